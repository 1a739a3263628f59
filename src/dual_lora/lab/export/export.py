"""Merge an adapter into its base; convert it to LoRA (PEFT's or mlx-lm's), or a LoRA to a Dual LoRA start.

A conversion says what it loses on records. It is written as an adapter folder that PEFT loads, with conversion.json
next to it: every layer's figures, the losses and the verdict.
"""

import json
import re
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from dual_lora.lab.data.examples import load_split
from dual_lora.lab.data.formats import Example
from dual_lora.lab.errors import UserError
from dual_lora.lab.files.write import free_folder, json_text, space_next_to, write_folder_atomically
from dual_lora.lab.model.load import quiet
from dual_lora.lab.model.note import write_note
from dual_lora.lab.model.opened import Tuned, open_tuned
from dual_lora.lab.progress import Bar
from dual_lora.lab.recipe.schema import DataSection, EvaluateSection
from dual_lora.lab.run.evaluate import mean_losses
from dual_lora.verify.numbers import header

REPORT = "conversion.json"
# Shares of the adapter's improvement in loss that a conversion keeps.
KEEPS, LOSES_SOME = 0.95, 0.8


@dataclass
class MergeResult:
    """A merged model's folder, its size in bytes, its precision, and the class of transformers that loads it."""

    folder: str
    bytes: int
    dtype: str
    loads: str


def merge(
    source: str | Path, out: str | Path, *, base: str | None = None, dtype: str | None = None, listed: bool = False
) -> MergeResult:
    """Write the merged model of a run or adapter folder to ``out``, with its tokenizer.

    The folder is a plain transformers model: it loads without this package. listed: with a list of its files (see
    `mark_whole`). Raises UserError if ``out`` holds anything, ``source`` holds no adapter, or its base cannot be saved.
    """
    with free_folder(out) as target:
        tuned = open_tuned(source, base, dtype, whole=True)  # packing again would lose a part of the update
        if not tuned.adapted and tuned.run is None:
            raise UserError(
                f"{source} holds no adapter to merge, expected the folder of a run or of an adapter (with an "
                "adapter_config.json)."
            )
        with quiet():
            model = _merged(tuned) if tuned.adapted else tuned.model
            if tuned.classes:
                model.config.id2label = dict(enumerate(tuned.classes))
                model.config.label2id = {name: i for i, name in enumerate(tuned.classes)}

            def write(folder: Path) -> None:
                try:
                    model.save_pretrained(str(folder))
                except NotImplementedError as error:  # bitsandbytes' 4 bits, of transformers 5.24
                    raise UserError(
                        "The base is stored quantised, and transformers cannot save what was merged into it. Give "
                        "--base with the model that it was quantised from, and quantise the result."
                    ) from error
                tuned.tokenizer.save_pretrained(str(folder))

            write_folder_atomically(target, write, listed)
        size = sum(file.stat().st_size for file in target.glob("*.safetensors"))
        classifies = "SequenceClassification" in type(model).__name__
        loads = "AutoModelForSequenceClassification" if classifies else "AutoModelForCausalLM"
        return MergeResult(str(out), size, str(model.dtype).removeprefix("torch."), loads)


def _merged(tuned: Tuned) -> Any:
    """The base with the adapter in its weights. Raises UserError for an adapter that has no such form."""
    from torch import nn

    if any(getattr(config, "layer_replication", None) for config in tuned.model.peft_config.values()):
        raise UserError(f"{tuned.source} repeats its base's layers (layer_replication), which no merged model does.")
    layers = [m for m in tuned.model.modules() if hasattr(m, "get_base_layer")]
    # Embeddings and head may share one weight: an update of the one would change both. Where both have the same one,
    # Dual LoRA ties its factors.
    holders = Counter(id(p) for m in tuned.model.modules() for p in m._parameters.values() if p is not None)
    kept = {id(p) for m in layers if getattr(m, "tied", None) for p in m.get_base_layer()._parameters.values()}
    for plain in (layer.get_base_layer() for layer in layers):
        for name, p in plain._parameters.items():
            if p is not None and holders[id(p)] > 1 and id(p) not in kept:
                plain._parameters[name] = nn.Parameter(p.detach().clone(), requires_grad=False)
    try:
        model = tuned.model.merge_and_unload(safe_merge=True)
    except (ValueError, NotImplementedError) as error:
        raise UserError(f"{tuned.source} cannot be merged into its base: {error}") from error
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is not None and head.weight is not embeddings.weight:
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False  # or else servers take the embeddings for the head
    return model


