"""Pages and what the source says have no phrase for which scripts/phrases.txt has a plainer one.

`make lint` checks single words everywhere.
"""

import io
import re
import tokenize

import pytest

from pages import PAGES, ROOT, name_of

PHRASES = dict(line.split("->") for line in (ROOT / "scripts" / "phrases.txt").read_text(encoding="utf-8").splitlines())
FOUND = re.compile(r"(?<![\w-])(" + "|".join(p.replace(" ", r"\s+") for p in PHRASES) + r")(?![\w-])", re.IGNORECASE)
CODE = re.compile(r"```.*?```|<!--.*?-->|`[^`]*`|\]\([^)]*\)", re.DOTALL)


def found(text):
    return [" ".join(phrase.lower().split()) for phrase in FOUND.findall(CODE.sub("", text))]


@pytest.mark.parametrize(
    "page",
    [*PAGES, ROOT / "CHANGELOG.md", ROOT / "LOG.md", *sorted((ROOT / "results" / "log").glob("*.md"))],
    ids=name_of,
)
def test_a_page_says_it_plainly(page):
    text = page.read_text(encoding="utf-8")
    assert not [f"{phrase!r}: {PHRASES[phrase]}" for phrase in found(text)]


def words(file):
    """The comments and texts of a file of source, with the line of each."""
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".yaml":
        return [(n, line) for n, line in enumerate(text.splitlines(), 1) if line.lstrip().startswith("#")]
    kinds = {tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}  # since 3.12
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    # What an f-string computes is code; so is a text of one word.
    return [(t.start[0], re.sub(r"\{[^}]*\}", "", t.string)) for t in tokens if t.type in kinds and " " in t.string]


@pytest.mark.parametrize("folder", ["src", "benchmarks", "conformance", "examples", "scripts"])
def test_source_says_it_plainly(folder):
    files = [file for kind in ("*.py", "*.yaml") for file in (ROOT / folder).rglob(kind)]
    files = [file for file in files if "tool_calls" not in file.parts]  # the demo's sentences
    assert files
    assert not [
        f"{file.relative_to(ROOT)}:{line}: {phrase!r}: {PHRASES[phrase]}"
        for file in files
        for line, text in words(file)
        for phrase in found(text)
        if phrase not in ("twin", "twins")  # names of recipes and a key of their files
    ]


def test_a_phrase_is_found_across_lines_and_not_in_code():
    text = "It hangs\n  on `the twin` of [a twin](twins.md), beside\nglue-twin-cola."
    assert found(text) == ["hangs on", "twin", "beside"]
