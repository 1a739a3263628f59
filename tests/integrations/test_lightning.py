"""A resumed run is the run without a stop; the paper's warm-up counts optimizer steps under accumulation."""

import functools

import pytest
import torch
from tiny import factor

from dual_lora import DualLoraConfig

pytest.importorskip("lightning", reason="Lightning comes with pip install '.[integrations]'")
pytestmark = pytest.mark.slow


def factors(module):
    return {name: p for name, p in module.model.named_parameters() if p.requires_grad}


def test_resumed_is_the_run_without_a_stop(example, tiny_lm, tmp_path, healthy, loads_as):
    main = example("lightning_module").main
    straight = main(str(tiny_lm), tmp_path / "straight", steps=8, save_steps=4)  # an epoch has 4
    healthy(straight.model)
    loads_as(tmp_path / "straight" / "adapter", straight.model)

    checkpoint = tmp_path / "straight" / "step=4.ckpt"
    saved = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert all(".dual_lora_" in name for name in saved)
    resumed = main(str(tiny_lm), tmp_path / "resumed", steps=8, resume=checkpoint)
    expected = factors(straight)
    assert factors(resumed).keys() == expected.keys()
    for name, tensor in factors(resumed).items():
        assert torch.equal(tensor, expected[name]), name


def test_the_papers_warm_up_counts_steps_not_batches_and_goes_on(example, tiny_lm, tmp_path, monkeypatch):
    module = example("lightning_module")
    monkeypatch.setattr(module, "DualLoraConfig", functools.partial(DualLoraConfig.paper, warmup_steps=5))
    main = module.main
    tuned = main(str(tiny_lm), tmp_path, steps=3, save_steps=2)  # of 4 batches each
    assert factor(tuned.model) == pytest.approx(3 / 5)
    resumed = main(str(tiny_lm), tmp_path, steps=4, resume=tmp_path / "step=2.ckpt")
    assert factor(resumed.model) == pytest.approx(4 / 5)
