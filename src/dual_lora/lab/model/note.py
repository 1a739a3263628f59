"""The laboratory's note next to a model's or an adapter's weights: the recipe, and the names of the classes."""

import json
from pathlib import Path
from typing import Any

from dual_lora.lab.data.encode import VALUE
from dual_lora.lab.errors import UserError, described
from dual_lora.lab.read import read_object
from dual_lora.lab.recipe.read import build_recipe
from dual_lora.lab.recipe.schema import Recipe

NOTE = "lab.json"
MOST_CLASSES = 100_000  # each has a row of the head, which is drawn before the file is read


def read_note(adapter: Path) -> tuple[Recipe | None, list[str]]:
    """The recipe and the classes that the laboratory noted in an adapter folder; none in one from elsewhere."""
    file = adapter / NOTE
    if not file.is_file():
        return None, []
    try:
        note = read_object(file)
        recipe, classes = note["recipe"], checked_classes(note.get("classes", []))
    except (ValueError, KeyError) as error:
        raise UserError(
            f"{file}, the note of the recipe, is damaged ({described(error)}): remove it and give --recipe."
        ) from None
    return build_recipe(recipe, str(file)), classes


def checked_classes(classes: Any) -> list[str]:
    """The names of classes that a file holds. Raises ValueError for what is none, and for more than any head has."""
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise ValueError(f"classes is {classes!r:.200}, expected a list of names")
    if len(classes) > MOST_CLASSES:
        raise ValueError(f"classes has {len(classes):,} names, expected at most {MOST_CLASSES:,}")
    "".join(classes).encode()  # half of a surrogate pair is no text
    if len({*classes}) < len(classes):
        raise ValueError(f"classes is {classes!r:.200}, in which a name stands twice")
    return classes


def write_note(adapter: Path, recipe: Recipe, classes: list[str], base: dict[str, str] | None = None) -> None:
    """Write the note. base: a digest of its weights, as they were when it was loaded; the adapter fits no others."""
    note = {"recipe": recipe.model_dump(mode="json"), "classes": classes} | ({"base": base} if base else {})
    (adapter / NOTE).write_text(json.dumps(note, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def label_settings(classes: list[str]) -> dict[str, dict[Any, Any]]:
    """The names in the terms of a transformers configuration; {} where the head tells no classes."""
    if not classes or classes == [VALUE]:
        return {}
    return {"id2label": dict(enumerate(classes)), "label2id": {name: i for i, name in enumerate(classes)}}


def name_classes(model: Any, classes: list[str]) -> None:
    """Put the names into the model's configuration, where pipelines and saved models look for them."""
    for name, value in label_settings(classes).items():
        setattr(model.config, name, value)


def name_in_adapter(folder: Path, model: Any, classes: list[str]) -> None:
    """Put the names into a saved adapter's configuration, next to the class that its base is.

    PEFT keeps what stands under `auto_mapping`, and warns of every field that it does not know.
    """
    file, plain = folder / "adapter_config.json", getattr(model, "base_model", model)
    if not label_settings(classes) or not file.is_file():
        return
    base = type(plain.get_base_model() if hasattr(plain, "get_base_model") else getattr(plain, "model", plain))
    values = read_object(file)
    mapping: dict[str, Any] = {"base_model_class": base.__name__, "parent_library": base.__module__}
    mapping |= {"id2label": label_settings(classes)["id2label"]}
    values["auto_mapping"] = {**(values.get("auto_mapping") or {}), **mapping}
    file.write_text(json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
