"""What each method can do in the installed PEFT, found out by trying: `python conformance/capabilities.py`.

Every row is tried on a tiny model. "yes" means that it worked and did what it says: the adapter had an effect, and the
numbers were right. "–" means that it raised, was silently ignored, or gave other numbers; `--why` prints which.
"?" means that a library is missing. `--write` keeps the table for `dual-lora info`.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import warnings
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Make = Callable[..., Any]  # options -> configuration
IDS = torch.arange(12).view(3, 4)
KEPT = Path(__file__).parents[1] / "src/dual_lora/lab/capabilities.json"


class Method(NamedTuple):
    """A method as a column of the table; `make(**options)` gives a configuration whose adapter has an effect."""

    name: str
    make: Make


class Answer(NamedTuple):
    """Whether a capability is there ("yes", "–" or "?"), and why not."""

    mark: str
    reason: str = ""


def methods() -> list[Method]:
    """LoRA, DoRA, HiRA and Dual LoRA."""
    from peft import HiraConfig, LoraConfig

    from dual_lora import DualLoraConfig

    return [
        Method("LoRA", lambda **o: LoraConfig(**{"r": 4, "init_lora_weights": False, **o})),
        Method("DoRA", lambda **o: LoraConfig(**{"r": 4, "init_lora_weights": False, "use_dora": True, **o})),
        Method("HiRA", lambda **o: HiraConfig(**{"r": 4, "init_weights": False, **o})),
        Method("Dual LoRA", lambda **o: DualLoraConfig(**{"r": 4, "init_weights": False, **o})),
    ]


PROBES: dict[str, Callable[[Make], None]] = {}


def probe(row: str) -> Callable[[Callable[[Make], None]], Callable[[Make], None]]:
    """Register a function that raises unless the capability is there."""

    def register(function: Callable[[Make], None]) -> Callable[[Make], None]:
        PROBES[row] = function
        return function

    return register


def table(chosen: list[Method] | None = None) -> dict[str, dict[str, Answer]]:
    """{row: {method: answer}}, by trying everything."""
    return {
        row: {method.name: _try(function, method.make) for method in chosen or methods()}
        for row, function in PROBES.items()
    }


def _try(function: Callable[[Make], None], make: Make) -> Answer:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        try:
            function(make)
        except ImportError as error:
            return Answer("?", str(error))
        except Exception as error:
            return Answer("–", f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}")
    return Answer("yes")


# Tiny models and the checks that rows share.


class Small(nn.Module):
    """One layer, called "it", between an optional cast and nothing."""

    def __init__(self, it: nn.Module):
        super().__init__()
        self.it = it

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.it, nn.MultiheadAttention) or hasattr(self.it, "num_heads"):
            return self.it(x, x[..., : self.it.kdim], x[..., : self.it.vdim])[0]
        return self.it(x)


def llama(**options: Any) -> Any:
    """A Llama of some thousand parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64
    )
    model = LlamaForCausalLM(LlamaConfig(**{**sizes, "num_key_value_heads": 2, **options}))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.2)
    return model.eval()


def adapted(base: nn.Module, config: Any, name: str = "default") -> Any:
    """A PEFT model in eval mode over a copy of the base."""
    from peft import get_peft_model

    return get_peft_model(copy.deepcopy(base), config, adapter_name=name).eval()


def logits(model: Any, **kwargs: Any) -> Tensor:
    """Output for the fixed ids, without gradients."""
    with torch.no_grad():
        return model(IDS, **kwargs).logits


def need(condition: bool, otherwise: str) -> None:
    """Fail the probe, with a reason."""
    if not condition:
        raise ValueError(otherwise)


def close(left: Tensor, right: Tensor, tolerance: float = 1e-3) -> bool:
    """Equal up to rounding."""
    return bool(torch.allclose(left.float(), right.float(), atol=tolerance, rtol=tolerance))


def works_on(base: nn.Module, x: Tensor, config: Any, merges: bool = True) -> None:
    """The adapter changes the output, trains, and merges to the same output."""
    from peft import get_peft_model

    holder = Small(base).eval()
    untouched = holder(x).detach()
    model: Any = get_peft_model(holder, config).eval()
    y = model(x)
    need(not close(y, untouched, 1e-5), "the adapter has no effect")
    y.float().sum().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    need(bool(trained) and all(p.grad is not None for p in trained), "an adapter weight gets no gradient")
    if merges:
        with torch.no_grad():
            expected = model(x)
            need(close(model.merge_and_unload()(x), expected), "the merged layer computes something else")


