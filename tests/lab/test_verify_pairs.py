"""No false alarm over right pairs in fp32, bf16 and on a 4-bit base. `verify_pairs.py 200` runs more."""

import pytest
from verify_pairs import PRECISIONS, verdict

from dual_lora.lab.verify.diagnose import GOOD


@pytest.mark.parametrize("precision", PRECISIONS)
def test_no_false_alarm(precision):
    if precision == "nf4":
        pytest.importorskip("bitsandbytes")
    words = [verdict(seed, precision, "right") for seed in range(4)]
    assert set(words) <= ({"on"} if precision != "nf4" else set(GOOD)), words


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ("off", {"off"}),
        ("half", {"layers dropped"}),
        ("twice", {"merged twice"}),
        ("λ 0.5", {"λ below 1", "other scale"}),
        ("other", {"another adapter"}),
    ],
)
def test_faults_are_named_under_the_rounding_of_bf16(fault, expected):
    assert {verdict(seed, "bf16", fault) for seed in (0, 1)} <= expected
