"""What Dual LoRA costs, against limits: `python -m benchmarks --help`. README.md explains every gate."""
