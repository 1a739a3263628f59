"""The one folder in a user's home that this program keeps things in."""

import os
from pathlib import Path


def cached(name: str) -> Path:
    """A file there: $XDG_CACHE_HOME/dual-lora/NAME, by default under ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dual-lora" / name
