"""Dual LoRA as a PEFT method, laid out like `peft/tuners/<name>/`."""
