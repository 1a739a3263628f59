"""Models of a few thousand parameters, and what tests do with them."""

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    Qwen3MoeConfig,
)

from dual_lora import DualLoraConfig, DualLoraLayer
from dual_lora.method.parallel import deepspeed

VOCABULARY = 60

ONE_GRAPH = pytest.mark.skipif(
    torch.__version__ < "2.7", reason="torch 2.6 cannot trace PEFT's own context manager in one graph"
)
GROUPED = pytest.mark.skipif(torch.__version__ < "2.9", reason="transformers wants torch 2.9 for grouped_mm")


def llama(hidden_size=32, layers=2, **options):
    torch.manual_seed(0)
    options = dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64) | options
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=hidden_size,
            intermediate_size=48,
            num_hidden_layers=layers,
            vocab_size=VOCABULARY,
            attention_dropout=0.0,
            **options,
        )
    )


def words():
    """A tokenizer of sixty words."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<unk>": 0, "<pad>": 1, "</s>": 2, **{f"w{k}": k for k in range(3, 60)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token="</s>")


def gpt2(layers=2):
    torch.manual_seed(0)
    dropout = dict(resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    config = GPT2Config(n_embd=32, n_layer=layers, n_head=4, vocab_size=VOCABULARY, n_positions=64, **dropout)
    return GPT2LMHeadModel(config)


def bert(layers=2):
    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=layers,
            num_attention_heads=4,
            vocab_size=VOCABULARY,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            num_labels=3,
        )
    )


MODELS = {"llama": llama, "gpt2": gpt2, "bert": bert}
TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"], "bert": ["query", "value"]}

MIXTURE = dict(
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=48,
    num_experts_per_tok=2,
)
MIXTURES = {
    "mixtral": lambda: MixtralConfig(**MIXTURE, num_local_experts=6),
    "qwen3": lambda: Qwen3MoeConfig(**MIXTURE, num_experts=6, moe_intermediate_size=40, head_dim=8),
    "gpt-oss": lambda: GptOssConfig(**MIXTURE, num_local_experts=6, head_dim=8, layer_types=["full_attention"]),
}
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def mixture(layout, implementation="eager"):
    """A language model of one layer with six experts, whose tensors `EXPERTS` names."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MIXTURES[layout]())
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.2)
    model.set_experts_implementation(implementation)
    return model.eval()


class Mlp(nn.Module):
    """Two linear layers."""

    def __init__(self, width=16):
        super().__init__()
        self.first, self.second = nn.Linear(12, width), nn.Linear(width, 5)

    def forward(self, x):
        return self.second(self.first(x).tanh())


class Counted(nn.Module):
    """A classifier whose head keeps a count and a mask, which are saved with it."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(12, 8), nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 2))
        self.head.register_buffer("mask", torch.tensor([True, False]))

    def forward(self, x):
        return self.head(self.body(x)) * self.head.mask


def adapted(base=None, adapter_name="default", **options):
    """A model with an adapter that is at full strength unless the options say otherwise."""
    if base is None:
        torch.manual_seed(0)
        base = Mlp()
        options = dict(target_modules=["first", "second"]) | options
    if "init_weights" not in options:  # the paper's: another start than its own would show nothing of the adapter
        options = dict(init_weights="paper", warmup_steps=0) | options
    options = dict(r=4) | options
    return get_peft_model(base, DualLoraConfig(**options), adapter_name=adapter_name)


def layers(model):
    """The adapted layers by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, DualLoraLayer)}


def layer(model):
    """The first adapted layer."""
    return next(iter(layers(model).values()))


def factor(lambda_of, adapter="default"):
    """λ, the same in every layer of a model."""
    (value,) = {float(m.warmup_factor(adapter)) for m in layers(lambda_of).values() if adapter in m.scaling}
    for m in layers(lambda_of).values():
        if adapter in m.scaling:
            # What forward uses is a tensor, derived from the count.
            assert m.adapter(adapter).scale.item() == pytest.approx(value * m.strength(adapter), rel=1e-6)
    return value


def tokens(batch=3, length=7):
    generator = torch.Generator().manual_seed(5)
    return torch.randint(0, VOCABULARY, (batch, length), generator=generator)


def logits(model, ids=None):
    with torch.no_grad():
        return model(input_ids=tokens() if ids is None else ids).logits


def points(rows=6):
    return torch.randn(rows, 12, generator=torch.Generator().manual_seed(3))


def state(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def changed(model, before):
    """Names of the entries that differ from an earlier `state`."""
    after = model.state_dict()
    assert after.keys() == before.keys()
    return {name for name in after if not torch.equal(after[name], before[name])}


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


def train(model, steps=3, lr=1e-2, optimizer=None, x=None, loss=None):
    """A plain loop on the Mlp, or with loss() on anything."""
    optimizer = optimizer or torch.optim.AdamW(trainable(model), lr=lr)
    loss = loss or (lambda: model(points() if x is None else x).square().mean())
    for _ in range(steps):
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def engine(model, optimizer):
    """What DeepSpeed's engine does around a model in fp16, with this package's changes: `applied` says if a step is."""

    class Engine:
        def __init__(self):
            self.module, self.optimizer, self.applied = model, optimizer, True
            optimizer.cur_scale = 1024.0

        def fp16_enabled(self):
            return True

        def zero_optimization_stage(self):
            return 1

        def was_step_applied(self):
            return self.applied

        def backward(self, loss):
            (optimizer.cur_scale * loss).backward()

        def _take_model_step(self):
            if self.applied:
                optimizer.step()
            model.zero_grad()

    deepspeed.wrap(Engine)
    return Engine()
