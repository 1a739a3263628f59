"""The demo: a small model learns to turn English requests into JSON tool calls, and is measured before and after.

Everything is made in one folder (data, run, evaluation, merged model) and is used again by the next call. The base
model is not told the tools: what it scores is what it knows, and what the adapter scores is what it has learned.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dual_lora.lab.data import tool_calls
from dual_lora.lab.data.tool_calls import TEST_SETS
from dual_lora.lab.errors import UserError
from dual_lora.lab.files.folder import OWN as OF_A_RUN
from dual_lora.lab.files.folder import check_plain, files_in, remove_own
from dual_lora.lab.files.write import WHOLE, make_folder, write_folder_atomically, write_json
from dual_lora.lab.interrupt import Stopped
from dual_lora.lab.read import read_object
from dual_lora.lab.recipe.read import read_recipe
from dual_lora.lab.recipe.schema import Recipe

if TYPE_CHECKING:
    from dual_lora.lab.run.evaluate import EvalResult
    from dual_lora.lab.run.train import RunResult

RECIPE = "tool-calls"
EXAMPLES = 600  # to train on
TEST_EXAMPLES = 100  # in each test set
BASE_EXAMPLES = 25  # of each test set, for the base model, which knows no tool, and for the check of the merged one
SETTINGS = {"seed", "examples", "test_examples"}
ENTRIES = ("settings.json", "data", "run", "evaluation", "merged", "demo.json")
# The files that a demo wrote, as globs (see `files_in`).
OWN = (
    *("settings.json", "demo.json", f"data/{WHOLE}", f"merged/{WHOLE}"),
    *(f"run/{file}" for file in OF_A_RUN),
    *(f"evaluation/*/*/{file}" for file in ("items.jsonl", "result.json")),
)
SHOWN = 2  # of each test set, before and after


@dataclass
class DemoResult:
    """The result of a demo, as `demo.json` keeps it. Times in seconds, sizes in bytes."""

    folder: str
    seed: int
    examples: int
    trainable_parameters: int
    base_parameters: int
    exact_match: dict[str, dict[str, list[int]]]  # "base" or "tuned" -> test set -> [right, of so many]
    shown: list[dict[str, str]]  # set, request, before, after, expected
    merged: str  # the plain model's folder
    merged_same: list[int] = field(default_factory=list)  # [answers equal to the adapter's, of so many]
    seconds: dict[str, float] = field(default_factory=dict)  # by stage
    training_memory: int = 0  # at the peak of training
    peak_memory: int = 0  # of all stages in one process, two loaded models among them
    reused: bool = False

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())


def run(
    out: Path,
    *,
    seed: int = 0,
    overwrite: bool = False,
    examples: int = EXAMPLES,
    test_examples: int = TEST_EXAMPLES,
    overrides: dict[str, Any] | None = None,
    progress: bool = True,
) -> DemoResult:
    """Copy the data, train, evaluate and merge in the folder `out`; what is there already is used again.

    overrides: laid over the recipe, as in `read_recipe`. A demo that was interrupted goes on where it stopped.
    Raises UserError when `out` holds something else, KeyboardInterrupt with the way on when interrupted.
    """
    data = {"train": str(out / "data" / "train.jsonl"), "test": str(out / "data" / f"{TEST_SETS[-1]}.jsonl")}
    recipe = read_recipe(RECIPE, Recipe.merged({"data": data, "train": {"seed": seed}}, overrides or {}))
    wanted = {"seed": seed, "examples": examples, "test_examples": test_examples}
    there = _settings(out)
    if there is None and out.is_dir() and any(out.iterdir()):
        raise UserError(f"{out} is not empty and holds no demo: give another --out.")
    if there and overwrite:
        remove_own(out, OWN)
    elif there and there != wanted:
        hint = "" if files_in(out, OWN)[1] else ", or --overwrite"
        raise UserError(f"{out} holds a demo with {there}, not {wanted}: give another --out{hint}.")
    if overwrite or not there:
        make_folder(out)
        write_json(out / "settings.json", wanted)
    if not (out / "data").is_dir():
        size = (examples, test_examples)
        write_folder_atomically(out / "data", lambda folder: tool_calls.copy_to(folder, *size), listed=True)
    if (done := read_result(out)) is not None:
        return replace(done, reused=True)
    return _make(out, seed, recipe, progress)


def _settings(out: Path) -> dict[str, Any] | None:
    """Return the settings that the demo in `out` was made with, None if there is none. Raises UserError for links in
    it."""
    check_plain(out, ENTRIES)
    with suppress(OSError, ValueError):
        settings = read_object(out / "settings.json")
        return settings if set(settings) == SETTINGS else None
    return None


def read_result(out: Path) -> DemoResult | None:
    """The result of the demo in `out`, None if it was not finished; UserError for a record of another version."""
    file = out / "demo.json"
    if _settings(out) is None or not file.is_file():
        return None
    try:
        return DemoResult(**read_object(file))
    except (TypeError, ValueError):
        raise UserError(f"{file} is damaged or of another version: start again with --overwrite.") from None


def ask(out: Path, request: str) -> str:
    """Return the answer of the merged model of the demo in `out` to a request of one's own: JSON, if it has learned its
    task.

    Raises UserError if there is no finished demo.
    """
    done = read_result(out)
    if done is None:
        raise UserError(f"There is no finished demo in {out}: `dual-lora demo` makes one.")
    if not request.strip():
        raise UserError('The request is empty: ask for something, as in --ask "Set a timer for 5 minutes for the tea."')
    from dual_lora.lab.data.encode import Prompter
    from dual_lora.lab.model.generate import generate_all

    recipe = read_recipe(out / "run")
    tuned = _open_merged(out, recipe)
    prompt = Prompter(tuned.tokenizer, "chat").prompt_ids(tuple(tool_calls.messages_for(request.strip())))
    return generate_all(tuned.model, tuned.tokenizer, [prompt], 1, recipe.evaluate.max_new_tokens)[0].strip()


def _make(out: Path, seed: int, recipe: Recipe, progress: bool) -> DemoResult:
    from dual_lora.lab.data.examples import load_split
    from dual_lora.lab.export.export import merge
    from dual_lora.lab.model.opened import open_tuned
    from dual_lora.lab.run.evaluate import evaluate, write_result
    from dual_lora.lab.run.train import run as train

    seconds: dict[str, float] = {}
    with _stage("training", seconds, progress):
        trained = train(recipe, out / "run", resume=(out / "run").is_dir(), progress=progress)
    if trained.state != "finished":
        raise Stopped(trained.stopped_by, "Interrupted. The same command goes on from here.")
    recipe = read_recipe(out / "run")  # with the precision that was chosen
    seconds["training"] = max(seconds["training"], trained.seconds)  # with what earlier sessions took

    files = {name: recipe.data.model_copy(update={"test": str(out / "data" / f"{name}.jsonl")}) for name in TEST_SETS}
    sets = {name: load_split(data, "test") for name, data in files.items()}
    results: dict[str, dict[str, EvalResult]] = {"base": {}, "tuned": {}}
    with _stage("evaluation", seconds, progress):
        tuned = replace(trained.tuned or open_tuned(out / "run"), run=None)  # its results belong to the demo
        trained.tuned = None
        for variant, of_variant in results.items():
            for name, examples in sets.items():
                asked = examples[:BASE_EXAMPLES] if variant == "base" else examples
                of_variant[name] = evaluate(
                    tuned, recipe.data, recipe.evaluate, examples=asked, variants=[variant], progress=progress
                )
                write_result(of_variant[name], out / "evaluation" / variant / name)
        del tuned  # room for the merged model; layers and their model refer to each other
        gc.collect()

    with _stage("merging and checking", seconds, progress):
        if not (out / "merged").is_dir():
            merge(out / "run", out / "merged", listed=True)
        last = TEST_SETS[-1]
        plain = _open_merged(out, recipe)
        checked = evaluate(plain, recipe.data, recipe.evaluate, examples=sets[last][:BASE_EXAMPLES], progress=progress)

    result = _result(out, seed, trained, sets, results)
    same = [a == b for a, b in zip(_answers(checked), _answers(results["tuned"][last])[:BASE_EXAMPLES], strict=True)]
    result.merged_same = [sum(same), len(same)]
    result.seconds = {stage: round(spent, 1) for stage, spent in seconds.items()}
    write_json(out / "demo.json", asdict(result))
    return result


def _result(
    out: Path, seed: int, trained: RunResult, sets: dict[str, list[Any]], results: dict[str, dict[str, EvalResult]]
) -> DemoResult:
    from dual_lora.lab.run.record import peak_memory

    return DemoResult(
        folder=str(out),
        seed=seed,
        examples=trained.examples,
        trainable_parameters=trained.trainable_parameters,
        base_parameters=trained.all_parameters - trained.trainable_parameters,
        exact_match={
            variant: {
                name: [int(sum(result.scores(variant, "exact_match"))), result.examples]
                for name, result in of_variant.items()
            }
            for variant, of_variant in results.items()
        },
        shown=[
            {
                "set": name,
                "request": str(example.messages[-2]["content"]),
                "before": _answers(results["base"][name])[i],
                "after": _answers(results["tuned"][name])[i],
                "expected": example.answer,
            }
            for name, examples in sets.items()
            for i, example in enumerate(examples[:SHOWN])
        ],
        merged=str(out / "merged"),
        training_memory=trained.peak_memory,
        peak_memory=max(trained.peak_memory, peak_memory()),
    )


def _answers(result: EvalResult) -> list[str]:
    """The generated texts in the order of the examples."""
    return [row["predicted"] for row in result.items]


def _open_merged(out: Path, recipe: Recipe) -> Any:
    """The merged model as a plain folder: nothing of the method is needed to load it."""
    from dual_lora.lab.model.opened import open_tuned

    return open_tuned(str(out / "merged"), dtype=recipe.model.dtype)


@contextmanager
def _stage(name: str, seconds: dict[str, float], progress: bool) -> Iterator[None]:
    """Name what begins, since models load for a while before a bar appears, and time it."""
    from dual_lora.lab.progress import console

    if progress:
        console.print(f"{name} (stage {len(seconds) + 1} of 3)", style="bold")
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start
