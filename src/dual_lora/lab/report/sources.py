"""A check that the sources of a report exist, before any library is imported."""

import os
from collections.abc import Iterable
from pathlib import Path

from dual_lora.lab.errors import UserError
from dual_lora.lab.model.location import suggest_model


def check_sources(paths: Iterable[str | Path]) -> None:
    """Raise UserError for a file or folder that is not there; a link whose target is gone counts as there."""
    for path in paths:
        if not os.path.lexists(path):
            raise UserError(
                f"There is no file or folder {path}: give runs, studies, analyses, a ledger, or a folder of them."
                f"{suggest_model(str(path), runs=True)}"
            )
