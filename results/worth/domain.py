"""Text unlike the model's, and text like it, for a study of learning and forgetting.

    python results/worth/domain.py DATA
    DUAL_LORA_DATA=DATA dual-lora compare results/worth/domain.yaml --out STUDY
    python results/worth/domain.py DATA --pareto STUDY

DATA/permuted/: E2E's sentences in a language that no model has seen: every word stands for another one of E2E's 1,200
or so, by one fixed permutation, so that all there is to learn is new. Trained on the sentences of E2E's test file,
judged on those of its validation file; DATA/known.txt: questions and film reviews, on which forgetting is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import sys
from pathlib import Path

WORD = re.compile(r"[A-Za-z]+")
KNOWN = 120  # texts of each kind


def sentences(file: Path) -> list[str]:
    """E2E's sentences, each once."""
    lines = file.read_text(encoding="utf-8").split("\n")
    found = (line.split("||")[1].strip() for line in lines if "||" in line)
    return list(dict.fromkeys(text for text in found if " " in text))


def permutation(texts: list[str]) -> dict[str, str]:
    """Every lower-case word of the texts, and the one that stands for it."""
    words = sorted({word.lower() for text in texts for word in WORD.findall(text)})
    return dict(zip(words, random.Random(0).sample(words, len(words)), strict=True))


def halved(text: str) -> tuple[str, str]:
    """A text's first words, and as many more, which it is judged by when the first are known."""
    words = text.split(" ")
    half = (len(words) + 1) // 2
    return " ".join(words[:half]) + " ", " ".join(words[half:])


def make(source: Path, out: Path) -> None:
    """Write the data."""
    train, test = (sentences(source / "e2e" / name) for name in ("test.txt", "valid.txt"))
    other = permutation(train + test)
    (out / "permuted").mkdir(parents=True, exist_ok=True)
    for name, texts in (("train", train), ("test", test)):
        random.Random(1).shuffle(texts)
        halves = [halved(WORD.sub(lambda word: other[word[0].lower()], text)) for text in texts]
        lines = (json.dumps({"prompt": first, "answer": second}) + "\n" for first, second in halves)
        (out / "permuted" / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    asked = json.loads((source / "commonsense" / "boolq" / "test.json").read_text(encoding="utf-8"))
    reviews = (source / "glue" / "SST2" / "dev.tsv").read_text(encoding="utf-8").split("\n")
    known = [record["instruction"].split("question: ")[-1].split("\n")[0] for record in asked[:KNOWN]]
    known += [line.split("\t")[1] for line in reviews if "\t" in line][:KNOWN]
    (out / "known.txt").write_text("\n".join(known) + "\n", encoding="utf-8")


def pareto(study: Path) -> None:
    """What each method learned against what it forgot, at each length, over the seeds."""
    for method in json.loads((study / "results.json").read_text(encoding="utf-8"))["methods"]:
        figures = [run["figures"] for run in method["seeds"] if run["status"] == "done"]
        loss, forgotten = (sum(f[name] for f in figures) / len(figures) for name in ("loss", "forgetting"))
        learned = f"loss {loss:.3f}, forgetting {forgotten:+.3f} nats"
        print(f"{method['task']}, {method['method']}: {learned} ({len(figures)} seeds)")


def main() -> None:
    """Write the data, or print a finished study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--pareto", type=Path, metavar="STUDY")
    args = parser.parse_args()
    if args.pareto:
        pareto(args.pareto)
    else:
        make(Path(os.environ.get("DUAL_LORA_DATA", "../shared/data")), args.data)
        print(f"{args.data} holds the data.", file=sys.stderr)


if __name__ == "__main__":
    main()
