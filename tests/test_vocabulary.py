"""Pages have no phrase for which scripts/phrases.txt has a plainer one; `make lint` checks single words everywhere."""

import re

import pytest

from pages import PAGES, ROOT, name_of

GENERATED = "<!-- Written by `python -m scripts.reference`. -->"  # their words come from the code
PHRASES = dict(line.split("->") for line in (ROOT / "scripts" / "phrases.txt").read_text(encoding="utf-8").splitlines())
FOUND = re.compile(r"(?<![\w-])(" + "|".join(p.replace(" ", r"\s+") for p in PHRASES) + r")(?![\w-])", re.IGNORECASE)
CODE = re.compile(r"```.*?```|<!--.*?-->|`[^`]*`|\]\([^)]*\)", re.DOTALL)


def found(text):
    return [" ".join(phrase.lower().split()) for phrase in FOUND.findall(CODE.sub("", text))]


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=name_of)
def test_a_page_says_it_plainly(page):
    text = page.read_text(encoding="utf-8")
    assert GENERATED in text or not [f"{phrase!r}: {PHRASES[phrase]}" for phrase in found(text)]


def test_a_phrase_is_found_across_lines_and_not_in_code():
    text = "It hangs\n  on `the twin` of [a twin](twins.md), beside\nglue-twin-cola."
    assert found(text) == ["hangs on", "twin", "beside"]
