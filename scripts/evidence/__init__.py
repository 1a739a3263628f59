"""The pages that quote results, filled in from results/: `python -m scripts.evidence --write`."""
