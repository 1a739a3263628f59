"""The newest PEFT that this version was tested with. With a newer one the import warns."""

import re
import sys

from ._warning import warn

NEWEST_PEFT = (0, 21)


def check_peft() -> None:
    """Warn if the imported PEFT is newer than the newest tested one. A version that cannot be read gets no warning."""
    version = str(getattr(sys.modules.get("peft"), "__version__", ""))
    found = re.match(r"(\d+)\.(\d+)", version)
    if found and (int(found[1]), int(found[2])) > NEWEST_PEFT:
        tested = ".".join(map(str, NEWEST_PEFT))
        following = f"{NEWEST_PEFT[0]}.{NEWEST_PEFT[1] + 1}"
        warn(
            f"PEFT {version} is newer than the newest one that this version of dual-lora was tested with ({tested}). "
            f"If something fails: `pip install --upgrade dual-lora`, or `pip install 'peft<{following}'`.",
            stacklevel=2,
        )
