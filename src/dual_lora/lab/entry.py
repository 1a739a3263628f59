"""Where the command `dual-lora` begins: it says what to install where the laboratory's packages are missing."""

import os
import sys

LAUNCHED = ("WORLD_SIZE", "RANK", "LOCAL_RANK")  # set for a process among several, which uses what is sharded


def main() -> None:
    """Run the command line."""
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
