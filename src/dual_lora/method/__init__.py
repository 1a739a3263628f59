"""Dual LoRA as a PEFT method, laid out like `peft/tuners/<name>/`."""

import peft  # noqa: F401 - registers the method on the way, whichever module of this package is imported first
