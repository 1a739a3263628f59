"""torch.compile on whole models: no graph break in our code, no recompilation while λ ramps, the same results."""

import pytest
import torch
from tiny import MODELS, TARGETS, adapted, factor, tokens, trainable

STEPS = 4


@pytest.fixture
def strict():
    """A graph break raises by fullgraph=True; a recompilation by this."""
    torch._dynamo.reset()
    torch._dynamo.config.error_on_recompile = True
    yield
    torch._dynamo.config.error_on_recompile = False
    torch._dynamo.reset()


def build(name):
    torch.manual_seed(1)
    base = MODELS[name]()
    torch.manual_seed(2)
    return adapted(base, target_modules=TARGETS[name], warmup_steps=STEPS, init_std=0.3)


def losses(name, compiled):
    """The course of a short training in which λ goes from 0 to 1, then logits in evaluation at several λ."""
    model = build(name)
    forward = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    seen = []
    for step in range(STEPS + 2):
        assert factor(model) == min(step / STEPS, 1)
        loss = forward(input_ids=tokens()).logits.float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(loss.item())
    return torch.tensor(seen)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_training_of_a_whole_model(name, strict):
    eager, compiled = losses(name, False), losses(name, True)
    assert (eager.diff() != 0).any()
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_inference_of_a_whole_model_at_every_lambda(name, strict):
    model = build(name).eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    outputs = []
    with torch.no_grad():
        for left in (STEPS, STEPS // 2, 0):
            for module in model.modules():
                if hasattr(module, "dual_lora_A"):
                    module._set_steps_left("default", left)
            outputs.append(model(input_ids=tokens()).logits)
            torch.testing.assert_close(compiled(input_ids=tokens()).logits, outputs[-1], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(outputs[0], outputs[-1], rtol=1e-3, atol=1e-3)
