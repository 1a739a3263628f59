"""The PEFT that this version needs, and the newest that it was tested with. With others the import warns."""

import re
import sys

from ._warning import warn

OLDEST_PEFT = (0, 21)  # as pyproject.toml has it; an older one may come by `pip install --no-deps`
NEWEST_PEFT = (0, 21)


def check_peft() -> None:
    """Warn if the imported PEFT is too old, or newer than the tested ones. One that cannot be read gets no warning."""
    version = str(getattr(sys.modules.get("peft"), "__version__", ""))
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None:
        return
    installed = int(found[1]), int(found[2])
    if installed < OLDEST_PEFT:
        oldest = ".".join(map(str, OLDEST_PEFT))
        warn(
            f"PEFT {version} is installed, and this version of dual-lora needs {oldest} or later: its method cannot be "
            f"imported with it. `pip install --upgrade 'peft>={oldest}'` in this environment.",
            stacklevel=2,
        )
    if installed > NEWEST_PEFT:
        tested = ".".join(map(str, NEWEST_PEFT))
        following = f"{NEWEST_PEFT[0]}.{NEWEST_PEFT[1] + 1}"
        warn(
            f"PEFT {version} is newer than the newest one that this version of dual-lora was tested with ({tested}). "
            f"If something fails: `pip install --upgrade dual-lora`, or `pip install 'peft<{following}'`.",
            stacklevel=2,
        )
