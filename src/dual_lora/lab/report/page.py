"""A page as HTML that loads nothing: style, scripts and data stand in it.

Names come from other people's files. The template escapes every text, the script sets texts as text, and a content
security policy lets no script run but those whose hash it names. Charts are drawn by Vega and Vega-Lite (folder `vega`)
with Vega's interpreter, which needs no `eval`; library and data are packed by gzip, which halves the page.
"""

import base64
import gzip
import hashlib
import json
import re
from functools import cache
from importlib.resources import files

from jinja2 import Environment, StrictUndefined

from dual_lora.lab.report.blocks import Chart, Page, Table
from dual_lora.lab.report.charts import drawings
from dual_lora.lab.report.columns import grouped
from dual_lora.lab.report.exports import FORMS, lines
from dual_lora.lab.terminal import shown

SIGN = "Written by <code>dual-lora report</code>"  # stands in every page; by it the command knows a page of its own


def render(page: Page, live: int = 0) -> str:
    """The page as HTML. live: seconds after which it loads itself anew, 0 for never."""
    style, script, library = _text("page.css"), _text("page.js"), _library()
    blocks = [block for section in page.sections for block in section.blocks]
    charts = [block for block in blocks if isinstance(block, Chart)]
    tables = {b.id: {kind: lines(b, kind) for kind in FORMS} for b in blocks if isinstance(b, Table)}
    data = {"charts": drawings(charts), "tables": tables}
    hashes = " ".join(map(_hash, (script, library)))
    environment = Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined, finalize=_without_controls
    )
    return environment.from_string(_text("page.html")).render(
        page=page,
        live=live,
        sign=SIGN,
        forms=FORMS,
        groups=grouped(page.sections, lambda section: section.group),
        style=style,
        script=script,
        policy=f"default-src 'none'; style-src {_hash(style)}; script-src {hashes}; img-src data:; base-uri 'none'; "
        "form-action 'none'",
        library=_compressed(library) if charts else "",
        data=_compressed(json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)),
    )


def _without_controls(value: object) -> object:
    """Write out control characters: a page is read in a terminal as well."""
    return shown(value) if type(value) is str else value


@cache
def _library() -> str:
    """Vega, Vega-Lite and the interpreter, as one script; the interpreter is a module, which a page without files
    cannot import, so its first and last statement are put in the older way."""
    interpreter = re.sub(r"import (\{.*?\}) from 'vega-util';", r"const \1 = vega;", _text("vega/vega-interpreter.js"))
    interpreter = re.sub(r"export \{ (\w+) as (\w+) \};", r"window.vegaInterpreter = \1;", interpreter)
    return f"{_text('vega/vega.min.js')}\n{_text('vega/vega-lite.min.js')}\n(() => {{\n{interpreter}\n}})();"


def _text(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _compressed(text: str) -> str:
    return base64.b64encode(gzip.compress(text.encode("utf-8", "replace"), mtime=0)).decode()


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
