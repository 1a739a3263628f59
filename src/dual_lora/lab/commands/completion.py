"""dual-lora completion"""

from typing import Annotated, Literal

from cyclopts import App, Parameter

from dual_lora.lab.commands.card import facts_card, finish
from dual_lora.lab.commands.parameters import Json
from dual_lora.lab.errors import UserError

Shell = Literal["bash", "zsh", "fish"]


def completion(
    shell: Annotated[Shell | None, Parameter(help="Shell to complete in. [default: the current one]")] = None,
    *,
    install: Annotated[
        bool, Parameter(help="Install the script where the shell finds it, and load it in the shell's start file.")
    ] = False,
    json: Json = False,
) -> None:
    """Print or install the script that completes commands and options in a shell with the tab key.

    Example: `dual-lora completion --install`, then open a new terminal

    By hand: `dual-lora completion bash > ~/.local/share/bash-completion/completions/dual-lora`
    """
    from dual_lora.lab.cli import build_app

    app: App = build_app(everything=True)
    try:
        if not install:
            print(app.generate_completion(prog_name="dual-lora", shell=shell))
            return
        file = app.install_completion(shell=shell)
    except Exception as error:
        if type(error).__name__ != "ShellDetectionError":
            raise
        raise UserError("Which shell this is cannot be told: name it, bash, zsh or fish.") from None
    finish({"file": str(file)}, facts_card("completion", {"script": str(file), "next": "open a new terminal"}), json)
