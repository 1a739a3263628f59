"""dual-lora estimate"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter
from rich.console import Group
from rich.table import Table

from dual_lora.lab.commands.card import duration, figures_table, finish, size
from dual_lora.lab.commands.parameters import Json
from dual_lora.lab.errors import UserError, suggest
from dual_lora.lab.recipe.schema import Quantize, normalised_name

if TYPE_CHECKING:
    from collections.abc import Callable

    from dual_lora.lab.cost.lengths import Lengths
    from dual_lora.lab.cost.options import StepOptions
    from dual_lora.lab.cost.side_by_side import Column


OF_A_PROCESS = (
    "Memory is that of the model and of a step. On a CPU `dual-lora train` reports the whole process, with Python, the "
    "libraries (some 0.4 GB) and freed memory that it keeps."
)


def estimate(
    what: Annotated[
        str | None,
        Parameter(help="Recipe (file or shipped name), model folder, package:NAME, or a name from --models."),
    ] = None,
    *,
    methods: Annotated[
        list[str] | None,
        Parameter(help="Methods to compare. [default: dual_lora lora dora full]", consume_multiple=True),
    ] = None,
    rank: Annotated[int | None, Parameter(help="Total rank, the same for all methods.")] = None,
    target_modules: Annotated[
        str | None,
        Parameter(help="Names separated by commas, or all-linear. [default: all-linear]"),
    ] = None,
    batch: Annotated[int | None, Parameter(name="--batch-size", help="Rows per device and forward pass.")] = None,
    length: Annotated[int | None, Parameter(name="--max-length", help="Tokens of a row, padding included.")] = None,
    logits: Annotated[
        int | None,
        Parameter(help="Number of last positions to compute logits for, if only answers count. [default: all]"),
    ] = None,
    dtype: Annotated[Literal["float32", "bfloat16", "float16"] | None, Parameter(help="Precision of the base.")] = None,
    quantisation: Annotated[
        Quantize | None,
        Parameter(
            name="--quantize",
            help="Quantisation of the base, as model.quantize. [default: the recipe's, or none]",
        ),
    ] = None,
    checkpointing: Annotated[
        bool | None,
        Parameter(
            name="--gradient-checkpointing",
            help="Recompute activations in backward.",
            negative="--no-gradient-checkpointing",
        ),
    ] = None,
    optimizer: Annotated[
        Literal["adamw", "adamw_8bit", "lion", "sgd", "momentum", "adafactor"] | None,
        Parameter(help="Optimizer, for the memory of its state. [default: the recipe's, or adamw]"),
    ] = None,
    accumulate: Annotated[int | None, Parameter(help="Forward passes per optimizer step.")] = None,
    head: Annotated[Literal["causal", "classification"] | None, Parameter(help="Head of the model.")] = None,
    classes: Annotated[
        int | None, Parameter(help="Classes of a classification head. [default: those of the recipe's records, or 2]")
    ] = None,
    devices: Annotated[int, Parameter(help="Show 1, 2, 4 … devices, up to this number.")] = 1,
    strategy: Annotated[
        Literal["ddp", "fsdp2", "zero1", "zero2", "zero3"], Parameter(help="How many devices share the work.")
    ] = "ddp",
    on: Annotated[Literal["cpu", "gpu"] | None, Parameter(help="Kind of device. [default: this machine's]")] = None,
    fits: Annotated[
        str | None,
        Parameter(help="Memory of a device, e.g. 24GB: propose the largest batch, length and rank that fit."),
    ] = None,
    calibrate: Annotated[
        bool, Parameter(help="Measure this machine's speed first (a minute), and keep it for later.")
    ] = False,
    models: Annotated[bool, Parameter(help="List the built-in models.")] = False,
    json: Json = False,
) -> None:
    """Estimate memory, arithmetic and time of a training step, without weights and without a device.

    Example: `dual-lora estimate llama-3-8b --max-length 2048 --on gpu`

    Devices: `dual-lora estimate llama-3-8b --devices 8 --strategy fsdp2 --on gpu`

    What fits: `dual-lora estimate qwen3-4b --fits 24GB --on gpu`

    Your recipe: `dual-lora estimate boolq-smollm2`
    """
    if models:
        _list_models(json)
        return
    if what is None and not calibrate:
        raise UserError("Say what to estimate: a recipe, a model folder, or a built-in model (--models lists them).")
    from dual_lora.lab.cost import calibrate as speed
    from dual_lora.lab.cost.side_by_side import largest, parse_size, side_by_side
    from dual_lora.lab.progress import Working, lines

    doing = f"estimating {what}" if what else "measuring the speed of this machine"
    with Working(doing) as working, lines(lambda: doing):

        def say(text: str) -> None:
            nonlocal doing
            doing = text
            working.say(text)

        rates = speed.calibrate(lambda text: say(f"calibrating: {text}")) if calibrate else speed.known_rates()
        if what is None:
            finish({"machine": speed.machine(), **(rates or {})}, _rates_table(speed.machine(), rates or {}), json)
            return
        given = {
            "batch": batch, "length": length, "logits": logits, "dtype": dtype, "checkpointing": checkpointing,
            "optimizer": optimizer, "accumulate": accumulate, "head": head, "classes": classes,
            "quantisation": quantisation, "on": on or speed.this_device(),
        }  # fmt: skip
        options, rows = _options(what, {k: v for k, v in given.items() if v is not None}, say)
        limit = parse_size(fits) if fits else 0.0  # before it takes a minute
        steps = [_with_method(options, name, rank, target_modules) for name in _chosen(methods, options)]
        columns, refused = side_by_side(steps, devices, strategy, rates, lambda t: say(f"simulating {t}"))
        if refused and all(column.method == "full" for column in columns):  # a wrong module name, not a method's limit
            raise UserError(next(iter(refused.values())))
        asked = columns if fits else []
        proposals = {c.method: largest(c.options, limit, devices, strategy, say) for c in asked}
    result = {
        "model": options.name,
        "on": options.on,
        "batch": options.batch,
        "length": options.length,
        "logits": options.logits,
        "rows": rows._asdict() if not isinstance(rows, str) else None,
        "dtype": options.dtype,
        "quantisation": options.quantisation,
        "checkpointing": options.checkpointing,
        "optimizer": options.optimizer,
        "devices": devices,
        "strategy": strategy,
        "methods": {column.method: column.plain() for column in columns},
        "refused": refused,
    }
    if proposals:
        result["fits"] = {"bytes": round(limit), **proposals}
    finish(result, _card(columns, refused, rates is not None, strategy, fits, proposals, rows), json)


def _options(what: str, given: dict[str, Any], say: Callable[[str], None]) -> tuple[StepOptions, Lengths | str]:
    """The step, and what is known of the rows' lengths: of a recipe whose records are here the longest one counts."""
    from dual_lora.lab.cost.options import from_model, from_recipe
    from dual_lora.lab.recipe.read import read_recipe, shipped_recipes

    if what in shipped_recipes() or what.endswith((".yaml", ".yml")) or (Path(what) / "recipe.yaml").is_file():
        recipe = read_recipe(what)
        if "length" in given:
            return from_recipe(recipe, **given), ""
        say("reading the records")
        from dual_lora.lab.cost.lengths import lengths_of

        if isinstance(rows := lengths_of(recipe), str):
            return from_recipe(recipe, **given), f"Rows are taken as long as data.max_length: {rows}."
        logits = None if rows.logits is None else min(rows.logits, rows.longest)
        seen = {"length": rows.longest} | ({"logits": logits} if logits and "head" not in given else {})
        seen |= {"classes": rows.classes} if rows.classes else {}
        return from_recipe(recipe, **{**seen, **given}), rows
    return from_model(what, **given), ""


