"""The simulated step against the real one: the same operators, so the same bytes and the same arithmetic."""

from dataclasses import replace

import pytest
import torch
from packaging.version import Version
from peft import get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, RobertaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from dual_lora.core import blocked, scratch
from dual_lora.core.flops import linear, linear_backward
from dual_lora.core.reference import Adapter, Factors, Form
from dual_lora.lab.cost import simulate as simulation
from dual_lora.lab.cost.memory import memory_of
from dual_lora.lab.cost.operators import MemoryTracker, inner_bytes
from dual_lora.lab.cost.options import StepOptions
from dual_lora.lab.cost.simulate import empty_model, simulate
from dual_lora.lab.errors import UserError
from dual_lora.lab.model.methods import method_config, method_fields, method_names
from dual_lora.lab.verify.logprobs import base_parameters

METHODS = ("dual_lora", "lora", "dora", "full")


EXPERTS = pytest.mark.skipif(
    Version(torch.__version__) < Version("2.9"), reason="transformers counts on torch 2.9 for experts"
)


def tiny(layers=3, **changes):
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=200, max_position_embeddings=128,
    )  # fmt: skip
    values = {"method": {"name": "dual_lora", "r": 8}, "dtype": "float32", "batch": 2, "length": 16}
    return StepOptions("tiny", config, **{**values, **changes})


def encoder(**changes):
    config = RobertaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=200,
        max_position_embeddings=80,
    )  # fmt: skip
    return StepOptions(
        "encoder", config, head="classification", **{"dtype": "float32", "batch": 2, "length": 16, **changes}
    )


class TestLive:
    def test_sees_what_comes_and_goes(self):
        x = torch.zeros(1000)  # 4 kB, stands before
        with MemoryTracker([x]) as tracker:
            y = x + 1
            assert tracker.now().activations == 4000
            z = y.view(10, 100).t()  # the same storage
            w = (z * 2).sum()
            assert tracker.now().activations == 4000 + 4
            del y, z
            assert tracker.now().activations == 4
        assert tracker.peaks["forward"].total == 8000 + 4
        assert w == 2000

    def test_knows_gradients(self):
        w = torch.nn.Parameter(torch.ones(500))
        tracker = MemoryTracker([w])
        w.register_post_accumulate_grad_hook(lambda p: tracker.is_gradient(p.grad))
        with tracker:
            (w * 2).sum().backward()
        assert tracker.now().gradients == 2000

    def test_counts_products(self):
        with MemoryTracker([]) as tracker:
            torch.ones(3, 4) @ torch.ones(4, 5)
        assert tracker.flops == 2 * 3 * 4 * 5


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_empty_step_is_the_real_step(method, checkpointing, monkeypatch):
    """With real tensors in the place of empty ones, the same code counts the same bytes and flops."""
    options = tiny(checkpointing=checkpointing).with_method(method)
    empty = simulate(options)

    def real(options, layers):
        torch.manual_seed(0)
        config = empty_model(options).config
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        adapter = method_config(options.method, "causal", 100, [])
        return simulation._run(options, (get_peft_model(model, adapter) if adapter else model).train())

    monkeypatch.setattr(simulation, "_simulate", real)
    measured = simulate(options)
    assert measured.flops == empty.flops
    assert measured.trained == empty.trained
    assert measured.weights == pytest.approx(empty.weights, abs=64 * options.layers)  # small buffers of the warm-up
    for name, peak in measured.peaks.items():
        assert empty.peaks[name].total == pytest.approx(peak.total, rel=0.002, abs=64), name


@pytest.mark.parametrize("method", METHODS)
def test_deep_model_lies_on_the_line_through_two_shallow_ones(method):
    options = tiny(layers=6).with_method(method)
    along, whole = simulate(options), simulation._simulate(options, None)
    assert along == whole


def test_uneven_blocks_are_simulated_one_by_one():
    said = []
    options = tiny(
        layers=6, method={"name": "dual_lora", "r": 8, "layers_to_transform": [5], "target_modules": ["q_proj"]}
    )
    assert simulate(options, said.append).trained == 4 * 8 * (64 + 64)
    assert said == ["dual_lora: 6 blocks"]


