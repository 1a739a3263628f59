"""Verdicts on scores that others made: read them (CSV, lm-eval, PEFT), compare them as a study does."""
