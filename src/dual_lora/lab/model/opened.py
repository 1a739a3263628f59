"""Open what was trained: a run folder, an adapter folder or any plain model."""

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from dual_lora._warning import warn
from dual_lora.lab.errors import UserError, described, memory_full
from dual_lora.lab.files.folder import RunFolder, result_of
from dual_lora.lab.model.bounds import check_config, check_finite_weights, check_stored_numbers
from dual_lora.lab.model.load import UNREAD, Loaded, load_model, load_tokenizer
from dual_lora.lab.model.location import Location, check_entries, check_here, is_here
from dual_lora.lab.model.methods import plain_name
from dual_lora.lab.model.note import NOTE, name_classes, read_note
from dual_lora.lab.model.pickled import check_weights
from dual_lora.lab.model.weights import is_other_base, other_settings, short_digest, warn_of_doubt, weights_digest
from dual_lora.lab.read import entries_named, read_object, regular
from dual_lora.lab.recipe.schema import ModelSection, Recipe
from dual_lora.serving.files import CONFIG_BYTES
from dual_lora.verify.numbers import header

# Methods whose adapter, switched off, leaves the base's own outputs. Of the others, and of new ones, the base is loaded
# anew: PiSSA's start is taken out of the weights.
BESIDE_THE_BASE = {"DUAL_LORA", "LORA", "ADALORA", "LOHA", "LOKR", "HIRA", "IA3", "VERA", "OFT", "BOFT", "HRA"} | {
    "FOURIERFT", "RANDLORA", "VBLORA", "LN_TUNING"
}  # fmt: skip

_AROUND = re.compile(r"\b(base_layer|original_module)\.")  # what PEFT puts around a weight of the base


@dataclass
class Tuned:
    """A model ready for evaluation.

    variants: "base" and "tuned", or one of them. ``as_variant`` switches between the two.
    """

    model: Any
    tokenizer: Any
    source: str
    recipe: Recipe | None = None
    classes: list[str] = field(default_factory=list)
    base_model: Any = None  # full fine-tuning: the model as it was before
    run: Path | None = None
    untrained: Callable[[], Any] | None = None  # loads that model
    given: dict[str, str] = field(default_factory=dict)  # the base and the precision that were asked for
    part: ModelSection | None = None  # the base, or the plain model, that was loaded
    rewritten: bool = False  # whether the adapter's file held weights of the base, which took the place of its own
    _loaded: Any = field(default=None, repr=False)  # what it has loaded

    @property
    def adapted(self) -> bool:
        return hasattr(self.model, "peft_config")

    @property
    def variants(self) -> list[str]:
        if self.adapted or self.base_model is not None:
            return ["base", "tuned"]
        return ["base"] if self.run is None else ["tuned"]

    @contextlib.contextmanager
    def as_variant(self, variant: str) -> Iterator[Any]:
        """The model in evaluation mode, for "base" as it was before its training.

        Raises UserError where that is asked for and not known.
        """
        off = variant == "base" and self.keeps_base
        model = self._base() if variant == "base" and not off else self.model
        was_training = model.training
        model.eval()
        with model.disable_adapter() if off else contextlib.nullcontext():
            yield model
        model.train(was_training)

    def _base(self) -> Any:
        if self.base_model is not None:
            return self.base_model
        if not self.adapted and self.run is None:
            return self.model  # which nobody has trained
        if self._loaded is None:
            if self.untrained is None:
                raise UserError(f"The base model of {self.source} is not known: open it with its run or its adapter.")
            self._loaded = self.untrained()
        return self._loaded

    @property
    def keeps_base(self) -> bool:
        """Whether the model without its adapter is the base: trained biases stay, and so do weights that were cut."""
        from dual_lora.method.lora_fields import keeps_base

        if not self.adapted or self.rewritten:
            return False
        for config in self.model.peft_config.values():
            kind = getattr(config.peft_type, "value", config.peft_type)
            plain = keeps_base(config) and getattr(config, "layer_replication", None) is None
            if kind not in BESIDE_THE_BASE or not plain or getattr(config, "bias", "none") not in ("none", None):
                return False
        return True


