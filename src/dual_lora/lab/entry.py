"""Where the command `dual-lora` begins: it says what to install where the laboratory's packages are missing."""

import sys


def main() -> None:
    """Run the command line."""
    try:
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