# Layers.


@probe("nn.Linear")
def _(make: Make) -> None:
    works_on(nn.Linear(6, 8), torch.randn(3, 6), make(target_modules=["it"]))


@probe("Conv1D (GPT-2)")
def _(make: Make) -> None:
    from transformers.pytorch_utils import Conv1D

    works_on(Conv1D(8, 6), torch.randn(3, 6), make(target_modules=["it"]))


@probe("nn.Embedding")
def _(make: Make) -> None:
    works_on(nn.Embedding(20, 6), IDS, make(target_modules=["it"]))


@probe("nn.Conv1d")
def _(make: Make) -> None:
    works_on(nn.Conv1d(4, 6, 3), torch.randn(2, 4, 9), make(target_modules=["it"]))


@probe("nn.Conv2d")
def _(make: Make) -> None:
    works_on(nn.Conv2d(4, 6, 3), torch.randn(2, 4, 7, 7), make(target_modules=["it"]))


@probe("nn.Conv2d, groups")
def _(make: Make) -> None:
    works_on(nn.Conv2d(4, 6, 3, groups=2), torch.randn(2, 4, 7, 7), make(target_modules=["it"]))


@probe("nn.Conv3d")
def _(make: Make) -> None:
    works_on(nn.Conv3d(4, 6, 2), torch.randn(2, 4, 5, 5, 5), make(target_modules=["it"]))


@probe("MultiheadAttention, packed")
def _(make: Make) -> None:
    works_on(nn.MultiheadAttention(8, 2, batch_first=True), torch.randn(2, 5, 8), make(target_modules=["it"]))


@probe("MultiheadAttention, separate")
def _(make: Make) -> None:
    attention = nn.MultiheadAttention(8, 2, batch_first=True, kdim=5, vdim=6)
    works_on(attention, torch.randn(2, 5, 8), make(target_modules=["it"]))


@probe("MoE experts (target_parameters)")
def _(make: Make) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes: dict[str, Any] = dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, vocab_size=64
    )
    base = MixtralForCausalLM(MixtralConfig(**sizes, num_key_value_heads=2, num_local_experts=4)).eval()
    model = adapted(base, make(target_modules=[], target_parameters=["mlp.experts.down_proj"]))
    need(not close(logits(model), logits(base), 1e-6), "the adapter has no effect")


# Quantised bases.


def _quantised(base: nn.Module, make: Make) -> None:
    works_on(base.requires_grad_(False), torch.randn(3, 64), make(target_modules=["it"]), merges=False)


def _bitsandbytes(four_bit: bool) -> nn.Module:
    import bitsandbytes as bnb

    W = nn.Linear(64, 64).weight.data
    layer: Any
    if four_bit:
        layer = bnb.nn.Linear4bit(64, 64, quant_type="nf4", compute_dtype=torch.float32)
        layer.weight = bnb.nn.Params4bit(W, requires_grad=False, quant_type="nf4")
    else:
        layer = bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False)
        layer.weight = bnb.nn.Int8Params(W, requires_grad=False, has_fp16_weights=False)
    return layer.to("cpu")


@probe("bitsandbytes 4 bit")
def _(make: Make) -> None:
    _quantised(_bitsandbytes(four_bit=True), make)


@probe("bitsandbytes 8 bit")
def _(make: Make) -> None:
    _quantised(_bitsandbytes(four_bit=False), make)


@probe("HQQ")
def _(make: Make) -> None:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    config = BaseQuantizeConfig(nbits=4, group_size=64)
    _quantised(HQQLinear(nn.Linear(64, 64), config, compute_dtype=torch.float32, device="cpu"), make)


@probe("torchao int8")
def _(make: Make) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = nn.Sequential(nn.Linear(64, 64))
    quantize_(model, Int8WeightOnlyConfig())
    _quantised(model[0], make)


# Merging.