@pytest.mark.parametrize(
    "targets",
    [
        {"target_modules": r".*layers\.[0-3]\..*q_proj"},
        {"target_modules": ["q_proj"], "exclude_modules": r".*layers\.(4|5|6|7|8|9)\..*"},
        {"target_modules": ["q_proj"], "rank_pattern": {r"layers\.1\..*q_proj": 4}},
    ],
)
def test_blocks_that_a_pattern_treats_differently_do_not_stand_for_all(targets):
    options = tiny(layers=10, method={"name": "dual_lora", "r": 8, **targets})
    along, whole = simulate(options), simulation._simulate(options, None)
    assert along == whole


@EXPERTS
def test_blocks_with_experts_do_not_stand_for_dense_ones():
    from transformers import Qwen3MoeConfig

    config = Qwen3MoeConfig(
        hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=9, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, num_experts=4, num_experts_per_tok=2, mlp_only_layers=[0, 1, 2],
        vocab_size=64,
    )  # fmt: skip
    method = {"name": "dual_lora", "r": 8, "target_modules": ["q_proj"]}
    said = []
    step = simulate(replace(tiny(), config=config, dtype="bfloat16", method=method), said.append)
    real = AutoModelForCausalLM.from_config(config)
    assert step.base_parameters == sum(p.numel() for p in real.parameters())
    assert said == ["dual_lora: 5 blocks", "dual_lora: 6 blocks"], "three dense ones, and two with experts"


def test_gpt2_s_linear_layers_are_packed():
    from transformers import GPT2Config

    config = GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=64, n_positions=64)
    step = simulate(replace(tiny(), config=config, method={"name": "lora", "r": 4, "target_modules": ["c_attn"]}))
    assert step.linear == 4 * 2 * (3 + 1 + 4 + 4) * 32 * 32


class TestFlops:
    T, O, I, r = 8192, 96, 64, 8

    def test_dual_lora_layer(self):
        """6·T·O·I + 8·O·I·(r1 + r2), and 4·T·O·I with the first layer's dx left out."""
        both = linear(self.T, self.O, self.I, self.r) + linear_backward(self.T, self.O, self.I, self.r)
        assert both == 6 * self.T * self.O * self.I + 8 * self.O * self.I * self.r
        saved = linear_backward(self.T, self.O, self.I, self.r, need_x=False)
        assert both - linear(self.T, self.O, self.I, self.r) - saved == 2 * self.T * self.O * self.I

    def test_of_methods_differ_as_their_arithmetic_does(self):
        steps = {m: simulate(tiny(length=128, batch=8).with_method(m)) for m in METHODS}
        flops = {m: s.flops for m, s in steps.items()}
        assert flops["lora"] < flops["dora"] < flops["dual_lora"] < 1.05 * flops["full"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("T", "O", "I", "r"), [(64, 96, 64, 4), (128, 1024, 768, 8), (64, 3072, 1024, 8)])
def test_workspace_of_the_blocks_is_what_they_allocate(T, O, I, r, dtype, monkeypatch):
    """The blocked operator itself, on real tensors, against the formula for what it uses inside."""
    factors = [torch.randn(s) for s in ((r, I), (O, r), (r, I), (O, r))]
    x, dy, weight = (torch.randn(s).to(dtype) for s in ((T, I), (T, O), (O, I)))
    adapter = Adapter(Factors(*factors), torch.tensor(0.5), Form())
    standing = [*factors, x, dy, weight, adapter.scale]
    op = torch.ops.dual_lora
    monkeypatch.setattr(scratch, "_buffers", scratch._Buffers())  # larger ones may have been kept
    with MemoryTracker(standing) as tracker:
        y = blocked.forward(x, weight, [adapter])
    args = (x, weight, None, factors, [adapter.scale], [torch.empty(0)], [0], None, 1.0)
    expected = inner_bytes(op.linear.default, args, y, "cpu") + y.nbytes
    assert tracker.peaks["forward"].total == pytest.approx(expected, rel=0.15)
    monkeypatch.setattr(scratch, "_buffers", scratch._Buffers())
    with MemoryTracker(standing) as tracker:
        grads = blocked.backward(dy, x, weight, [adapter], None, blocked.Needs(True, False, True))
    args = (dy, x, weight, factors, [adapter.scale], [torch.empty(0)], [0], None, 1.0, None, True, False, True)
    out = grads.x.nbytes + sum(f.nbytes for f in grads.factors[0])
    expected = inner_bytes(op.linear_backward.default, args, grads, "cpu") + out
    assert tracker.peaks["forward"].total == pytest.approx(expected, rel=0.15)


