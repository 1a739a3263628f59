"""The demo as an animated picture: `python -m scripts.recording`, which runs the real one (pip install termtosvg).

The demo runs in a terminal and in a folder that is thrown away. What it wrote is played in half a minute instead of its
own minutes: pauses keep their share of the time, and screens that stand too short to be seen are left out.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

PICTURE = Path(__file__).parent.parent / "docs" / "pictures" / "demo-recording.svg"
COLUMNS, ROWS, SECONDS = 108, 34, 30.0
SHORTEST, LAST = 300, 6000  # milliseconds of a screen, and of the one that stays at the end


def faster(recording: str) -> str:
    """An asciicast (version 2) played in SECONDS."""
    header, *events = recording.splitlines()
    played = [json.loads(event) for event in events]
    rate = SECONDS / max(played[-1][0], SECONDS)
    return "\n".join([header, *(json.dumps([time * rate, kind, text]) for time, kind, text in played), ""])


def without_paths(drawn: str, *paths: str) -> str:
    """The picture without this machine's paths; what stands behind them on a line moves to the left."""

    def shortened(text: re.Match[str]) -> str:
        words = text[2]
        for path in paths:
            words = words.replace(path, "")
        return text[1] + words + " " * (len(text[2]) - len(words)) + text[3]

    return re.sub(r"(<text[^>]*>)([^<]*)(</text>)", shortened, drawn)


def main() -> None:
    """Record, and write the picture."""
    termtosvg = str(Path(sys.executable).parent / "termtosvg")
    with tempfile.TemporaryDirectory() as folder:
        cast = Path(folder) / "demo.cast"
        command = f"{Path(sys.executable).parent / 'dual-lora'} demo --out {folder}/demo-output"
        record = [termtosvg, "record", str(cast), "-g", f"{COLUMNS}x{ROWS}", "-c", command]
        with subprocess.Popen(record, stdin=subprocess.PIPE) as running:  # at the end of its input it would stop
            if running.wait():
                raise SystemExit("The demo was not recorded.")
        cast.write_text(faster(cast.read_text(encoding="utf-8")), encoding="utf-8")
        render = [termtosvg, "render", str(cast), str(PICTURE), "-m", str(SHORTEST), "-D", str(LAST)]
        subprocess.run([*render, "-t", "window_frame"], check=True)
    drawn = PICTURE.read_text(encoding="utf-8")
    for addresses in (r"<termtosvg:template_settings.*?</termtosvg:template_settings>", r"/\*.*?\*/"):
        drawn = re.sub(addresses, "", drawn, flags=re.S)
    PICTURE.write_text(without_paths(drawn, f"{folder}/", f"{Path(sys.executable).parent}/"), encoding="utf-8")


if __name__ == "__main__":
    main()
