"""What mkdocs does not do by itself: notebooks as pages, formulas as MathML, GitHub's notes, tabs, links out of docs/.

A linked file of the repository is copied into the site (as text; those of results/pages as pages), a linked folder
becomes plain text: the site needs no repository behind it. The build fails where a page would load something from
elsewhere. Where the repository's address is known (`GITHUB_REPOSITORY`, which a hosted runner sets), pages link to it,
and notebooks to hosted ones.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
OWN = ROOT / "results" / "pages"
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
_ALERT = re.compile(r"^> \[!(NOTE|TIP|IMPORTANT|WARNING|CAUTION)\]\n((?:^>.*(?:\n|\Z))+)", re.MULTILINE)
_TABS = re.compile(r"^<!-- tabs -->\n(.*?)^<!-- /tabs -->$", re.MULTILINE | re.DOTALL)
_PERCENT = re.compile(r"(?<=\d) (?=%)")
_INLINE = re.compile(r"(?<!<pre>)(?<!</span>)<code>([^<]*-[^<]*)</code>")
_CELL = re.compile(r"<td\b.*?</td>", re.DOTALL)
_WORDS = re.compile(r"<code>([^<]* [^<]*)</code>")
SENTENCE = 24  # letters of code with blanks from which on a cell may break it between its words
LONGEST = 32  # letters of code that stay together: all of them fit on a phone
_LOADED = re.compile(
    r"<(?:script|img|iframe|source|video|audio)\b[^>]*\ssrc=\"?(?:https?:)?//"
    r"|<link\b[^>]*\brel=\"?(?:stylesheet|preload|preconnect|icon)\"?[^>]*href=\"?(?:https?:)?//"
    r"|<link\b[^>]*href=\"?(?:https?:)?//[^>]*rel=\"?(?:stylesheet|preload|preconnect)"
    r"|@import\s+(?:url\()?[\"']?(?:https?:)?//|url\([\"']?(?:https?:)?//"
)


def on_config(config: Any) -> Any:
    """Blocks of ```math become MathML; the repository gets its link."""
    if repository := config.extra["repository"]:
        config.repo_name, config.repo_url = repository, f"https://github.com/{repository}"
    fences = config.mdx_configs.setdefault("pymdownx.superfences", {}).setdefault("custom_fences", [])
    fences.append({"name": "math", "class": "math", "format": formula})
    return config


def admonition(found: re.Match[str]) -> str:
    """`> [!NOTE]` and the quoted lines below it, as mkdocs writes a note."""
    kind = {"IMPORTANT": "note", "CAUTION": "danger"}.get(found[1], found[1].lower())
    lines = [re.sub(r"^> ?", "", line) for line in found[2].splitlines()]
    return f"!!! {kind}\n\n" + "".join(f"    {line}\n" if line else "\n" for line in lines)


def tabs(found: re.Match[str]) -> str:
    """What stands under bold titles between `<!-- tabs -->` and `<!-- /tabs -->`, a tab each. GitHub shows titles."""
    before, *parts = re.split(r"^\*\*(.+)\*\*$\n", found[1], flags=re.MULTILINE)
    if before.strip() or len(parts) < 4:
        raise PluginError(f"Tabs need two **titles** on lines of their own, and nothing before them: {found[0][:200]}")
    shown = []
    for title, body in zip(parts[::2], parts[1::2], strict=True):
        lines = [f"    {line}\n" if line else "\n" for line in body.strip("\n").splitlines()]
        shown.append(f'=== "{title}"\n\n' + "".join(lines))
    return "\n".join(shown)


def formula(source: str, *_: Any, **__: Any) -> str:
    """LaTeX as MathML, which browsers draw by themselves."""
    from latex2mathml.converter import convert

    return f'<div class="math">{convert(source.strip(), display="block")}</div>'


def on_files(files: Files, config: Any) -> Files:
    """Add the notebooks as pages, and the repository's files that pages link to."""
    docs = Path(config.docs_dir)
    for file in list(files):
        if file.src_uri.endswith(".ipynb"):
            files.append(File.generated(config, file.src_uri.replace(".ipynb", ".md"), content=notebook(file, config)))
            files.remove(file)
    for page in [*docs.rglob("*.md"), *OWN.glob("*.md")]:
        for _, _, link in _LINK.findall(page.read_text(encoding="utf-8")):
            target = _outside(page, link, docs)
            if target and target.is_file() and files.get_file_from_path(_copy(target)) is None:
                files.append(File.generated(config, _copy(target), abs_src_path=str(target)))
    for page in OWN.glob("*.md"):
        if files.get_file_from_path(_copy(page)) is None:
            files.append(File.generated(config, _copy(page), abs_src_path=str(page)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links out of docs/ lead to the copies; notes as GitHub writes them, and ways side by side, become the site's."""
    markdown = _TABS.sub(tabs, _ALERT.sub(admonition, markdown))
    docs = Path(config.docs_dir)
    here = docs / page.file.src_uri
    own = page.file.src_uri.startswith("results/pages/")
    told = ROOT / page.file.src_uri if own else here  # from where its links lead

    def rewritten(found: re.Match[str]) -> str:
        path, sign, anchor = found[3].partition("#")
        target = _outside(told, found[3], docs)
        if own and target is None and path and "://" not in path:  # into docs/
            target = Path(os.path.normpath(told.parent / path))
            return f"{found[1]}[{found[2]}]({os.path.relpath(target, here.parent)}{sign}{anchor})"
        if target is None:  # a notebook is a page here
            return found[0].replace(".ipynb)", ".md)") if "://" not in found[3] else found[0]
        if not target.exists():
            raise PluginError(f"{page.file.src_uri}: {found[3]} leads nowhere.")
        if target.is_dir():
            return found[2]
        after = sign + anchor if target.parent == OWN else ""
        return f"{found[1]}[{found[2]}]({os.path.relpath(docs / _copy(target), here.parent)}{after})"

    return _LINK.sub(rewritten, markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Where a line breaks: not before a %, nor behind the hyphens of an option in code, if a phone has room for it.

    Code in a cell stays in one piece, but a message or a command breaks between its words.
    """
    parts = re.split(r"(<pre.*?</pre>)", html, flags=re.DOTALL)
    html = "".join(part if part.startswith("<pre") else _PERCENT.sub("\u00a0", part) for part in parts)
    html = _CELL.sub(lambda cell: _WORDS.sub(_by_words, cell[0]), html)
    return _INLINE.sub(lambda found: f"<code>{re.sub('[^ ]+', _together, found[1])}</code>", html)


def _by_words(code: re.Match[str]) -> str:
    if len(code[1]) <= SENTENCE:
        return code[0]
    words = (f'<span class="together">{word}</span>' for word in code[1].split(" "))
    return f'<code class="words">{" ".join(words)}</code>'


def _together(word: re.Match[str]) -> str:
    return f'<span class="together">{word[0]}</span>' if "-" in word[0] and len(word[0]) <= LONGEST else word[0]


def on_page_context(context: Any, page: Any, **_: Any) -> Any:
    """The home page has no neighbours to show."""
    if page.is_homepage:
        page.meta["hide"] = ["navigation"]
    return context


def hosted(file: File, repository: str) -> str:
    """Where to open the notebook on a machine of someone else's, and what it has to run first."""
    name = f"docs/{file.src_uri}"
    return (
        f"[Open in Colab](https://colab.research.google.com/github/{repository}/blob/main/{name}), and run first:\n\n"
        f"```text\n!git clone --depth 1 https://github.com/{repository} dual-lora\n"
        f"%cd dual-lora/{os.path.dirname(name)}\n%pip install '../..[lab]'\n```"
    )