@dataclass
class Exported:
    """A converted adapter, what each layer lost, and what that means."""

    folder: str
    method: str  # "lora"
    layers: list[dict[str, Any]] = field(repr=False)
    parameters: int  # numbers in the factors that were written
    weights: int  # numbers in the adapted weights, for comparison
    loss: dict[str, float]  # "base", "adapter", "converted"; empty without records
    examples: int
    verdict: str
    advice: str


def in_words(loss: dict[str, float], lost: float, size: float = 0.0) -> tuple[str, str]:
    """(verdict, advice) from the losses, or without them from what the median layer lost of its update (0 to 1).

    size: numbers in the written factors for each number in the weights that they change.
    """
    way_out = (
        "ΔW is of high rank, so that a LoRA holds it only at a high rank. Give a larger --rank or --energy, or serve "
        "the merged model, which loses nothing: `dual-lora export … --to merged` (or gguf)."
    )
    if loss:
        gain = loss["base"] - loss["adapter"]
        if gain <= 0:
            return (
                f"cannot be told: the adapter itself does not improve on its base on these records ({loss['base']:.4f} "
                f"→ {loss['adapter']:.4f})",
                "Give records of the kind that the adapter was trained for: --data FILE.",
            )
        kept = (loss["base"] - loss["converted"]) / gain
        bad = kept < KEEPS
        word = "good" if not bad else "loses some" if kept >= LOSES_SOME else "loses too much"
        verdict = f"{word}: {max(kept, 0):.1%} of the adapter's improvement in loss is kept"
    else:
        from dual_lora.method.conversion import LARGE_ERROR

        bad = lost > LARGE_ERROR
        word = "may lose too much" if bad else "good by the weights"
        verdict = f"{word}: the median layer loses {lost:.0%} of its update; the loss was not measured (--data FILE)"
    if bad:
        return verdict, way_out
    if size >= 1:
        return verdict, (
            f"The LoRA is {size:.1f} times as large as the weights that it changes: the merged model is smaller and "
            "loses nothing (`dual-lora export … --to merged`)."
        )
    return verdict, ""


def export_lora(
    source: str | Path,
    out: str | Path,
    rank: int | float,
    *,
    base: str | None = None,
    dtype: str | None = None,
    data: str | None = None,
    limit: int = 200,
    progress: bool = True,
    opened: Tuned | None = None,
) -> Exported:
    """Write the LoRA adapter nearest to a Dual LoRA run or adapter, the folder whole, with what is lost.

    rank: a fixed rank (int), or the share of energy to keep (float). data: file of records on which the loss is
    measured before and after; left out: the run's own test records. limit: at most so many of them, 0 for no
    measurement. opened: the source, where the caller has it open already. Raises UserError for what cannot be
    converted.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from torch.linalg import LinAlgError

    from dual_lora.method.conversion import convert_to_lora, write_adapter

    with free_folder(out) as target:
        tuned = opened or open_tuned(source, base, dtype)
        _check_kind(tuned, source)
        records = _records(tuned, data, limit)
        count = sum(isinstance(m, BaseTunerLayer) for m in tuned.model.modules())
        with Bar("converting layers", count, progress) as bar, warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*ΔW is of high rank")  # the verdict says it
            try:
                made = convert_to_lora(tuned.model, rank, advance=bar.advance)
            except (ValueError, TypeError, LinAlgError) as error:
                raise UserError(str(error)) from error
        rows, results = [layer._asdict() for layer in made.losses], list[Exported]()

        def write(folder: Path) -> None:
            tuned.tokenizer.save_pretrained(str(folder))
            if tuned.recipe is not None:
                write_note(folder, tuned.recipe, tuned.classes)
            write_adapter(folder, made.config, made.state_dict)
            parameters, weights = _parameter_counts(folder)
            loss = _losses(tuned, records, lambda: open_tuned(folder, base, dtype), progress) if records else {}
            verdict, advice = in_words(loss, made.median, parameters / weights)
            results.append(Exported(str(out), "lora", rows, parameters, weights, loss, len(records), verdict, advice))
            (folder / REPORT).write_text(json_text(asdict(results[0]), indent=1) + "\n", encoding="utf-8")

        write_folder_atomically(target, write)
        return results[0]


def _losses(tuned: Tuned, records: list[Example], written: Callable[[], Tuned], progress: bool) -> dict[str, float]:
    """Mean loss of the base, of the adapter and of what was written."""
    spec = EvaluateSection(batch_size=tuned.recipe.evaluate.batch_size) if tuned.recipe else EvaluateSection()
    unfiled = replace(tuned, run=None)  # `evaluate` files its result in the folder of a run
    before = mean_losses(unfiled, _data(tuned), records, ["base", "tuned"], spec, progress)
    with quiet():
        converted = written()
    after = mean_losses(converted, _data(tuned), records, ["tuned"], spec, progress)
    return {"base": before["base"], "adapter": before["tuned"], "converted": after["tuned"]}


def _check_kind(tuned: Tuned, source: str | Path) -> None:
    config = tuned.model.peft_config.get("default") if tuned.adapted else None
    found = getattr(config, "peft_type", None)
    found = getattr(found, "value", found)
    if found != "DUAL_LORA":
        what = f"a {found} adapter" if tuned.adapted else "no adapter"
        raise UserError(f"{source} holds {what}, expected a Dual LoRA adapter.")


def _records(tuned: Tuned, data: str | None, limit: int) -> list[Example]:
    """The examples on which the loss is measured; none without records or with a limit of 0."""
    part = _data(tuned).model_copy(update={"test": data, "tests": {}} if data is not None else {})
    if not limit or not (part.test or part.tests):
        return []
    part = part.model_copy(update={"test_limit": limit if part.test_limit is None else min(limit, part.test_limit)})
    try:
        return load_split(part, "test")
    except UserError as error:
        raise UserError(f"{error} Give records by --data FILE, or --limit 0 to measure nothing.") from error


def _data(tuned: Tuned) -> DataSection:
    return tuned.recipe.data if tuned.recipe else DataSection()


def _parameter_counts(folder: Path) -> tuple[int, int]:
    """Numbers in the factors, and in the weights that they change: a layer's two factors A [r, I] and B [O, r]."""
    held = header(folder / "adapter_model.safetensors")
    factors = {key: s for key, (_, s) in held.items() if "lora_" in key and len(s) == 2}
    weights = sum(s[0] * factors[key.replace("lora_B", "lora_A")][1] for key, s in factors.items() if "lora_B" in key)
    return sum(s[0] * s[1] for s in factors.values()), weights


