"""Ordinary calls of PEFT and torch that once gave another model than LoRA's would have been, without a word."""

import copy
import warnings

import pytest
import torch
from peft import PeftModel, convert_to_lora, get_peft_model
from peft.utils.quantization_utils import Bnb4bitBackend
from quantized_layers import decoded
from tiny import adapted, points
from torch import nn
from torch.autograd import forward_ad
from torch.nn.functional import dropout, mse_loss
from torch.nn.utils import prune, weight_norm
from torch.utils.flop_counter import FlopCounterMode

from dual_lora import (
    DualLoraConfig,
    DualLoraWarning,
    count_step,
    dual_lora_linear,
    save_as_lora,
)
from dual_lora.core.compose_op import dual_lora_weight
from dual_lora.core.embedding_op import dual_lora_embedding
from dual_lora.core.reference import delta_weight
from dual_lora.method.layers.quantized_rows import row_source


def llama(tie=False):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    small = dict(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    return LlamaForCausalLM(LlamaConfig(**small, num_key_value_heads=2, tie_word_embeddings=tie)).eval()


def visible(**options):
    return DualLoraConfig(**{"r": 4, "init_weights": False, "warmup_steps": 0, **options})


def logits(model, **given):
    given = given or {"input_ids": torch.arange(12).view(2, 6)}
    with torch.no_grad():
        return model(**given).logits


def left(model, adapter="default"):
    return {m.steps_left(adapter) for m in model.modules() if hasattr(m, "dual_lora_A")}


def test_a_state_of_trainable_parameters_alone_is_finished():
    """As frameworks that save `requires_grad` alone have it."""
    trained = adapted(init_weights=False, alpha=16)
    state = {n: p.detach().clone() for n, p in trained.named_parameters() if p.requires_grad}
    fresh = adapted(warmup_steps=7, alpha=16)
    assert left(fresh) == {7}
    fresh.load_state_dict(state, strict=False)
    assert left(fresh) == {0}
    torch.testing.assert_close(fresh(points()), trained(points()))


def two_adapters():
    model = adapted(warmup_steps=6)
    model.add_adapter("b", model.peft_config["default"])
    optimizer = torch.optim.AdamW([p for n, p in model.named_parameters() if "dual_lora_" in n], lr=1e-2)
    return model, optimizer


def test_an_adapter_chosen_earlier_in_the_step_is_counted_and_trains():
    model, optimizer = two_adapters()
    for _ in range(6):
        optimizer.zero_grad()
        for name, sign in (("default", 1.0), ("b", -1.0)):
            model.set_adapter(name)
            out = model(points())
            mse_loss(out, sign * torch.ones_like(out)).backward()
        optimizer.step()
    assert (left(model), left(model, "b")) == ({0}, {0})


def test_a_step_while_adapters_are_switched_off_is_counted():
    model, optimizer = two_adapters()
    for _ in range(3):
        optimizer.zero_grad()
        model(points()).square().mean().backward()
        with model.disable_adapter():
            optimizer.step()
    assert (left(model), left(model, "b")) == ({3}, {6}), "b has no gradient"


def test_a_copy_that_follows_is_counted_by_hand():
    student = adapted(warmup_steps=4)
    teacher = copy.deepcopy(student).requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in student.parameters() if p.requires_grad], lr=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        student(points()).square().mean().backward()
        optimizer.step()
        for ours, theirs in zip(teacher.parameters(), student.parameters(), strict=True):
            ours.data.copy_(theirs.data)
        count_step(teacher)
    torch.testing.assert_close(teacher(points()), student(points()))


def test_count_step_leaves_the_adapters_that_do_not_train():
    model, _ = two_adapters()
    count_step(model)
    assert (left(model), left(model, "b")) == ({5}, {6})


def test_an_optimizer_state_loaded_by_torch_s_own_functions_is_no_step():
    state_dict = pytest.importorskip("torch.distributed.checkpoint.state_dict")
    model = adapted(warmup_steps=10)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(4):
        optimizer.zero_grad()
        model(points()).square().mean().backward()
        optimizer.step()
    saved = state_dict.get_optimizer_state_dict(model, optimizer)
    other = adapted(warmup_steps=10)
    other.load_state_dict(model.state_dict())
    again = torch.optim.AdamW([p for p in other.parameters() if p.requires_grad], lr=1e-3)
    state_dict.set_optimizer_state_dict(other, again, optim_state_dict=saved)
    assert left(other) == {6}


