"""The permission to run code: a module that a file names is imported only if a person has named it too.

Recipes, studies and runs are passed on, and importing a module runs it with all rights of the person at the keyboard.
So `MODULE:NAME` in such a file is a request. It is granted on the command line (`--allow-module MODULE`) or in the
person's own environment ($DUAL_LORA_ALLOW_MODULES, names with commas between). Child processes inherit the environment;
nothing that is read from a file adds to it. Nor is the folder in which a command is given a permission: the Python
processes that are started from it import nothing that lies there.
"""

import os
from importlib import import_module
from types import ModuleType

from dual_lora.lab.errors import UserError

FLAG = "--allow-module"
VARIABLE = "DUAL_LORA_ALLOW_MODULES"
SAFE_PATH = "PYTHONSAFEPATH"  # what Python asks at its start: import nothing from the working folder (`-c`, `-m`)
SAFE_PROGRAMS = "NoDefaultCurrentDirectoryInExePath"  # what Windows asks: start no program (git) that lies there


def allow(module: str) -> None:
    """Let files ask for this module, in this process and in those that it starts."""
    if not _is_name(module):
        raise UserError(f"{FLAG} is {module!r}, expected the name of a Python module, such as my_methods.")
    os.environ[VARIABLE] = ",".join([*allowed(), module])


def allowed() -> list[str]:
    """The modules that a person has named."""
    return [name for given in os.environ.get(VARIABLE, "").split(",") if (name := given.strip())]


def import_allowed(module: str, where: str) -> ModuleType:
    """The module, if a person has named it. where: which field of which file asks for it. Raises UserError if not."""
    if not _is_name(module):
        raise UserError(f"{where}: {module!r} is not the name of a Python module.")
    if module not in allowed():
        raise UserError(
            f"{where} asks to import the Python module {module}, which would run its code. Nothing was imported. If "
            f"you know that code, add {FLAG} {module} to the command, or set {VARIABLE}={module}."
        )
    try:
        return import_module(module)
    except ImportError as error:
        raise UserError(f"{where}: {module} cannot be imported ({error}). Is it on PYTHONPATH?") from error


def _is_name(module: str) -> bool:
    return all(part.isidentifier() for part in module.split("."))
