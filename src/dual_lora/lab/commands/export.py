"""dual-lora export"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from dual_lora.lab.commands.card import facts_card, figures_table, finish, size
from dual_lora.lab.commands.parameters import Base, Dtype, Json
from dual_lora.lab.errors import UserError

if TYPE_CHECKING:
    from dual_lora.lab.model.export import Exported
    from dual_lora.lab.model.gguf import GgufResult

Target = Literal["merged", "gguf", "gguf-lora", "mlx-lora", "lora", "dual-lora"]
TARGETS = (
    "merged: plain model; gguf: the same for llama.cpp and Ollama; lora, gguf-lora, mlx-lora, dual-lora: an adapter."
)
# Which options belong to which target; the others are refused, so that none is silently without effect.
OPTIONS: dict[str, tuple[str, ...]] = {
    "merged": (),
    "gguf": ("outtype", "quantize", "converter"),
    "gguf-lora": ("rank", "energy", "data", "limit", "outtype", "converter"),
    "mlx-lora": ("rank", "energy", "data", "limit"),
    "lora": ("rank", "energy", "data", "limit"),
    "dual-lora": ("rank", "data", "limit"),
}


def export(
    source: Annotated[str, Parameter(help="Run folder or adapter folder.")],
    out: Annotated[Path, Parameter(help="What to write: a folder, or a .gguf file.")],
    *,
    to: Annotated[Target, Parameter(help=TARGETS)],
    rank: Annotated[int | None, Parameter(help="LoRA: rank of every layer; dual-lora: rank of the magnitude.")] = None,
    energy: Annotated[float | None, Parameter(help="LoRA: share of every update to keep, e.g. 0.9.")] = None,
    data: Annotated[str | None, Parameter(help="Records to measure the loss on. [default: the run's test set]")] = None,
    limit: Annotated[int | None, Parameter(help="At most so many records; 0: none. [default: 200]")] = None,
    outtype: Annotated[str | None, Parameter(help="gguf: f32, f16, bf16, q8_0 or auto. [default: auto]")] = None,
    quantize: Annotated[str | None, Parameter(help="gguf: a type of llama.cpp's llama-quantize, e.g. Q4_K_M.")] = None,
    converter: Annotated[str | None, Parameter(help="gguf: llama.cpp's folder or convert_hf_to_gguf.py.")] = None,
    base: Base = None,
    dtype: Dtype = None,
    json: Json = False,
) -> None:
    """Write an adapter for other programs: merged, as GGUF or as LoRA; or a LoRA as the start of a Dual LoRA.

    Example: `dual-lora export runs/boolq-smollm2 served --to lora --energy 0.9 --data my-records.jsonl`

    A LoRA holds a part of the update: every layer's loss is shown, and what it does to the loss on your records.
    """
    given = {"rank": rank, "energy": energy, "data": data, "limit": limit}
    given |= {"outtype": outtype, "quantize": quantize, "converter": converter}
    for name, value in given.items():
        if value is not None and name not in OPTIONS[to]:
            raise UserError(f"--{name} has no meaning for --to {to}.")
    shared: dict[str, Any] = {"base": base, "dtype": dtype}
    keep: Any = rank if energy is None else float(energy)
    if to == "merged":
        from dual_lora.lab.commands.merge import merge

        merge(source, out, json=json, **shared)
    elif to == "gguf":
        from dual_lora.lab.model.gguf import export_gguf

        made = {"outtype": outtype or "auto", "quantize": quantize, "converter": converter}
        result = export_gguf(source, out, **made, **shared)  # type: ignore[arg-type]
        finish(asdict(result), _gguf_card(result), json)
    else:
        from dual_lora.lab.model.export import export_dual_lora, export_lora

        shared |= {"data": data, "limit": 200 if limit is None else limit}
        if to == "dual-lora":
            exported = export_dual_lora(source, out, rank, **shared)
        elif (rank is None) == (energy is None):
            raise UserError("Say how much of the update to keep: --rank 64 for every layer, or --energy 0.9.")
        elif to == "gguf-lora":
            from dual_lora.lab.model.gguf import export_gguf_lora

            shared |= {"outtype": outtype or "f32", "converter": converter}
            exported = export_gguf_lora(source, out, keep, **shared)
        elif to == "mlx-lora":
            from dual_lora.lab.model.export import export_mlx_lora

            exported = export_mlx_lora(source, out, keep, **shared)
        else:
            exported = export_lora(source, out, keep, **shared)
        finish(asdict(exported), _card(exported), json)


def _gguf_card(result: GgufResult) -> Any:
    facts = {
        "file": result.file,
        "size": f"{size(result.bytes)}, {result.tensors} tensors",
        "run": f'llama-cli -m {quote(result.file)} -p "…"',
    }
    if result.modelfile:
        facts["Ollama"] = f"ollama create NAME -f {quote(result.modelfile)}"
    return facts_card("GGUF", facts | ({"Ollama": result.remark} if result.remark else {}))


def _card(exported: Exported) -> Any:
    from rich.console import Group

    columns = ["rank", "error"] if exported.method == "lora" else ["r1", "r2", "cosine", "signs"]
    rows = [[layer["layer"], *(_figure(layer[name]) for name in columns)] for layer in exported.layers]
    facts = {
        "folder": exported.folder,
        "size": f"{exported.parameters:,} numbers ({exported.parameters / exported.weights:.0%} of the weights)",
    }
    if exported.loss:
        facts["loss"] = " · ".join(f"{name} {value:.4f}" for name, value in exported.loss.items())
        facts["records"] = f"{exported.examples:,}"
    facts |= {"verdict": exported.verdict} | ({"instead": exported.advice} if exported.advice else {})
    title = "What every layer loses" if exported.method == "lora" else "What every layer keeps of the LoRA"
    return Group(figures_table(title, ["layer", *columns], rows), facts_card(f"exported to {exported.method}", facts))


def _figure(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.2%}"
