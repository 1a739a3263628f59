"""Blocks to one HTML page that loads nothing: style, script and data stand in it.

Names come from other people's files. Every text is escaped here and set as text by the script, and a content security
policy lets no script run but the one whose hash it names.
"""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import asdict
from html import escape
from importlib.resources import files
from typing import Any

from dual_lora.lab.report.blocks import (
    Answer,
    Block,
    Chart,
    Column,
    Page,
    Row,
    Section,
    Source,
    Table,
    Text,
    Verdict,
    slug,
)  # fmt: skip
from dual_lora.lab.report.studies import MOODS

CARDS = 9  # verdicts that are shown unfolded


def render(page: Page, live: int = 0) -> str:
    """The page as HTML. live: seconds after which it loads itself anew, 0 for never."""
    style, script = (files(__package__).joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    writer = _Writer({section.slug for section in page.sections})
    body = "\n".join(writer.section(section) for section in page.sections)
    data = _json({"charts": writer.charts, "live": live})
    policy = (
        f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; img-src data:; base-uri 'none'; "
        "form-action 'none'"
    )
    problems = "".join(f'<p class="warning">{escape(text)}</p>' for text in page.problems)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{escape(policy)}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<title>{escape(page.title)}</title>
<link rel="icon" href="data:,">
<style>{style}</style>
</head>
<body>
<a class="skip" href="#content">To the content</a>
<header class="top">
<h1>{escape(page.title)}</h1>
<p class="made">{escape(page.made)}{" · live" if live else ""}</p>
</header>
<nav class="bar" aria-label="Parts of the report"><div class="in"><div class="links">{_links(page.sections)}</div>\
<button type="button" class="button" id="theme">◐ auto</button></div></nav>
<main id="content">
{problems}
{body}
{_provenance(page.sources)}
</main>
<footer>Written by <code>dual-lora report</code>. The page holds all its data and loads nothing from anywhere.</footer>
<script type="application/json" id="data">{data}</script>
<script>{script}</script>
</body>
</html>
"""


def _hash(text: str) -> str:
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"'sha256-{digest}'"


def _json(value: Any) -> str:
    """JSON that cannot end the script element that it stands in."""
    text = json.dumps(_finite(value), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e").replace("\u2028", "\\u2028")


def _finite(value: Any) -> Any:
    """Without NaN and infinity, which JSON does not have, and with six digits, which is what a plot can show."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if abs(value) < float("inf") else None
    return value


def _links(sections: list[Section]) -> str:
    """A link a part; where a group has several, they unfold under its name."""
    links = ""
    for group in dict.fromkeys(s.group for s in sections):
        here = [s for s in sections if s.group == group]
        each = "".join(f'<a href="#{s.slug}">{escape(s.title)}</a>' for s in here)
        links += each if len(here) == 1 else f"<details><summary>{escape(group)}</summary><div>{each}</div></details>"
    return links + '<a href="#provenance">Provenance</a>'


class _Writer:
    """Writes blocks, and keeps what the script needs for the charts."""

    def __init__(self, used: set[str]) -> None:
        self.charts: dict[str, Row] = {}
        self._used = used

    def _id(self, title: str) -> str:
        base = name = slug(title)
        number = 2
        while name in self._used:
            name, number = f"{base}-{number}", number + 1
        self._used.add(name)
        return name

    def section(self, section: Section) -> str:
        name = section.slug
        blocks = "\n".join(self.block(block) for block in section.blocks)
        whole = f'<h2 id="{name}-h">{escape(section.title)}</h2>\n{blocks}'
        if section.folded:
            head, _, rest = whole.partition("\n")
            whole = f'<details class="fold" id="{name}-fold"><summary>{head}</summary>\n{rest}</details>'
        return f'<section id="{name}" aria-labelledby="{name}-h">{whole}\n</section>'

    def block(self, block: Block) -> str:
        if isinstance(block, Text):
            return f'<p class="{block.kind}">{escape(block.text)}</p>'
        if isinstance(block, Table):
            return self.table(block)
        if isinstance(block, Chart):
            return self.chart(block)
        answers = [item for item in block if isinstance(item, Answer)]
        return self.answers(answers) if answers else self.verdicts([v for v in block if isinstance(v, Verdict)])

    def answers(self, answers: list[Answer]) -> str:
        """Each question, a link to its section, with the verdicts in a line or two."""
        items = ""
        for answer in answers:
            words = " ".join(
                f'<span class="verdict {mood}"><span class="chip">{_sign(mood)} {escape(verdict)}</span> '
                f"{escape(', '.join(who))}</span>"
                for verdict, mood, who in answer.verdicts
            )
            question = f'<a href="#{answer.anchor}">{escape(answer.question)}</a>'
            items += (
                f'<li><p class="asked">{question}</p><p class="about">{escape(answer.about)}</p><p>{words}</p></li>'
            )
        return f'<ul class="answers">{items}</ul>'

    def verdicts(self, verdicts: list[Verdict]) -> str:
        """Cards, sure ones first; beyond a screenful the rest is folded."""
        ordered = sorted(verdicts, key=lambda v: ("good", "bad", "same", "open").index(v.mood))
        items = [
            f'<li class="{v.mood}"><span class="chip">{_sign(v.mood)} {escape(v.verdict)}</span>'
            f"<p>{_with_subject(v)}</p></li>"
            for v in ordered
        ]
        first, rest = (f'<ul class="verdicts">{"".join(part)}</ul>' for part in (items[:CARDS], items[CARDS:]))
        more = f'<details id="{self._id("more verdicts")}"><summary>{len(items) - CARDS} more</summary>{rest}</details>'
        return (first if items else "") + (more if len(items) > CARDS else "")

    def table(self, table: Table) -> str:
        name = self._id(table.title)
        heads = "".join(
            f'<th scope="col"{_numeric(c)}{_title(c.help)}><button type="button">{escape(c.label)}</button></th>'
            for c in table.columns
        )
        rows = "".join(f"<tr>{''.join(_cell(c, row) for c in table.columns)}</tr>" for row in table.rows)
        search = (
            f'<input type="search" placeholder="filter {len(table.rows)} rows" aria-label="Filter the rows">'
            if len(table.rows) > 8
            else ""
        )
        tools = (
            f'<div class="tools">{search}<span class="status visually-hidden" aria-live="polite"></span>'
            + "".join(
                f'<button type="button" class="button" data-export="{kind}" '
                f'aria-label="Save {escape(table.title)} as {label}">{label}</button>'
                for kind, label in (("csv", "CSV"), ("md", "Markdown"), ("tex", "LaTeX"))
            )
            + "</div>"
        )
        note = f'<p class="caption">{escape(table.note)}</p>' if table.note else ""
        note += _meanings(table.columns)
        whole = (
            f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(table.title)}"><table id="{name}">'
            f'<caption class="visually-hidden">{escape(table.title)}. Headings are buttons that sort.</caption>'
            f"<thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>{note}{_from(table.source)}"
        )
        if table.folded:
            summary = f"<summary>{escape(_short(table.title))} ({len(table.rows)} rows)</summary>"
            return f'<details class="card" id="{name}-fold">{summary}{tools}{whole}</details>'
        return f'<div class="card"><div class="head"><h3>{escape(_short(table.title))}</h3>{tools}</div>{whole}</div>'

    def chart(self, chart: Chart) -> str:
        if not chart.views:
            return ""
        name = self._id(f"plot-{chart.title}")
        self.charts[name] = {
            "kind": chart.kind,
            "views": [asdict(view) for view in chart.views],
            "band": chart.band,
            "zero": chart.zero,
        }
        choice = ""
        if len(chart.views) > 1:
            options = "".join(f'<option value="{i}">{escape(v.name)}</option>' for i, v in enumerate(chart.views))
            choice = f'<select class="view" aria-label="What {escape(chart.title)} shows">{options}</select>'
        note = " ".join(
            t for t in (chart.note, f"Shaded: {chart.band_label}." if chart.band and chart.band_label else "") if t
        )
        return (
            f'<figure class="card"><div class="head"><h3>{escape(_short(chart.title))}</h3>'
            f'<div class="tools">{choice}</div></div>'
            f'<div class="plot" id="{name}" tabindex="0" role="group" '
            f'aria-label="{escape(chart.title)}. Arrow keys go from point to point."></div>'
            f'<figcaption class="caption">{escape(note)}</figcaption>'
            '<details class="values"><summary>Values as a table</summary>'
            '<div class="scroll" tabindex="0"></div></details>'
            f"{_from(chart.source)}</figure>"
        )


