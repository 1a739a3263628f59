"""Work on a stranger's pattern in a process of its own, which nothing else in Python could end."""

import json
import math
import subprocess
import sys

LONGER = 5  # seconds after which the process ends by itself: who waits for it may have been killed
_ENDS = "import signal\nif hasattr(signal, 'alarm'):\n    signal.alarm({})\n"


def tried(code: str, given: object, seconds: float) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter that knows Python's own modules alone.

    given: its standard input, as JSON. Raises subprocess.TimeoutExpired after so many seconds.
    """
    return subprocess.run(
        [sys.executable, "-I", "-S", "-c", _ENDS.format(math.ceil(seconds) + LONGER) + code],
        input=json.dumps(given),
        capture_output=True,
        encoding="utf-8",
        timeout=seconds,
        check=False,
    )
