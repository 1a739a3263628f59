"""Checks of a run of any PEFT method; they know none of them, this package's own included."""

import peft  # noqa: F401 - which registers this package's method, and that reads modules of this package