def test_a_quantised_weight_is_there_twice_while_a_gpu_composes_it():
    factors = [torch.empty(s) for s in ((2, 64), (96, 2), (2, 64), (96, 2))]
    x, weight, number = torch.empty(5, 64), torch.empty(96, 64), torch.tensor(0)
    for on, times in (("cpu", 1), ("gpu", 2)):
        dense, quantised = (
            inner_bytes(torch.ops.dual_lora.linear.default, (x, W, None, factors, [], [], [0], None), None, on)
            for W in (weight, number)
        )
        assert quantised == times * dense > 0


def test_batched_product_copies_a_shared_matrix():
    """bf16 on a CPU; measured with /proc/self/status, for want of an operator that would show it."""
    weight, rows = torch.zeros(40, 8, dtype=torch.bfloat16), torch.zeros(4, 9, 8, dtype=torch.bfloat16)
    for last, copied in ((rows[:, -2:], 4 * 40 * 8 * 2), (rows[:, -2:].contiguous(), 0)):
        with MemoryTracker([weight, rows, last]) as tracker:
            y = torch.nn.functional.linear(last, weight)
        assert tracker.peaks["forward"].workspace == copied
        assert tracker.now().activations == y.nbytes


class TestMemory:
    def test_adds_up(self):
        options = tiny()
        step = simulate(options)
        memory = memory_of(options, step)
        assert memory.optimizer == 2 * memory.trained == 2 * step.trained
        parts = (
            memory.weights
            + memory.trained
            + memory.optimizer
            + memory.gradients
            + memory.activations
            + memory.workspace
        )
        assert memory.peak == parts == max(memory.phases.values())
        assert memory.phases["standing"] == memory.weights + memory.trained + memory.optimizer

    def test_checkpointing_keeps_one_input_a_block(self):
        plain, kept = simulate(tiny()), simulate(tiny(checkpointing=True))
        one_input = 2 * 16 * 64 * 4
        assert kept.kept.total < plain.kept.total / 2
        deeper = simulate(tiny(layers=4, checkpointing=True))
        assert deeper.kept.total - kept.kept.total == one_input

    def test_dual_lora_keeps_less_than_lora(self):
        """x, W and the factors against x, the thin products and, over a bf16 base, x in fp32."""
        dual, lora = (simulate(tiny(dtype="bfloat16").with_method(m)).kept.total for m in ("dual_lora", "lora"))
        assert dual < 0.8 * lora

    def test_fewer_logits(self):
        full, few = simulate(tiny()), simulate(tiny(logits=2))
        assert few.peaks["loss"].total < full.peaks["loss"].total - 10 * 2 * 200 * 4

    def test_accumulation_keeps_the_gradients(self):
        once, twice = (memory_of(s, simulate(s)) for s in (tiny(), tiny(accumulate=2)))
        assert twice.phases["forward"] == once.phases["forward"] + once.trained

    def test_quantised_base(self):
        options = tiny(dtype="bfloat16", quantisation="nf4")
        step = simulate(options)
        linear = 3 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 96 * 64)
        assert step.linear == 2 * linear
        packed = memory_of(options, step).weights
        assert packed == step.weights - 2 * linear + linear * (0.5 + 4 / 64)
        with pytest.raises(UserError, match="Full fine-tuning needs a base that is not quantised"):
            memory_of(replace(options, method={"name": "full"}), step)

    def test_encoder_with_a_fresh_head(self):
        options = encoder(method={"name": "dual_lora", "r": 8})
        head = 64 * 64 + 64 + 2 * 64 + 2
        adapted = 2 * (4 * (64 + 64) + 2 * (64 + 96)) * 8
        assert simulate(options).trained_parameters == head + adapted