def test_patterns_of_one_layer_are_read_alike_before_and_after_saving(tmp_path):
    several = {r"model\.layers\.0\.self_attn\.k_proj": 64.0, "k_proj": 1.0}
    with pytest.warns(UserWarning, match="alpha_pattern has several values for one layer"):
        model = get_peft_model(llama(), visible(target_modules=["k_proj"], alpha=8.0, alpha_pattern=several)).eval()
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="alpha_pattern has several values"):
        loaded = PeftModel.from_pretrained(llama(), tmp_path).eval()
    torch.testing.assert_close(logits(loaded), logits(model))


@pytest.mark.parametrize("patterns", [{"alpha_pattern": {"embed_tokens": 32.0}}, {"rank_pattern": {"embed_tokens": 8}}])
def test_a_tied_head_acts_as_the_embedding_that_it_is(patterns):
    options = dict(target_modules=["embed_tokens", "lm_head"], ensure_weight_tying=True, alpha=8.0, **patterns)
    model = get_peft_model(llama(tie=True), visible(**options)).eval()
    before = logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)


def test_a_merged_tied_head_alone_is_switched_off():
    options = dict(target_modules=["embed_tokens", "lm_head"], ensure_weight_tying=True)
    base, model = llama(tie=True), get_peft_model(llama(tie=True), visible(**options)).eval()
    given = {"inputs_embeds": torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))}
    before = logits(model, **given)
    model.merge_adapter()
    with model.disable_adapter():
        torch.testing.assert_close(logits(model, **given), logits(base, **given))
    torch.testing.assert_close(logits(model, **given), before)


def test_a_hot_swap_of_shared_factors_is_one_of_both():
    from dual_lora.method.hotswap import hotswap_from_state_dict

    options = dict(target_modules=["embed_tokens", "lm_head"], ensure_weight_tying=True)
    model, other = (get_peft_model(llama(tie=True), visible(**options)).eval() for _ in range(2))
    with torch.no_grad():
        for name, p in other.named_parameters():
            if "dual_lora_" in name:
                p.normal_(generator=torch.Generator().manual_seed(3)).mul_(0.3)
    state = {n: p.detach() for n, p in other.named_parameters() if "dual_lora_" in n}  # shared ones once
    hotswap_from_state_dict(model, state, "default", other.peft_config["default"])
    torch.testing.assert_close(logits(model), logits(other))


def test_a_merge_into_a_named_parameter_that_another_layer_shares_is_said():
    options = dict(target_modules=[], target_parameters=["embed_tokens.weight"])
    model = get_peft_model(llama(tie=True), visible(**options)).eval()
    with pytest.warns(UserWarning, match=r"changes Linear.* as well, which shares its weight"):
        model.merge_adapter()


@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens", "q_proj"]])
def test_an_embedding_saved_while_merged_is_the_base_s(tmp_path, targets):
    model = get_peft_model(llama(), visible(target_modules=targets)).eval()
    before, weights = logits(model), {n: p.clone() for n, p in model.named_parameters()}
    model.merge_adapter()
    merged = {n: p.clone() for n, p in model.named_parameters()}
    model.save_pretrained(tmp_path)
    assert all(torch.equal(p, merged[n]) for n, p in model.named_parameters()), "the model stays merged"
    torch.testing.assert_close(logits(PeftModel.from_pretrained(llama(), tmp_path).eval()), before)
    model.unmerge_adapter()
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())


class Masked(nn.Linear):
    """As in PixelCNN and MADE: a mask is written into the weight at every call."""

    def forward(self, x):
        self.weight.data *= torch.ones_like(self.weight).tril()
        return super().forward(x)


def test_a_forward_that_writes_into_its_weight():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 6), Masked(6, 6))
    model = get_peft_model(net, visible(target_modules=["1"]))
    layer = model.base_model.model[1]
    x = torch.randn(3, 6, requires_grad=True)
    model(x).square().sum().backward()
    W = (layer.get_base_layer().weight + layer.get_delta_weight("default")).detach().tril()
    again = x.detach().requires_grad_()
    nn.functional.linear(net[0](again), W, net[1].get_base_layer().bias).square().sum().backward()
    torch.testing.assert_close(x.grad, again.grad)


