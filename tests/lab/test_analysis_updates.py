"""Updates read by blocks: judged by dense formulas on small matrices and by what merging does."""

import copy

import pytest
import torch
from peft import HiraConfig, LoHaConfig, LoraConfig, OFTConfig, VeraConfig, get_peft_model
from safetensors.torch import save_file
from torch import nn

from dual_lora import DualLoraConfig
from dual_lora.core.reference import Adapter, Factors, Form, delta_weight
from dual_lora.lab.analysis import matrices
from dual_lora.lab.analysis.likeness import correlation, leading_subspaces, likeness, magnitude_and_direction
from dual_lora.lab.analysis.matrices import Dense, Factored
from dual_lora.lab.analysis.measures import changes, measure, threshold_of_largest
from dual_lora.lab.analysis.ranks import rank_bound, rank_examples, ranks, singular_values
from dual_lora.lab.analysis.updates import adapted_layers, base_matrix, full_updates, linear_layers, snapshot
from dual_lora.lab.cost.operators import MemoryTracker
from dual_lora.lab.errors import UserError


class Net(nn.Module):
    """Two linear layers and a head that adapters leave alone."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(40, 24)
        self.second = nn.Linear(24, 33)
        self.classifier = nn.Linear(33, 2)

    def forward(self, x):
        return self.classifier(torch.relu(self.second(torch.relu(self.first(x)))))


AS_IT_IS = matrices.BLOCK


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(matrices, "BLOCK", 7 * 33)  # several uneven blocks even here


def net(seed=0):
    torch.manual_seed(seed)
    return Net()


def dual(seed=0, **options):
    torch.manual_seed(seed)
    start = {"init_weights": "paper"} if "warmup_steps" in options else {}
    return get_peft_model(net(), DualLoraConfig(r=8, target_modules=["first", "second"], **start, **options))


def dense_update(model, layer):
    adapter = adapted_layers(model)[layer].adapter("default")
    return delta_weight(adapter.factors, adapter.scale, adapter.form).detach()


def whole(matrix):
    return torch.cat([matrix.rows(*span) for span in matrices.row_spans(matrix)])


def test_dual_lora_update_is_core_s_by_rows():
    model = dual(init_weights=False)
    matrix = snapshot(model)["second"].update()
    assert isinstance(matrix, Factored)
    torch.testing.assert_close(whole(matrix), dense_update(model, "second"))


@pytest.mark.parametrize("magnitude", ["relu", "identity"])
@pytest.mark.parametrize("direction", ["sign", "identity"])
def test_groups_apart_multiply_to_the_update(magnitude, direction):
    model = dual(init_weights=False, magnitude_activation=magnitude, direction_activation=direction)
    matrix = snapshot(model)["first"].update()
    product = whole(matrix.group("magnitude")) * whole(matrix.group("direction")) * matrix.adapter.scale
    torch.testing.assert_close(product, whole(matrix))
    A, B, C, D = matrix.adapter.factors
    torch.testing.assert_close(whole(matrix.product("magnitude")), (B @ A).detach())
    torch.testing.assert_close(whole(matrix.product("direction")), (D @ C).detach())


def test_update_during_the_warm_up_is_at_full_strength_with_lambda_beside_it():
    model = dual(warmup_steps=10)
    found = snapshot(model)["first"]
    assert found.strength == 0
    assert measure(found.update())["zero"] < 0.7  # the pattern is there though ΔW is still 0
    assert measure(found.update(), strength=found.strength)["norm"] == 0


def test_snapshot_does_not_follow_the_model():
    model = dual(init_weights=False)
    before = snapshot(model)["first"].update()
    held = whole(before).clone()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    assert torch.equal(whole(before), held)
    assert not torch.equal(whole(snapshot(model)["first"].update()), held)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=4, target_modules=["first", "second"], init_lora_weights=False),
        LoraConfig(r=4, target_modules=["first", "second"], init_lora_weights=False, use_dora=True),
        LoHaConfig(r=4, target_modules=["first", "second"], init_weights=False),
        VeraConfig(r=4, target_modules=["first"], init_weights=False),
        HiraConfig(r=4, target_modules=["first", "second"], init_weights=False),
        OFTConfig(oft_block_size=4, target_modules=["first"], init_weights=False),
    ],
    ids=["lora", "dora", "loha", "vera", "hira", "oft"],
)
def test_update_of_any_method_is_what_merging_does(config):
    torch.manual_seed(3)
    model = get_peft_model(net(), config)
    bits = {n: p.clone() for n, p in model.named_parameters()}
    held = {name: found.update() for name, found in snapshot(model).items()}
    assert all(torch.equal(p, bits[n]) for n, p in model.named_parameters())
    assert not any(layer.merged for layer in adapted_layers(model).values())
    merged = copy.deepcopy(model).merge_and_unload()
    for name, matrix in held.items():
        expected = merged.get_submodule(name).weight - net().get_submodule(name).weight
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(whole(matrix), expected.detach(), atol=1e-6, rtol=1e-4)


def test_a_dora_that_has_not_moved_has_no_update():
    model = get_peft_model(net(), LoraConfig(r=4, target_modules=["first"], use_dora=True))
    assert measure(snapshot(model)["first"].update())["zero"] == 1  # and not half of it + by rounding, half -


def test_snapshot_of_another_method_is_of_its_moment():
    model = get_peft_model(net(), LoraConfig(r=4, target_modules=["first"], init_lora_weights=False))
    old = snapshot(model)["first"]
    held = whole(old.update())
    with torch.no_grad():
        adapted_layers(model)["first"].lora_B["default"].weight.add_(1)
    assert torch.equal(whole(old.update()), held)
    assert not torch.equal(whole(snapshot(model)["first"].update()), held)


def test_full_fine_tuning_is_read_from_the_file(tmp_path):
    base, tuned = net(), net()
    with torch.no_grad():
        tuned.second.weight.add_(torch.randn(33, 24) / 10)
    save_file(tuned.state_dict(), tmp_path / "model.safetensors")
    assert linear_layers(base) == ["first", "second"]
    with full_updates([tmp_path / "model.safetensors"], base) as updates:
        torch.testing.assert_close(
            whole(updates["second"].update()), (tuned.second.weight - base.second.weight).detach()
        )
        assert measure(updates["first"].update())["zero"] == 1
    del base.first
    base.third = nn.Linear(3, 3)
    with (
        pytest.raises(UserError, match=r"no weight third\.weight"),
        full_updates([tmp_path / "model.safetensors"], base),
    ):
        pass


def test_measures_against_dense_formulas():
    model = dual(init_weights=False)
    layer = adapted_layers(model)["first"]
    dense = dense_update(model, "first").double()
    base = layer.get_base_layer().weight.detach().double()
    found = measure(snapshot(model)["first"].update(), base_matrix(layer), strength=0.5)
    n = dense.numel()
    assert found["zero"] == pytest.approx(float((dense == 0).sum()) / n)
    assert found["positive"] == pytest.approx(float((dense > 0).sum()) / n)
    assert found["negative"] == pytest.approx(float((dense < 0).sum()) / n)
    assert found["norm"] == pytest.approx(0.5 * float(dense.norm()))
    assert found["norm_ratio"] == pytest.approx(0.5 * float(dense.norm() / base.norm()))
    assert found["largest"] == pytest.approx(0.5 * float(dense.abs().max()))
    assert found["largest_ratio"] == pytest.approx(0.5 * float(dense.abs().max() / base.square().mean().sqrt()))
    Q = snapshot(model)["first"].update().product("direction")
    assert found["direction_positive"] == pytest.approx(float((whole(Q) > 0).double().mean()))


def test_changes_count_flips_and_switches():
    old = Dense(torch.tensor([[1.0, -1.0, 0.0, 2.0], [0.0, 0.0, 3.0, 1.0]]))
    new = Dense(torch.tensor([[-1.0, -2.0, 5.0, 0.0], [0.0, -1.0, 3.0, -1.0]]))
    found = changes(old, new)
    assert found == {"flipped": 2 / 8, "switched_on": 2 / 8, "switched_off": 1 / 8}


def test_changes_see_signs_flip_behind_closed_entries():
    model = dual(init_weights=False)
    before = snapshot(model)["first"].update()
    with torch.no_grad():
        adapted_layers(model)["first"].dual_lora_D["default"].neg_()
    after = snapshot(model)["first"].update()
    found = changes(before, after)
    assert found["direction_flipped"] == 1
    assert found["flipped"] == pytest.approx(1 - measure(before)["zero"])
    assert found["switched_on"] == found["switched_off"] == 0


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 1.0])
def test_threshold_holds_the_wanted_share(share):
    torch.manual_seed(0)
    matrix = torch.randn(200, 300) ** 3
    limit = threshold_of_largest(Dense(matrix), share)
    assert float((matrix.abs() >= limit).double().mean()) == pytest.approx(share, rel=0.01)


@pytest.mark.parametrize("shape", [(20, 50), (50, 20)])
def test_singular_values_and_ranks_against_torch(shape):
    torch.manual_seed(0)
    low = torch.randn(shape[0], 5) @ torch.randn(5, shape[1])
    expected = torch.linalg.svdvals(low.double())
    torch.testing.assert_close(singular_values(Dense(low))[:5], expected[:5])
    found = ranks(Dense(low))
    assert found["rank_numerical"] == 5
    share = expected[:5] / expected[:5].sum()
    assert found["rank_effective"] == pytest.approx(float(torch.exp(-(share * share.log()).sum())), rel=1e-3)
    assert found["rank_stable"] == pytest.approx(float(expected.square().sum() / expected[0] ** 2))
    assert found["rank_90"] <= found["rank_99"] <= 5


def test_ranks_of_nothing_and_of_the_identity():
    assert set(ranks(Dense(torch.zeros(4, 6))).values()) == {0.0}
    found = ranks(Dense(torch.eye(12)))
    assert found["rank_effective"] == pytest.approx(12)
    assert found["rank_stable"] == pytest.approx(12)
    assert (found["rank_90"], found["rank_99"]) == (11, 12)


def test_examples_show_rank_raised_and_lowered_by_both_functions():
    examples = rank_examples(16)
    for operation in ("ReLU", "Sign"):
        of = [e for e in examples if e.operation == operation]
        assert any(e.after > e.before for e in of), operation
        assert any(e.after < e.before for e in of), operation
    assert max(e.after for e in examples if e.before == 2) >= 15


@pytest.mark.parametrize("magnitude", ["relu", "identity"])
@pytest.mark.parametrize("direction", ["sign", "identity"])
@pytest.mark.parametrize("r", [(1, 1), (2, 1), (1, 3)])
def test_no_update_has_more_rank_than_the_bound(magnitude, direction, r):
    form = Form(magnitude=magnitude, direction=direction)
    bound = rank_bound(*r, form, (24, 30))
    for seed in range(5):
        torch.manual_seed(seed)
        # Whole numbers, so that zeros occur, which is where Sign's bound is reached.
        A, B, C, D = (torch.randint(-2, 3, s).double() for s in ((r[0], 30), (24, r[0]), (r[1], 30), (24, r[1])))
        update = delta_weight(Factors(A, B, C, D), 1.0, form)
        assert torch.linalg.matrix_rank(update) <= bound


def test_likeness_of_equal_opposite_and_unrelated_updates():
    torch.manual_seed(0)
    target = torch.randn(60, 40) @ torch.diag(torch.linspace(3, 0.1, 40))
    same, opposite = likeness(Dense(2 * target), Dense(target)), likeness(Dense(-target), Dense(target))
    assert same["cosine"] == pytest.approx(1)
    assert same["norm_relative"] == pytest.approx(2)
    assert same["agree_1"] == same["agree_10"] == same["agreement_10"] == 1
    assert same["overlap_left"] == pytest.approx(1, abs=1e-6)
    assert same["angle_right"] == pytest.approx(0, abs=0.1)
    assert opposite["cosine"] == pytest.approx(-1)
    assert opposite["disagree_10"] == 1
    half = target.clone()
    half[:30] = 0
    assert likeness(Dense(half), Dense(target))["rest_10"] > 0.3
    other = likeness(Dense(torch.randn(60, 40)), Dense(target))
    assert abs(other["cosine"]) < 5 * other["cosine_chance"]
    assert other["overlap_left"] < 0.5
    with pytest.raises(ValueError, match="different layers"):
        likeness(Dense(target), Dense(target.t()))


def test_leading_subspaces_against_svd():
    torch.manual_seed(0)
    matrix = torch.randn(50, 70, dtype=torch.float64) @ torch.diag(0.8 ** torch.arange(70, dtype=torch.float64))
    U, V = leading_subspaces(Dense(matrix.float()), 4)
    left, _, right = torch.linalg.svd(matrix)
    assert torch.linalg.svdvals(U.t() @ left[:, :4]).min() > 0.999
    assert torch.linalg.svdvals(V.t() @ right[:4].t()).min() > 0.999


def test_magnitude_and_direction_of_scaling_and_of_rotation():
    base = Dense(torch.eye(4))
    scaled = magnitude_and_direction(Dense(0.5 * torch.eye(4)), base)
    assert scaled == pytest.approx({"magnitude_change": 0.5, "direction_change": 0})
    turned = magnitude_and_direction(Dense(torch.eye(4).roll(1, 0) - torch.eye(4)), base)
    assert turned == pytest.approx({"magnitude_change": 0, "direction_change": 1})
    assert correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert correlation([1, 2], [3, 2]) is None
    assert correlation([1, 1, 1], [3, 2, 1]) is None


@pytest.mark.slow
def test_a_layer_of_7b_size_is_measured_in_little_memory(monkeypatch):
    """As of LLaMA-7B's largest linear layer, 172 MiB in fp32, of which no whole copy may be made; here by a quarter."""

    def matrix(seed, O, I, r=16):
        torch.manual_seed(seed)
        factors = Factors(*(torch.randn(s) for s in ((r, I), (O, r), (r, I), (O, r))))
        return Factored(Adapter(factors, torch.tensor(1.0), Form()))

    monkeypatch.setattr(matrices, "BLOCK", AS_IT_IS // 4)
    O, I = 2048, 5504
    with MemoryTracker([]) as tracker:
        a, b = matrix(0, O, I), matrix(1, O, I)
        measure(a), changes(a, b), leading_subspaces(a, 8)
    peak = max(held.total for held in tracker.peaks.values())
    assert 4 * matrices.BLOCK < peak < 4 * O * I


def test_a_row_of_zeros_has_no_direction_to_lose():
    base, change = torch.randn(6, 5), torch.randn(6, 5)
    base[2] = 0
    found = magnitude_and_direction(Dense(change), Dense(base))["direction_change"]
    cosines = torch.nn.functional.cosine_similarity(base + change, base)
    assert found == pytest.approx(float((1 - cosines)[base.any(1)].sum()) / 6, abs=1e-6)


def test_two_parameters_of_one_module_are_two_layers():
    class Cell(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = nn.LSTMCell(6, 5)

    model = get_peft_model(Cell(), DualLoraConfig(r=4, target_parameters=["cell.weight_ih", "cell.weight_hh"]))
    found = {name: update.update().shape for name, update in snapshot(model).items()}
    assert sorted(found.values()) == [(20, 5), (20, 6)]
    for name, layer in adapted_layers(model).items():
        weight = getattr(layer.get_base_layer(), layer.parameter_name)
        assert torch.equal(whole(base_matrix(layer)), weight), name


def test_what_is_no_matrix_is_left_out():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Parameter(torch.randn(3, 8, 6))
            self.gate = nn.Linear(6, 3)

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = Experts()

    config = DualLoraConfig(r=4, target_modules=["gate"], target_parameters=["experts.up"])
    assert set(snapshot(get_peft_model(Outer(), config))) == {"experts.base_layer.gate"}


def test_codes_of_eight_bits_are_no_weights():
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(layer.weight.data.to(torch.float8_e4m3fn), requires_grad=False)
    assert base_matrix(layer) is None
