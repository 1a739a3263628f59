"""torch.compile on whole models: no graph break in our code, no recompilation while λ ramps, the same results."""

import pytest
import torch
from quantized_layers import KINDS, I, wrapped
from tiny import MODELS, ONE_GRAPH, TARGETS, adapted, factor, layers, logits, tokens, trainable
from torch import nn
from transformers import Trainer, TrainingArguments, set_seed

from dual_lora import DualLoraConfig

STEPS = 4
LAYERS = {"llama": 2, "gpt2": 1, "bert": 1}  # of one model two layers, which share nothing but the graph


@pytest.fixture
def strict():
    """A graph break raises by fullgraph=True; a recompilation by this."""
    torch._dynamo.reset()
    torch._dynamo.config.error_on_recompile = True
    yield
    torch._dynamo.config.error_on_recompile = False
    torch._dynamo.reset()


def build(name, **options):
    torch.manual_seed(1)
    base = MODELS[name](**options)
    torch.manual_seed(2)
    return adapted(base, target_modules=TARGETS[name], warmup_steps=STEPS, init_std=0.3)


def losses(model, forward):
    """The course of a short training in which λ goes from 0 to 1."""
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
    model = build(name, layers=LAYERS[name])
    eager = losses(model, model)
    model = build(name, layers=LAYERS[name])
    compiled = losses(model, torch.compile(model, fullgraph=True, backend="aot_eager"))
    assert (eager.diff() != 0).any()
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_inference_of_a_whole_model_at_every_lambda(name, strict):
    model = build(name, layers=LAYERS[name]).eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    outputs = []
    with torch.no_grad():
        for left in (STEPS, STEPS // 2, 0):
            for module in model.modules():
                if hasattr(module, "dual_lora_A"):
                    module.set_left("default", left)
            outputs.append(model(input_ids=tokens()).logits)
            torch.testing.assert_close(compiled(input_ids=tokens()).logits, outputs[-1], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(outputs[0], outputs[-1], rtol=1e-3, atol=1e-3)


@ONE_GRAPH
@pytest.mark.slow
@pytest.mark.long  # a minute, where no cache of C++ is: test_layer has Inductor with a smaller model
@pytest.mark.parametrize("name", MODELS)
def test_the_default_backend(name, strict):
    """Inductor, which writes and compiles C++ here: training, then inference at several λ."""
    model = build(name, layers=1)
    eager = losses(model, model)
    model = build(name, layers=1)
    with torch._inductor.config.patch(compile_threads=1):
        compiled = losses(model, torch.compile(model, fullgraph=True))
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-6)
        assert (eager.diff() != 0).any()
        torch._dynamo.reset()
        forward = torch.compile(model.eval(), fullgraph=True)
        with torch.no_grad():
            for left in (STEPS, 1, 0):
                for layer in layers(model).values():
                    layer.set_left("default", left)
                expected = model(input_ids=tokens()).logits
                torch.testing.assert_close(forward(input_ids=tokens()).logits, expected, rtol=1e-4, atol=1e-5)


@ONE_GRAPH
@pytest.mark.slow
@pytest.mark.long
def test_the_trainers_own_switch(tmp_path, strict):
    """`torch_compile=True` of transformers' Trainer, with its default backend."""
    seen = []
    for compiled in (False, True):
        set_seed(0)
        model = build("llama", layers=1)
        arguments = TrainingArguments(
            str(tmp_path), max_steps=STEPS + 2, per_device_train_batch_size=2, learning_rate=1e-2, logging_steps=1,
            report_to=[], use_cpu=True, save_strategy="no", dataloader_pin_memory=False, torch_compile=compiled,
        )  # fmt: skip
        data = [{"input_ids": row, "labels": row} for row in tokens(2 * (STEPS + 2))]
        torch._dynamo.utils.counters.clear()
        trainer = Trainer(model, arguments, train_dataset=data)
        with torch._inductor.config.patch(compile_threads=1):
            trainer.train()
        seen.append(torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry]))
        assert factor(model) == 1
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]
    torch.testing.assert_close(*seen, rtol=1e-4, atol=1e-5)


# Several adapters.


def with_two():
    model = build("llama", layers=1)
    torch.manual_seed(3)
    model.add_adapter(
        "two", DualLoraConfig.paper(r=6, target_modules=["q_proj", "o_proj"], warmup_steps=2, init_std=0.3)
    )
    model.base_model.set_adapter(["default", "two"])
    return model


@ONE_GRAPH
@pytest.mark.slow
def test_two_active_adapters_with_ramps_of_their_own(strict):
    eager, compiled = with_two(), with_two()
    forward = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    expected = losses(eager, eager)
    assert (expected.diff() != 0).any()
    torch.testing.assert_close(losses(compiled, forward), expected, rtol=1e-4, atol=1e-6)


@ONE_GRAPH
@pytest.mark.slow
def test_a_graph_for_every_choice_of_adapters():
    torch._dynamo.reset()
    model = with_two().eval()
    for layer in layers(model).values():
        for name in layer.states:
            layer.set_left(name, 0)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    forward = torch.compile(model, fullgraph=True, backend=counter)
    seen = []
    for name in ("default", "two", "default", "two"):
        model.set_adapter(name)
        seen.append(logits(model))
        torch.testing.assert_close(logits(forward), seen[-1], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(seen[0], seen[1], rtol=1e-3)
    assert counter.frame_count == 2


@ONE_GRAPH
@pytest.mark.slow
def test_a_mixed_batch():
    """PEFT hooks every layer during the call of its model, which no graph holds; the model below is one graph."""
    torch._dynamo.reset()
    model = with_two().eval()
    for layer in layers(model).values():
        for name in layer.states:
            layer.set_left(name, 0)
    mixed = [["two", "__base__", "default"], ["default", "default", "two"]]
    with torch.no_grad():
        expected = [model(input_ids=tokens(), adapter_names=names).logits for names in mixed]
        with pytest.raises(torch._dynamo.exc.Unsupported, match="hooks"):
            torch.compile(model, fullgraph=True, backend="aot_eager")(input_ids=tokens(), adapter_names=mixed[0])
        counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
        model.get_base_model().compile(backend=counter, fullgraph=True)
        for _ in range(2):
            for names, wanted in zip(mixed, expected, strict=True):
                got = model(input_ids=tokens(), adapter_names=names).logits
                torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    assert counter.frame_count == len(mixed)


# Quantised bases.


def quantised_course(kind, compiled):
    """Losses and the gradient of x while λ rises from 0 to 1, then outputs in evaluation at several λ."""
    torch.manual_seed(3)
    model, layer, _ = wrapped(kind, warmup_steps=STEPS, init_weights="paper", init_std=0.3)
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
            layer.set_left("default", left)
            seen.append(forward(x.detach()).norm().item())
    return torch.tensor(seen)


@ONE_GRAPH
@pytest.mark.parametrize("kind", ["nf4", pytest.param("int8", marks=pytest.mark.slow), "hqq 4", "torchao int8 dynamic"])
def test_a_quantised_base(kind, strict):
    eager, compiled = quantised_course(kind, False), quantised_course(kind, True)
    assert len(eager.unique()) > 2 * STEPS
    torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-5)


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
    assert len({layer._handle.number.item() for layer in layers(model).values()}) == 3
