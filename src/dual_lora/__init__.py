"""Dual LoRA (Xu et al., arXiv 2512.03402) as a Hugging Face PEFT method."""

__version__ = "0.1.0"
