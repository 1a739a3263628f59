"""The weight's gradient from some of the tokens: no bias, by the average over all numbers that can be drawn."""

import pytest
import torch
from formula import make_case, operator, run
from operands import Rows
from torch.utils.checkpoint import checkpoint

from dual_lora.core import blocked, op, tokens, whole
from dual_lora.core.op import dual_lora_linear
from dual_lora.core.reference import Adapter, Factors, Form, delta_weight
from dual_lora.core.tokens import AUTO, EXACT

T, O, I = 160, 24, 20
NUMBERS = (torch.arange(1000) + 0.5).double() / 1000  # every number that may be drawn, evenly


def tensors(kind, T=T, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    dy, x = (torch.randn(T, n, generator=generator, dtype=dtype) for n in (O, I))
    if kind == "skewed":
        dy *= torch.logspace(0, -4, T, dtype=dtype).unsqueeze(1)
    elif kind == "zeros":
        dy[::3] = 0
    elif kind == "one":
        dy[7] *= 1e6
    elif kind == "equal":
        dy, x = torch.ones(T, O, dtype=dtype), torch.ones(T, I, dtype=dtype)
    return dy, x


KINDS = ["gaussian", "skewed", "zeros", "one", "equal"]


def auto_count(dy, x, draw):
    made = tokens.water_filling(tokens.leverage(dy, x))
    return tokens.sample_size(len(x), AUTO, made, lambda: tokens.gradient_variance(dy, x, 4, made, draw))


def by_bisection(scores, n):
    """π = min(1, c · score) with Σ π = n, by halving an interval for c: another way than the one that is tested."""
    low, high = 0.0, 1e30
    for _ in range(400):
        c = (low + high) / 2 if high < 1e29 else (low * 2 or 1e-30)
        if torch.clamp(c * scores, max=1).sum() < n:
            low = c
        else:
            high = c
    return torch.clamp(high * scores, max=1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 40, 100])
def test_probabilities(kind, n):
    dy, x = tensors(kind)
    chances = tokens.water_filling(tokens.leverage(dy, x)).probabilities(n)
    torch.testing.assert_close(chances, by_bisection(dy.norm(dim=1) * x.norm(dim=1), n), rtol=1e-9, atol=1e-9)
    assert chances.sum() == pytest.approx(n)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [5, 40, 100])
def test_the_expectation_is_the_gradient(kind, n):
    dy, x = tensors(kind)
    total = torch.zeros(O, I, dtype=torch.float64)
    for number in NUMBERS:
        rows, columns = tokens.sample(dy, x, n, number)
        assert len(rows) == len(columns) == n
        total += rows.T @ columns
    G = dy.T @ x
    # Each token is drawn for the share π of the numbers, up to the distance of two numbers at both ends.
    assert (total / len(NUMBERS) - G).norm() < 0.02 * (dy.norm(dim=1) * x.norm(dim=1)).sum() / n**0.5
    assert (total / len(NUMBERS) - G).norm() < 0.05 * G.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_rare_token_is_weighed_in_fp32(dtype):
    """Its weight 1/π was rounded first: infinite in fp16, so that a GradScaler skipped the step, and off in bf16."""
    dy = torch.full((4096, 2), 1e-6, dtype=dtype)
    dy[-100:] = 1
    x = torch.full((4096, 1), 0.5, dtype=dtype)
    made = tokens.water_filling(tokens.leverage(dy, x))
    at, weights = made.draw(64, torch.tensor(1e-3))
    assert at[0] < 4096 - 100
    assert weights[0] > 65504
    rows, _ = tokens.weighted_rows(dy, x, (at, weights))
    expected = dy[at].double() * weights.unsqueeze(1)
    assert ((rows.double() - expected).abs() <= torch.finfo(dtype).eps / 2 * expected).all()


def test_tokens_that_carry_nothing_make_room_for_the_others():
    dy, x = tensors("zeros")
    for n in (110, 150):  # of 106 that carry something
        for number in (0.0, 0.3, 0.999999):
            rows, columns = tokens.sample(dy, x, n, torch.tensor(number))
            torch.testing.assert_close(rows.T @ columns, dy.T @ x)
    assert torch.equal(*(tokens.sample(torch.zeros_like(dy), x, n, NUMBERS[0])[0] for n in (5, 5)))
    assert not tokens.sample(torch.zeros_like(dy), x, 5, NUMBERS[0])[0].any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["dy", "x"])
def test_what_is_not_finite_reaches_the_result(bad, where):
    """A gradient scaler has to see it."""
    dy, x = tensors("gaussian")
    (dy if where == "dy" else x)[90, 3] = bad
    for number in NUMBERS[::100]:
        rows, columns = tokens.sample(dy, x, 40, number)
        assert not (rows.T @ columns).isfinite().all()


