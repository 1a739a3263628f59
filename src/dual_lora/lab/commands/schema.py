"""dual-lora schema"""

import json
from typing import Annotated, Any, Literal

from cyclopts import Parameter


def schema(
    kind: Annotated[Literal["recipe", "study"], Parameter(help="The file that the schema is for.")],
) -> None:
    """Print the JSON Schema of a recipe or a study: an editor completes and checks such YAML files by it.

    Example: `dual-lora schema recipe > recipe.schema.json`

    Then, as the first line of your file: `# yaml-language-server: $schema=recipe.schema.json`
    """
    print(json.dumps(json_schema(kind), indent=1, ensure_ascii=False))


def json_schema(kind: Literal["recipe", "study"]) -> dict[str, Any]:
    """The schema of the fields as they may be written, their short forms included."""
    if kind == "recipe":
        from dual_lora.lab.recipe.schema import Recipe

        found = Recipe.model_json_schema()
    else:
        from dual_lora.lab.study.study import Study

        found = Study.model_json_schema()
        # What `extends` names gives the fields that are left out here.
        text = "Another study, a shipped one or a file in the same folder: its fields hold where this one is silent."
        found["properties"] = {"extends": {"type": "string", "description": text}, **found["properties"]}
        found["required"] = ["name"]
        found["anyOf"] = [{"required": ["extends"]}, {"required": ["tasks", "methods"]}]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **found}
