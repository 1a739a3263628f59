"""The cache of composed weights: when it is used, what invalidates it, and that it never answers with stale weights."""

import copy
import sys
import threading
import warnings

import pytest
import torch
from peft import get_peft_model
from tiny import Mlp, adapted, layer, layers, points, train
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from dual_lora import DualLoraConfig, composed_weights
from dual_lora.method import cache as cache_module
from dual_lora.method import layer as layer_module
from dual_lora.method.cache import ComposedWeights

DECODED = layer_module.DECODED_TOKENS["cpu"]


@pytest.fixture(autouse=True)
def _nothing_kept():
    """What other tests' models have kept is no matter of these."""
    composed_weights.clear()


@pytest.fixture
def model():
    model = adapted(init_weights=False)
    model.add_adapter("other", DualLoraConfig(r=2, init_weights=False, target_modules=["first", "second"]))
    return model.eval()


@pytest.fixture
def compositions(monkeypatch):
    """Counts how often a cached weight is made."""
    made = []
    real = composed_weights.get

    def get(layer, sources, extra, make, **options):
        return real(layer, sources, extra, lambda: made.append(layer) or make(), **options)

    monkeypatch.setattr(composed_weights, "get", get)
    return made


def tokens(rows=None):
    """One token of so many sequences, as decoding sees them."""
    return (points() if rows is None else points(rows)).unsqueeze(1)


def run(model, x=None, mode=torch.no_grad):
    with mode():
        return model(tokens() if x is None else x).clone()


def truth(model, x=None):
    """The same without the cache: with gradients on it is not used."""
    return model(tokens() if x is None else x).detach()


def test_used_in_evaluation_without_gradients(model, compositions):
    first = run(model)
    assert len(compositions) == len(composed_weights._entries) == 2
    assert torch.equal(run(model), first)
    assert len(compositions) == 2, "composed anew without a reason"
    torch.testing.assert_close(first, truth(model), rtol=1e-5, atol=1e-6)


def test_kept_while_the_adapters_are_switched_off_and_on(model, compositions):
    first = run(model)
    with model.disable_adapter():
        assert not torch.equal(run(model), first)
    model.set_adapter("default")
    assert torch.equal(run(model), first)
    assert len(compositions) == 2


def test_its_weight_is_the_merged_weight(model):
    run(model)
    kept = {m: e.weight.clone() for m, e in composed_weights._entries.items()}
    model.merge_adapter()
    assert all(torch.equal(kept[m], m.get_base_layer().weight) for m in layers(model).values())


@pytest.mark.parametrize("why", ["gradients", "training", "many rows"])
def test_not_used(model, why):
    x = tokens()
    run(model)
    composed_weights.clear()
    if why == "training":
        model.train()
        x = points()
    if why == "many rows":
        x = tokens(layer_module.CACHED_ROWS + 1)
    with torch.set_grad_enabled(why == "gradients"):
        model(x)
    assert composed_weights.bytes_held == 0


@pytest.mark.parametrize("rows", [1, layer_module.CACHED_ROWS])
def test_used_for_few_rows(model, rows):
    run(model, tokens(rows))
    assert composed_weights.bytes_held > 0


def test_a_layer_without_sequences_goes_by_those_with_sequences(model, compositions):
    """As an expert in a model that decodes. Alone, or in an evaluation, its weight is composed in every pass."""
    for _ in range(2):
        run(model, points())
    assert composed_weights.bytes_held == 0
    run(model)
    kept = len(compositions)
    run(model, points())
    assert len(compositions) == kept
    run(model, points(DECODED + 1).unsqueeze(0))
    run(model, points())
    assert composed_weights.bytes_held == 0