def test_the_added_variance_is_that_of_independent_draws():
    dy, x = tensors("skewed")
    made = tokens.water_filling(tokens.leverage(dy, x))
    for n in (10, 40, 100):
        chances = made.probabilities(n)
        want = ((1 / chances - 1) * made.scores.square()).sum()
        torch.testing.assert_close(made.added_variance(n), want.view(1))


def gradients(case, share, number, source=None, form="identity"):
    """The operator's own backward for one number that is drawn."""
    adapters = [
        Adapter(Factors(*f), torch.tensor(s).to(case.x.dtype), Form(form))
        for f, s in zip(case.factors, case.scales, strict=True)
    ]
    needs = op.Needs(True, False, True)
    weight = case.weight if source is None else source
    dx, _, dF = op._linear_backward(case.dy, case.x, weight, adapters, None, share, number, needs)
    return dx, dF


def case_of(ste="identity", T=160, O=40, I=30, dtype=torch.float64, blocks=False):
    return make_case(T=T, O=O, I=I, ranks=((3, 2),), forms=[{"ste": ste}], dtype=dtype)


@pytest.mark.parametrize("ste", ["identity", "hardtanh", "surrogate"])
@pytest.mark.parametrize("by", [whole, blocked], ids=["whole", "blocks"])
def test_the_factors_gradients_have_the_exact_ones_as_expectation(ste, by, monkeypatch):
    if by is blocked:
        monkeypatch.setattr(blocked, "CPU", blocked.Sizes(tile=16 * 30, block=16 * 30 * 8, narrow=16))
    case = case_of(ste)
    dx, exact = gradients(case, EXACT, None, form=ste)
    sums = [torch.zeros_like(f) for f in exact]
    numbers = NUMBERS[::2]
    for number in numbers:
        sampled_dx, sampled = gradients(case, 0.5, number, form=ste)
        assert torch.equal(sampled_dx, dx)
        for total, f in zip(sums, sampled, strict=True):
            total += f / len(numbers)
    for total, f in zip(sums, exact, strict=True):
        assert (total - f).norm() < 0.03 * f.norm()


def test_a_half_is_noisy_and_reproducible():
    case = case_of(dtype=torch.float32)
    leaves = [f.clone().requires_grad_() for f in case.factors[0]]

    def once(seed, share=0.5):
        torch.manual_seed(seed)
        y = dual_lora_linear(
            case.x, case.weight, None, [Adapter(Factors(*leaves), torch.tensor(0.5), Form())], None, share
        )
        return torch.autograd.grad(y, leaves, case.dy)

    assert all(map(torch.equal, once(1), once(1)))
    assert not torch.equal(once(1)[0], once(2)[0])
    assert not torch.equal(once(1)[0], once(1, EXACT)[0])


def test_nothing_is_drawn_where_all_tokens_count():
    case = case_of(dtype=torch.float32)
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    run(operator, case)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_trained_weight_gets_its_exact_gradient():
    case = case_of(dtype=torch.float32)
    weight = case.weight.clone().requires_grad_()
    leaves = [f.clone().requires_grad_() for f in case.factors[0]]
    adapters = [Adapter(Factors(*leaves), torch.tensor(0.5), Form())]
    grads = [
        torch.autograd.grad(dual_lora_linear(case.x, weight, None, adapters, None, share), [weight, *leaves], case.dy)
        for share in (0.5, EXACT)
    ]
    assert all(map(torch.equal, *grads))


@pytest.mark.parametrize("way", ["checkpoint", "compiled", "autocast", "rows", "bf16"])
def test_ways_of_training(way):
    """Each gives the bits of a plain run after the same seed, or of one in the same precision."""
    case = case_of(dtype=torch.float32)
    leaves = [f.clone().requires_grad_() for f in case.factors[0]]
    x, dy, weight = case.x.view(4, 40, -1), case.dy.view(4, 40, -1), case.weight
    adapters = [Adapter(Factors(*leaves), torch.tensor(0.5), Form())]
    low = way in ("autocast", "bf16")
    plain = lambda x, w: dual_lora_linear(x, w, None, adapters, None, 0.5)  # noqa: E731

    def grads(call, *operands, dy=dy):
        y = call(*operands)
        torch.manual_seed(5)
        return torch.autograd.grad(y, leaves, dy)

    want = grads(
        plain,
        *(
            (
                x.bfloat16(),
                weight.bfloat16(),
            )
            if low
            else (x, weight)
        ),
        dy=dy.bfloat16() if low else dy,
    )
    if way == "checkpoint":
        got = grads(lambda *a: checkpoint(plain, *a, use_reentrant=False, preserve_rng_state=False), x, weight)
    elif way == "compiled":
        got = grads(torch.compile(plain, backend="aot_eager"), x, weight)
    elif way == "autocast":
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = grads(plain, x, weight.bfloat16(), dy=dy.bfloat16())
    elif way == "rows":
        got = grads(plain, x, Rows(weight))
    else:
        got = grads(plain, x.bfloat16(), weight.bfloat16(), dy=dy.bfloat16())
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())


