"""The mathematics and the kernels of Dual LoRA. Imports torch and nothing else."""
