"""dual-lora completion"""

import re
from typing import Annotated, Literal

from cyclopts import App, Parameter

from dual_lora.lab.commands.card import facts_card, finish
from dual_lora.lab.commands.parameters import Json
from dual_lora.lab.errors import UserError

Shell = Literal["bash", "zsh", "fish"]
# cyclopts completes files in bash by their bare names, and bash would run the "$(…)" in one. Quoted they are names
# alone, but for the form $'…' (of control characters), which is none within other quotes: such a name is left out.
_BARE_NAMES = re.compile(r'COMPREPLY=\( \$\(compgen (-[df]) -- "\$\{cur\}"\) \)')
_QUOTED_NAMES = r"""
_dual_lora_names() {
  local _name _quoted
  COMPREPLY=()
  while IFS= read -r _name; do
    printf -v _quoted '%q' "${_name}"
    [[ ${cur} == \~* ]] && _quoted=${_quoted#\\}
    [[ ${_quoted} == \$* ]] || COMPREPLY+=("${_quoted}")
  done < <(compgen "$1" -- "${cur}")
}
"""


def completion(
    shell: Annotated[Shell | None, Parameter(help="Shell to complete in. [default: the current one]")] = None,
    *,
    install: Annotated[
        bool, Parameter(help="Install the script where the shell finds it, and load it in the shell's start file.")
    ] = False,
    json: Json = False,
) -> None:
    """Print or install the script that completes commands and options in a shell with the tab key.

    Example: `dual-lora completion --install` (then open a new terminal)

    By hand: `dual-lora completion bash > dual-lora.bash` (for `source dual-lora.bash` in ~/.bashrc)
    """
    from dual_lora.lab.cli import build_app

    app: App = build_app(everything=True)
    try:
        if not install:
            print(_with_quoted_names(app.generate_completion(prog_name="dual-lora", shell=shell)))
            return
        file = app.install_completion(shell=shell)
    except Exception as error:
        if type(error).__name__ != "ShellDetectionError":
            raise
        raise UserError("Which shell this is cannot be told: name it, bash, zsh or fish.") from None
    file.write_text(_with_quoted_names(file.read_text()))
    finish({"file": str(file)}, facts_card("completion", {"script": str(file), "next": "open a new terminal"}), json)


def _with_quoted_names(script: str) -> str:
    """Return the script with names of files as bash reads them on a command line: quoted."""
    quoted, count = _BARE_NAMES.subn(r"_dual_lora_names \1", script)
    return quoted + _QUOTED_NAMES if count else script