def _with_method(options: StepOptions, name: str, rank: int | None, targets: str | None) -> StepOptions:
    """The step with that method, of this rank and on these modules; full fine-tuning has neither."""
    from dataclasses import replace

    if rank is not None and rank < 1:
        raise UserError(f"--rank is {rank}, expected at least 1.")
    own = options.with_method(name)
    if name == "full":
        return own
    own = own if rank is None else own.with_rank(rank)
    if targets is None:
        return own
    modules = targets if targets == "all-linear" else [name.strip() for name in targets.split(",")]
    return replace(own, method={**own.method, "target_modules": modules})


def _chosen(methods: list[str] | None, options: StepOptions) -> list[str]:
    """The methods asked for, or the recipe's own and those that it is compared with."""
    from dual_lora.lab.cost.calibrate import METHODS
    from dual_lora.lab.model.methods import method_names

    own = options.method["name"]
    if methods is None:
        return [*METHODS] if own in METHODS else [own, *METHODS]
    chosen = [normalised_name(name) for given in methods for name in given.split(",")]
    for name in chosen:
        if name not in method_names():
            raise UserError(f"--methods: there is no method {name!r}.{suggest(name, method_names())}")
    return chosen


def _list_models(as_json: bool) -> None:
    from dual_lora.lab.recipe.published import FAMILIES

    found = {name: size.stated for family in FAMILIES.values() for name, size in family.sizes.items()}
    rows = [[", ".join(family.sizes), family.source] for family in FAMILIES.values()]
    table = figures_table("", ["models", "numbers from"], rows)
    table.columns[1].justify = "left"
    finish(found, table, as_json)