def open_tuned(
    source: str | Path,
    base: str | None = None,
    dtype: str | None = None,
    device: str | None = None,
    *,
    whole: bool = False,
    unsaid: str = "float32",
    classes: Sequence[str] = (),
) -> Tuned:
    """Load a run folder, an adapter folder, or a model by folder, name, GGUF file or package.

    base: the base model, where the adapter's own note of it does not hold any more. dtype: precision of the base.
    whole: the base as it was before `model.quantize` packed it. unsaid: the precision of what is no run of ours.
    classes: of a plain model that is a classifier, as its configuration names them (`classes_of`).
    Raises UserError for folders that are neither, and runs that are not finished.
    """
    path = Path(source)
    folder = RunFolder(path)
    if folder.is_run:
        result = result_of(folder)
        full = result == folder.full_model
        tuned = (
            _open_full(folder, dtype, device)
            if full
            else _open_adapter(result, base, dtype, device, path, whole, unsaid)
        )
        tuned.given |= {"dtype": dtype} if dtype else {}
        return tuned
    if (path / "adapter_config.json").is_file():
        return _open_adapter(path, base, dtype, device, whole=whole, unsaid=unsaid)
    check_here(str(source), others=", run or adapter")
    loaded = load_plain(str(source), dtype or unsaid, classes, device)
    check_finite_weights(dict(loaded.model.named_parameters()), f"The model {source}")
    part = ModelSection(path=str(source))
    return Tuned(loaded.model, loaded.tokenizer, str(source), classes=[*classes], part=part)


def load_plain(path: str, dtype: str, classes: Sequence[str] = (), device: str | None = None) -> Loaded:
    """A model that is no run and no adapter. classes: of a classifier. Raises UserError for one without its head."""
    head = "classification" if classes else "causal"
    loaded = load_model(ModelSection(path=path, dtype=dtype, head=head), len(classes) or None, device)  # type: ignore[arg-type]
    if classes and loaded.fresh:
        raise UserError(f"The classifier {path} has no weights for {', '.join(loaded.fresh)}: copy it whole.")
    return loaded


def _other_base(adapter: Path, part: ModelSection, base: str | None) -> dict[str, str]:
    """Return what distinguishes a base, which was just loaded, from the one that the adapter was trained on; {} if
    nothing does.

    base: as it was asked for by name. Raises UserError for another one, and only warns if it was asked for.
    """
    known = read_object(adapter / NOTE).get("base") if (adapter / NOTE).is_file() else None
    another = is_other_base(known, now := weights_digest(part))
    if another:
        what = f"The weights of {part.path} are not those that {adapter} was trained on"
        if base is None:
            raise UserError(f"{what}. Restore them, or give --base {part.path} to use them anyway.")
        warn(f"{what}.", stacklevel=4)
    else:
        warn_of_doubt(known, now, f"{adapter} was trained on")
    if another or other_settings(known, now):
        return {"base_weights": short_digest(now)}
    return {"base": base} if base and another is None else {}


def _open_full(folder: RunFolder, dtype: str | None, device: str | None) -> Tuned:
    recipe, classes = read_note(folder.full_model)
    if recipe is None:
        raise UserError(
            f"{folder.full_model / NOTE}, the note of the recipe, is missing: the run has to be made again."
        )
    part = recipe.model.model_copy(update={"dtype": dtype or recipe.model.dtype})
    trained = part.model_copy(update={"path": str(folder.full_model), "revision": None})
    loaded = load_model(trained, len(classes) or None, device)
    check_finite_weights(dict(loaded.model.named_parameters()), f"The model {folder.full_model}")
    name_classes(loaded.model, classes)
    base = load_base(part, recipe.train.seed, len(classes) or None, device).model
    other = _other_base(folder.full_model, part, part.path)
    return Tuned(loaded.model, loaded.tokenizer, str(folder.path), recipe, classes, base, folder.path, given=other)


