"""Fill in docs/explanation/evidence.md: `python -m scripts.evidence --write`.

page.md beside this file is the text, with {{STUDY/METHOD/FIELD}} where a figure belongs (facts.py).
A line <!-- holds: STUDY/METHOD is VERDICT; ... --> says what the words around it rest on; it stops the script when the
results say otherwise.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from .facts import ROOT, quoted, verdict

HERE = Path(__file__).parent
PAGE = ROOT / "docs" / "explanation" / "evidence.md"
_FIGURE = re.compile(r"\{\{(.+?)\}\}")
_HOLDS = re.compile(r"^<!-- holds: (.+?) -->\n", re.MULTILINE | re.DOTALL)


def filled(text: str) -> str:
    """The text with its figures. Raises ValueError where the results no longer say what its words rest on."""
    for claims in _HOLDS.findall(text):
        for claim in claims.replace("\n", " ").split(";"):
            path, _, expected = (part.strip() for part in claim.rpartition(" is "))
            study, _, candidate = path.partition("/")
            found = verdict(study, candidate)
            if not found.startswith(expected):
                raise ValueError(f"The words rest on {path} being {expected}, and it is {found}: write them anew.")
    return _FIGURE.sub(lambda match: quoted(match[1]), _HOLDS.sub("", text))


def page() -> str:
    """The page."""
    return filled((HERE / "page.md").read_text(encoding="utf-8"))


def main(argv: list[str] | None = None) -> None:
    """Print the page, or write it."""
    parser = argparse.ArgumentParser(prog="python -m scripts.evidence", description=__doc__)
    parser.add_argument("--write", action="store_true", help="into docs/explanation/evidence.md")
    if parser.parse_args(argv).write:
        PAGE.write_text(page(), encoding="utf-8")
    else:
        print(page(), end="")


if __name__ == "__main__":
    main()
