"""Families of recipes: what many runs share is written once, and every setting stands under the one who gave it.

    family: commonsense            names begin with it
    about: "{model} on {data}"     filled in with the values of the axes
    sources:                       the names under which settings stand: their kind and what they are
      dora: "predecessor: ..."
    common:                        settings of all recipes: source -> part of a recipe
      dora: {train: {epochs: 3}}
    axes:                          one recipe for every combination, named family-value-value
      model: {llama-7b: {dora: {...}}}
      data: {170k: {...}, 15k: {...}}
    cells:                         more settings for single combinations
      llama-7b-170k: {...}
    twins:                         recipes outside the combinations: common settings and their own
      twin: {...}

Later settings lie over earlier ones. `reported` next to the settings of a source are figures that it reports.
"""

import itertools
import textwrap
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from dual_lora.lab import yaml_text
from dual_lora.lab.errors import UserError
from dual_lora.lab.read import parse_yaml, read_yaml_text

KINDS = ("paper", "predecessor", "ours")  # who a setting can come from; a source's text begins with one of them
_KEYS = {"family", "about", "sources", "common", "axes", "cells", "twins"}


def family(path: Path) -> dict[str, dict[str, Any]]:
    """The recipes of a family's file by name: their values as in a recipe's file, `origin` included.

    Raises UserError for a file that is not of the form above.
    """
    return _read(path, path.stat().st_mtime_ns)


@lru_cache
def _read(path: Path, _changed: int) -> dict[str, dict[str, Any]]:
    written = parse_yaml(read_yaml_text(path), str(path))
    if not isinstance(written, dict) or set(written) - _KEYS or "family" not in written:
        raise UserError(f"{path} is no family of recipes: expected a mapping with {', '.join(sorted(_KEYS))}.")
    sources = written.get("sources", {})
    for name, text in sources.items():
        if text.partition(":")[0] not in KINDS:
            raise UserError(
                f"{path}: source {name!r} has to begin with {' or '.join(KINDS)} and a colon, found {text!r}."
            )
    cells = dict(written.get("cells") or {})
    axes = written.get("axes") or {}
    members = {}
    for values in itertools.product(*axes.values()) if axes else ():
        own = "-".join(map(str, values))
        blocks = [axes[axis][value] for axis, value in zip(axes, values, strict=True)]
        members[own] = ([*blocks, cells.pop(own, None)], dict(zip(axes, map(str, values), strict=True)))
    members |= {own: ([blocks], {}) for own, blocks in (written.get("twins") or {}).items()}
    if cells:
        raise UserError(f"{path}: cells {', '.join(cells)} are no combinations of the axes.")
    names = {f"{written['family']}-{own}": parts for own, parts in members.items()}
    return {name: _member(written, name, blocks, chosen, str(path)) for name, (blocks, chosen) in names.items()}


def _member(
    written: dict[str, Any], name: str, blocks: list[Any], chosen: dict[str, str], where: str
) -> dict[str, Any]:
    sources = written.get("sources", {})
    laid: dict[str, Any] = {}
    source_of: dict[str, str] = {}  # dotted setting -> source
    reported: dict[str, dict[str, Any]] = {}
    for source, part in (pair for block in [written.get("common"), *blocks] for pair in (block or {}).items()):
        if source not in sources:
            raise UserError(f"{where} ({name}): {source!r} is none of the sources {', '.join(sources)}.")
        given = dict(part)
        reported.setdefault(source, {}).update(given.pop("reported", {}))
        source_of |= dict.fromkeys(_merge_settings(laid, given), source)
    about = laid.pop("about", None) or str(written.get("about", "")).format(**chosen)
    source_of.pop("about", None)
    used = [s for s in sources if s in source_of.values() or reported.get(s)]
    origin = {
        "sources": {s: sources[s] for s in used},
        "settings": {s: [setting for setting, by in source_of.items() if by == s] for s in used},
        "reported": {s: figures for s, figures in reported.items() if figures},
    }
    return {"name": name, "about": about, **_ordered(laid), "origin": origin}


def _merge_settings(values: dict[str, Any], over: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Lay settings over others, and yield the dotted name of each."""
    for key, value in over.items():
        if isinstance(value, dict) and value:
            yield from _merge_settings(values.setdefault(key, {}), value, f"{prefix}{key}.")
        else:
            values[key] = value
            yield f"{prefix}{key}"


def _ordered(values: dict[str, Any]) -> dict[str, Any]:
    """The parts and their settings in the order in which a recipe has them."""
    from dual_lora.lab.recipe.schema import Recipe

    fields = {part: list(getattr(about.annotation, "model_fields", {})) for part, about in Recipe.model_fields.items()}
    parts = _sorted_by(values, list(fields))
    return {part: _sorted_by(given, fields.get(part, [])) for part, given in parts.items()}


def _sorted_by(values: dict[str, Any], order: list[str]) -> dict[str, Any]:
    return {key: values[key] for key in sorted(values, key=lambda k: order.index(k) if k in order else len(order))}


def marks_of(origin: dict[str, Any]) -> dict[str, str]:
    """Setting -> "paper", "ours", or "predecessor (dora)"."""
    kinds = {name: text.partition(":")[0] for name, text in origin["sources"].items()}
    shown = {name: kind if name == kind else f"{kind} ({name})" for name, kind in kinds.items()}
    return {setting: shown[name] for name, settings in origin["settings"].items() for setting in settings}


def marked_yaml(values: dict[str, Any], marks: dict[str, str], default: str = "") -> str:
    """YAML with a comment behind every setting: its mark, or ``default`` where it has none."""
    rows = list(_rows(values, ""))
    width = min(max((len(line) for line, setting in rows if setting), default=0), 70)
    lines = []
    for line, setting in rows:
        mark = marks.get(setting, default) if setting else ""
        lines.append(f"{line:<{width}}  # {mark}" if mark else line)
    return "\n".join(lines) + "\n"


def _rows(values: dict[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    """Lines of YAML with the settings that they hold ("" for the line of a mapping)."""
    pad = "  " * prefix.count(".")
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield f"{pad}{_flow(key)}:", ""
            yield from _rows(value, f"{prefix}{key}.")
        else:
            yield f"{pad}{_flow(key)}: {_flow(value)}", f"{prefix}{key}"


def _flow(value: Any) -> str:
    text = yaml_text.dump(value, default_flow_style=True, allow_unicode=True, width=10**6)
    return text.removesuffix("\n").removesuffix("\n...")


def member_text(values: dict[str, Any]) -> str:
    """A member as a recipe's file, every setting marked with its source."""
    shown = {key: value for key, value in values.items() if key != "origin"}
    head = "Every setting says who gave it. What is not written is the laboratory's default: `recipes show --full`."
    origin = values["origin"]
    sources = yaml_text.dump({"origin": {"sources": origin["sources"]}}, sort_keys=False, width=110)
    rest = {key: origin[key] for key in ("settings", "reported")}
    lists = textwrap.indent(yaml_text.dump(rest, sort_keys=False, default_flow_style=None, width=110), "  ")
    return f"# {head}\n{marked_yaml(shown, marks_of(origin))}{sources}{lists}"
