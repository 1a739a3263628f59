"""torch.compile on whole models: no graph break in our code, no recompilation while λ ramps, the same results."""

import pytest
import torch
from test_quantized import KINDS, I, wrapped
from tiny import MODELS, TARGETS, adapted, factor, layers, tokens, trainable
from torch import nn

STEPS = 4
ONE_GRAPH = pytest.mark.skipif(
    torch.__version__ < "2.7", reason="torch 2.6 cannot trace PEFT's own context manager in one graph"
)


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


# Quantised bases.


def quantised_course(kind, compiled):
    """Losses and the gradient of x while λ rises from 0 to 1, then outputs in evaluation at several λ."""
    torch.manual_seed(3)
    model, layer, _ = wrapped(kind, warmup_steps=STEPS, init_weights=True, init_std=0.3)
    x = torch.randn(5, I)
    model.train()(x)  # bitsandbytes' 8-bit layer makes its state in the first call
    forward = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    optimizer = torch.optim.SGD(trainable(model), lr=0.5)
    seen = []
    for _ in range(STEPS + 2):
        x.grad = None
        loss = forward(x.requires_grad_()).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seen += [loss.item(), x.grad.norm().item()]
    model.eval()
    torch._dynamo.reset()
    forward = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    with torch.no_grad():
        for left in (STEPS, 1, 0):
            layer._set_steps_left("default", left)
            seen.append(forward(x.detach()).norm().item())
    return torch.tensor(seen)


@ONE_GRAPH
@pytest.mark.parametrize("kind", [k if k == "nf4" else pytest.param(k, marks=pytest.mark.slow) for k in KINDS])
def test_a_quantised_base(kind, strict):
    eager, compiled = quantised_course(kind, False), quantised_course(kind, True)
    assert len(eager.unique()) > 2 * STEPS
    torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-6)


@ONE_GRAPH
@pytest.mark.parametrize("kind", ["nf4 nested", "int8", "torchao int8 dynamic"])
def test_quantised_blocks_that_are_compiled_one_by_one_share_their_graph(kind, strict):
    net = nn.Sequential(*(nn.Sequential(KINDS[kind](), nn.Linear(64, I)) for _ in range(3)))
    model = adapted(net, target_modules=[f"{k}.0" for k in range(3)], init_weights=False)
    x = torch.randn(3, I, requires_grad=True)
    expected = model(x)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    for block in model.base_model.model:
        block.compile(backend=counter, fullgraph=True)
    torch.testing.assert_close(model(x), expected)
    assert counter.frame_count == 1
    assert len({layer._ticket.number.item() for layer in layers(model).values()}) == 3
