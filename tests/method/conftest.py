"""Global state of the method starts afresh in every test: warnings, step counters, the cache, the scaler."""

import pytest

from dual_lora import composed_weights
from dual_lora.method import scaler, warmup


@pytest.fixture(autouse=True)
def _fresh_state():
    composed_weights.clear()
    composed_weights._warned.clear()
    scaler.set_grad_scaler(None)
    warmup._layers.clear()
    yield
    composed_weights.clear()
    scaler.set_grad_scaler(None)
