"""How good are the texts of a finished study of E2E? Run after: dual-lora compare e2e-again --keep adapters --out STUDY

    python results/worth/texts.py STUDY [--runs FOLDER] [--prompts 120]
    dual-lora judge STUDY/texts.csv --reference lora --metric rouge_l --margin 0.01 --out STUDY/rouge_l
    dual-lora judge STUDY/bleu.csv --reference lora --margin 1 --out STUDY/bleu

Every final adapter writes a sentence for each of so many prompts of the study's test file, greedily. A text's
ROUGE-L and, where WordNet is installed, METEOR against all references of its prompt are in texts.csv; BLEU, which is
no mean over texts, is in bleu.csv, one figure a run. The texts themselves are kept in STUDY/texts, one file a run;
what is there is not written again.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Iterator
from pathlib import Path

from dual_lora.lab.data.examples import load_split
from dual_lora.lab.files.write import write_json
from dual_lora.lab.model.opened import open_tuned
from dual_lora.lab.run.evaluate import evaluate
from dual_lora.lab.run.figures import nlg_figures

ITEMS = ("rouge_l", "meteor")


def finals(study: Path, runs: Path) -> Iterator[tuple[str, int, Path]]:
    """Method, seed and run folder of all final runs that ended well."""
    for method in json.loads((study / "results.json").read_text(encoding="utf-8"))["methods"]:
        for run in method["seeds"]:
            if run["status"] == "done":
                yield method["method"], run["seed"], runs / run["key"]


def texts(run: Path, prompts: int, kept: Path) -> list[tuple[str, list[str]]]:
    """What the adapter of a run writes for each prompt, and the references. kept: a folder for them."""
    file = kept / f"{run.name}-{prompts}.json"
    if file.exists():
        return [(text, references) for text, references in json.loads(file.read_text(encoding="utf-8"))]
    tuned = open_tuned(run)
    assert tuned.recipe is not None
    data = tuned.recipe.data.model_copy(update={"test_limit": None, "test_prompts": prompts})
    spec = tuned.recipe.evaluate.model_copy(update={"tasks": ["nlg"], "base": False})
    found = evaluate(tuned, data, spec, examples=load_split(data, "test"), variants=["tuned"], progress=False)
    written = [(item["predicted"], item["references"]) for item in found.items]
    kept.mkdir(exist_ok=True)
    write_json(file, written)
    return written


def main() -> None:
    """Write both tables; a run is a line of progress."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("--runs", type=Path, help="of the study, if not STUDY/runs")
    parser.add_argument("--prompts", type=int, default=120)
    args = parser.parse_args()
    with (
        (args.study / "texts.csv").open("w", newline="") as by_item,
        (args.study / "bleu.csv").open("w", newline="") as by_run,
    ):
        items, runs = csv.writer(by_item), csv.writer(by_run)
        items.writerow(("method", "seed", "item", "score", "metric"))
        runs.writerow(("method", "seed", "score", "metric"))
        for method, seed, run in finals(args.study, args.runs or args.study / "runs"):
            written = texts(run, args.prompts, args.study / "texts")
            for i, (text, own) in enumerate(written):
                figures = nlg_figures([text], [own])
                items.writerows((method, seed, i, f"{figures[n]:.6g}", n) for n in ITEMS if n in figures)
            bleu = nlg_figures(*map(list, zip(*written, strict=True)))["bleu"]
            runs.writerow((method, seed, f"{bleu:.6g}", "bleu"))
            print(f"{method}, seed {seed}: BLEU {bleu:.1f}", flush=True)


if __name__ == "__main__":
    main()
