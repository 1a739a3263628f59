"""What belongs to one adapter of a layer: its place in a configuration's patterns, and its tie to the embedding."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils import hotswap
from tiny import Mlp, layers, llama, logits, points
from torch import nn

from dual_lora import DualLoraConfig


class Blocks(nn.Module):
    """An attention, and a module with two parameters that are adapted as such."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.experts = Pair()

    def forward(self, x):
        return self.experts(self.attention(x, x, x)[0])


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(6, 8)), nn.Parameter(torch.randn(8, 6))

    def forward(self, x):
        return x @ self.up.t() @ self.down.t()


MODELS = {
    "anchored": (Mlp, points(), {"target_modules": ["first", "second"]}, ["^first", "second"]),
    "nested": (llama, None, {"target_modules": ["q_proj", "down_proj"]}, [r"^model\.layers\.0\..*", "q_proj"]),
    "parameters": (
        Blocks,
        torch.randn(2, 3, 8),
        {"target_modules": [], "target_parameters": ["experts.up", "experts.down"]},
        ["experts.up", "^experts.down"],
    ),
    "attention": (Blocks, torch.randn(2, 3, 8), {"target_modules": ["attention"]}, ["^attention", "out_proj"]),
}


@pytest.mark.parametrize("kind", MODELS)
def test_a_swapped_adapter_has_the_patterns_of_one_that_is_made(kind):
    make, x, targets, (first, second) = MODELS[kind]

    def build(**options):
        torch.manual_seed(0)
        model = get_peft_model(make(), DualLoraConfig(init_weights=False, warmup_steps=0, **targets, **options))
        return model.eval()

    patterns = dict(r=6, rank_pattern={first: 2, second: [1, 3]}, alpha=5.0, alpha_pattern={first: 1.0, second: 9.0})
    wanted, model = build(**patterns), build(r=6)
    state = get_peft_model_state_dict(wanted)
    hotswap.hotswap_adapter_from_state_dict(model, state, "default", wanted.peft_config["default"])
    for ours, theirs in zip(layers(model).values(), layers(wanted).values(), strict=True):
        assert (ours.states, ours.scaling) == (theirs.states, theirs.scaling)
    with torch.no_grad():
        output = (lambda m: logits(m)) if x is None else (lambda m: m(x))
        torch.testing.assert_close(output(model), output(wanted), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("new", [dict(r=6, alpha=1.0), dict(r=2, alpha=9.0), dict(r1=1, r2=7)], ids=str)
@pytest.mark.parametrize("kind", MODELS)
def test_a_swapped_adapter_is_saved_as_it_is(kind, new, tmp_path):
    """By the ranks that are stored, which are padded, and the new strength: the old α would make it another model."""
    make, _, targets, (first, _) = MODELS[kind]

    def build(**options):
        torch.manual_seed(0)
        return get_peft_model(make(), DualLoraConfig(init_weights=False, **targets, **options)).eval()

    model, other = build(r=6, warmup_steps=0), build(**{"rank_pattern": {first: 4}, **new})
    old = model.peft_config["default"]
    state = get_peft_model_state_dict(other)
    hotswap.hotswap_adapter_from_state_dict(model, state, "default", other.peft_config["default"])
    assert (old.r, old.rank_pattern) == (6, {}), "another adapter may have the same configuration"
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    again = PeftModel.from_pretrained(make(), tmp_path).eval()
    for ours, theirs in zip(layers(again).values(), layers(model).values(), strict=True):
        torch.testing.assert_close(ours.get_delta_weight("default"), theirs.get_delta_weight("default"))
        assert ours.strength("default") == pytest.approx(theirs.strength("default"))


def tied_and(targets):
    """Adapter "a" is one update of the tied embedding and head; "b" has its own, of `targets`."""
    base = llama(tie_word_embeddings=True, pad_token_id=3)
    options = dict(init_weights=False, warmup_steps=0)
    model = get_peft_model(
        base, DualLoraConfig(target_modules=["embed_tokens"], ensure_weight_tying=True, **options), adapter_name="a"
    )
    model.add_adapter("b", DualLoraConfig(target_modules=targets, r=2, **options))
    return model.eval()


@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`", "ignore:.*lm_head")
@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head"]], ids=str)
def test_an_adapter_beside_a_tied_one_is_not_tied(targets):
    model = tied_and(targets)
    head = model.base_model.model.lm_head
    model.set_adapter("b")
    want = logits(model)
    torch.testing.assert_close(model.base_model.model(input_ids=IDS).logits, logits(model, IDS), rtol=1e-4, atol=1e-4)
    if "lm_head" in targets:
        assert head.get_delta_weight("b")[3].any(), "the padding's row has an update where nothing is tied"
    for act in (model.merge_adapter, copy.deepcopy(model).merge_and_unload):
        if len(targets) == 2:
            with pytest.raises(ValueError, match=r"share one weight, and their updates \(b and b\) differ.*Untie"):
                act()
        else:
            with pytest.warns(UserWarning, match=r"Merging adapter b .*which shares its weight.*Untie"):
                act()
    model.unmerge_adapter()
    assert torch.equal(logits(model), want)
    model.set_adapter("a")
    want = logits(model)
    assert not head.get_delta_weight("a")[3].any()
    model.merge_adapter()
    torch.testing.assert_close(logits(model), want, rtol=1e-3, atol=1e-4)
    model.unmerge_adapter()
    model.delete_adapter("a")
    assert not head.tied


IDS = torch.arange(8).view(1, 8)


@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`", "ignore:.*lm_head")
def test_untied_as_the_error_says_each_merges_its_own():
    model = tied_and(["lm_head"])
    model.set_adapter("b")
    want = logits(model)
    base = model.base_model.model.lm_head.get_base_layer()
    base.weight = nn.Parameter(base.weight.detach().clone())
    model.merge_adapter()
    torch.testing.assert_close(logits(model), want, rtol=1e-3, atol=1e-4)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), want)


