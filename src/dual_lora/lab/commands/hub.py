"""dual-lora card, dual-lora push"""

import sys
from pathlib import Path
from shlex import quote
from typing import Annotated

from cyclopts import Parameter

from dual_lora.lab.commands.card import facts_card, finish, size
from dual_lora.lab.commands.parameters import Json
from dual_lora.lab.errors import UserError
from dual_lora.lab.terminal import Console

Run = Annotated[Path, Parameter(help="Folder of a finished run.")]
BaseModel = Annotated[str | None, Parameter(help="The base model's name on the hub, if the run's base was a folder.")]
Licence = Annotated[str | None, Parameter(help="Licence of the adapter by its name on the hub, e.g. apache-2.0.")]


def card(
    run: Run,
    *,
    base_model: BaseModel = None,
    license: Licence = None,
    json: Json = False,
) -> None:
    """Write a run's card for a model hub: README.md next to the adapter, with method, data, scores and cost.

    Training writes a card without scores. Run this after `dual-lora evaluate` to add them.

    Example: `dual-lora card runs/boolq-smollm2 --license apache-2.0`
    """
    from dual_lora.lab.files.folder import run_at
    from dual_lora.lab.recipe.read import read_recipe
    from dual_lora.lab.run.hub_card import write_card

    file = write_card(run_at(run), read_recipe(run), base_model=base_model, licence=license)
    facts = {"card": str(file), "next": f"dual-lora push {quote(str(run))} NAME/REPOSITORY"}
    finish({"card": str(file)}, facts_card("card", facts), json)


def push(
    run: Run,
    repo: Annotated[str, Parameter(help="OWNER/NAME on the hub; created if it does not exist.")],
    *,
    base_model: BaseModel = None,
    license: Licence = None,
    private: Annotated[bool, Parameter(help="Make a new repository private.")] = False,
    yes: Annotated[bool, Parameter(help="Upload without asking.")] = False,
    dry_run: Annotated[bool, Parameter(help="Check everything and list the files, but upload nothing.")] = False,
    json: Json = False,
) -> None:
    """Upload a run's weights, tokenizer and card to the Hugging Face hub, after a question.

    Uploads only the files of the result, without paths of this machine. Sign in with `hf auth login` before.

    Example: `dual-lora push runs/mine me/mine --base-model Qwen/Qwen3-4B`

    Look first, without a network: add `--dry-run`
    """
    from dual_lora.lab.run.push import prepared_upload, upload

    with prepared_upload(run, repo, base_model=base_model, licence=license) as ready:
        facts = {name: size(count) for name, count in ready.files.items()}
        title = f"to {repo}{' (private)' if private else ', for everyone to see'}"
        if dry_run:
            facts["all files"] = size(sum(ready.files.values()))
            found = {"repo": repo, "private": private, "files": ready.files}
            return finish(found, facts_card(f"would be uploaded {title}", facts), json)
        if not yes:
            if not sys.stdin.isatty():
                raise UserError("Nobody is there to answer whether to upload: give --yes, or --dry-run to look first.")
            Console(stderr=True).print(facts_card(title, facts))
            if input("Upload these files? [y/N] ").strip().lower() not in {"y", "yes"}:
                raise UserError("Nothing was uploaded.")
        address = upload(ready, private=private)
    finish({"commit": address, "files": list(facts)}, facts_card("uploaded", {"commit": address, **facts}), json)
