"""Dual LoRA on each kind of layer but the linear one."""
