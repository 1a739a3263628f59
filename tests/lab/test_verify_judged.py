"""The judge of `verify` on numbers alone: what explains a candidate, and what does not."""

import json

import pytest
import torch

from dual_lora.lab.verify.diagnose import Known, judge


class Linear:
    """Guesses of an adapter whose log-probabilities grow with its strength; four bits do to it what `coarse` says."""

    def __init__(self, base, tuned, *coarse):
        self.base, self.tuned, self.rounded = base, tuned, dict(enumerate(coarse))

    def scaled(self, strength):
        return self.base + strength * (self.tuned - self.base)

    def parts(self):
        return iter(())

    def coarse(self):
        return self.rounded


def across(direction, size, seed):
    """Noise of this root mean square that the projection on the direction does not see."""
    noise = torch.randn(len(direction), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    noise -= (noise @ direction) / (direction @ direction) * direction
    return noise * size / noise.square().mean().sqrt()


TOKENS = 20
BASE = torch.linspace(-12, -2, TOKENS, dtype=torch.float64)
DIRECTION = 6.6 * torch.tensor([1.0, 1.0, 1.1, 0.9] * (TOKENS // 4), dtype=torch.float64)


def verdict(found, coarse, rounding, *merged):
    """Of a candidate, where bf16 rounds by so much and four bits give `coarse`; all are differences from the base.

    merged: what four bits give after a merge."""
    known = Known(BASE, BASE + DIRECTION, torch.arange(TOKENS) // 4, rounding, warms_up=True)
    coarse = [BASE + each for each in (coarse, *merged)]
    return judge(BASE + found, known, Linear(BASE, BASE + DIRECTION, *coarse)).word


def judged(strength, apart):
    """A candidate at this strength, `apart` nats beside it, where bf16 rounds by 0.07 and four bits by 2.4."""
    found = strength * DIRECTION + across(DIRECTION, apart, 1)
    return verdict(found, DIRECTION + across(DIRECTION, 2.4, 2), 0.07)


def test_another_adapter_that_does_something_alike_is_no_weaker_one():
    """Seen on a server that had an adapter for the same words backwards, where four bits round by much."""
    assert judged(0.44, 3.8) == "another adapter"


def test_what_a_strength_explains_has_its_name():
    assert judged(0.44, 0.05) == "λ below 1"
    assert judged(2.0, 0.05) == "merged twice"
    assert judged(1.0, 0.05) == "on"
    assert judged(1.0, 2.4) == "rounded"
    assert judged(0.0, 0.05) == "off"


def test_where_four_bits_do_most_of_what_the_adapter_does_they_must_look_alike():
    """Seen on a server that had another adapter: so far from this one as four bits were, it was taken for rounded."""
    four = 0.75 * DIRECTION + across(DIRECTION, 3.6, 2)
    assert verdict(0.75 * DIRECTION + across(DIRECTION, 3.6, 3), four, 0.1) == "undecided"
    assert verdict(four + across(DIRECTION, 1.5, 4), four, 0.1) == "rounded"


@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_where_rounding_moves_the_strength_by_more_than_the_adapter_has_nothing_is_told(strength):
    """The base itself was taken for the adapter: it is as near to it as bf16 is."""
    known = Known(BASE, BASE + DIRECTION / 100, torch.arange(TOKENS) // 4, 0.023, rounded_strength=-0.4)
    assert judge(BASE + strength * DIRECTION / 100, known, Linear(BASE, known.tuned, known.tuned)).word == "undecided"


def in_four_bits(strength, apart):
    """A candidate at this strength, where four bits take three tenths of the strength, and little else."""
    return noisy(strength, 0.7, 0.3, across(DIRECTION, apart, 3))


def noisy(strength, keep, noise, more=0.0):
    """A candidate at this strength with the very noise of four bits, which keep that much of the strength."""
    same = across(DIRECTION, noise, 2)
    return verdict(strength * DIRECTION + same + more, keep * DIRECTION + same, 0.03)


def test_four_bits_that_look_like_a_strength_are_four_bits():
    """Seen on a server that tells the likeliest tokens alone: a strength of 0.85 left 0.16 nats, four bits 0.08."""
    assert in_four_bits(0.7, 0.2) == "rounded"
    assert in_four_bits(0.68, 0.1) == "rounded"


def test_as_much_and_the_same_strength_are_four_bits():
    """Seen on that server on another machine: a strength of 0.83 left 0.113 nats of 0.241, four bits 0.103."""
    noise = across(DIRECTION, 0.9, 2)
    coarse = 0.72 * DIRECTION + noise / 2 + across(DIRECTION, 0.5, 3)
    assert verdict(0.7 * DIRECTION + noise, coarse, 0.03) == "rounded"
    assert verdict(0.5 * DIRECTION + noise, coarse, 0.03) == "λ below 1"


def test_a_strength_that_explains_more_than_four_bits_do_keeps_its_name():
    assert in_four_bits(0.4, 0.2) == "λ below 1"
    assert in_four_bits(2.0, 0.2) == "merged twice"
    assert in_four_bits(1.5, 0.2) == "other scale"


def test_a_fault_in_four_bits_is_a_fault():
    assert noisy(0.49, 0.7, 1.5) == "λ below 1"
    assert noisy(0.35, 0.5, 1.0) == "λ below 1"
    assert noisy(0.0, 0.2, 1.5) == "off"
    assert noisy(0.0, 0.1, 1.0) == "off"


def test_four_bits_of_a_merged_file_round_otherwise():
    """Seen behind llama.cpp's server: a strength of 1.23 left 0.152 nats of 0.327, the base's own four bits more."""
    small = 0.15 * across(DIRECTION, 1.0, 4)
    found = 1.23 * DIRECTION + small
    beside, merged = 0.98 * DIRECTION + across(DIRECTION, 2.0, 5), 1.23 * DIRECTION + small / 2
    assert verdict(found, beside, 0.03) == "other scale"
    assert verdict(found, beside, 0.03, merged) == "rounded"
    assert verdict(1.5 * DIRECTION + small, beside, 0.03, merged) == "other scale"


def test_modules_in_another_order_are_no_difference(tmp_path):
    """PEFT has them in a set; r does differ."""
    from dual_lora.lab.verify.verify import _config_differences

    for name, modules, r in (("one", ["q_proj", "k_proj"], 8), ("other", ["k_proj", "q_proj"], 4)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text(json.dumps({"target_modules": modules, "r": r}))
    assert _config_differences(tmp_path / "one", tmp_path / "other") == ["r is 4 there and 8 here"]