class TestSharding:
    options = tiny(layers=6)

    @pytest.fixture(scope="class")
    def full(self):
        return simulate(self.options.with_method("full"))

    def test_who_holds_what(self, full):
        def peaks(strategy, n):
            return memory_of(self.options.with_method("full"), full, n, strategy)

        one = peaks("ddp", 1)
        assert all(peaks(s, 1) == one for s in ("fsdp2", "zero1", "zero2", "zero3"))
        ddp, fsdp = peaks("ddp", 4), peaks("fsdp2", 4)
        assert ddp.trained == one.trained == 4 * fsdp.trained
        assert ddp.optimizer == 4 * fsdp.optimizer
        assert ddp.peak == one.peak + one.trained  # the buckets
        zero1, zero2, zero3 = (peaks(f"zero{k}", 4) for k in (1, 2, 3))
        master = (one.optimizer + one.trained) / 4
        assert [z.optimizer for z in (zero1, zero2, zero3)] == [master] * 3
        assert zero2.phases["step"] == zero1.phases["step"] - one.trained * 3 / 4
        assert zero3.trained == one.trained / 4

    def test_fsdp2_gathers_what_lies_outside_and_three_blocks(self):
        options = self.options
        step = simulate(options)
        outside = step.weights + step.trained - 6 * (step.block_weights + step.block_trained)
        assert outside == pytest.approx((2 * 200 * 64 + 64) * 4, abs=1000)  # embedding, head, norm; small buffers
        memory = memory_of(options, step, 2, "fsdp2")
        assert memory.gathered == outside + 3 * (step.block_weights + step.block_trained)

    def test_wrong_input(self, full):
        with pytest.raises(UserError, match="Did you mean 'fsdp2'"):
            memory_of(self.options, full, 2, "fsdp")
        with pytest.raises(UserError, match="devices is 0"):
            memory_of(self.options, full, 0)


@EXPERTS
def test_mixture_of_experts_and_other_families_can_be_simulated():
    from dual_lora.lab.model.empty import shortened
    from dual_lora.lab.recipe.published import published_config, published_family

    for name in (
        "qwen3-30b-a3b",
        "gemma-2-2b",
        "gemma-3-1b",
        "gpt2",
        "roberta-base",
        "deberta-v3-xsmall",
    ):
        config = shortened(published_config(name), 2)
        options = StepOptions(name, config, head=published_family(name).head, batch=1, length=16)
        step = simulate(options)
        assert step.flops > 0, name
        assert step.trained_parameters > 0, name


def test_another_method_has_the_same_layers():
    method = {"name": "dual_lora", "r": 8, "target_modules": ["q_proj"], "layers_to_transform": [1], "ste": "surrogate"}
    lora = replace(tiny(), method=method | {"modules_to_save": ["embed_tokens"]}).with_method("lora").method
    assert lora == {"name": "lora"} | {k: v for k, v in method.items() if k not in ("name", "ste")} | {
        "modules_to_save": ["embed_tokens"]
    }


def test_model_that_does_not_run_in_a_precision_says_so(monkeypatch):
    """Some models mix fp32 into a step in bf16, as DeBERTa did before transformers 5.25."""
    forward = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: forward(self, torch.baddbmm(x, x @ x.mT, x.float())))
    options = tiny(dtype="bfloat16")
    with pytest.raises(UserError, match=r"tiny does not run in bfloat16.*Try --dtype float32"):
        simulate(options)
    assert simulate(replace(options, dtype="float32")).flops > 0


def test_what_a_method_adds_is_none_of_the_base_s_parameters():
    """AdaLoRA's ranknum, CPT's tokens and X-LoRA's frozen adapters have names of their own kinds."""
    base = {name: p.shape for name, p in empty_model(tiny(method={"name": "full"})).named_parameters()}
    tried = set()
    for name in method_names():
        fields = {"r": 8, "modules_to_save": ["lm_head"]} if name != "cpt" else {}
        method = {"name": name, **{key: value for key, value in fields.items() if key in method_fields(name)}}
        try:
            model = empty_model(tiny(method=method))
        except UserError:  # it needs settings of its own
            continue
        tried.add(name)
        assert {own: p.shape for own, p in base_parameters(model).items()} == base, name
    assert tried >= {"adalora", "cpt", "dora", "dual_lora", "ia3", "loha", "lora", "vera", "xlora"}
