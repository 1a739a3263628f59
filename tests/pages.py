"""The blocks of code in a Markdown page, each with what the comments before it say about its test.

<!-- test: hidden          Python that a reader need not see: it runs in its place among the blocks
<!-- test: skip, REASON -->  the next block is not run
<!-- test: needs MODULE -->  … where that module is not installed
<!-- test: from FILE -->     an excerpt of a tested file: its lines are there, in this order; `...` leaves some out
<!-- test: file NAME -->     the block is a file, which the blocks after it find
<!-- test: run -->           these commands are executed, not only parsed
<!-- test: output -->        what the block before it prints. A number stands for any number, a time for any time, a
                             size for any size, `…` for what is left out, whole lines too: machines differ in these,
                             and in no word
<!-- test: output, exact -->    … with the same numbers
<!-- test: output, whole -->    … where the whole tutorial runs (`make tutorial`): a shortened one gives other answers
<!-- test: recipe -->        YAML of a recipe; `study` of a study
"""

import functools
import re
from dataclasses import dataclass, field
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
MARK = "<!-- test:"


@dataclass
class Block:
    """language: of the fence, "hidden" for Python in a comment. line: of its first line of code, from 1."""

    language: str
    code: str
    line: int
    marks: dict[str, str] = field(default_factory=dict)


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> list[Block]:
    return [*_blocks(page.read_text(encoding="utf-8"))]


@functools.cache
def _blocks(text: str) -> list[Block]:
    found, marks = [], {}
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        if token.type == "html_block" and token.content.startswith(MARK):
            text = token.content.removeprefix(MARK).rpartition("-->")[0]
            word, _, rest = text.strip().partition("\n" if text.strip().startswith("hidden") else " ")
            if word == "hidden":
                found.append(Block("hidden", rest, token.map[0] + 2))
            else:
                marks[word.rstrip(",")] = rest.strip()
        elif token.type == "fence":
            found.append(Block(token.info.split(" ")[0], token.content, token.map[0] + 2, marks))
            marks = {}
        elif token.type not in ("paragraph_close", "html_block"):
            marks = {}
    return found


def commands(code: str) -> list[str]:
    """The lines of a shell block, those that go on in the next one joined."""
    return [line.strip() for line in code.replace("\\\n", " ").splitlines() if line.strip()]


def differs(shown: str, printed: str, exact: bool = False) -> str:
    """The first line of `shown` that is not in `printed`, in its order; "" where all are."""
    at, text = 0, _comparable(printed, exact)
    for line in filter(None, map(str.strip, shown.splitlines())):
        parts = map(re.escape, _comparable(line, exact).split("…"))
        found = re.compile(r"[^\n]*?".join(parts)).search(text, at)
        if not found:
            return line
        at = found.end()
    return ""


def _comparable(text: str, exact: bool) -> str:
    """Without the frames of tables, with one space for many and, if not exact, one number for all."""
    text = re.sub(r"[^\S\n]+", " ", re.sub("[─-╿]", " ", text))
    if exact:
        return text
    text = re.sub(r"(\d+ h )?(\d+ min )?\b\d+(\.\d+)? m?s\b|\b\d+ (h|min)\b", "0 s", text)
    return re.sub(r"\d+([.,]\d+)*( [kMGT]B\b)?", "0", text)


def only_looks(words: list[str]) -> bool:
    """Whether a dual-lora command trains nothing and needs no file of the reader's."""
    if any("$" in word or word.startswith(("my-", "gpu-")) for word in words):  # gpu-: data that the reader fetches
        return False
    looks = words[0] == "recipes" or (words[0] == "estimate" and "--calibrate" not in words)
    return looks or "--dry-run" in words or words == ["compare"]