# PEFT's name of a factor: the block that mlx-lm counts, and the layer within it.
_FACTOR = re.compile(r"base_model\.model\.(?P<path>.+?\.\d+\.(?P<key>.+))\.lora_(?P<letter>[AB])\.weight")


def export_mlx_lora(source: str | Path, out: str | Path, rank: int | float, **options: Any) -> Exported:
    """Write the nearest LoRA of a Dual LoRA for mlx-lm on Apple's machines (`mlx_lm.generate --adapter-path OUT`).

    rank and options are those of `export_lora`. Raises UserError for what no LoRA can hold, and for layers outside a
    model's numbered blocks, which mlx-lm has none for.
    """
    with free_folder(out) as target, space_next_to(target) as space:
        lora = space / "lora"
        exported = export_lora(source, lora, rank, **options)
        write_folder_atomically(target, lambda folder: write_mlx(lora, folder))
    return replace(exported, folder=str(target))


def write_mlx(lora: Path, folder: Path) -> None:
    """Rewrite a LoRA's folder as PEFT has it into mlx-lm's: A [r, I] becomes lora_a [I, r], B [O, r] lora_b [r, O]."""
    from safetensors.torch import load_file, save_file

    config = json.loads((lora / "adapter_config.json").read_text("utf-8"))
    if config.get("layer_replication"):
        raise UserError(
            "mlx-lm does not repeat a model's blocks, as this adapter does (layer_replication), and would leave them "
            "out."
        )
    factors, keys = {}, set()
    for name, tensor in load_file(lora / "adapter_model.safetensors").items():
        found = _FACTOR.fullmatch(name)
        if found is None:
            raise UserError(
                f"mlx-lm has no place for {name}: it adapts the linear layers of a model's blocks alone. Merge instead "
                "(--to merged), which mlx-lm converts."
            )
        keys.add(found["key"])
        factors[f"{found['path']}.lora_{found['letter'].lower()}"] = tensor.t().contiguous()
    save_file(factors, folder / "adapters.safetensors", {"format": "mlx"})
    scale = config["lora_alpha"] / config["r"]
    parameters = {"rank": config["r"], "scale": scale, "dropout": 0.0, "keys": sorted(keys)}
    # mlx-lm adapts the last blocks of a model: -1 means all of them.
    written = {"fine_tune_type": "lora", "num_layers": -1, "lora_parameters": parameters}
    (folder / "adapter_config.json").write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
