"""dual-lora recipes, dual-lora schema"""

from pathlib import Path
from shlex import quote
from typing import Annotated, Any, Literal

from cyclopts import App, Parameter

from dual_lora.lab.commands.card import facts_card, figures_table, finish, size
from dual_lora.lab.commands.parameters import Json
from dual_lora.lab.commands.plain import PLAIN_FLAGS
from dual_lora.lab.errors import UserError, suggest
from dual_lora.lab.files.write import json_text, write_output
from dual_lora.lab.recipe.families import family, marked_yaml, marks_of
from dual_lora.lab.recipe.read import FAMILIES, LISTING, read_recipe, recipe_text, shipped_recipes
from dual_lora.lab.recipe.schema import Recipe

Name = Annotated[str, Parameter(help="Recipe file, or the name of a shipped recipe.")]

app = App(
    name="recipes",
    help="Begin a recipe for your own data; list, show and copy the shipped ones.\n\n"
    "Example: `dual-lora recipes init mine.yaml --data my.csv --base ./my-model`",
    default_parameter=PLAIN_FLAGS,
)


@app.default
def list_recipes(
    start: Annotated[
        str,
        Parameter(help="List only names that begin with this, and every recipe of a family (e.g. commonsense)."),
    ] = "",
    *,
    json: Json = False,
) -> None:
    """List the shipped recipes, the paper's experiments by family.

    Example: `dual-lora recipes list commonsense`
    """
    shipped = {name: path for name, path in shipped_recipes().items() if name.startswith(start)}
    if not shipped:
        raise UserError(f"No recipe's name begins with {start!r}.{suggest(start, shipped_recipes(), LISTING)}")
    found = {name: read_recipe(name) for name in shipped}
    together = {} if start else {name: path for name, path in shipped.items() if path.parent.name == FAMILIES}
    rows = [
        [name, recipe.model.path, str(recipe.method["name"]), recipe.about]
        for name, recipe in found.items()
        if name not in together
    ]
    for path in dict.fromkeys(together.values()):
        names = list(family(path))
        models = len({found[name].model.path for name in names})
        about = f"The paper's experiments. {len(names)} recipes: dual-lora recipes list {path.stem}"
        rows.append([f"{path.stem}-…", f"{models} models", "dual_lora", about])
    shown = 2 if start else 4  # what the members of a family are about is nearly the same sentence
    table = figures_table("", ["recipe", "model", "method", "about"][:shown], [row[:shown] for row in rows])
    table.columns[0].no_wrap = True  # a name that is cut off cannot be typed
    for column in table.columns:
        column.justify = "left"
    finish({name: recipe.about for name, recipe in found.items()}, table, json)


app.command(list_recipes, name="list")


@app.command
def show(name: Name, *, full: Annotated[bool, Parameter(help="Write out every default.")] = False) -> None:
    """Print a recipe; for the paper's experiments also the source of every setting.

    Example: `dual-lora recipes show boolq-smollm2 --full`
    """
    recipe = read_recipe(name)
    if not full:
        print(recipe_text(name), end="")
    elif recipe.origin is None:
        print(recipe.to_yaml(), end="")
    else:
        values = recipe.model_dump(mode="json")
        marks = marks_of(values.pop("origin")) | {"name": "", "about": ""}
        print(marked_yaml(values, marks, "ours (default)"), end="")


@app.command
def copy(
    name: Name,
    to: Annotated[
        Path | None, Parameter(help="File to write, or a folder for it. [default: NAME.yaml]", show_default=False)
    ] = None,
) -> None:
    """Copy a recipe, to change it.

    Example: `dual-lora recipes copy boolq-smollm2 mine.yaml`
    """
    target = to or Path(f"{name}.yaml")
    if target.is_dir():
        target = target / f"{name}.yaml"
    if target.exists():
        raise taken(target, "copy")
    write_output(target, recipe_text(name))
    finish({"file": str(target)}, f"{target} — run it with: dual-lora train {quote(str(target))}", False)


def taken(file: Path, command: str) -> UserError:
    """An error for a recipe that is there already: it may hold a person's changes."""
    other = next(path for n in range(2, 10**6) if not (path := file.with_stem(f"{file.stem}-{n}")).exists())
    shown = quote(str(file))
    return UserError(
        f"{file} exists already, and `recipes {command}` overwrites nothing. Write another one "
        f"({quote(str(other))}), or go on with this one (`dual-lora check-data {shown}`), or remove it first "
        f"(`rm {shown}`)."
    )