@probe("merge = forward")
def _(make: Make) -> None:
    model = adapted(llama(), make(target_modules=["q_proj", "down_proj"]))
    before = logits(model)
    model.merge_adapter()
    need(close(logits(model), before), "the merged model computes something else")


@probe("unmerge exact, 100 times in bf16")
def _(make: Make) -> None:
    model = adapted(Small(nn.Linear(16, 16).bfloat16()), make(target_modules=["it"]))
    weight = model.base_model.model.it.base_layer.weight
    before = weight.detach().clone()
    for _ in range(100):
        model.merge_adapter()
        model.unmerge_adapter()
    drift = (model.base_model.model.it.base_layer.weight - before).abs().mean() / before.abs().mean()
    need(bool(drift == 0), f"the base weight has drifted by {float(drift):.1%}")


@probe("safe_merge leaves a base untouched")
def _(make: Make) -> None:
    model = adapted(Small(nn.Linear(16, 16)), make(target_modules=["it"]))
    before = model.base_model.model.it.base_layer.weight.detach().clone()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "bias" not in name:
            parameter.data.fill_(float("nan"))
    try:
        model.merge_adapter(safe_merge=True)
    except ValueError:
        need(torch.equal(model.base_model.model.it.base_layer.weight, before), "the base has changed")
        return
    raise ValueError("a broken adapter was merged")


# Adapters.


def _two(make: Make, **options: Any) -> Any:
    model = adapted(llama(), make(target_modules=["q_proj"]), "one")
    model.add_adapter("two", make(target_modules=["q_proj"], **options))
    return model.eval()


@probe("several active adapters")
def _(make: Make) -> None:
    model = _two(make)
    alone = logits(model)
    model.base_model.set_adapter(["one", "two"])
    both = logits(model)
    need(not close(both, alone, 1e-5), "the second adapter has no effect")
    model.merge_adapter()
    need(close(logits(model), both), "merged together they compute something else")


@probe("mixed batch (adapter_names)")
def _(make: Make) -> None:
    model = _two(make)
    names = ["two", "__base__", "one"]
    mixed = logits(model, adapter_names=names)
    for row, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                alone = logits(model)
        else:
            model.set_adapter(name)
            alone = logits(model)
        need(close(mixed[row], alone[row]), f"row {row} is not that of {name!r}: the names were ignored")


@probe("add_weighted_adapter, one at a strength")
def _(make: Make) -> None:
    model = _two(make)
    model.add_weighted_adapter(["one"], [1.0], "new")
    expected = logits(model)
    model.set_adapter("new")
    need(close(logits(model), expected), "at strength 1 it computes something else")


@probe("add_weighted_adapter, a sum in one")
def _(make: Make) -> None:
    model = _two(make)
    model.base_model.set_adapter(["one", "two"])
    expected = logits(model)
    model.add_weighted_adapter(["one", "two"], [1.0, 1.0], "new", combination_type="cat")
    model.set_adapter("new")
    need(close(logits(model), expected), "the sum computes something else")


@probe("rank_pattern and alpha_pattern")
def _(make: Make) -> None:
    def size(**options: Any) -> int:
        model = adapted(llama(), make(target_modules=["q_proj"], **options))
        return sum(p.numel() for p in model.parameters() if p.requires_grad)

    need(size(rank_pattern={"q_proj": 8}) > size(), "the rank has not changed")
    need(size(lora_alpha=16, alpha_pattern={"q_proj": 8}) == size(), "α has changed the size")


@probe("layers_to_transform")
def _(make: Make) -> None:
    model = adapted(llama(), make(target_modules=["q_proj"], layers_to_transform=0))
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    need(bool(names) and all(".layers.0." in name for name in names), "other layers are adapted as well")


@probe("exclude_modules")
def _(make: Make) -> None:
    model = adapted(llama(), make(target_modules=["q_proj", "k_proj"], exclude_modules=["k_proj"]))
    need(not any("k_proj" in name for name, p in model.named_parameters() if p.requires_grad), "k_proj is adapted")


