"""The kernels compile for GPUs that are not there, and what the compiler says holds the launch constants to account.

With the Triton that is installed; `make compile-table` does it with all that are supported.
"""

import pytest

pytest.importorskip("triton", minversion="3.4", reason="the Triton kernels need triton 3.4 or later")

from benchmarks.compile_table import TABLE, TARGETS, VERSIONS, compile_ahead, fault


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_compose_for_a_training_step(target, tmp_path):
    [kernel] = compile_ahead(target, "compose", '"bf16", "rank": 16}', cache=tmp_path)
    assert fault(target, kernel) is None
    assert kernel["spill"] == 0, kernel


def test_both_operands_of_the_weight_gradient_are_copied_asynchronously(tmp_path):
    """On sm_80 a copy through registers costs the product its overlap with memory."""
    [kernel] = compile_ahead("sm_80", '"gradient"', 'bfloat16"', "[64, 64", '"deterministic": false', cache=tmp_path)
    assert fault("sm_80", kernel) is None
    assert kernel["async_in_loops"] >= 4, kernel
    assert kernel["through_registers_in_loops"] == 0, kernel


# One kernel of each kind and card; all of them are in the table.
@pytest.mark.parametrize(
    ("target", "words"),
    [
        pytest.param("sm_80", ['"forms": "every"'], marks=pytest.mark.long),  # half a minute
        ("sm_90", ['"gradient"', 'bfloat16"', "[64, 64", '"deterministic": false']),
        ("gfx942", ['"gradient"', "float32", "[32, 64"]),
    ],
    ids=str,
)
def test_gradient(target, words, tmp_path):
    [kernel] = compile_ahead(target, *words, cache=tmp_path)
    assert fault(target, kernel) is None


def test_the_table_has_every_version_and_target():
    text = TABLE.read_text()
    assert [line for line in text.splitlines() if line.startswith("## ")] == [f"## {target}" for target in TARGETS]
    heads = [line for line in text.splitlines() if line.startswith("| | ")]
    assert all(f"{version} (torch" in head for version in VERSIONS for head in heads)
    assert "does not compile" not in text
    assert "not compiled" not in text
