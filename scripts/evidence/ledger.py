"""Tables of the page of evidence that are made of all studies: one line each, and those that have not been run."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from dual_lora.lab.study.read import shipped_studies

from .facts import ROOT, _names, study

TEXTS = ROOT / "scripts" / "evidence" / "results" / "pages"
OVERVIEWS = ("questions.md", "situations.md")
WORDS = {  # verdict -> as it is counted
    "significantly better": "better",
    "significantly worse": "worse",
    "significantly different, size unclear": "different",
    "equivalent within the margin": "equivalent",
    "inconclusive": "inconclusive",
    "neither learned the task": "not learned",
}


def studies(_: str = "") -> str:
    """A row a published study: question, task, reference, seeds, how many verdicts of each kind, and the last run's
    day; with the page that says most of it, and its file."""
    rows = ["| study | question | task | against | seeds | verdicts | finished |", "|---|---|---|---|---|---|---|"]
    return "\n".join([*rows, *(_row(name) for name in _names())])


def waiting(_: str = "") -> str:
    """The names of the shipped studies that have no published results."""
    return ", ".join(f"`{name}`" for name in sorted(set(shipped_studies()) - set(_names())))


def _row(name: str) -> str:
    results = study(name)
    asked: dict[str, Any] = results["study"]
    found = Counter(WORDS[c["verdict"]] for c in results["comparisons"])
    verdicts = ", ".join(f"{found[word]} {word}" for word in WORDS.values() if found[word])
    against = "all pairs" if asked["pairs"] == "all" else f"`{asked['reference']}`"
    cells = [
        f"[`{name}`](../../results/pages/{_page(name)})",
        asked["question"],
        ", ".join(asked["tasks"]),
        against,
        str(len(asked["seeds"])),
        f"[{verdicts}](../../results/studies/{name}/results.json)",
        results["provenance"]["finished"][:10],
    ]
    return "| " + " | ".join(cells) + " |"


def _page(name: str) -> str:
    """The page that introduces a study, in brackets, or else quotes it most. Raises ValueError where none does."""
    named = re.compile(rf"(?<![\w-]){re.escape(name)}(?=[/`])")
    texts = {file.name: file.read_text(encoding="utf-8") for file in sorted(TEXTS.glob("*.md"))}
    told = {page: 9 * text.count(f"(`{name}`") + len(named.findall(text)) for page, text in texts.items()}
    page = max(sorted(set(told) - {*OVERVIEWS}), key=told.__getitem__)
    if not told[page]:
        raise ValueError(f"No page in {TEXTS.relative_to(ROOT)} says anything of the study {name}: write a line there.")
    return page