@app.command
def init(
    to: Annotated[Path, Parameter(help="Recipe file to write; its name becomes the run's name.")],
    *,
    data: Annotated[str, Parameter(help="Training records: .csv, .tsv, .json, .jsonl, .parquet or .txt, or hub:NAME.")],
    base: Annotated[str, Parameter(help="Model by folder, name, GGUF file or package:NAME.")],
    test: Annotated[str | None, Parameter(help="Test records.")] = None,
    text: Annotated[
        str | None, Parameter(help="Column of the text to classify. [default: by the column's name]")
    ] = None,
    text_pair: Annotated[
        str | None, Parameter(help="Column of a second text, which is compared with the first.")
    ] = None,
    label: Annotated[str | None, Parameter(help="Column of the class or number.")] = None,
    prompt: Annotated[str | None, Parameter(help="Column of the prompt.")] = None,
    answer: Annotated[str | None, Parameter(help="Column of the answer.")] = None,
    columns: Annotated[
        list[str] | None,
        Parameter(help="Names of the columns of a table without a header line.", consume_multiple=True),
    ] = None,
    json: Json = False,
) -> None:
    """Write a first recipe for your own data, with a comment at each choice; the task is guessed from the columns.

    Example: `dual-lora recipes init mine.yaml --data my.csv --base ./my-model`
    """
    from dual_lora.lab.commands.check_data import meanings
    from dual_lora.lab.data.guess import HEADS, INIT_OPTIONS, guess
    from dual_lora.lab.data.records import read_joined
    from dual_lora.lab.data.starter import as_trained, read_starter, starter
    from dual_lora.lab.model.location import check_here
    from dual_lora.lab.recipe.read import run_name

    if to.suffix not in (".yaml", ".yml"):
        raise UserError(f"{to} is the recipe to write: give it a name that ends in .yaml.")
    if to.exists():
        raise taken(to, "init")
    records = read_joined(data, columns)
    named = {"text": text, "text_pair": text_pair, "label": label, "prompt": prompt, "answer": answer}
    found = guess(records, {ours: theirs for ours, theirs in named.items() if theirs}, INIT_OPTIONS)
    check_here(base)
    records = as_trained(records, data, found)
    written = starter(to, run_name(to.stem), base, data, test, found, records, columns, whole=0.98)
    recipe = read_starter(written, to)
    write_output(to, written)
    facts = {
        "task": f"train a {HEADS[found.head]}" + (f" of {len(found.classes)} classes" if found.classes else ""),
        "columns": ", ".join(meanings(found.names, recipe.data)),
        "or": ", ".join(f"--label {quote(name)}" for name in found.rivals),
        "records": f"{len(records):,}, {recipe.data.holdout:,} of them held out for validation"
        if recipe.data.holdout
        else _too_few(len(records), found.format),
        "next": f"dual-lora check-data {quote(str(to))}\ndual-lora train {quote(str(to))}",
    }
    result = {"file": str(to), "format": found.format, "head": found.head, "fields": found.fields}
    finish(result, facts_card(str(to), {name: fact for name, fact in facts.items() if fact}), json)


def _too_few(count: int, form: str) -> str:
    """The words for records of which none can be held out. A text file is one."""
    if form == "document":
        return f"{count:,} text{'s' * (count != 1)}, none held out: to validate, give other texts as data.validation"
    return f"{count:,}, too few to hold any out for validation"


@app.command
def check(
    name: Name,
    *,
    classes: Annotated[
        int, Parameter(help="Number of classes of a classification head; the command does not read the data.")
    ] = 2,
    json: Json = False,
) -> None:
    """Put a recipe's method on its real model without weights: layers, parameters, memory of a training step.

    Example: `dual-lora recipes check commonsense-llama-7b-170k`
    """
    from dual_lora.lab.cost.memory import memory_of
    from dual_lora.lab.cost.options import from_recipe
    from dual_lora.lab.cost.simulate import simulate
    from dual_lora.lab.model.empty import fit

    recipe = read_recipe(name)
    found = fit(recipe, classes)
    options = from_recipe(recipe, classes=classes, on="gpu")
    memory = memory_of(options, simulate(options)).peak
    facts = {
        "model": recipe.model.path,
        "layers": ", ".join(f"{count} {layer}" for layer, count in found.layers.items()) or "all",
        "trainable": f"{found.trainable:,} of {found.all_parameters:,} ({found.trainable / found.all_parameters:.2%})",
        "memory": f"{size(memory)} at the peak of a step on one GPU, by estimate: batch "
        f"{recipe.train.batch_size}, {recipe.data.max_length} tokens a row",
    }
    result = {"layers": found.layers, "trainable": found.trainable, "all": found.all_parameters, "memory": memory}
    finish(result, facts_card(recipe.name, facts), json)


def schema(
    kind: Annotated[Literal["recipe", "study"], Parameter(help="The file that the schema is for.")],
) -> None:
    """Print the JSON Schema of a recipe or a study, with which an editor completes and checks such YAML files.

    Example: `dual-lora schema recipe > recipe.schema.json`

    Then, as the first line of your file: `# yaml-language-server: $schema=recipe.schema.json`
    """
    print(json_text(json_schema(kind), indent=1))


def json_schema(kind: Literal["recipe", "study"]) -> dict[str, Any]:
    """The schema of the fields as they may be written, their short forms included."""
    if kind == "recipe":
        found = Recipe.model_json_schema()
    else:
        from dual_lora.lab.study.study import Study

        found = Study.model_json_schema()
        # What `extends` names gives the fields that are left out here.
        text = "Another study, a shipped one or a file in the same folder: it gives the fields that are missing here."
        found["properties"] = {"extends": {"type": "string", "description": text}, **found["properties"]}
        found["required"] = ["name"]
        found["anyOf"] = [{"required": ["extends"]}, {"required": ["tasks", "methods"]}]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **found}
