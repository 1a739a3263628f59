"""The numerics policy of all tests: how an error is measured, and what is close enough.

Errors are measured against fp64 truth, relative to the largest entry of the truth. In fp32 and fp64 the limits are
fixed; in lower precision our error may be twice plain PyTorch's at the same precision.
"""

import torch

LIMIT = {torch.float32: 5e-6, torch.float64: 1e-12}

# What the order of fp32 sums alone does to one formula: the shapes and ranks of test_triton_gradient in 120 orders each
# (terms shuffled, whole or in chunks of 1 to 32) had errors of 2e-8 to 9.8e-7. Every processor has an order of its own.
ORDER = 1e-6


def error(got, truth):
    """max |got - truth| / max |truth|."""
    assert got.shape == truth.shape, f"shape {tuple(got.shape)}, expected {tuple(truth.shape)}"
    assert torch.isfinite(got).all(), "not finite"
    if truth.numel() == 0:
        return 0.0
    difference = (got.detach().double() - truth.detach().double()).abs().max().item()
    return difference / max(truth.abs().max().item(), 1e-300)


def assert_close(got, truth, dtype, context=""):
    """Every named tensor of `got` is close to its namesake of `truth`; both are dicts with the same names."""
    assert got.keys() == truth.keys(), f"{context}: {sorted(got)} against {sorted(truth)}"
    errors = {name: error(got[name], truth[name]) for name in got}
    wrong = {name: f"{e:.1e}" for name, e in errors.items() if not e <= LIMIT[dtype]}
    assert not wrong, f"{context}: errors above {LIMIT[dtype]:.0e}: {wrong}"


def assert_relative_rule(ours, plain, truth, context=""):
    """Our error is at most twice plain PyTorch's, or twice what another order of its sums may give."""
    assert ours.keys() == plain.keys() == truth.keys()
    for name in truth:
        e, limit = error(ours[name], truth[name]), 2 * max(error(plain[name], truth[name]), ORDER)
        assert e <= limit, f"{context} {name}: error {e:.2e}, plain PyTorch allows {limit:.2e}"
