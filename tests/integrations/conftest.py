"""A language model and an encoder of some ten thousand weights, and what every example has to show."""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

EXAMPLES = Path(__file__).parents[2] / "examples"
CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture
def example():
    """Function: name of an example → its module."""

    def load(name):
        spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture
def healthy():
    """Function: asserts that a model's factors are fp32, that each has had a gradient, and that λ has this value."""
    from tiny import factor, layers

    had_gradient = {}

    def look(optimizer, args, kwargs):
        for group in optimizer.param_groups:
            had_gradient.update({id(p): p for p in group["params"] if p.grad is not None and p.grad.any()})

    hook = register_optimizer_step_post_hook(look)

    def check(model, warmth=1.0):
        assert factor(model) == pytest.approx(warmth)
        assert layers(model)
        for name, layer in layers(model).items():
            for letter, tensor in zip("ABCD", layer.factors("default"), strict=True):
                assert tensor.dtype == torch.float32, f"{name} {letter}"
                assert id(tensor) in had_gradient, f"{name} {letter} never had a gradient"
        trained = {n for n, p in model.named_parameters() if id(p) in had_gradient}
        assert all(".dual_lora_" in name for name in trained), "more than the factors was trained"

    yield check
    hook.remove()


@pytest.fixture(scope="session")
def tiny_lm(tmp_path_factory):
    """Folder of a language model with two layers, whose tokenizer knows the tool calls' words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from dual_lora.lab.data import tool_calls

    folder = tmp_path_factory.mktemp("tiny-lm")
    words = Tokenizer(models.BPE())
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<pad>", "</s>", "<|system|>", "<|user|>", "<|assistant|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words.train_from_iterator(
        [f"{request['content']} {call['content']}" for _, request, call in tool_calls.chats("train", 200)], trainer
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>")
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=512, pad_token_id=0, eos_token_id=1, initializer_range=0.1,
        )
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory, tiny_lm):
    """Folder of a sentence encoder with two layers, and mean pooling as sentence-transformers adds it."""
    from transformers import AutoTokenizer, BertConfig, BertModel

    folder = tmp_path_factory.mktemp("tiny-encoder")
    tokenizer = AutoTokenizer.from_pretrained(tiny_lm)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    BertModel(
        BertConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=128, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture
def loads_as():
    """Function: asserts that the saved adapter gives the trained model's logits."""

    def check(folder, model):
        from peft import AutoPeftModelForCausalLM

        tokens = torch.arange(20, 50)[None]
        loaded = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=model.dtype)
        with torch.no_grad():
            expected, base = model.eval()(tokens).logits, model.get_base_model()
            with model.disable_adapter():
                plain = base(tokens).logits
            assert torch.equal(loaded(tokens).logits, expected)
        assert not torch.equal(expected, plain)

    return check
