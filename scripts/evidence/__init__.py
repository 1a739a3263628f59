"""The page of evidence, filled in from results/: `python -m scripts.evidence --write`."""
