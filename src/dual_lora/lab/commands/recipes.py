"""dual-lora recipes"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from dual_lora.lab.commands.card import figures_table, finish
from dual_lora.lab.errors import UserError
from dual_lora.lab.recipe import read_recipe, recipe_text, shipped_recipes

app = App(
    name="recipes", help="List, show and copy the shipped recipes. Example: `dual-lora recipes show boolq-smollm2`"
)


@app.default
def list_recipes(
    *, json: Annotated[bool, Parameter(help="One line of JSON on standard output.", negative="")] = False
) -> None:
    """List the shipped recipes. Example: `dual-lora recipes`"""
    found = {name: read_recipe(name) for name in shipped_recipes()}
    rows = [[name, recipe.model.path, str(recipe.method["name"]), recipe.about] for name, recipe in found.items()]
    table = figures_table("", ["recipe", "model", "method", "about"], rows)
    for column in table.columns:
        column.justify = "left"
    finish({name: recipe.about for name, recipe in found.items()}, table, json)


app.command(list_recipes, name="list")


@app.command
def show(name: str, *, full: Annotated[bool, Parameter(help="With every default.", negative="")] = False) -> None:
    """Print a recipe. Example: `dual-lora recipes show boolq-smollm2 --full`"""
    print(read_recipe(name).to_yaml() if full else recipe_text(name)[1], end="")


@app.command
def copy(name: str, to: Path | None = None) -> None:
    """Copy a recipe, to change it. Example: `dual-lora recipes copy boolq-smollm2 mine.yaml`"""
    target = to or Path(f"{name}.yaml")
    if target.is_dir():
        target = target / f"{name}.yaml"
    if target.exists():
        raise UserError(f"{target} exists already: give another name.")
    target.write_text(recipe_text(name)[1], encoding="utf-8")
    finish({"file": str(target)}, f"{target} — run it with: dual-lora train {target}", False)