def test_a_model_in_training_mode_that_decodes(model, compositions):
    """As RL trainers generate: without gradients, and never in eval mode."""
    model.train()
    step = tokens(3)
    expected = truth(model, step)
    for _ in range(4):
        torch.testing.assert_close(run(model, step), expected, rtol=1e-5, atol=1e-6)
    assert len(compositions) == 2, "composed anew for each token"
    train(model, 1, lr=0.1)
    assert composed_weights.bytes_held == 0
    torch.testing.assert_close(run(model, step), truth(model, step), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(run(model, step), expected, atol=1e-3)
    assert composed_weights.bytes_held > 0
    model(points())
    assert composed_weights.bytes_held == 0, "the memory is for training"
    run(model, points(3))
    run(model, points(4).unsqueeze(0))
    assert composed_weights.bytes_held == 0, "those are sequences"


def test_dropout_in_training_mode_keeps_nothing():
    model = adapted(init_weights=False, dropout=0.5).train()
    run(model, points(3).unsqueeze(1))
    assert composed_weights.bytes_held == 0


def change_factor(model):
    with torch.no_grad():
        layer(model).dual_lora_B["default"].mul_(2)


def change_all_factors_by_an_optimizer(model):
    model.train()
    train(model, 2, lr=0.1)
    model.eval()


def step_in_eval_mode(model):
    train(model, 2, lr=0.1)


def change_strength(model):
    layer(model).set_scale("default", 0.5)


def change_base(model):
    with torch.no_grad():
        layer(model).get_base_layer().weight.add_(1)


def change_active(model):
    model.set_adapter("other")


def activate_both(model):
    model.base_model.set_adapter(["default", "other"])


def load_state(model):
    other = {n: t + 1 if "dual_lora_A" in n else t for n, t in model.state_dict().items()}
    model.load_state_dict(other)


def load_state_by_assignment(model):
    other = {n: t + 1 if "dual_lora_A" in n else t.clone() for n, t in model.state_dict().items()}
    model.load_state_dict(other, assign=True)


def remake_adapter(model):
    layer(model).update_layer("default", 3, 3, None, config=DualLoraConfig(init_weights=False))


def merge_the_other(model):
    model.merge_adapter(["other"])
    model.unmerge_adapter()
    change_factor(model)


def replace_base_weight(model):
    base = layer(model).get_base_layer()
    base.weight = torch.nn.Parameter(base.weight + 1)


def put_averages_in_place(model):
    """As exponential moving averages are swapped in for an evaluation."""
    for p in layer(model).dual_lora_B.values():
        p.data = 2 * p.data


CHANGES = [
    change_factor,
    put_averages_in_place,
    change_all_factors_by_an_optimizer,
    step_in_eval_mode,
    change_strength,
    change_base,
    change_active,
    activate_both,
    load_state,
    load_state_by_assignment,
    remake_adapter,
    merge_the_other,
    replace_base_weight,
]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_invalidated(model, change, mode):
    before = run(model, mode=mode)
    change(model)
    after = run(model, mode=mode)
    assert not torch.allclose(after, before, atol=1e-3), "the change has no effect"
    torch.testing.assert_close(after, truth(model), rtol=1e-5, atol=1e-5)


def test_another_tensor_of_the_same_version_invalidates(model):
    replace_base_weight(model)
    before = run(model)
    version = layer(model).get_base_layer().weight._version
    replace_base_weight(model)
    assert layer(model).get_base_layer().weight._version == version
    assert not torch.equal(run(model), before)
    torch.testing.assert_close(run(model), truth(model), rtol=1e-5, atol=1e-5)


def test_factors_that_were_thawed_are_followed_through_backward(model):
    """Kept while they were frozen, no hook of theirs tells of a backward; `.data` is then written by hand."""
    factors = layer(model).stored_factors("default")
    for f in factors:
        f.requires_grad_(False)
    run(model)
    for f in factors:
        f.requires_grad_(True)
    model(points()).square().sum().backward()
    for f in factors:
        f.data.sub_(f.grad)
    torch.testing.assert_close(run(model), truth(model), rtol=1e-5, atol=1e-5)


def test_a_transform_of_the_factors_raises_a_clear_error(model):
    name, B = next((n, p) for n, p in model.named_parameters() if "dual_lora_B.default" in n)
    x = tokens()
    with torch.no_grad(), pytest.raises(NotImplementedError, match="vmap"):
        torch.func.vmap(lambda B: torch.func.functional_call(model, {name: B}, x))(torch.stack([B, 2 * B]))


def test_the_ramp_invalidates():
    model = adapted(warmup_steps=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for _ in range(5):
        model.train()
        train(model, 1, optimizer=optimizer)
        model.eval()
        torch.testing.assert_close(run(model), truth(model), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "act",
    [
        lambda m: m.train(),
        lambda m: m.merge_adapter(),
        lambda m: m.set_adapter("other"),
        lambda m: m.delete_adapter("default"),
        lambda m: m.load_state_dict(m.state_dict()),
        lambda m: m.double(),
        lambda m: m.to(torch.bfloat16),
        lambda m: composed_weights.clear(),
        lambda m: m.unload(),
    ],
    ids=["train", "merge", "set_adapter", "delete_adapter", "load", "double", "to", "clear", "unload"],
)
def test_memory_is_given_back(model, act):
    import gc

    run(model)
    assert composed_weights.bytes_held > 0
    act(model)
    gc.collect()
    assert composed_weights.bytes_held == 0


def test_dtypes(model):
    run(model)
    model.to(torch.bfloat16)
    x = tokens().bfloat16()
    torch.testing.assert_close(run(model, x), truth(model, x), rtol=0.05, atol=0.05)
    assert all(e.weight.dtype == torch.bfloat16 for e in composed_weights._entries.values())
    model.float()
    torch.testing.assert_close(run(model), truth(model), rtol=1e-5, atol=1e-5)


def test_autocast_has_its_own_entry(model):
    with torch.autocast("cpu", torch.bfloat16):
        low = run(model)
    full = run(model)
    assert (low.dtype, full.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(full, truth(model), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(low.float(), full, rtol=0.05, atol=0.05)


def test_inference_mode(model, compositions):
    first = run(model, mode=torch.inference_mode)
    assert torch.equal(run(model, mode=torch.inference_mode), first)
    assert len(compositions) == 2
    assert torch.equal(run(model), first)
    torch.testing.assert_close(first, truth(model), rtol=1e-5, atol=1e-6)
    model.train()
    train(model, 2)  # nothing of inference mode is left that autograd would refuse


def test_a_model_made_in_inference_mode():
    """Inference tensors have no version counter; nothing of theirs is kept."""
    with torch.inference_mode():
        model = adapted(init_weights=False).eval()
        first = model(tokens())
        assert composed_weights.bytes_held == 0
        layer(model).dual_lora_B["default"].mul_(2)
        assert not torch.equal(model(tokens()), first)


def test_bounded_with_one_warning(model, monkeypatch):
    monkeypatch.setattr(composed_weights, "limit_bytes", 16 * 12 * 4)  # the first layer alone
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            torch.testing.assert_close(run(model), truth(model), rtol=1e-5, atol=1e-6)
    assert composed_weights.bytes_held == 16 * 12 * 4
    told = [str(w.message) for w in caught if "cache of composed weights is full" in str(w.message)]
    assert len(told) == 1
    assert "limit_bytes" in told[0]
    assert "merge" in told[0]


def test_switched_off_by_a_limit_of_zero(model, monkeypatch):
    monkeypatch.setattr(composed_weights, "limit_bytes", 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run(model)
    assert composed_weights.bytes_held == 0


def test_copies_have_their_own_entries(model):
    run(model)
    copied = copy.deepcopy(model)
    change_factor(copied)
    torch.testing.assert_close(run(copied), truth(copied), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(run(model), truth(model), rtol=1e-5, atol=1e-6)


def through_data(model):
    layer(model).dual_lora_B["default"].data.mul_(2)


def through_numpy(model):
    layer(model).dual_lora_C["default"].detach().numpy()[:] *= -1


def through_the_optimizers_function(model):
    B = layer(model).dual_lora_B["default"]
    states = [[torch.ones_like(B)] for _ in range(3)]
    numbers = {"lr": 1.0, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.0, "eps": 1e-8}
    step = [torch.ones(())]
    torch._fused_adamw_([B], *states, [], step, amsgrad=False, maximize=False, **numbers)


def through_the_base_weight(model):
    layer(model).get_base_layer().weight.data.add_(1)


def through_the_scale(model):
    layer(model).dual_lora_scale["default"].data.mul_(2)


WRITES = [through_data, through_numpy, through_the_optimizers_function, through_the_base_weight, through_the_scale]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("write", WRITES, ids=lambda f: f.__name__)
def test_writes_without_a_version_are_seen_on_a_cpu(model, write, mode):
    before = run(model, mode=mode)
    versions = [p._version for p in model.parameters()]
    write(model)
    assert [p._version for p in model.parameters()] == versions, "this write is seen without a look at the values"
    after = run(model, mode=mode)
    assert not torch.allclose(after, before, atol=1e-3), "the write has no effect"
    torch.testing.assert_close(after, truth(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("of_base", [True, False], ids=["a head of the base", "a factor's last row"])
def test_a_write_to_a_part_is_seen_where_several_tokens_come(of_base):
    """Attention heads are set to zero one after the other through `.data`; the first bytes stay as they were."""
    base = torch.nn.Sequential(torch.nn.Linear(64, 64))
    model = get_peft_model(base, DualLoraConfig(r=32, target_modules=["0"], init_weights=False)).eval()
    layer, x = model.base_model.model[0], torch.randn(1, 8, 64)
    with torch.no_grad():
        before = model(x)
        part = layer.base_layer.weight.data[48:] if of_base else layer.dual_lora_A["default"].data[-1]
        part.mul_(-3)
        after = model(x)
        composed_weights.clear()
        torch.testing.assert_close(after, model(x), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(after, before, atol=1e-3), "the write has no effect"


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """No value is compared there, as reading one waits for the device, and one token alone is decoding."""
    monkeypatch.setattr(cache_module, "_address", lambda tensor: 0)
    monkeypatch.setattr(layer_module, "DECODED_TOKENS", {})


@pytest.mark.usefixtures("as_on_a_gpu")
def test_writes_through_data_are_not_seen_on_a_gpu_until_cleared(model):
    """The documented limit: `.data` raises no version counter."""
    before = run(model)
    through_data(model)
    assert torch.equal(run(model), before)
    composed_weights.clear()
    after = run(model)
    assert not torch.equal(after, before)
    torch.testing.assert_close(after, truth(model), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rows", [1, 20], ids=["kept", "too many rows to keep"])
def test_a_sequence_is_composed_for_anew(model, compositions, rows, monkeypatch):
    """An average of weights that is put in place through `.data` after one evaluation, and evaluated itself."""
    monkeypatch.setattr(cache_module, "_address", lambda tensor: 0)
    token = tokens(1)
    sequence = points()[:1].expand(rows, DECODED + 1, -1).contiguous()
    before = run(model, token)
    run(model, token.expand(-1, DECODED, -1))
    assert len(compositions) == 2, "a few tokens at once are decoding"
    through_data(model)
    assert torch.equal(run(model, token), before), "the limit of a GPU"
    torch.testing.assert_close(run(model, sequence), truth(model, sequence), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(run(model, token), truth(model, token), rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("tokens", [2, DECODED])
def test_on_a_gpu_more_than_one_token_is_a_sequence(model, compositions, tokens):
    sequence = points()[:tokens].unsqueeze(0)
    for _ in range(2):
        torch.testing.assert_close(run(model, sequence), truth(model, sequence), rtol=1e-5, atol=1e-6)
        assert not compositions
        through_data(model)


@pytest.mark.usefixtures("as_on_a_gpu")
def test_on_a_gpu_a_layer_of_one_token_next_to_one_of_a_sequence_is_composed_for_anew(model):
    """As the class token of a vision model, or the time step of a diffusion transformer, under an average's weights."""
    one, other = layers(model).values()
    alone, sequence = tokens(1), torch.randn(1, 5, other.in_features)
    for _ in range(2):
        with torch.no_grad():
            y = one(alone)
            other(sequence)
        torch.testing.assert_close(y, one(alone).detach(), rtol=1e-5, atol=1e-6)
        through_data(model)


def test_threads_may_add_and_drop_while_others_count(monkeypatch):
    """Of a dictionary that grows while it is walked through, Python makes an error."""
    cache, stop, errors = ComposedWeights(), threading.Event(), []
    modules, weight = [torch.nn.Identity() for _ in range(500)], torch.zeros(2)

    def count():
        try:
            while not stop.is_set():
                assert cache.bytes_held >= 0
        except RuntimeError as error:
            errors.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    thread = threading.Thread(target=count)
    thread.start()
    for module in modules:
        cache.get(module, [weight], (), lambda: weight)
    stop.set()
    thread.join()
    sys.setswitchinterval(interval)
    assert not errors


def test_a_model_without_adapters_is_left_alone():
    run(Mlp().eval())
    assert composed_weights.bytes_held == 0


def test_a_graph_holds_no_kept_weight(model):
    run(model)
    with torch.no_grad():
        graph = make_fx(lambda x: model(x))(tokens())
        layer(model).dual_lora_B["default"].mul_(2)
        torch.testing.assert_close(graph(tokens()), model(tokens()))


def test_a_pass_without_numbers_leaves_nothing(model):
    want = run(copy.deepcopy(model))
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        model(torch.empty(6, 12))
    assert torch.equal(run(model), want)


def test_a_model_without_sequences_keeps_nothing_next_to_one_that_decodes(model):
    """A critic's target network is written through `.data`, between the passes of a language model that generates."""
    critic = adapted(init_weights=False).eval()
    run(model)
    run(critic, points())
    layer(critic).dual_lora_B["default"].data.mul_(2)
    run(model)
    torch.testing.assert_close(run(critic, points()), truth(critic, points()))
