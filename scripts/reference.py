"""The generated pages of the reference: `python -m scripts.reference` writes them, a test compares.

In docs/reference: cli.md from the commands; recipe.md, study.md and config.md from typed fields; schemas for editors.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

REFERENCE = Path(__file__).parent.parent / "docs" / "reference"
# Fields that PEFT fills in.
_OF_PEFT = {
    "task_type",
    "peft_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
}
GENERATED = "<!-- Written by `python -m scripts.reference`. -->"

RECIPE = """# Recipe

A recipe is one YAML file, and every field is a flag too: `train.steps` is `--train.steps`.
`dual-lora recipes show NAME` prints a complete one, and a run's folder keeps its own as `recipe.yaml`.

`--method.name lora --method.r 16` (or any PEFT method, or `full`) trains the same recipe with another method.
Other settings then have that method's own defaults, with two exceptions: `target_modules` is `all-linear`, and with
the paper's start (`method: {name: dual_lora, init_weights: paper}`) `warmup_steps` is a tenth of the steps.

With [the JSON Schema](schemas/recipe.schema.json) an editor completes and checks recipes: write it to a file with
`dual-lora schema recipe > recipe.schema.json`, and make this the first line of your recipe:
`# yaml-language-server: $schema=recipe.schema.json`."""

STUDY = """# Study

A study is one YAML file that `dual-lora compare FILE` runs. [Comparing methods](../how-to/studies.md) explains it.

With [the JSON Schema](schemas/study.schema.json) an editor completes and checks studies: write it to a file with
`dual-lora schema study > study.schema.json`, and make this the first line of your study:
`# yaml-language-server: $schema=study.schema.json`.

One more field is not in the tables, `extends`: another study, which supplies the fields that yours does not have."""

CONFIG = """# DualLoraConfig

The fields of the method's configuration. In a recipe they are under `method`; on the command line they are flags, as
in `--method.r 16`. In both, `target_modules` is `all-linear` by default. With `init_weights: paper`, `warmup_steps` is
a tenth of the steps.

[LoRA's fields](../how-to/settings.md#you-have-a-lora-configuration) work too: `lora_alpha`, `lora_dropout`, and
the others if their values mean plain LoRA."""

CLI = """# Command line

Every command has `--help`. `--json` ends a command with one line of JSON, `--debug` shows where an error comes from,
`--allow-module NAME` lets a recipe, a study or a run import the module NAME ([why](../explanation/security.md))."""


def pages() -> dict[str, str]:
    """Name under docs/reference → its text."""
    from dual_lora.lab.commands.recipes import json_schema
    from dual_lora.lab.recipe.schema import Recipe
    from dual_lora.lab.study.study import Study

    return {
        "cli.md": _page(CLI, _commands()),
        "recipe.md": _page(RECIPE, *_tables(Recipe)),
        "study.md": _page(STUDY, *_tables(Study)),
        "config.md": _page(CONFIG, _config()),
        **{
            f"schemas/{kind}.schema.json": json.dumps(json_schema(kind), indent=1, ensure_ascii=False) + "\n"
            for kind in ("recipe", "study")
        },
    }


def _page(*parts: str) -> str:
    title, _, rest = parts[0].partition("\n")
    text = "\n\n".join([title, GENERATED, rest.strip(), *parts[1:]]).rstrip() + "\n"
    return text.replace("][", "]\\[")  # "NAME[,SUBSET][:SPLIT]" is no link


def _commands() -> str:
    """Every command with its arguments, by cyclopts' own writer, without its title and list of commands."""
    from importlib import import_module

    from cyclopts import App

    from dual_lora.lab.cli import COMMANDS
    from dual_lora.lab.commands.plain import PLAIN_FLAGS, show_all

    show_all(True)

    app = App(name="dual-lora", help_format="markdown", help_flags=(), version_flags=(), default_parameter=PLAIN_FLAGS)
    for name, target, _ in COMMANDS:
        module, _, function = target.partition(":")
        app.command(getattr(import_module(module), function), name=name)
    # Cyclopts shows how this very program was started, which is `python -m scripts.reference` here.
    text = re.sub(r"(?m)^(dual-lora(?: [\w-]+)*) -m [\w.]+", r"\1", app.generate_docs(usage_name="dual-lora"))
    return text[text.index(f"## dual-lora {COMMANDS[0][0]}\n") :]


def _config() -> str:
    from dataclasses import MISSING, fields

    from dual_lora import DualLoraConfig

    lines = ["| field | default | meaning |", "|---|---|---|"]
    for field in fields(DualLoraConfig):
        if text := field.metadata.get("help") if field.name not in _OF_PEFT else None:
            value = field.default_factory() if field.default_factory is not MISSING else field.default
            lines.append(f"| `{field.name}` | `{value!r}` | {' '.join(text.split())} |")
    return "\n".join(lines)


def _tables(model: type[BaseModel], name: str = "", seen: tuple[type, ...] = ()) -> Iterator[str]:
    """A table of a model's fields, then one of each model among them."""
    rows, inner = [], []
    for key, field in model.model_fields.items():
        part = _part(field.annotation)
        if part and part not in seen:
            inner.append((part, f"{name}{key}.NAME." if get_origin(field.annotation) is dict else f"{name}{key}."))
        text = " ".join((field.description or "").split()).replace("|", "\\|")
        rows.append(f"| `{name}{key}` | {_kind(field.annotation)} | {_default(field)} | {text} |")
    title = f"## `{name.rstrip('.')}`" if name else "## Top"
    about = (model.__dict__.get("__doc__") or "").strip().partition("\n")[0]
    table = "\n".join(["| field | kind | default | meaning |", "|---|---|---|---|", *rows])
    yield "\n\n".join(filter(None, (title, about, table)))
    for part, prefix in inner:
        yield from _tables(part, prefix, (*seen, model))


def _part(kind: Any) -> type[BaseModel] | None:
    found = [kind, *get_args(kind)]
    return next((k for k in found if isinstance(k, type) and issubclass(k, BaseModel)), None)


def _kind(kind: Any) -> str:
    if get_origin(kind) is Annotated:
        return _kind(get_args(kind)[0])
    if get_origin(kind) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(kind))
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(_kind(k) for k in get_args(kind) if k is not NoneType)
    if get_origin(kind) is dict:
        return "mapping"
    if get_origin(kind) is list:
        return "list"
    return getattr(kind, "__name__", str(kind)) if _part(kind) is None else "fields below"


def _default(field: Any) -> str:
    if field.is_required():
        return "needed"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel) or value in (None, "", {}, []):
        return ""
    return f"`{json.dumps(value, ensure_ascii=False)}`"


def main() -> int:
    """Write the pages; returns 0."""
    for name, text in pages().items():
        (REFERENCE / name).parent.mkdir(parents=True, exist_ok=True)
        (REFERENCE / name).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
