"""dual-lora merge"""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from dual_lora.lab.commands.card import facts_card, finish, size
from dual_lora.lab.commands.parameters import Base, Json
from dual_lora.lab.recipe.schema import Precision


def merge(
    source: Annotated[str, Parameter(help="Run folder or adapter folder.")],
    out: Annotated[Path, Parameter(help="Folder to write; it must be empty or not exist.")],
    *,
    base: Base = None,
    dtype: Annotated[
        Precision | None, Parameter(help="Precision of the merged weights. [default: the run's, else float32]")
    ] = None,
    json: Json = False,
) -> None:
    """Merge an adapter into its base and write a plain model folder, which loads without this package.

    Example: `dual-lora merge runs/boolq-smollm2 merged --dtype bfloat16`
    """
    from dual_lora.lab.model.merge import merge as run_merge

    result = run_merge(source, out, base=base, dtype=dtype)
    facts = {
        "folder": result.folder,
        "weights": f"{size(result.bytes)}, {result.dtype}",
        "load": f"{result.loads}.from_pretrained({result.folder!r})",
    }
    finish(vars(result), facts_card("merged", facts), json)
