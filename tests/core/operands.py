"""What the operators are called with: random factors that take gradients, and a weight that is read by rows."""

import torch
from formula import operator

from dual_lora.core.reference import Factors


def gaussian(T=7, I=20, O=30, r1=3, r2=4, dtype=torch.float32):
    """x, W, bias, factors with a gradient wherever training has one: everywhere but in W."""
    shapes = (r1, I), (O, r1), (r2, I), (O, r2)
    factors = Factors(*(torch.randn(s, dtype=dtype).requires_grad_() for s in shapes))
    x = torch.randn(T, I, dtype=dtype).requires_grad_()
    return x, torch.randn(O, I, dtype=dtype) / I**0.5, torch.randn(O, dtype=dtype).requires_grad_(), factors


class Rows:
    """A RowSource over a plain tensor. reads: how many rows each reading took."""

    def __init__(self, weight):
        self.weight, self.shape, self.reads = weight, tuple(weight.shape), []

    def rows(self, start, stop):
        self.reads.append(stop - start)
        return self.weight[start:stop].clone()


def operator_by_rows(x, weight, *rest):
    """`formula.operator` with a weight that it reads by rows, and which takes no gradient."""
    return operator(x, Rows(weight.detach()), *rest)
