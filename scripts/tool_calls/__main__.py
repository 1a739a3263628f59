"""Write the data set that the package carries: `PYTHONPATH=scripts python -m tool_calls`."""

from pathlib import Path

from tool_calls import generate

TRAIN = 600  # as many as `dual-lora demo` trains on: what a test set says of them holds for that very set
FOLDER = Path(__file__).parents[2] / "src/dual_lora/lab/data/tool-calls"

if __name__ == "__main__":
    generate(seed=0, train=TRAIN).write(FOLDER)
    print(f"{FOLDER}: {', '.join(f'{path.name} {path.stat().st_size:,} bytes' for path in sorted(FOLDER.iterdir()))}")
