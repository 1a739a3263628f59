"""The peak of a run is its own, not that of what the process did before."""

import sys

import pytest

from dual_lora.lab.run.record import peak_memory, reset_peak


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux forgets an earlier peak of the resident size")
def test_an_earlier_peak_is_forgotten():
    large = bytearray(300_000_000)
    high = peak_memory()
    del large
    reset_peak()
    assert peak_memory() < high - 200_000_000
