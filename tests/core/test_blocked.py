"""Any split of a weight into blocks gives what the reference implementation gives."""

from itertools import cycle
from typing import get_args
from unittest import mock

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import assert_close
from operands import Rows

from dual_lora.core import blocked, frozen, reference
from dual_lora.core.reference import Adapter, Direction, Factors, Form, Magnitude, Ste

forms = st.builds(
    Form,
    ste=st.sampled_from(get_args(Ste)),
    magnitude=st.sampled_from(get_args(Magnitude)),
    direction=st.sampled_from(get_args(Direction)),
    live_zero=st.booleans(),
    plain=st.just(0),
)
sources = st.sampled_from(["rows", "columns", "read by rows", "none"])


def quarters(*shape):
    """With them P and Q are exact in every precision, so that implementations agree on every sign; some are zero."""
    return torch.randint(-3, 4, shape).double() / 4


def factors_of(form, O, I, r1, r2):
    trains = form.trains_direction
    C, D = frozen.keys(torch.tensor(7), O, I) if form.direction == "frozen" else (quarters(r2 * trains, I), None)
    return Factors(quarters(r1, I), quarters(O, r1), C, quarters(O, r2 * trains) if D is None else D)


def cast(adapter, dtype):
    return Adapter(Factors(*(f.to(dtype) if f.is_floating_point() else f for f in adapter.factors)),
                   adapter.scale.to(dtype), adapter.form)  # fmt: skip


def truth(x, W, dy, adapters, loss_scale):
    """Value and gradients in fp64, by autograd through the reference."""
    named = {"x": x} | ({} if W is None else {"weight": W})
    named |= {f"{n}{k}": f for k, a in enumerate(adapters) for n, f in zip("ABCD", a.factors, strict=True)}
    named = {n: t.clone().requires_grad_() if t.is_floating_point() else t for n, t in named.items()}
    deltas = [
        reference.delta_weight(Factors(*(named[f"{n}{k}"] for n in "ABCD")), a.scale, a.form, loss_scale, W)
        for k, a in enumerate(adapters)
    ]
    composed = sum(deltas) if W is None else named["weight"] + sum(deltas)
    y = named["x"] @ composed.t()
    y.backward(dy)
    return {"y": y, "composed": composed} | {n: t.grad for n, t in named.items() if t.grad is not None}


@settings(derandomize=True, max_examples=60, deadline=None, database=None)
@given(
    chosen=st.lists(forms, min_size=1, max_size=2),
    sizes=st.tuples(st.integers(0, 9), *[st.integers(1, 40)] * 2, *[st.integers(1, 5)] * 2),
    source=sources,
    split=st.lists(st.integers(1, 20), min_size=1, max_size=6),  # heights, of blocks and of their tiles
    dtype=st.sampled_from([torch.float32, torch.float64]),
    loss_scale=st.sampled_from([None, 4.0]),
    tall=st.booleans(),
)
def test_any_split_into_blocks_is_the_reference(chosen, sizes, source, split, dtype, loss_scale, tall):
    torch.manual_seed(0)
    T, O, I, r1, r2 = sizes
    if source == "none":
        chosen = [form._replace(direction="identity") if form.direction == "weight" else form for form in chosen]
    adapters = [Adapter(factors_of(f, O, I, r1, r2), torch.tensor(0.5**k), f) for k, f in enumerate(chosen)]
    x, dy, W = quarters(T, I), 8 * quarters(T, O), None if source == "none" else quarters(O, I)
    want = truth(x, W, dy, adapters, loss_scale)

    heights = cycle(split)

    def spans(length, step):
        start = 0
        while start < length:
            stop = min(length, start + next(heights))
            yield slice(start, stop)
            start = stop

    weight = None if W is None else W.to(dtype)
    if source == "columns":
        weight = weight.t().contiguous().t()
    if source == "read by rows":
        weight = Rows(weight)
    ours = [cast(a, dtype) for a in adapters]
    given_scale = None if loss_scale is None else torch.tensor(loss_scale)
    needs = blocked.Needs(True, isinstance(weight, torch.Tensor), True)
    with mock.patch.object(blocked, "_spans", spans), mock.patch.object(blocked._Work, "is_tall", return_value=tall):
        y = blocked.forward(x.to(dtype), weight, ours)
        composed = blocked.compose(weight, ours, dtype)
        dx, dW, dF = blocked.backward(dy.to(dtype), x.to(dtype), weight, ours, given_scale, needs)
    found = {"y": y, "composed": composed, "x": dx, "weight": dW}
    found |= {f"{n}{k}": g for k, four in enumerate(dF) for n, g in zip("ABCD", four, strict=True)}
    if dW is None:
        want.pop("weight", None)
    assert_close({name: found[name] for name in want}, want, dtype)
