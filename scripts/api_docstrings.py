"""How the Python page shows our docstrings: parameters as a list, errors in bold, examples without doctest's marks.

A griffe extension, which mkdocs.yml names. The docstrings themselves stay as a reader of the code wants them.
"""

from __future__ import annotations

import re
from typing import Any

from griffe import Docstring, Extension


def shown(text: str, parameters: set[str]) -> str:
    """The docstring as Markdown. A line `name: …` is a parameter's if there is one of that name.

    >>> print(shown("Do it.\\n\\nrank: at most 4,\\n    or less.\\nRaises ValueError otherwise.", {"rank"}))
    Do it.
    <BLANKLINE>
    - `rank`: at most 4,
        or less.
    <BLANKLINE>
    **Raises** ValueError otherwise.
    """
    lines: list[str] = []
    listed = code = False
    for line in text.splitlines():
        named = re.match(r"(\w+): (.*)", line)
        if line.startswith((">>> ", "... ")):
            lines += [] if code else ["", "```python"]
            lines.append(re.sub(r" *# doctest: \+\w+$", "", line[4:]))
            code = True
            continue
        if code:
            lines += ["```", ""]
            code = False
        if named and named[1] in parameters:
            lines += [*([] if listed else [""]), f"- `{named[1]}`: {named[2]}"]
            listed = True
            continue
        if listed and not line.startswith("    "):
            lines.append("")
            listed = False
        lines.append(re.sub(r"^Raises\b", "**Raises**", line))
        if re.match(r"Raises\b", line):
            lines.insert(-1, "")
    return re.sub(r"\n{3,}", "\n\n", "\n".join([*lines, *(["```"] if code else [])])).strip()


class Docstrings(Extension):
    """Rewrites what griffe has read, before it is drawn."""

    def on_function(self, *, func: Any, **_: Any) -> None:
        self._rewrite(func, {parameter.name for parameter in func.parameters})

    def on_module(self, *, mod: Any, **_: Any) -> None:
        self._rewrite(mod, set())

    def on_class(self, *, cls: Any, **_: Any) -> None:
        init = cls.members.get("__init__")
        fields = {name for name, member in cls.members.items() if member.is_attribute}
        self._rewrite(cls, fields | ({p.name for p in init.parameters} if init is not None else set()))

    def _rewrite(self, item: Any, parameters: set[str]) -> None:
        if item.docstring is not None:
            item.docstring = Docstring(
                shown(item.docstring.value, parameters), lineno=item.docstring.lineno, parent=item
            )