def _card(
    columns: list[Column],
    refused: dict[str, str],
    calibrated: bool,
    strategy: str,
    fits: str | None,
    proposals: dict[str, dict[str, Any]],
    rows: Lengths | str = "",
) -> Group:
    methods = [column.method for column in columns]
    usual = None if isinstance(rows, str) else rows.usual / rows.longest
    parts: list[Any] = [_memory_table(columns, calibrated, usual)]
    if len(columns[0].memory) > 1:
        peaks = [[str(n), *(size(c.memory[n].peak) for c in columns)] for n in columns[0].memory]
        parts.append(figures_table(f"Peak of each device, {strategy}", ["devices", *methods], peaks))
    if proposals:
        largest = ("batch", "length", "rank")
        fitting = [[f"largest {what}", *(str(proposals[m][what] or "–") for m in methods)] for what in largest]
        parts.append(figures_table(f"What fits into {fits}, the other two as above", ["", *methods], fitting))
    parts += [f"{name}: {reason}" for name, reason in refused.items()]
    if rows:
        parts.append(rows if isinstance(rows, str) else f"Length: {rows.words}. --max-length N estimates longer ones.")
    if "full" in methods and columns[0].options.dtype != "float32":
        parts.append(
            "Method full trains its weights in float32 unless a recipe says otherwise: --dtype float32 estimates that."
        )
    if columns[0].options.on == "cpu":
        parts.append(OF_A_PROCESS)
    if not calibrated:
        parts.append("No time: `dual-lora estimate --calibrate` measures this machine once, in a minute.")
    return Group(*parts)


def _memory_table(columns: list[Column], calibrated: bool, usual: float | None) -> Table:
    """The columns' steps on one device. usual: the length of the mean row, as a share of the longest."""
    options, one = columns[0].options, [column.memory[1] for column in columns]
    checkpointing = ", checkpointing" if options.checkpointing else ""
    packed = f" ({options.quantisation})" if options.quantisation != "none" else ""
    title = (
        f"{options.name}: {options.dtype}{packed}, batch {options.batch} × {options.length} tokens{checkpointing}, "
        f"{options.optimizer}, {options.on}, rank {max(column.options.rank for column in columns)}"
    )
    named = {"weights": "weights, frozen", "trained": "factors or trained weights", "optimizer": "optimizer"}
    named |= {"gradients": "gradients", "activations": "activations"}
    named |= {"workspace": "workspace (logits, loss, temporaries)", "peak": "peak"}
    rows = [[label, *(size(getattr(m, name)) for m in one)] for name, label in named.items()]
    rows.append(["… which comes in", *(m.where for m in one)])
    for phase in ("standing", "forward", "logits", "loss", "backward", "step"):
        rows.append([f"peak, {phase}", *(size(m.phases[phase]) if phase in m.phases else "–" for m in one)])
    rows += [
        ["trainable parameters", *(f"{c.step.trained_parameters:,.0f}" for c in columns)],
        ["adapter or model on disk", *(size(c.step.saved) for c in columns)],
        ["GFLOP a token", *(f"{c.flops_a_token / 1e9:,.3g}" for c in columns)],
    ]
    if calibrated:
        rows.append(["time of a step, this machine", *(duration(c.seconds) if c.seconds else "–" for c in columns)])
        if usual is not None:
            shares = [duration(c.seconds * usual) if c.seconds else "–" for c in columns]
            rows.append(["… of rows of mean length", *shares])
        rows.append(["tokens a second", *(f"{c.tokens_a_second:,.0f}" if c.tokens_a_second else "–" for c in columns)])
    return figures_table(title, ["one device", *(c.method for c in columns)], rows)


def _rates_table(machine: str, entry: dict[str, Any]) -> Any:
    from dual_lora.lab.cost.calibrate import Cost

    rows = []
    for dtype, methods in entry["costs"].items():
        for at_width in zip(*methods.values(), strict=True):
            costs = [Cost(*point) for point in at_width]
            figures = (f"{c.rate / 1e9:,.0f} GFLOP/s + {c.weight * 1e9:.1f} ns" for c in costs)
            rows.append([f"{dtype}, width {costs[0].width}", *figures])
    methods = next(iter(entry["costs"].values()))
    title = f"Training, {machine}: arithmetic, and each adapted or trained weight once a step"
    return figures_table(title, ["", *methods], rows)
