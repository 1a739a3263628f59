"""A run's card for a model hub: the README.md next to its weights, with method, data, scores, cost and how to load it.

PEFT writes a card of metadata and empty headings when an adapter is saved. This one keeps the metadata, gives it a text
and takes local paths out. What a person writes above or below the two marks stays when the card is written anew.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from shlex import quote
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from jinja2 import Environment, StrictUndefined, UndefinedError

from dual_lora._warning import warn
from dual_lora.lab import yaml_text
from dual_lora.lab.data.encode import VALUE
from dual_lora.lab.data.records import joined
from dual_lora.lab.errors import UserError, damaged
from dual_lora.lab.files.folder import RunFolder, result_of
from dual_lora.lab.files.write import write_listed
from dual_lora.lab.model.note import label_settings
from dual_lora.lab.model.weights import folder_digest, weights_changed
from dual_lora.lab.read import parse_yaml, read_object, read_yaml_text
from dual_lora.lab.recipe.schema import Recipe
from dual_lora.lab.results import read_evaluation
from dual_lora.lab.run.results_file import as_markdown
from dual_lora.lab.terminal import duration, size

BEGIN, END = "<!-- dual-lora card: `dual-lora card` writes what stands between these marks -->", "<!-- end of card -->"
HERE = "path/to/this/folder"
DUAL_LORA = "Dual LoRA ([arXiv 2512.03402](https://arxiv.org/abs/2512.03402))"
# Head of the model -> what the hub calls its task, and the class that loads it.
TASKS = {
    "causal": ("text-generation", "CausalLM"),
    "classification": ("text-classification", "SequenceClassification"),
    "regression": ("text-classification", "SequenceClassification"),
}


def write_card(
    folder: RunFolder,
    recipe: Recipe,
    *,
    base_model: str | None = None,
    licence: str | None = None,
) -> Path:
    """Write the card of a finished run next to its weights and return its path.

    base_model: the base's name on a hub, where the recipe names a folder. licence: of the adapter, as the hub names it.
    Left out, both are what an earlier card says.
    """
    file = result_of(folder) / "README.md"
    write_listed(file, card_text(folder, recipe, file, base_model=base_model, licence=licence))
    return file


def card_text(
    folder: RunFolder,
    recipe: Recipe,
    earlier: Path,
    *,
    base_model: str | None = None,
    licence: str | None = None,
    repo: str = HERE,
    record: Mapping[str, Any] | None = None,
    fresh: bool = False,
) -> str:
    """The card as text. earlier: a card whose metadata and own words are kept; it need not exist.

    record: of the run, if its file does not have it yet. fresh: the earlier card is PEFT's of a moment ago.
    """
    with damaged(f"The record or an evaluation of the run {folder.path}"):
        before = read_card(earlier, fresh)
        ours = before is not None and BEGIN in before.text
        data: Any = before.data if before else ModelCardData()
        base = data.base_model = known_base(before, recipe, base_model)
        data.license = licence or data.license
        record = record or read_object(folder.record)
        results = _results(folder)
        adapter = recipe.method["name"] != "full"
        data.library_name = "peft" if adapter else "transformers"
        data.pipeline_tag = data.pipeline_tag or TASKS[recipe.model.head][0]
        data.tags = _tags(data.tags or [], recipe, base, adapter)
        data.eval_results = _model_index(results, recipe) or None
        data.model_name = recipe.name if data.eval_results else None
        if base:
            data["base_model_relation"] = "adapter" if adapter else "finetune"
        body = _body(recipe, record, results, base, data.license, repo)
        own = f"{BEGIN}\n\n{body.strip()}\n\n{END}"
        text = re.sub(f"{re.escape(BEGIN)}.*{re.escape(END)}", lambda _: own, before.text, flags=re.S) if ours else own  # type: ignore[union-attr]
        return f"---\n{data.to_yaml()}\n---\n\n{text.strip()}\n"


def _body(
    recipe: Recipe,
    record: Mapping[str, Any],
    results: list[dict[str, Any]],
    base: str | None,
    licence: str | None,
    repo: str,
) -> str:
    """The card's text, by the template `card.jinja`."""
    name, result, kind = str(recipe.method["name"]), record["result"], TASKS[recipe.model.head][1]
    losses = {"at the end": result["loss"], "validation": result["validation_loss"]}
    environment = Environment(trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    environment.filters |= {"cell": cell, "size": size, "duration": duration}
    environment.filters["thousands"] = lambda value: f"{value + 0:,}"  # of what is undefined the sum says what
    environment.filters["figure"] = lambda value: "" if value is None else f"{value:.4f}"
    template = environment.from_string(files(__package__).joinpath("card.jinja").read_text("utf-8"))
    try:
        return template.render(
            recipe=recipe,
            record=record,
            result=result,
            results=results,
            repo=repo,
            licence=licence,
            base=base,
            link=base and f"[{base}](https://huggingface.co/{base})",
            package=_package(recipe.model.path),
            adapter=name != "full",
            kind={"full": "all weights", "dual_lora": DUAL_LORA}.get(name, cell(name)),
            method=name,
            settings=", ".join(f"{key} = {value}" for key, value in recipe.method.items() if key != "name"),
            head=kind,
            labels="" if kind == "CausalLM" else _labels(record.get("classes") or [VALUE]),
            source=source_name(recipe.data.train or ""),
            lost=too_long_note(recipe, result["left_out"]),
            rows=int(record.get("rows_at_once", recipe.train.batch_size)) * recipe.train.accumulate,
            losses=", ".join(f"{value:.4f} {when}" for when, value in losses.items() if value is not None),
        )
    except UndefinedError as error:  # what a damaged record lacks
        raise KeyError(error.message) from error


def _labels(classes: list[str]) -> str:
    """Return the arguments that tell the base's class of its head: the names, as Python writes them, or the number of
    values."""
    names = label_settings(classes)
    if not names:
        return f", num_labels={len(classes)}"
    return "".join(f", {name}={value!a}" for name, value in names.items())


def _results(folder: RunFolder) -> list[dict[str, Any]]:
    """The run's evaluations, without those of other data or settings, and without those of weights it had before."""
    now = folder_digest(folder.result) if folder.result else {}
    found = []
    for file in sorted((folder.path / "evaluation").glob("*/result.json")):
        result = read_evaluation(file)
        if result.get("other"):
            continue
        if not weights_changed(result.get("weights"), now):
            found.append(result)
            continue
        warn(
            f"{file} was measured with other weights than the run holds now, so the card leaves it out: "
            f"`dual-lora evaluate {quote(str(folder.path))}` measures them; or remove it.",
            stacklevel=2,
        )
    return found


def _package(path: str) -> str:
    """The package that holds the base, or "". A package is public, and a folder's name is nobody's business."""
    package = re.fullmatch(r"package:([\w.-]+)", path)
    return package[1] if package else ""


def known_base(card: ModelCard | None, recipe: Recipe, given: str | None) -> str | None:
    """The base model's name on the hub: what is given, else what an earlier card of ours says, else the recipe's.

    An earlier card was written when the base was there, and so it was known whether a name is that of a folder.
    """
    if given is not None:
        if not is_hub_name(given):
            raise UserError(f"The base model is {given!r}, expected its name on the hub: OWNER/NAME.")
        return given
    if card is not None and BEGIN in card.text:
        name = card.data.get("base_model")
        return name if isinstance(name, str) and is_hub_name(name) else None
    path = recipe.model.path
    return path if is_hub_name(path) and not Path(path).exists() else None


def read_card(file: Path, fresh: bool = False) -> ModelCard | None:
    """A card that is there. One that cannot be read, and one of somebody else's whole text, is an error."""
    if not file.is_file():
        return None
    try:
        card = ModelCard(_plain_metadata(file), ignore_metadata_errors=True)
    except Exception as error:
        raise UserError(
            f"{file}, the card, could not be read ({error}): remove it, and give the command again."
        ) from None
    if not fresh and BEGIN not in card.text and "[More Information Needed]" not in card.text:
        raise UserError(
            f"{file} is a card of your own: add the lines {BEGIN} and {END}; the card is written between them."
        )
    if (card.text.count(BEGIN), card.text.count(END)) not in ((0, 0), (1, 1)):
        raise UserError(f"{file} has one of the marks {BEGIN} and {END} without the other, or twice: mend it.")
    return card


def _plain_metadata(file: Path) -> str:
    """The card's text, its metadata written anew: the hub's library reads them by PyYAML, in which one number can take
    an hour. Raises UserError for metadata that are not read."""
    text = read_yaml_text(file)
    block = REGEX_YAML_BLOCK.search(text)
    if block is None:
        return text
    values = parse_yaml(block[2], "its metadata")
    return f"---\n{yaml_text.dump(values or {}, sort_keys=False, allow_unicode=True)}---\n{text[block.end() :]}"


def _tags(before: Iterable[str], recipe: Recipe, base: str | None, adapter: bool) -> list[str]:
    kept = {tag for tag in before if not tag.startswith("base_model:") and without_private_paths(tag) == tag}
    named = {f"base_model:{'adapter' if adapter else 'finetune'}:{base}"} if base else set()
    return sorted(kept | named | {str(recipe.method["name"]).rpartition(":")[2].replace("_", "-")})


def too_long_note(recipe: Recipe, count: int) -> str:
    """Say what happened to training records that are too long; the text follows the number of examples."""
    gone = "left out" if recipe.model.head == "causal" else "cut"
    return f", {count:,} longer than {recipe.data.max_length} tokens {gone}" if count else ""


ON_OTHER_TEXT = ("forgetting", "text_loss")  # figures that are not of the test records


def _model_index(results: Sequence[Mapping[str, Any]], recipe: Recipe) -> list[EvalResult]:
    """Return the trained model's figures on test records for the hub's own tables."""
    return [
        EvalResult(
            task_type=TASKS[recipe.model.head][0],
            dataset_type=_dataset(recipe, name),
            dataset_name=_dataset(recipe, name),
            dataset_split=result["split"],
            metric_type=name,
            metric_value=value,
        )
        for result in results
        if result["split"] == "test"
        for name, value in result["metrics"].get("tuned", {}).items()
        if name not in ON_OTHER_TEXT
        if value is not None and math.isfinite(value)
    ]


def _dataset(recipe: Recipe, metric: str) -> str:
    """The test set of a metric, or of `metric/part`; of a mean over several sets all their names."""
    tests = recipe.data.tests or {"": recipe.data.test or ""}
    part = metric.partition("/")[2]
    found = [source_name(source) for source in ([tests[part]] if part in tests else tests.values())]
    return ", ".join(s.removeprefix("hub:").split(":")[0].split(",")[0] if s.startswith("hub:") else s for s in found)


# A POSIX path of two parts or more, one in the home folder, one of Windows; not what stands behind "//" in a URL.
_PATH = re.compile(r"(?<![\w.:/~])(?:~?/[^\s/\"'`|<>]+(?:/[^\s/\"'`|<>]*)+|~/[^\s\"'`|<>]+|[A-Za-z]:\\[^\s\"'`|<>]+)")
_FILE_URL = re.compile(r"file://")
_TOKEN = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|gh[pousr]_[A-Za-z0-9]{16,}|glpat-[\w-]{16,}|sk-[\w-]{16,}|AKIA[0-9A-Z]{16}|xox[abprs]-[\w-]{10,})"
)
_CREDENTIALS = re.compile(r"(?<=://)[^/\s@]+@")
_HUB_NAME = re.compile(r"\w[\w.-]*(?:/\w[\w.-]*)?")
REMOVED = "(removed)"


def without_private_paths(text: object) -> str:
    """A text without local paths, of which the last part stays, and without tokens and passwords in URLs."""
    text = _CREDENTIALS.sub("", _TOKEN.sub(REMOVED, _FILE_URL.sub("", str(text))))
    return _PATH.sub(lambda found: re.split(r"[/\\]", found[0].rstrip("/\\"))[-1], text)


def cell(text: object) -> str:
    """Return a text as one cell of a Markdown table."""
    return as_markdown(" ".join(without_private_paths(text).split()))


def source_name(source: str) -> str:
    """Return the name of records: a hub's name as it is, of a file its name alone."""
    return " + ".join(
        without_private_paths(one) if one.startswith("hub:") else Path(one.replace("\\", "/")).name
        for one in joined(source)
    )


def is_hub_name(name: str) -> bool:
    """Whether a hub could have a model of that name."""
    return _HUB_NAME.fullmatch(name) is not None and not name.endswith(".gguf")
