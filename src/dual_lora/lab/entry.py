"""The start of the command `dual-lora`: it says what to install where the laboratory's packages are missing."""

import os
import sys

from .memory import limit_memory
from .permission import SAFE_PATH, SAFE_PROGRAMS

LAUNCHED = ("WORLD_SIZE", "RANK", "LOCAL_RANK")  # set for a process among several, which uses what is sharded


def main() -> None:
    """Run the command line."""
    # The folder that a command is given in may be a stranger's, and Python processes that libraries start (`-c`, `-m`)
    # would import modules that lie there.
    os.environ.setdefault(SAFE_PATH, "1")
    os.environ.setdefault(SAFE_PROGRAMS, "1")
    limit_memory(sys.argv[1:])
    try:
        if "torch" not in sys.modules and not any(name in os.environ for name in LAUNCHED):
            from .deferred import defer

            defer()
        from .cli import main as run
    except ModuleNotFoundError as error:
        if (error.name or "dual_lora").startswith("dual_lora"):
            raise
        print(
            f"dual-lora: the command line needs the package {error.name}, which comes with the laboratory: "
            'pip install "dual-lora[lab]"',
            file=sys.stderr,
        )
        raise SystemExit(1) from None
    run()