class Attends(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x, **kwargs):
        return self.attention(x, x, x, need_weights=False)[0]


def test_a_layer_whose_weight_is_read():
    torch.manual_seed(0)
    base = Attends().eval()
    model = get_peft_model(copy.deepcopy(base), visible(target_modules=["out_proj"])).eval()
    x = torch.randn(3, 5, 8)
    with pytest.raises(TypeError, match="weight is read and not called"):
        model(x, adapter_names=["default", "default", "__base__"])
    adapted_output = model(x)
    model.merge_adapter()
    torch.testing.assert_close(model(x), adapted_output)
    with model.disable_adapter():
        torch.testing.assert_close(model(x), base(x))
    torch.testing.assert_close(model(x), adapted_output)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("name", ["linear", "model"])
def test_of_several_adapters_none_is_called_as_a_module_is(name, first):
    """PEFT leaves layers out of the file of another adapter. One alone may have any name."""
    config = visible(target_modules=["linear"])
    model = get_peft_model(Named(), config, adapter_name=name if first else "default")
    with pytest.raises(ValueError, match=f"none can be called '{name}', because a module of this model has"):
        model.add_adapter("other" if first else name, config)
    assert len(model.peft_config) == 1


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(x)


def test_an_adapter_alone_may_be_called_as_a_module_is(tmp_path):
    torch.manual_seed(0)
    base, x = Named().eval(), torch.randn(3, 4)
    model = get_peft_model(copy.deepcopy(base), visible(target_modules=["linear"]), adapter_name="linear").eval()
    model.save_pretrained(tmp_path)
    opened = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "linear").eval()
    torch.testing.assert_close(opened(x), model(x))
    assert not torch.allclose(model(x), base(x))


def test_a_model_gets_an_adapter_a_second_time(tmp_path):
    """A cell of a notebook runs again, or a failed load has left an adapter in the base: LoRA warns, and so do we."""
    torch.manual_seed(0)
    base, x = Named().eval(), torch.randn(3, 4)
    saved = get_peft_model(copy.deepcopy(base), visible(target_modules=["linear"])).eval()
    saved.save_pretrained(tmp_path)
    get_peft_model(base, visible(target_modules=["linear"]))
    with pytest.warns(UserWarning, match="second time"):
        again = get_peft_model(base, visible(target_modules=["linear"])).eval()
    assert not torch.allclose(again(x), saved(x))
    with pytest.warns(UserWarning, match="Already found"):
        opened = PeftModel.from_pretrained(base, tmp_path).eval()
    torch.testing.assert_close(opened(x), saved(x))


def test_factors_are_not_loaded_under_a_merged_weight():
    model, other = adapted(init_weights=False), adapted(init_weights=False)
    model.merge_adapter()
    with pytest.raises(RuntimeError, match=r"merged weight would stay.*unmerge_adapter"):
        model.load_state_dict({n: p for n, p in other.named_parameters() if "dual_lora_" in n}, strict=False)


def test_dropout_goes_by_its_own_mode():
    """Monte Carlo dropout: the model in eval mode, its dropouts in training mode."""
    model = adapted(init_weights=False, dropout=0.5).eval()
    assert torch.equal(model(points()), model(points()))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.train()
    assert not torch.equal(model(points()), model(points()))


class AlwaysOn(nn.modules.dropout._DropoutNd):
    """As libraries for Bayesian models put it in the place of every nn.Dropout."""

    def forward(self, x):
        return dropout(x, self.p, training=True)


class AlwaysOnToo(nn.Dropout):
    forward = AlwaysOn.forward


@pytest.mark.parametrize("kind", [AlwaysOn, AlwaysOnToo])
def test_a_dropout_of_another_class_is_called(kind):
    model = adapted(init_weights=False, dropout=0.5).eval()
    for layer in [m for m in model.modules() if hasattr(m, "dual_lora_dropout")]:
        layer.dual_lora_dropout["default"] = kind(0.5).eval()
    assert not torch.equal(model(points()), model(points()))


