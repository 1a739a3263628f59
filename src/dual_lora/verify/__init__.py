"""What checks a run of any PEFT method; it knows none of them, this package's own included."""
