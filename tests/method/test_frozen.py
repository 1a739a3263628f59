"""`direction_activation="frozen"` and `plain_rank`: what a user sees of them, from configuration to merge and file."""

import copy
import re

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.hotswap import hotswap_adapter, hotswap_adapter_from_state_dict
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

from dual_lora import DualLoraConfig, convert_to_lora
from dual_lora._warning import DualLoraWarning
from dual_lora.core.frozen import seed_of

KINDS = {
    "frozen": {},
    "sum": {"plain_rank": 2},
    "sum with ReLU": {"plain_rank": 3, "magnitude_activation": "relu"},
}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(20, 30), nn.Linear(30, 30)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).tanh())


class Renamed(nn.Module):
    def __init__(self, model: Model) -> None:
        super().__init__()
        self.outer = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.outer(x)


def config(**options) -> DualLoraConfig:
    usual = {"direction_activation": "frozen", "magnitude_activation": "identity", "init_weights": False}
    if "alpha" not in options:
        usual["lora_alpha"] = 6
    return DualLoraConfig(r=6, target_modules=["first", "second"], **(usual | options))


def base() -> Model:
    torch.manual_seed(0)
    return Model()


def adapted(**options):
    torch.manual_seed(0)
    model = base()
    torch.manual_seed(7)
    return get_peft_model(model, config(**options))


X = torch.randn(9, 20, generator=torch.Generator().manual_seed(3))


def signs(layer) -> torch.Tensor:
    C, D, *_ = layer.dual_lora_keys["default"]
    return torch.where(D * C > 0, 1.0, -1.0)


def by_hand(model, x: torch.Tensor) -> torch.Tensor:
    """The model's output by plain operations."""
    for name in ("first", "second"):
        layer = getattr(model.base_model.model, name)
        A, B = layer.dual_lora_A["default"], layer.dual_lora_B["default"]
        p = model.peft_config["default"].plain_rank
        P = B[:, p:] @ A[p:]
        if model.peft_config["default"].magnitude_activation == "relu":
            P = P.relu()
        W = layer.base_layer.weight + layer.scaling["default"] * (P * signs(layer) + B[:, :p] @ A[:p])
        x = nn.functional.linear(x, W, layer.base_layer.bias)
        x = x.tanh() if name == "first" else x
    return x


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_output_and_gradients(kind: dict):
    model = adapted(**kind)
    trained = [p for p in model.parameters() if p.requires_grad]
    got, want = model(X), by_hand(model, X)
    assert torch.allclose(got, want, rtol=1e-5, atol=1e-6)
    weights = torch.linspace(-1, 1, got.numel()).view_as(got)
    for a, b in zip(*(torch.autograd.grad((y * weights).sum(), trained) for y in (got, want)), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)


def test_it_has_lora_s_size_and_scale_and_begins_at_the_base():
    ours = adapted(init_weights=True, alpha=None)
    theirs = get_peft_model(base(), LoraConfig(r=6, lora_alpha=12, target_modules=["first", "second"]))
    assert ours.get_nb_trainable_parameters()[0] == theirs.get_nb_trainable_parameters()[0]
    layers = ours.base_model.model.first, theirs.base_model.model.first
    assert layers[0].scaling["default"] == layers[1].scaling["default"] == 2.0
    assert ours.peft_config["default"].lora_alpha == 12
    assert torch.equal(ours(X), base()(X))
    ours(X).square().sum().backward()
    assert layers[0].dual_lora_B["default"].grad.abs().sum() > 0


def test_layers_and_numbers_have_signs_of_their_own():
    model, other = adapted(), adapted(direction_seed=1)
    first, second = model.base_model.model.first, model.base_model.model.second
    assert int(first.dual_lora_seed["default"]) == seed_of(0, "first")
    assert not torch.equal(signs(first)[:, :20], signs(second)[:, :20])
    assert not torch.equal(signs(first), signs(other.base_model.model.first))
    assert torch.equal(signs(first), signs(adapted().base_model.model.first))


def test_the_seed_is_in_the_file_so_that_other_names_change_nothing(tmp_path):
    model = adapted()
    want = model(X)
    model.save_pretrained(tmp_path)
    from safetensors.torch import load_file

    state = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(name.endswith("dual_lora_seed") for name in state) == 2
    renamed = get_peft_model(Renamed(base()), config())
    assert not torch.allclose(renamed(X), want)
    moved = {name.replace("base_model.model.", "base_model.model.outer."): value for name, value in state.items()}
    set_peft_model_state_dict(renamed, moved)
    assert torch.equal(renamed(X), want)


def test_copies_and_moves():
    model = adapted(plain_rank=2)
    want = model(X).detach()
    assert torch.equal(copy.deepcopy(model)(X), want)
    assert torch.allclose(copy.deepcopy(model).double()(X.double()).float(), want, atol=1e-6)
    emptied = copy.deepcopy(model).to("meta").to_empty(device="cpu")
    assert int(emptied.base_model.model.first.dual_lora_seed["default"]) == seed_of(0, "first")