def test_a_hook_of_all_modules_is_called():
    """Of PyTorch's own, which its counters set, a layer stays one product."""
    model = adapted(init_weights=False, target_modules=["second"]).eval()
    base = model.base_model.model.second.base_layer
    before = model(points())
    hook = nn.modules.module.register_module_forward_hook(lambda module, x, y: y + 1 if module is base else None)
    try:
        torch.testing.assert_close(model(points()), before + 1)
    finally:
        hook.remove()
    with FlopCounterMode(display=False) as counter:
        assert torch.equal(model(points()), before)
    assert torch.ops.dual_lora.linear in counter.get_flop_counts()["Global"]
    assert len(counter.get_flop_counts()["Global"]) == 2  # and the layer that is not adapted


def test_adapters_of_two_precisions_are_added():
    """One from before the model was cast to fp64, and one from after it."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 5))
    model = get_peft_model(base, visible(target_modules=["0", "1"])).double()
    model.add_adapter("other", visible(target_modules=["0", "1"]))
    rows, summed = torch.arange(9), []
    for name in ("default", "other"):
        layers = [m for m in model.modules() if hasattr(m, "dual_lora_A")]
        summed.append([layer.get_delta_weight(name).double() for layer in layers])
    embedded, W, bias = base[0].weight, base[1].get_base_layer().weight, base[1].bias
    want = (embedded + summed[0][0] + summed[1][0]) @ (W + summed[0][1] + summed[1][1]).T + bias
    for order in (["default", "other"], ["other", "default"]):
        model.base_model.set_adapter(order)
        torch.testing.assert_close(model(rows), want, atol=1e-6, rtol=1e-6)


def read_layer():
    """An attention reads the weight of its output projection and never calls it."""
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()


def test_a_layer_that_is_read_does_not_become_a_lora_that_does_nothing(tmp_path):
    model = get_peft_model(read_layer(), visible(target_modules=["out_proj"]))
    with pytest.raises(TypeError, match=r"read and not called.*out_proj.*ReadLinear"):
        save_as_lora(tmp_path, model, 8)
    with pytest.raises(TypeError, match="support LoRA conversion"):
        convert_to_lora(model, 8)


@pytest.mark.parametrize(("letter", "value"), [("A", float("inf")), ("C", float("nan"))])
def test_broken_factors_are_not_converted(letter, value, tmp_path):
    model = adapted(init_weights=False)
    layer = next(m for m in model.modules() if hasattr(m, "dual_lora_A"))
    getattr(layer, f"dual_lora_{letter}")["default"].data[0, 0] = value
    with pytest.raises(ValueError, match="holds NaN or infinity"):
        save_as_lora(tmp_path, model, 2)


def test_a_converted_adapter_keeps_its_base_s_revision(tmp_path):
    model = adapted(init_weights=False, revision="v2")
    assert save_as_lora(tmp_path, model, 0.999).config.revision == "v2"


def test_a_strength_that_is_not_saved_is_said(tmp_path):
    model = adapted(init_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path / "plain")
    for module in model.modules():
        if hasattr(module, "dual_lora_A"):
            module.set_scale("default", 0.5)
    y = model(points())
    with pytest.warns(DualLoraWarning, match=r"has 0.5 times its own strength.*add_weighted_adapter\(\['default'\]"):
        model.save_pretrained(tmp_path / "half")
    model.base_model.add_weighted_adapter(["default"], [1.0], "scaled")
    model.set_adapter("scaled")
    torch.testing.assert_close(model(points()), y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path / "copy", selected_adapters=["scaled"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_an_embedding_s_scale_is_not_rounded(dtype):
    """√768 in bf16 is 0.13 % more; as in a base of that precision, rows times a Python number are rounded once."""
    modeling = pytest.importorskip("transformers.models.plbart.modeling_plbart")
    torch.manual_seed(0)
    base = modeling.PLBartScaledWordEmbedding(50, 768, 1, embed_scale=768**0.5).to(dtype)
    ids = torch.arange(40).view(4, 10)
    expected = base(ids)
    model = get_peft_model(nn.Sequential(base), DualLoraConfig(r=4, target_modules=["0"]))
    with torch.no_grad():
        assert torch.equal(model(ids), expected), "λ is 0"


def test_a_scale_that_is_to_train_is_refused():
    model = adapted(init_weights=False)
    adapter = next(m for m in model.modules() if hasattr(m, "dual_lora_A")).adapter("default")
    x = torch.randn(3, adapter.factors.A.shape[1])
    weight = torch.zeros(adapter.factors.B.shape[0], x.shape[1])
    trained = adapter._replace(scale=adapter.scale.clone().requires_grad_())
    for compute in (
        lambda: dual_lora_linear(x, weight, None, [trained]),
        lambda: dual_lora_weight(weight, [trained]),
        lambda: delta_weight(trained.factors, trained.scale, trained.form),
    ):
        with pytest.raises(ValueError, match="scale of a Dual LoRA adapter requires a gradient"):
            compute()
    with torch.no_grad():
        dual_lora_linear(x, weight, None, [trained])


def test_whole_numbers_are_no_input():
    model = adapted(init_weights=False)
    adapter = next(m for m in model.modules() if hasattr(m, "dual_lora_A")).adapter("default")
    x = torch.ones(3, adapter.factors.A.shape[1], dtype=torch.int64)
    with pytest.raises(TypeError, match=r"x is torch.int64, expected a floating dtype"):
        dual_lora_linear(x, None, None, [adapter])


@pytest.mark.parametrize("which", ["weight", "bias", "scale"])
def test_a_tangent_of_any_operand_is_refused(which):
    model = adapted(init_weights=False)
    adapter = next(m for m in model.modules() if hasattr(m, "dual_lora_A")).adapter("default")
    O, I = adapter.factors.B.shape[0], adapter.factors.A.shape[1]
    given = {"weight": torch.zeros(O, I), "bias": torch.zeros(O), "scale": adapter.scale.detach()}
    x = torch.randn(3, I)
    with forward_ad.dual_level():
        given[which] = forward_ad.make_dual(given[which], torch.ones_like(given[which]))
        adapters = [adapter._replace(scale=given["scale"])]
        with pytest.raises(NotImplementedError, match="no forward mode"):
            dual_lora_linear(x, given["weight"], given["bias"], adapters)
        if which != "bias":
            with pytest.raises(NotImplementedError, match="no forward mode"):
                dual_lora_weight(given["weight"], adapters)
            with pytest.raises(NotImplementedError, match="no forward mode"):
                dual_lora_embedding(torch.tensor([0]), given["weight"], adapters)


def test_torch_func_s_derivatives_of_a_weight_are_refused():
    model = adapted(init_weights=False)
    adapter = next(m for m in model.modules() if hasattr(m, "dual_lora_A")).adapter("default")
    weight, x = torch.zeros(adapter.factors.B.shape[0], adapter.factors.A.shape[1]), points(3)

    def f(w):
        return dual_lora_linear(x[:, : w.shape[1]], w, None, [adapter]).sum()

    with pytest.raises(NotImplementedError, match=r"no rule for torch\.func"):
        torch.func.jvp(f, (weight,), (torch.ones_like(weight),))
    with pytest.raises(NotImplementedError, match=r"no rule for torch\.func"):
        torch.func.grad(f)(weight)
    with pytest.raises(NotImplementedError, match=r"no rule for torch\.func"):
        torch.func.vmap(f)(weight.expand(2, -1, -1))


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32], ids=str)
def test_four_bits_in_any_storage_are_read_at_their_places(storage):
    """`bnb_4bit_quant_storage`, as FSDP wants it for QLoRA."""
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    base = bnb.nn.Linear4bit(96, 1100, bias=False, compute_dtype=torch.float32, quant_type="nf4", quant_storage=storage)
    base.weight = bnb.nn.Params4bit(
        torch.randn(1100, 96), requires_grad=False, quant_type="nf4", quant_storage=storage, blocksize=64
    )
    base = base.to("cpu")
    weight = decoded(base.weight)
    model = get_peft_model(nn.Sequential(base), visible(target_modules=["0"]))
    layer = model.base_model.model[0]
    x = torch.randn(2, 96)
    torch.testing.assert_close(model(x), x @ (weight + layer.get_delta_weight("default")).T, rtol=1e-3, atol=1e-3)
    rows = row_source(base, Bnb4bitBackend())
    for start, stop in ((0, 3), (3, 6), (1001, 1100)):
        assert torch.equal(rows.rows(start, stop).float(), weight[start:stop])


@pytest.mark.parametrize("by", ["lerp", "data"])
def test_an_average_of_parameters_alone_is_what_it_looks_like(by):
    """As EMA and target networks follow, which copy parameters and no buffers."""
    model = adapted(init_weights=True)
    average = copy.deepcopy(model).eval()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(4):
        optimizer.zero_grad()
        (model(points()) - 1).square().mean().backward()
        optimizer.step()
        with torch.no_grad():
            average(points())
            for mine, theirs in zip(average.parameters(), model.parameters(), strict=True):
                (mine if by == "lerp" else mine.data).lerp_(theirs, 1.0)
    with torch.no_grad():
        assert torch.equal(average(points()), model.eval()(points()))


def test_who_writes_factors_and_their_count_is_not_warned():
    from torch.optim.swa_utils import AveragedModel

    torch.manual_seed(1)
    model = adapted(warmup_steps=2)
    averages = [AveragedModel(model), AveragedModel(model, use_buffers=True)]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(4):
        optimizer.zero_grad()
        (model(points()) - 1).square().mean().backward()
        optimizer.step()
        for average in averages:
            average.update_parameters(model)
    by_hand = adapted(warmup_steps=2)
    with torch.no_grad():
        for mine, theirs in zip(by_hand.state_dict().values(), model.state_dict().values(), strict=True):
            mine.copy_(theirs)
    fresh = adapted(warmup_steps=2)
    fresh.add_adapter("ref", fresh.peft_config["default"])
    fresh.add_weighted_adapter(["default"], [0.5], "weaker")
    fresh.base_model.model.first.reset_dual_lora_parameters("default", fresh.peft_config["default"])
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        assert torch.equal(by_hand.eval()(points()), model.eval()(points()))
        for average in averages:
            average.eval()(points())
        for name in ("default", "ref", "weaker"):
            fresh.set_adapter(name)
            fresh.eval()(points())


@pytest.mark.parametrize("broken", [False, True])
def test_a_refused_merge_leaves_the_model_as_it_was(broken):
    model = nn.Sequential()
    model.add_module("one", nn.Linear(6, 6))
    model.add_module("two", nn.Linear(6, 6) if broken else nn.utils.parametrizations.weight_norm(nn.Linear(6, 6)))
    peft = get_peft_model(model, visible(target_modules=["one", "two"]))
    x = torch.randn(3, 6)
    before = peft(x)
    with peft.disable_adapter():
        base = peft(x)
    factor = peft.base_model.model.two.dual_lora_D["default"].data
    kept = factor.clone()
    if broken:
        factor[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaNs detected" if broken else "its weight is no parameter"):
        peft.merge_and_unload(safe_merge=broken)
    factor.copy_(kept)
    assert torch.equal(peft(x), before)
    with peft.disable_adapter():
        assert torch.equal(peft(x), base)
    assert len(left(peft)) == 1
    assert sum(hasattr(m, "dual_lora_A") for m in peft.modules()) == 2


def test_casting_of_inputs_may_be_switched():
    from peft.helpers import disable_input_dtype_casting

    model = adapted(init_weights=False)
    with disable_input_dtype_casting(model):
        assert torch.equal(model(points()), model(points()))


@pytest.mark.parametrize(
    "put", [lambda d: prune.l1_unstructured(d, "default", 0.3), lambda d: weight_norm(d, "default")]
)
def test_what_a_hook_computes_of_the_factors_is_computed_though_nobody_calls_their_dictionary(put):
    """A pruned model that was loaded from its file acted as before the loading (LoRA's factors are called)."""
    torch.manual_seed(0)
    trained, fresh = (get_peft_model(nn.Sequential(nn.Linear(6, 5)), visible(target_modules=["0"])) for _ in range(2))
    for model in (trained, fresh):
        layer = model.base_model.model[0]
        for factors in (layer.dual_lora_A, layer.dual_lora_B, layer.dual_lora_C, layer.dual_lora_D):
            put(factors)
    x = torch.randn(3, 6)
    for _ in range(2):  # the second backward pass found the first one's graph
        trained(x).sum().backward()
    fresh.load_state_dict(trained.state_dict())
    torch.testing.assert_close(fresh(x), trained(x))