def load_base(part: ModelSection, seed: int, num_labels: int | None, device: str | None = None) -> Loaded:
    """The untrained model; the seed gives a new head the same weights as at the start of its training."""
    torch.manual_seed(seed)
    return load_model(part, num_labels, device)


def check_known(adapter: Path) -> None:
    """Raise UserError for an adapter of a method that the installed PEFT does not have. What is damaged is left to
    whoever reads it."""
    kind = None
    with contextlib.suppress(OSError, ValueError):
        kind = read_object(adapter / "adapter_config.json").get("peft_type")
    if isinstance(kind, str) and kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise UserError(
            f"The adapter {adapter} is of the method {kind[:100]!r}, which PEFT {peft.__version__} does not have: "
            "install the version that it was made with, or name the module that registers the method "
            "(--allow-module)."
        )


def _open_adapter(
    adapter: Path,
    base: str | None,
    dtype: str | None,
    device: str | None,
    run: Path | None = None,
    whole: bool = False,
    unsaid: str = "float32",
) -> Tuned:
    import dual_lora  # noqa: F401  (registers its method with PEFT)

    check_entries(adapter)
    if not any((adapter / f"adapter_model.{kind}").is_file() for kind in ("safetensors", "bin")):
        # PEFT would ask the hub for a repository with the name of this folder.
        raise UserError(f"The adapter {adapter} holds no weights (adapter_model.safetensors): copy it whole.")
    recipe, classes = read_note(adapter)
    if recipe:
        plain_name(str(recipe.method["name"]))  # a method of the user's own is known to PEFT from here on
    try:
        regular(adapter / "adapter_config.json", CONFIG_BYTES)
        config = PeftConfig.from_pretrained(str(adapter))
    except Exception as error:  # whatever a foreign file makes PEFT raise: KeyError, AttributeError, RecursionError
        check_known(adapter)
        raise UserError(f"The adapter {adapter} could not be read: {described(error)}") from error
    check_stored_numbers(adapter / "adapter_model.safetensors", f"The adapter {adapter}")
    check_weights(entries_named(adapter, "*.bin"))
    part = recipe.model if recipe else _model_section(config, adapter, unsaid)
    another = {"path": base, "revision": None} if base and base != part.path else {}
    unpacked = {"quantize": "none"} if whole else {}
    part = part.model_copy(update=another | ({"dtype": dtype} if dtype else {}) | unpacked)
    labels = len(classes) or _labels_in(adapter) if part.head != "causal" else None
    seed = recipe.train.seed if recipe else 0
    loaded = load_base(part, seed, labels, device)
    name_classes(loaded.model, classes)
    other = _other_base(adapter, part, base)
    check_config(config, loaded.model, f"The adapter {adapter}", adapter / "adapter_model.safetensors")
    try:
        before = _weights_in_both(adapter, loaded.model)
        model = PeftModel.from_pretrained(loaded.model, str(adapter), config=config)
        brought = get_peft_model_state_dict(model, save_embedding_layers=False)
    except Exception as error:
        if memory_full(error):
            raise
        if type(error).__name__ == "SafetensorError":
            raise UserError(f"The adapter file in {adapter} is damaged: {error}") from error
        reason = described(error, ValueError, RuntimeError, OSError, lines=2)
        raise UserError(f"The adapter {adapter} does not fit {part.path}: {reason}") from error
    check_finite_weights(brought, f"The adapter {adapter}")
    _warn_of_unread(adapter, model)
    untrained = partial(untrained_model, part, seed, labels, str(model.device))
    tokenizer = _tokenizer_of(adapter, loaded.tokenizer)
    return Tuned(
        model.eval(), tokenizer, str(run or adapter), recipe, classes, run=run, untrained=untrained, given=other,
        part=part, rewritten=_warn_of_rewritten(adapter, model, before),
    )  # fmt: skip


