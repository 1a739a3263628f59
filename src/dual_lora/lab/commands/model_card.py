"""dual-lora card"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from dual_lora.lab.commands.card import facts_card, finish
from dual_lora.lab.commands.parameters import Json


def card(
    run: Annotated[Path, Parameter(help="Folder of a finished run.")],
    *,
    base_model: Annotated[
        str | None, Parameter(help="The base model's name on the hub, if the run had a folder.")
    ] = None,
    license: Annotated[str | None, Parameter(help="Licence of the adapter, as the hub names it: apache-2.0.")] = None,
    json: Json = False,
) -> None:
    """Write a run's card for a model hub: README.md beside the adapter, with method, data, scores and cost.

    Training writes one by itself. Again after `dual-lora evaluate`, it has the scores.

    Example: `dual-lora card runs/boolq-smollm2 --license apache-2.0`
    """
    from dual_lora.lab.recipe.read import read_recipe
    from dual_lora.lab.run.hub_card import write_card
    from dual_lora.lab.run.push import finished_run

    folder = finished_run(run)
    file = write_card(folder, read_recipe(run), base_model=base_model, licence=license)
    facts = {"card": str(file), "next": f"dual-lora push {run} NAME/REPOSITORY"}
    finish({"card": str(file)}, facts_card("card", facts), json)
