"""The reference implementation against a formula that shares nothing with it."""

import pytest
import torch
from formula import FORMS, make_case, name_of, reference, run, truth
from numerics import assert_close

from dual_lora.core.reference import Adapter, Factors, Form, delta_weight, direction, scaling


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("form", FORMS, ids=name_of)
def test_value_and_gradients(form, dtype):
    case = make_case(T=21, O=143, forms=[form], dtype=dtype)
    assert_close(run(reference, case), truth(case), dtype, name_of(form))


def test_loss_scale_is_taken_out_before_the_clip():
    case = make_case(T=21, O=143, dtype=torch.float64)._replace(loss_scale=4.0)
    assert_close(run(reference, case), truth(case), torch.float64)
    plain = run(reference, case._replace(loss_scale=None))
    assert not torch.allclose(plain["C0"], run(reference, case)["C0"]), "the loss scale has no effect"


def test_sign_of_zero_is_minus_one():
    assert direction(torch.tensor([-2.0, -0.0, 0.0, 1e-30, 2.0]), Form()).tolist() == [-1, -1, -1, 1, 1]


def test_scale():
    assert scaling(32, 4, 16) == 4.0


def test_delta_weight_is_of_high_rank_and_half_zero():
    factors = Factors(*(torch.randn(*s) for s in ((4, 100), (80, 4), (4, 100), (80, 4))))
    dW = delta_weight(factors, 1.0)
    assert 0.4 < (dW == 0).double().mean() < 0.6
    assert torch.linalg.matrix_rank(dW) > 70  # B A alone has rank 4


def test_a_row_without_an_update():
    adapter = Adapter(Factors(*(torch.randn(*s) for s in ((2, 5), (4, 2), (2, 5), (4, 2)))), torch.tensor(2.0), Form())
    assert adapter.without_row(None) is adapter
    whole, left_out = (delta_weight(a.factors, 2.0) for a in (adapter, adapter.without_row(1)))
    assert not left_out[1].any()
    assert torch.equal(left_out[[0, 2, 3]], whole[[0, 2, 3]])


def test_delta_weight_of_two_ranks_of_one_has_rank_two():
    """Without zeros, Sign of a product of rank 1 has rank 1, and ReLU of one rank 2: two signs, two parts."""
    torch.manual_seed(0)
    f = Factors(torch.randn(1, 48), torch.randn(64, 1), torch.randn(1, 48), torch.randn(64, 1))
    assert torch.linalg.matrix_rank(delta_weight(f, 1.0)) == 2


@pytest.mark.parametrize("form", FORMS, ids=name_of)
def test_form_survives_its_code(form):
    assert Form.from_code(Form(**form).code) == Form(**form)


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (Form(ste="clamp"), "Unknown ste 'clamp': choose one of 'clip', 'identity', 'hardtanh', 'surrogate'"),
        (Form(magnitude="gelu"), "Unknown magnitude 'gelu': choose one of 'relu', 'identity'"),
        (Form(direction="tanh"), "Unknown direction 'tanh': choose one of 'sign', 'identity'"),
    ],
)
def test_unknown_choices_are_named(form, message):
    with pytest.raises(ValueError, match=message):
        form.check()
