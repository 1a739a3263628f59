"""Verdicts on scores that others made: read them (CSV, lm-eval, PEFT), judge them as a study is judged."""
