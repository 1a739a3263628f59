"""Fill in the pages of docs that quote results: `python -m scripts.evidence --write`.

The .md files in folders here are the texts of the pages in the same folders of the repository, with
{{STUDY/METHOD/FIELD}} where a figure belongs (facts.py), and {{ledger}} or {{waiting}} for a whole table (ledger.py).
A line <!-- holds: STUDY/METHOD is VERDICT; ... --> says what the words around it rest on; it stops the script when the
results say otherwise. STUDY/* is every comparison of the study, "is not VERDICT" the opposite.
A line <!-- fresh: STUDY after STUDY; ... --> says that the first has none of the other's seeds.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from . import ledger
from .facts import ROOT, quoted, study, verdicts

HERE = Path(__file__).parent
TABLES = {"ledger": ledger.studies, "waiting": ledger.waiting}
_FIGURE = re.compile(r"\{\{(.+?)\}\}")
_HOLDS, _FRESH = (re.compile(rf"^<!-- {word}: (.+?) -->\n", re.MULTILINE | re.DOTALL) for word in ("holds", "fresh"))


def filled(text: str) -> str:
    """The text with its figures. Raises ValueError where the results no longer say what its words rest on."""
    for path, expected in claims(text):
        name, _, candidate = path.partition("/")
        for found in verdicts(name, candidate):
            if found.startswith(expected.removeprefix("not ")) == expected.startswith("not "):
                raise ValueError(f"The words rest on {path} being {expected}, and it is {found}: write them anew.")
    for pair in (pair for line in _FRESH.findall(text) for pair in line.split(";")):
        later, earlier = (set(study(name.strip())["study"]["seeds"]) for name in pair.split(" after "))
        if later & earlier:
            raise ValueError(f"{pair.strip()}: seeds {sorted(later & earlier)} are not fresh.")
    return _FIGURE.sub(lambda match: TABLES.get(match[1], quoted)(match[1]), _FRESH.sub("", _HOLDS.sub("", text)))


def claims(text: str) -> list[tuple[str, str]]:
    """What a text says that it rests on: STUDY/METHOD and the verdict."""
    every = [claim.rpartition(" is ") for held in _HOLDS.findall(text) for claim in held.replace("\n", " ").split(";")]
    return [(path.strip(), expected.strip()) for path, _, expected in every]


def pages() -> dict[Path, str]:
    """Each page with its figures."""
    texts = {ROOT / text.relative_to(HERE): text.read_text(encoding="utf-8") for text in sorted(HERE.rglob("*.md"))}
    return {page: filled(text) for page, text in texts.items()}


def main(argv: list[str] | None = None) -> None:
    """Print the pages, or write them."""
    parser = argparse.ArgumentParser(prog="python -m scripts.evidence", description=__doc__)
    parser.add_argument("--write", action="store_true", help="into docs and results/pages")
    write = parser.parse_args(argv).write
    for file, text in pages().items():
        if write:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
        else:
            print(text, end="")


if __name__ == "__main__":
    main()