@pytest.mark.parametrize("cast", [torch.Tensor.float, torch.Tensor.double, lambda t: 0.5 * t + 0.5 * t])
def test_a_state_whose_seeds_were_averaged_or_cast_is_refused(cast):
    model = adapted()
    state = {name: cast(value) for name, value in get_peft_model_state_dict(adapted(direction_seed=1)).items()}
    before = model(X)
    with pytest.raises(ValueError, match=r"expected torch\.int64"):
        set_peft_model_state_dict(model, state)
    with pytest.raises(ValueError, match=r"expected torch\.int64"):
        hotswap_adapter_from_state_dict(model, state, "default", model.peft_config["default"])
    assert torch.equal(model(X), before)


def test_an_average_that_rounds_the_seeds_is_warned_of():
    model = adapted()
    model(X)
    average = AveragedModel(model, use_buffers=True, avg_fn=get_ema_avg_fn(0.9))
    for _ in range(2):
        average.update_parameters(model)
    with pytest.warns(DualLoraWarning, match="use_buffers"):
        average(X)


def test_other_seeds_are_loaded_without_a_warning(recwarn):
    model, other = adapted(), adapted(direction_seed=1)
    model(X)
    set_peft_model_state_dict(model, get_peft_model_state_dict(other))
    assert torch.equal(model(X), other(X))
    model.load_state_dict(adapted().state_dict())
    assert torch.equal(copy.deepcopy(model)(X), adapted()(X))
    assert not [w for w in recwarn if issubclass(w.category, DualLoraWarning)]


def test_an_adapter_made_anew_under_its_name_may_have_another_form():
    model = adapted()
    layer = model.base_model.model.first
    layer.update_layer("default", r1=2, r2=2, alpha=None, config=DualLoraConfig(r=4, init_weights=False))
    assert "default" not in layer.dual_lora_seed
    assert layer(X).shape == (9, 30)
    layer.update_layer("default", r1=6, r2=0, alpha=None, config=config(), key="first")
    assert "default" not in layer.dual_lora_C
    assert layer(X).shape == (9, 30)


def test_hot_swap_takes_the_seed_along(tmp_path):
    model, other = adapted(), adapted(direction_seed=3)
    other.save_pretrained(tmp_path)
    keys = model.base_model.model.first.dual_lora_keys["default"]
    hotswap_adapter(model, str(tmp_path), "default")
    assert model.base_model.model.first.dual_lora_keys["default"][0] is keys[0]  # in place, for compiled graphs
    assert torch.equal(model(X), other(X))
    sum_of = adapted(plain_rank=2)
    with pytest.raises(ValueError, match="plain_rank"):
        hotswap_adapter(sum_of, str(tmp_path), "default")


def test_a_copy_at_another_strength():
    model = adapted()
    delta = model.base_model.model.first.get_delta_weight("default")
    model.add_weighted_adapter(["default"], [-0.5], "smaller")
    assert torch.allclose(model.base_model.model.first.get_delta_weight("smaller"), -0.5 * delta, atol=1e-6)
    relu = adapted(magnitude_activation="relu")
    with pytest.raises(ValueError, match="ReLU before signs that are frozen"):
        relu.add_weighted_adapter(["default"], [-1.0], "negative")


def test_conversion_to_lora():
    losses = convert_to_lora(adapted(), 20).losses
    assert 0 < losses[-1].error < 1


def test_experts_and_convolutions_and_embeddings():
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.conv = nn.Embedding(12, 8), nn.Conv1d(8, 10, 3)
            self.attention = nn.MultiheadAttention(10, 2, batch_first=True)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            hidden = self.conv(self.table(tokens).mT).mT
            return self.attention(hidden, hidden, hidden)[0]

    torch.manual_seed(0)
    options = {"direction_activation": "frozen", "magnitude_activation": "identity", "init_weights": False}
    targets = ["table", "conv", "attention"]
    model = get_peft_model(Mixed(), DualLoraConfig(r=4, plain_rank=1, target_modules=targets, **options))
    tokens = torch.arange(12).view(2, 6)
    y = model(tokens)
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)
    seeds = [int(b) for n, b in model.named_buffers() if "dual_lora_seed" in n]
    assert len(set(seeds)) == len(seeds) == 4  # the attention's output projection has one of its own
    merged = model.merge_and_unload()
    assert torch.allclose(merged(tokens), y, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"plain_rank": 6}, ["plain_rank", "rank 6", "below it"]),
        ({"plain_rank": -1}, ["plain_rank", "-1"]),
        ({"plain_rank": 1, "direction_activation": "sign"}, ["plain_rank=1", "direction_activation='frozen'"]),
        ({"direction_seed": 0.5}, ["direction_seed", "0.5"]),
        ({"direction_activation": "weight"}, ["Unknown direction 'weight'", "'sign', 'identity', 'frozen'"]),
        ({"r1": 3, "r2": 3}, ["no factors C and D", "Give `r` alone"]),
        ({"rank_pattern": {"first": [2, 2]}}, ["rank_pattern['first']", "no factors C and D"]),
    ],
    ids=str,
)
def test_what_cannot_be(options: dict, words: list[str]):
    with pytest.raises(ValueError, match=".*".join(map(re.escape, words))):
        config(**options)


def test_a_layer_whose_rank_is_all_plain_is_refused():
    with pytest.raises(ValueError, match=r"plain_rank=2 leaves nothing of this layer's rank 2"):
        adapted(plain_rank=2, rank_pattern={"first": 2})
