"""The warm-up's count where no hook of ours runs: graphs, transformers' own loader, averages, bare factors."""

import copy
import warnings

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from tiny import adapted, factor, layers, llama, logits, points, tokens, train, trainable

STEPS = 4


def ramping(left, base=None, **options):
    """An adapter with `left` of its four steps to go."""
    model = adapted(base, warmup_steps=STEPS, init_weights=False, **options).eval()
    for layer in layers(model).values():
        layer._set_steps_left("default", left)
    return model


def written(model, left):
    """As DDP's broadcast, a distributed checkpoint and `AveragedModel` write to a buffer."""
    with torch.no_grad():
        for layer in layers(model).values():
            layer.dual_lora_left["default"].fill_(left)


@pytest.mark.parametrize("inference", [False, True])
def test_a_graph_sees_a_count_that_was_written_past_every_hook(inference):
    torch._dynamo.reset()
    model, x = ramping(STEPS), points()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=torch.__version__ >= "2.7")
    with torch.inference_mode(inference):
        torch.testing.assert_close(compiled(x), ramping(STEPS)(x))
        for left in (1, 0, 3):
            written(model, left)
            torch.testing.assert_close(compiled(x), ramping(left)(x))
    layers(model)["base_model.model.first"].set_scale("default", 0.5)
    with torch.no_grad():
        seen = compiled(x)
        torch.testing.assert_close(seen, model(x))


def test_an_exported_program_is_of_the_count_that_was_written():
    model, x = ramping(STEPS), points()
    written(model, 1)
    program = torch.export.export(model, (x,), strict=False).module()
    with torch.no_grad():
        torch.testing.assert_close(program(x), ramping(1)(x))


def test_an_average_acts_as_strongly_as_what_it_is_of():
    model, x = ramping(STEPS).train(), points()
    average = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    average.update_parameters(model)
    torch._dynamo.reset()
    with torch.no_grad():
        expected = model.eval()(x)
        torch.testing.assert_close(torch.compile(average.eval(), backend="eager")(x), expected)
        torch.testing.assert_close(average(x), expected)


def swapped(model, state, way):
    if way == "load_state_dict":
        model.load_state_dict(state, strict=False)
    else:
        set_peft_model_state_dict(model, {name.replace(".default", ""): value for name, value in state.items()})


@pytest.mark.parametrize("way", ["load_state_dict", "set_peft_model_state_dict"])
def test_averages_put_in_place_in_the_middle_of_the_ramp_do_not_end_it(way):
    model = ramping(STEPS)
    own = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    swapped(model, own, way)
    assert factor(model) == 1, "a state of factors alone is that of a finished adapter, before a step was made"
    for layer in layers(model).values():
        layer._set_steps_left("default", 3)
    swapped(model, {name: p * 0.5 for name, p in own.items()}, way)
    assert factor(model) == 0.25
    swapped(model, own, way)
    assert factor(model) == 0.25
    for name, p in model.named_parameters():
        assert name not in own or torch.equal(p, own[name])


@pytest.fixture
def saved(tmp_path):
    """(folder of an adapter with a step to go, folder of the same without a count), and their base."""
    torch.manual_seed(3)
    base = llama()
    model = ramping(1, copy.deepcopy(base), target_modules=["q_proj", "down_proj"])
    for name in ("half", "uncounted"):
        model.save_pretrained(tmp_path / name)
    file = tmp_path / "uncounted" / "adapter_model.safetensors"
    tensors = {name: value for name, value in load_file(file).items() if "dual_lora_left" not in name}
    save_file(tensors, file, metadata={"format": "pt"})
    return tmp_path, base


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize(("name", "expected"), [("half", 0.75), ("uncounted", 1.0)])
def test_transformers_own_loader_gives_what_peft_gives(saved, trained, name, expected):
    folder, base = saved
    peft, own = PeftModel.from_pretrained(copy.deepcopy(base), folder / name, is_trainable=trained), copy.deepcopy(base)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        own.load_adapter(folder / name, is_trainable=trained)
    told = ["saved during its warm-up, 1 of 4 optimizer steps" in str(w.message) for w in caught]
    assert any(told) == (name == "half" and not trained)
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(own.eval(), backend="eager")(tokens()).logits
        torch.testing.assert_close(compiled, logits(peft.eval()))
    assert factor(own) == factor(peft) == expected


@pytest.mark.parametrize("trained", [False, True])
def test_transformers_own_loader_of_a_state_without_a_count(trained):
    """There is no folder to look into."""
    model = adapted(llama(), target_modules=["q_proj"], warmup_steps=STEPS)
    state = get_peft_model_state_dict(model) | {
        name: torch.tensor(1, dtype=torch.int32) for name in model.state_dict() if "dual_lora_left" in name
    }
    state = {name.removesuffix(".default"): value for name, value in state.items()}
    uncounted = {name: value for name, value in state.items() if "dual_lora_left" not in name}
    assert len(state) == len(uncounted) + 2
    for tensors, expected in (state, 0.75), (uncounted, 1.0):
        own, config = llama(), copy.deepcopy(model.peft_config["default"])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            own.load_adapter(peft_config=config, adapter_state_dict=dict(tensors), is_trainable=trained)
        assert factor(own) == expected


def test_a_fresh_adapter_with_the_configuration_of_a_saved_one_is_the_base(tmp_path):
    """A saved configuration says inference_mode: as LoRA's, such an adapter changes nothing before it has trained."""
    adapted(llama(), target_modules=["q_proj"], warmup_steps=STEPS, init_std=0.3).save_pretrained(tmp_path)
    config = PeftConfig.from_pretrained(tmp_path)
    assert config.inference_mode
    model = get_peft_model(llama(), config).eval()
    assert torch.equal(logits(model), logits(llama().eval()))
    model.set_adapter("default")
    train(model, 1, loss=lambda: model(input_ids=tokens(), labels=tokens()).loss)
    assert factor(model) == 1 / STEPS