def sequences(alike, B=4, T=64):
    """Gradients of B sequences, whose tokens agree with each other or not."""
    generator = torch.Generator().manual_seed(1)
    each = torch.randn(B, 1, O, generator=generator), torch.randn(B, 1, I, generator=generator)
    noise = torch.randn(B, T, O, generator=generator), torch.randn(B, T, I, generator=generator)
    return [(alike * e + n).reshape(B * T, -1) for e, n in zip(each, noise, strict=True)]


def test_auto_takes_the_fewer_tokens_the_more_the_sequences_differ():
    draw = torch.tensor(0.4)
    counts = []
    for alike in (0.0, 1.0, 4.0):
        dy, x = sequences(alike)
        counts.append(auto_count(dy, x, draw))
    assert counts[0] == 256 > counts[1] > counts[2] == tokens.MIN_TOKENS


def test_auto_adds_less_than_its_bound():
    """Against the variance between the sequences, by the definition."""
    dy, x = sequences(1.5)
    n = auto_count(dy, x, torch.tensor(0.4))
    each = dy.view(4, -1, O).mT @ x.view(4, -1, I)
    own = (each - each.mean(0)).square().sum() * 4 / 3
    G = dy.T @ x
    errors = [(r.T @ c - G).square().sum() for r, c in (tokens.sample(dy, x, n, number) for number in NUMBERS[::5])]
    assert n < len(x)
    assert sum(errors) / len(errors) < 2 * tokens.VARIANCE_BOUND * own  # four probes know `own` to some 30 %


def test_rows_that_are_zero_are_left_out_exactly():
    case = case_of("clip", dtype=torch.float64)
    case.dy[::4] = 0
    case.dy[5] = 1e-200  # whose square is zero, and which is not
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens, "nonzero_rows", lambda dy: None)
        want = gradients(case, EXACT, None, form="clip")
    got = gradients(case, EXACT, None, form="clip")
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-300)
    assert not got[0][::4].any()


def test_which_rows_are_zero():
    dy = torch.ones(100, 8)
    assert tokens.nonzero_rows(dy) is None
    dy[10:30] = 0
    assert tokens.nonzero_rows(dy).tolist() == [*range(10), *range(30, 100)]
    dy[20, 0] = 1e-30
    assert tokens.nonzero_rows(dy) is None
    dy[20, 0] = float("nan")
    assert 20 in tokens.nonzero_rows(dy).tolist()
    assert tokens.nonzero_rows(torch.zeros(100, 8)).tolist() == []


def test_a_loss_of_no_token_has_gradients_of_zero():
    case = case_of(dtype=torch.float32)
    case.dy.zero_()
    dx, dF = gradients(case, 0.5, NUMBERS[3])
    assert not dx.any()
    assert not any(f.any() for f in dF)


def test_the_whole_agrees_with_the_definition():
    """The exact gradient of the same case by autograd through ΔW."""
    case = case_of("identity")
    leaves = [f.clone().requires_grad_() for f in case.factors[0]]
    W = case.weight + delta_weight(Factors(*leaves), case.scales[0], Form("identity"))
    want = torch.autograd.grad(case.x @ W.T, leaves, case.dy)
    torch.testing.assert_close(gradients(case, EXACT, None)[1], [*want], rtol=1e-9, atol=1e-9)


def test_processes_with_one_seed_draw_each_their_own(monkeypatch):
    drawn, kept = [], tokens.WaterFilling.draw
    monkeypatch.setattr(
        tokens.WaterFilling, "draw", lambda made, n, draw: drawn.append(float(draw)) or kept(made, n, draw)
    )
    dy, x = tensors("gaussian")
    other = dy.flip(1)
    other[0] *= 1.01
    for rows in (dy, dy.clone(), other):  # the second as a replica of the first
        tokens.gradient_rows(rows, x, 1, 0.5, torch.tensor(0.25))
    assert drawn[0] == drawn[1]
    assert abs(drawn[0] - drawn[2]) > 1e-3
    assert all(0 <= draw < 1 for draw in drawn)


def test_draws_of_other_data_are_spread_evenly():
    x = torch.randn(T, I, generator=torch.Generator().manual_seed(1))
    shifts = torch.stack(
        [tokens.water_filling(tokens.leverage(tensors("gaussian")[0] * (1 + k / 999), x)).shift() for k in range(400)]
    )
    assert torch.histc(shifts, 4, 0, 1).min() > 70  # of 100 each