@probe("modules_to_save")
def _(make: Make) -> None:
    model = adapted(llama(), make(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    need(any("lm_head" in name for name, p in model.named_parameters() if p.requires_grad), "lm_head does not train")


@probe("trainable_token_indices")
def _(make: Make) -> None:
    model = adapted(llama(), make(target_modules=["q_proj"], trainable_token_indices=[1, 2]))
    need(any("trainable_tokens" in name for name, p in model.named_parameters() if p.requires_grad), "no token trains")


@probe("tied embeddings (ensure_weight_tying)")
def _(make: Make) -> None:
    base = llama(tie_word_embeddings=True)
    model = adapted(base, make(target_modules=["embed_tokens"], ensure_weight_tying=True))
    before = logits(model)
    need(hasattr(model.base_model.model.lm_head, "base_layer"), "the tied head is not adapted")
    need(close(logits(model.merge_and_unload()), before), "the merged model computes something else")


@probe("hot-swap")
def _(make: Make) -> None:
    from peft import PeftModel
    from peft.utils.hotswap import hotswap_adapter

    with tempfile.TemporaryDirectory() as folder:
        expected = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            config = make(target_modules=["q_proj"])
            base = llama()
            torch.manual_seed(seed)
            model = adapted(base, config)
            model.save_pretrained(f"{folder}/{seed}")
            expected.append(logits(model))
        model = PeftModel.from_pretrained(llama(), f"{folder}/1").eval()
        hotswap_adapter(model, f"{folder}/2", adapter_name="default", torch_device="cpu")
        need(close(logits(model), expected[1]), "the swapped adapter computes something else")


@probe("layer replication")
def _(make: Make) -> None:
    model = adapted(llama(), make(target_modules=["q_proj"], layer_replication=[(0, 2), (0, 2)]))
    need(len(model.base_model.model.model.layers) == 4, "no layer was replicated")
    logits(model)


@probe("save and load, bit-exact")
def _(make: Make) -> None:
    from peft import PeftModel

    with tempfile.TemporaryDirectory() as folder:
        model = adapted(llama(), make(target_modules=["q_proj", "down_proj"]))
        model.save_pretrained(folder)
        loaded = PeftModel.from_pretrained(llama(), folder, low_cpu_mem_usage=True).eval()
        need(torch.equal(logits(loaded), logits(model)), "the loaded adapter computes something else")


@probe("torch.compile, one graph")
def _(make: Make) -> None:
    model = adapted(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), make(target_modules=["0", "2"]))
    x = torch.randn(3, 8)
    torch._dynamo.reset()
    compiled = torch.compile(model.base_model.model, backend="aot_eager", fullgraph=True)
    need(close(compiled(x), model(x)), "the compiled model computes something else")


@probe("convert_to_lora, right at full rank")
def _(make: Make) -> None:
    from peft import convert_to_lora, get_peft_model, set_peft_model_state_dict

    base = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    model = adapted(base, make(target_modules=["0", "2"]))
    for parameter in model.parameters():  # as after some training
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    config, state_dict = convert_to_lora(model, rank=8)
    lora = get_peft_model(copy.deepcopy(base), config).eval()
    set_peft_model_state_dict(lora, state_dict)
    x = torch.randn(3, 8)
    error = (lora(x) - model(x)).norm() / model(x).norm()
    need(bool(error < 1e-3), f"the outputs differ by {float(error):.0%}")


def main(arguments: list[str] | None = None) -> None:
    """Try everything and print the table; with --why the reasons."""
    parser = argparse.ArgumentParser(prog="python conformance/capabilities.py", description=main.__doc__)
    parser.add_argument("--why", action="store_true", help="print why something is not there")
    parser.add_argument("--write", action="store_true", help=f"keep the table in {KEPT.name}")
    options = parser.parse_args(arguments)
    found = table()
    names = [method.name for method in methods()]
    width = max(map(len, found))
    print(f"{'capability':<{width}}  " + "  ".join(f"{name:^9}" for name in names))
    for row, answers in found.items():
        print(f"{row:<{width}}  " + "  ".join(f"{answers[name].mark:^9}" for name in names))
        for name in names if options.why else ():
            if answers[name].reason:
                print(f"    {name}: {answers[name].reason}")
    if options.write:
        versions = {name: metadata.version(name).split("+")[0] for name in ("torch", "transformers", "peft")}
        KEPT.write_text(json.dumps({"versions": versions, "table": found}, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
