"""What the arithmetic allows: flops of one linear layer's forward and backward. T tokens, O out, I in, ranks.

Dual LoRA   6·T·O·I + 8·O·I·(r1 + r2)     y, dx, the masked G; P and Q twice, four small gradients
LoRA        4·T·O·I + 6·T·r·(O + I)       y, dx; the two thin products and their gradients
full        6·T·O·I
"""

from __future__ import annotations


def dual(T: int, O: int, I: int, rank: int, adapters: int = 1) -> int:
    """rank: r1 + r2 of one adapter."""
    return 6 * T * O * I + 8 * O * I * rank * adapters


def lora(T: int, O: int, I: int, rank: int, adapters: int = 1) -> int:
    return 4 * T * O * I + 6 * T * rank * (O + I) * adapters


def full(T: int, O: int, I: int) -> int:
    return 6 * T * O * I