def test_a_second_tied_adapter_is_tied_as_the_first():
    model = tied_and(["lm_head"])
    options = dict(target_modules=["embed_tokens"], ensure_weight_tying=True, init_weights=False, warmup_steps=0)
    model.add_adapter("c", DualLoraConfig(r=2, **options))
    model.base_model.add_weighted_adapter(["a"], [-0.5], "minus")
    head, embedding = model.base_model.model.lm_head, model.base_model.model.model.embed_tokens
    model.eval()
    for name in ("c", "minus"):
        assert name in head.tied
        model.set_adapter(name)
        want = logits(model)
        model.merge_adapter()
        torch.testing.assert_close(logits(model), want, rtol=1e-3, atol=1e-3)
        model.unmerge_adapter()
    torch.testing.assert_close(embedding.get_delta_weight("minus"), -0.5 * embedding.get_delta_weight("a"))


def test_factors_that_are_tied_merge_into_both_weights_where_there_are_two(tmp_path):
    """A checkpoint of two weights that its configuration ties: the head's merge was left to the embedding's weight."""
    apart = llama()
    apart.config.tie_word_embeddings = True
    apart.save_pretrained(tmp_path)
    base = type(apart).from_pretrained(tmp_path)
    assert base.lm_head.weight is not base.model.embed_tokens.weight
    config = DualLoraConfig(r=4, init_weights=False, target_modules=["embed_tokens"], ensure_weight_tying=True)
    model = get_peft_model(base, config).eval()
    assert base.lm_head.tied
    expected, before = logits(model), base.lm_head.weight.data.clone()
    model.merge_adapter()
    torch.testing.assert_close(logits(model), expected)
    model.unmerge_adapter()
    assert torch.equal(base.lm_head.get_base_layer().weight, before)
    assert torch.equal(logits(model), expected)
    torch.testing.assert_close(logits(model.merge_and_unload()), expected)