def notebook(file: File, config: Any) -> str:
    """A notebook's cells and outputs as Markdown."""
    book = json.loads(Path(str(file.abs_src_path)).read_text(encoding="utf-8"))
    parts = []
    for number, cell in enumerate(book["cells"]):
        if number == 1 and config.extra["repository"]:  # below the title
            parts.append(hosted(file, config.extra["repository"]))
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "text/html" in data:
                parts.append("".join(data["text/html"]))
            elif text := "".join(output.get("text", data.get("text/plain", ""))).rstrip():
                parts.append(f"```text\n{text}\n```")
    return "\n\n".join(parts) + "\n"


def on_post_build(config: Any) -> None:
    """Fail where a page loads a script, a style, a font or a picture from elsewhere."""
    for file in Path(config.site_dir).rglob("*"):
        own = file.suffix in {".html", ".css"} and "files" not in file.relative_to(config.site_dir).parts
        if own and (found := _LOADED.search(file.read_text(encoding="utf-8"))):
            raise PluginError(f"{file} loads something from elsewhere: {found[0]}")


def _outside(page: Path, link: str, docs: Path) -> Path | None:
    """The file or folder outside docs/ that a link leads to, None for any other link."""
    path = link.partition("#")[0]
    if not path or "://" in link or link.startswith("mailto:"):
        return None
    target = Path(os.path.normpath(page.parent / path))
    return None if target.is_relative_to(docs) else target


def _copy(target: Path) -> str:
    """Where a repository's file lies in the site: what a browser would not show gets .txt."""
    name = target.relative_to(ROOT).as_posix()
    if target.parent == OWN and target.suffix == ".md":
        return name
    return f"files/{name}" + ("" if target.suffix in {".html", ".svg", ".png", ".pdf", ".txt"} else ".txt")