def _tokenizer_of(adapter: Path, of_base: Any) -> Any:
    """The one that was saved with the adapter: its chat template may be its own, or the base's may have changed."""
    if not (adapter / "tokenizer_config.json").is_file():
        return of_base
    try:
        return load_tokenizer(str(adapter), Location(str(adapter)))
    except UserError as error:
        warn(f"The tokenizer in {adapter} is not used, but its base's: {error}", stacklevel=4)
        return of_base


def _weights_in_both(adapter: Path, base: Any) -> dict[str, torch.Tensor]:
    """Return copies of the base's weights that have a namesake in the adapter's file, by the name there. PEFT puts in
    their place what the file holds."""
    from peft.utils import load_peft_weights

    file, own = adapter / "adapter_model.safetensors", base.state_dict()
    held = header(file) if file.is_file() else load_peft_weights(str(adapter), device="cpu")
    plain = {name: _AROUND.sub("", name.removeprefix("base_model.model.")) for name in held}
    return {name: own[its].clone() for name, its in plain.items() if its in own}


def _warn_of_rewritten(adapter: Path, model: Any, before: dict[str, torch.Tensor]) -> bool:
    """Whether the base's weights are others than they were, which is said. Trained biases are an adapter's own."""
    now = model.state_dict()
    changed = sorted(name for name, was in before.items() if name in now and not torch.equal(now[name], was))
    if changed and not all(name.endswith(".bias") for name in changed):
        warn(
            f"{adapter} holds {len(changed)} weights of the base itself, the first of them {changed[0]}, and the model "
            "has taken them over. What the base computes is measured with its own.",
            stacklevel=4,
        )
    return bool(changed)


def _warn_of_unread(adapter: Path, model: Any) -> None:
    """Say which tensors of an adapter's file the model has not taken: PEFT says what is missing, not what is left."""
    from peft.utils import load_peft_weights

    file = adapter / "adapter_model.safetensors"
    if not file.is_file():
        return
    names = {key.removesuffix(".weight") for key in get_peft_model_state_dict(model, save_embedding_layers=True)}
    if all(key.removesuffix(".weight") in names for key in header(file)):
        return
    # Adapters of earlier versions have other names, which PEFT translates while it loads: it is asked once more.
    asked: Any = set_peft_model_state_dict(model, load_peft_weights(str(adapter), device="cpu"))
    unread = sorted(asked.unexpected_keys)
    if unread:
        warn(f"{file} holds {len(unread)} tensors that {UNREAD % unread[0]}", stacklevel=3)


def untrained_model(part: ModelSection, seed: int, num_labels: int | None, device: str) -> Any:
    """Load the model as it was before its training, for `Tuned.untrained`."""
    with torch.random.fork_rng():  # whoever asks goes on with the random numbers that it had
        return load_base(part, seed, num_labels, device).model


def _model_section(config: Any, adapter: Path, dtype: str) -> ModelSection:
    if not config.base_model_name_or_path:
        raise UserError(f"The adapter {adapter} does not name its base model: give --base.")
    head = "classification" if config.task_type == "SEQ_CLS" else "causal"
    path = config.base_model_name_or_path
    if not isinstance(path, str):
        raise UserError(f"The adapter {adapter} names {path!r} as its base model, expected a name: give --base.")
    revision = None if is_here(path) else getattr(config, "revision", None)
    return ModelSection(path=path, head=head, revision=revision, dtype=dtype)  # type: ignore[arg-type]


def _labels_in(adapter: Path) -> int:
    """Number of classes of a saved classification head: its number of rows."""
    heads = (".classifier.weight", ".score.weight", ".out_proj.weight")
    held = header(adapter / "adapter_model.safetensors")
    rows = [shape[0] for name, (_, shape) in held.items() if name.endswith(heads)]
    if len(rows) != 1:
        raise UserError(f"The adapter {adapter} holds no classification head.")
    return rows[0]
