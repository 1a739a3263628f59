"""The Trainer's and TRL's examples on a tiny model: loss, λ, the reference, and what was saved."""

import math

import pytest

pytest.importorskip("trl", reason="TRL is among what examples need: pip install '.[integrations]'")
pytestmark = pytest.mark.slow


def history(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.mark.parametrize("name", ["trainer", "trl_sft"])
def test_supervised(name, example, tiny_lm, tmp_path, healthy, loads_as):
    trainer = example(name).main(str(tiny_lm), tmp_path, steps=20, learning_rate=2e-2)
    losses = history(trainer, "loss")
    assert losses[-1] < losses[0] - 0.5
    healthy(trainer.model)
    loads_as(tmp_path / "adapter", trainer.model)


@pytest.mark.long
def test_trl_dpo(example, tiny_lm, tmp_path, healthy, loads_as):
    trainer = example("trl_dpo").main(str(tiny_lm), tmp_path, steps=20, learning_rate=2e-2)
    losses = history(trainer, "loss")
    # The reference is the base, and with λ = 0 so is the policy: all margins are 0, and the loss is ln 2.
    assert trainer.ref_model is None
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses[-1] < losses[0] - 0.1
    assert history(trainer, "rewards/accuracies")[-1] > 0.5
    healthy(trainer.model)
    loads_as(tmp_path / "adapter", trainer.model)


@pytest.mark.long
def test_trl_grpo(example, tiny_lm, tmp_path, healthy, loads_as):
    trainer = example("trl_grpo").main(str(tiny_lm), tmp_path, steps=10, learning_rate=2e-2)
    assert trainer.ref_model is None
    divergences = history(trainer, "kl")
    assert divergences[0] == 0  # λ = 0: the policy is the reference
    assert divergences[-1] > 0
    assert all(0 < reward < 1 for reward in history(trainer, "reward"))
    healthy(trainer.model)
    loads_as(tmp_path / "adapter", trainer.model)
