"""GPTQ and AWQ bases, quantised and run on a CPU by gptqmodel; skipped where it is not installed.

It is no part of the development environment: `pip install gptqmodel optimum`, and GPTQMODEL_CPU_WORKERS=2 on two cores.
"""

import pytest
import torch
from peft import get_peft_model
from tiny import layers, words
from torch.nn.functional import linear
from transformers import LlamaConfig, LlamaForCausalLM

from dual_lora import DualLoraConfig

gptqmodel = pytest.importorskip("gptqmodel")
pytestmark = pytest.mark.slow
TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture(scope="module", params=["gptq", "awq"])
def checkpoint(request, tmp_path_factory):
    """Folder of a tiny Llama in 4 bits, and the kind of its quantisation."""
    from gptqmodel.quantization import AWQConfig

    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    sizes = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4)
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=64)).half().save_pretrained(folder / "plain")
    words().save_pretrained(folder / "plain")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # it writes its log where it is
        how = (gptqmodel.QuantizeConfig if request.param == "gptq" else AWQConfig)(bits=4, group_size=32)
        model = gptqmodel.GPTQModel.load(str(folder / "plain"), how, device="cpu")
        texts = torch.randint(3, 60, (16, 200)).tolist()
        model.quantize([{"input_ids": text, "attention_mask": [1] * 200} for text in texts], batch_size=4)
        model.save(str(folder / "quantised"))
    return folder / "quantised", request.param


def opened(checkpoint, backend, dtype, **options):
    """The quantised model with an adapter, and its adapted layers."""
    from transformers import AutoModelForCausalLM, AwqConfig, GPTQConfig

    folder, kind = checkpoint
    how = (GPTQConfig if kind == "gptq" else AwqConfig)(bits=4, group_size=32, backend=backend)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=how)
    torch.manual_seed(0)
    config = DualLoraConfig.paper(r=8, target_modules=TARGETS, warmup_steps=0, task_type="CAUSAL_LM", **options)
    model = get_peft_model(base, config)
    return model, list(layers(model).values())


def test_value_gradients_and_what_is_refused(checkpoint):
    plain = {"gptq": "gptq_torch", "awq": "torch_awq"}[checkpoint[1]]
    model, adapted = opened(checkpoint, plain, torch.float32, init_weights=False)
    model.train()
    assert len(adapted) == 6
    for layer in adapted:
        base = layer.get_base_layer()
        W = base(torch.eye(base.in_features)).detach().T + layer.get_delta_weight("default")
        x = torch.randn(3, 5, base.in_features, requires_grad=True)
        y = layer(x)
        torch.testing.assert_close(y, linear(x, W), atol=1e-3 * float(y.detach().abs().max()), rtol=0)
        g = torch.randn_like(y)
        (dx,) = torch.autograd.grad(y, x, g)
        torch.testing.assert_close(dx, g @ W, atol=1e-3 * float(dx.abs().max()), rtol=0)
    with pytest.raises(ValueError, match=r"Cannot merge Dual LoRA into a (gptq|awq) layer"):
        model.merge_adapter()


def test_training_lowers_the_loss_and_the_adapter_loads_again(checkpoint, tmp_path):
    from peft import AutoPeftModelForCausalLM

    model, _ = opened(checkpoint, "auto_trainable", torch.float32)
    ids = torch.randint(3, 40, (2, 16))
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _ in range(15):
        loss = model.train()(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0] - 0.5, losses
    model.save_pretrained(tmp_path)
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        expected = model.eval()(input_ids=ids).logits
        torch.testing.assert_close(
            again(input_ids=ids).logits, expected, atol=3e-2 * float(expected.abs().max()), rtol=0
        )


def test_a_kernel_that_stops_gradients_in_silence_is_an_error(checkpoint):
    """Evaluated in 16 bits before the first step, gptqmodel's kernels compute without gradients from then on."""
    model, _ = opened(checkpoint, "auto_trainable", torch.bfloat16)
    ids = torch.randint(3, 40, (2, 16))
    with torch.no_grad():
        model.eval()(input_ids=ids)
    with pytest.raises(RuntimeError, match=r"passes no gradient to its input.*gptq_torch"):
        model.train()(input_ids=ids, labels=ids)
