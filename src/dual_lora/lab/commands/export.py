"""dual-lora merge, dual-lora export"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from dual_lora.lab.commands.card import facts_card, figures_table, finish, size
from dual_lora.lab.commands.parameters import Base, Device, Dtype, Json
from dual_lora.lab.errors import UserError
from dual_lora.lab.model.location import check_source
from dual_lora.lab.progress import stage
from dual_lora.lab.recipe.schema import Precision

if TYPE_CHECKING:
    from dual_lora.lab.export.export import Exported
    from dual_lora.lab.export.gguf import GgufResult


def merge(
    source: Annotated[str, Parameter(help="Run folder or adapter folder.")],
    out: Annotated[Path, Parameter(help="Folder to write; it must be empty or not exist.")],
    *,
    base: Base = None,
    dtype: Annotated[
        Precision | None, Parameter(help="Precision of the merged weights. [default: the run's, else float32]")
    ] = None,
    device: Device = None,
    json: Json = False,
) -> None:
    """Merge an adapter into its base and write a plain model folder, which loads without this package.

    Example: `dual-lora merge runs/boolq-smollm2 merged --dtype bfloat16`
    """
    check_source(source)
    with stage(f"merging {source} into {out}"):
        from dual_lora.lab.export.export import merge as run_merge
        from dual_lora.lab.model.device import use_device

        use_device(device)
        result = run_merge(source, out, base=base, dtype=dtype)
    facts = {
        "folder": result.folder,
        "weights": f"{size(result.bytes)}, {result.dtype}",
        "load": f"{result.loads}.from_pretrained({result.folder!r})",
    }
    finish(vars(result), facts_card("merged", facts), json)


SHOWN = 10  # layers of a table: a model has hundreds
Target = Literal["merged", "gguf", "gguf-lora", "mlx-lora", "lora"]
TARGETS = "merged: plain model; gguf: the same for llama.cpp and Ollama; lora, gguf-lora, mlx-lora: a LoRA adapter."
# Which options belong to which target; the others are refused, so that none is silently without effect.
OPTIONS: dict[str, tuple[str, ...]] = {
    "merged": (),
    "gguf": ("outtype", "quantize", "converter"),
    "gguf-lora": ("rank", "energy", "data", "limit", "outtype", "converter"),
    "mlx-lora": ("rank", "energy", "data", "limit"),
    "lora": ("rank", "energy", "data", "limit"),
}


def export(
    source: Annotated[str, Parameter(help="Run folder or adapter folder.")],
    out: Annotated[Path, Parameter(help="Folder or .gguf file to write.")],
    *,
    to: Annotated[Target, Parameter(help=TARGETS)],
    rank: Annotated[int | None, Parameter(help="LoRA: rank of every layer.")] = None,
    energy: Annotated[float | None, Parameter(help="LoRA: share of every update to keep, e.g. 0.9.")] = None,
    data: Annotated[
        str | None, Parameter(help="Records on which to measure the loss. [default: the run's test set]")
    ] = None,
    limit: Annotated[
        int | None, Parameter(help="Largest number of these records; 0: measure no loss. [default: 200]")
    ] = None,
    outtype: Annotated[str | None, Parameter(help="gguf: f32, f16, bf16, q8_0 or auto. [default: auto]")] = None,
    quantize: Annotated[str | None, Parameter(help="gguf: a type of llama.cpp's llama-quantize, e.g. Q4_K_M.")] = None,
    converter: Annotated[str | None, Parameter(help="gguf: llama.cpp's folder or convert_hf_to_gguf.py.")] = None,
    base: Base = None,
    dtype: Dtype = None,
    device: Device = None,
    json: Json = False,
) -> None:
    """Write an adapter for other programs: merged, as GGUF or as LoRA.

    Example: `dual-lora export runs/mine served --to lora --energy 0.9`

    A LoRA keeps only a part of the update. The command shows how much is lost (of every layer with `--json`), and how
    that changes the loss on your records.
    """
    options: dict[str, Any] = {"rank": rank, "energy": energy, "data": data, "limit": limit}
    options |= {"outtype": outtype, "quantize": quantize, "converter": converter}
    options = {name: value for name, value in options.items() if value is not None}
    for name in options:
        if name not in OPTIONS[to]:
            raise UserError(f"--{name} has no meaning for --to {to}.")
    if "energy" in OPTIONS[to]:
        _check_kept(rank, energy)
    if to.startswith("gguf") and out.suffix != ".gguf":
        raise UserError(f"The output is {out}, expected a file name that ends in .gguf.")
    options |= {"base": base, "dtype": dtype}
    check_source(source)
    if to == "merged":
        return merge(source, out, device=device, json=json, **options)
    with stage(f"exporting {source} to {out} ({to})"):
        from dual_lora.lab.export import export as adapters
        from dual_lora.lab.export import gguf
        from dual_lora.lab.model.device import use_device

        use_device(device)
    if to == "gguf":
        result = gguf.export_gguf(source, out, **options)
        return finish(asdict(result), _gguf_card(result), json)
    convert: dict[str, Callable[..., Exported]] = {
        "lora": adapters.export_lora,
        "gguf-lora": gguf.export_gguf_lora,
        "mlx-lora": adapters.export_mlx_lora,
    }
    keep = options.pop("rank", None) if energy is None else float(options.pop("energy"))
    exported = convert[to](source, out, keep, **options)
    finish(asdict(exported), _card(exported), json)


def _check_kept(rank: int | None, energy: float | None) -> None:
    """Raise UserError unless one of the two says how much of the update a LoRA keeps, before a model is loaded."""
    if rank is None and energy is None:
        raise UserError("Say how much of the update to keep: --rank 64 for every layer, or --energy 0.9.")
    if rank is not None and energy is not None:
        raise UserError(
            f"Give --rank {rank} or --energy {energy:g}, not both: each says how much of the update to keep."
        )
    if rank is not None and rank < 1:
        raise UserError(f"--rank is {rank}, expected a whole number of at least 1.")
    if energy is not None and not 0 < energy <= 1:
        raise UserError(f"--energy is {energy:g}, expected a share above 0 and up to 1, e.g. 0.9.")


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

    worst = sorted(exported.layers, key=lambda layer: layer["error"], reverse=True)
    few = len(worst) <= SHOWN
    rows = [
        [layer["layer"], f"{layer['rank']}", f"{layer['error']:.2%}"]
        for layer in (exported.layers if few else worst[:SHOWN])
    ]
    middle, ranks = worst[len(worst) // 2]["error"], [layer["rank"] for layer in worst]
    facts = {
        "folder": exported.folder,
        "layers": f"{len(worst)} of rank {min(ranks)}"
        + (f" to {max(ranks)}" if max(ranks) > min(ranks) else "")
        + f"; the median one loses {middle:.1%} of its update, the worst {worst[0]['error']:.1%}",
        "size": f"{exported.parameters:,} numbers ({exported.parameters / exported.weights:.0%} of the weights)",
    }
    if exported.loss:
        facts["loss"] = " · ".join(f"{name} {value:.4f}" for name, value in exported.loss.items())
        facts["records"] = f"{exported.examples:,}"
    facts |= {"verdict": exported.verdict} | ({"instead": exported.advice} if exported.advice else {})
    title = "What every layer loses" if few else f"The {SHOWN} layers that lose most (--json lists all {len(worst)})"
    shown = figures_table(title, ["layer", "rank", "error"], rows)
    return Group(shown, facts_card("exported to LoRA", facts))
