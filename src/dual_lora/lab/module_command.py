"""The command of a single module, `python -m dual_lora.lab.…`."""

import sys
from collections.abc import Callable
from typing import NoReturn

from dual_lora.lab.errors import UserError
from dual_lora.lab.terminal import guarded


def run_module(main: Callable[[list[str]], int]) -> NoReturn:
    """End the process by a module's own command (`python -m …`): its texts are guarded, a UserError is one line."""
    with guarded():
        try:
            code = main(sys.argv[1:])
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            code = 1
    sys.exit(code)