def _with_subject(verdict: Verdict) -> str:
    """The sentence, with what it is about in bold."""
    rest = verdict.sentence.removeprefix(verdict.subject)
    subject = f"<strong>{escape(verdict.subject)}</strong>" if rest != verdict.sentence else ""
    return subject + escape(rest)


def _meanings(columns: list[Column]) -> str:
    """What a heading's tooltip says, for those who have no pointer to hover with."""
    items = "".join(f"<dt>{escape(c.label)}</dt><dd>{escape(c.help)}</dd>" for c in columns if c.help)
    return f"<details><summary>What the columns mean</summary><dl>{items}</dl></details>" if items else ""


def _short(title: str) -> str:
    """A title without what the section's heading says already: "study: scores" -> "Scores"."""
    last = title.rpartition(": ")[2]
    return last[:1].upper() + last[1:]


def _cell(column: Column, row: Row) -> str:
    text, value = column.text(row), row.get(column.key)
    if column.kind == "verdict":
        mood = MOODS.get(str(value), "open")
        return f'<td class="{mood}" data-v="{escape(text)}"><span class="chip">{_sign(mood)} {escape(text)}</span></td>'
    if column.kind == "check" and isinstance(value, bool):
        mood = "good" if value else "bad"
        return f'<td class="{mood}" data-v="{int(value)}"><span class="chip">{escape(text)}</span></td>'
    if column.is_number:
        raw = "" if text == "" else repr(value).replace("inf", "Infinity")  # as JavaScript calls it
        return f'<td class="n" data-v="{escape(raw)}">{escape(text)}</td>'
    return f'<td class="{"t long" if len(text) > 30 else "t"}">{escape(text)}</td>'


def _numeric(column: Column) -> str:
    return ' class="n"' if column.is_number else ""


def _title(text: str) -> str:
    return f' title="{escape(text)}"' if text else ""


def _sign(mood: str) -> str:
    """A sign beside the colour, for those who see no colours."""
    return {"good": "▲", "bad": "▼", "same": "=", "open": "?"}[mood]


def _from(source: Source | None) -> str:
    if source is None:
        return ""
    command = f", made by <code>{escape(source.command)}</code>" if source.command else ""
    commit = f" at {escape(source.commit)}" if source.commit else ""
    return f'<p class="from">From <code>{escape(source.file)}</code>{command}{commit}.</p>'


def _provenance(sources: list[Source]) -> str:
    columns = [
        Column("file", "file"),
        Column("command", "made by"),
        Column("commit", "commit"),
        Column("device", "device"),
        Column("made", "finished"),
        Column("versions", "versions"),
    ]
    rows = [
        {**asdict(s), "versions": ", ".join(f"{name} {version}" for name, version in s.versions.items())}
        for s in sources
    ]
    table = Table("Where the figures come from", columns, rows)
    return _Writer(set()).section(Section("Provenance", [table]))
