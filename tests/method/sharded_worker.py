"""One process of a model that is sharded by tensor parallelism. Called by test_sharded.py.

Every process also computes the same thing whole, by itself, and compares. A case that has passed leaves a file.
"""

import copy
import json
import os
import warnings

import pytest
import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from dual_lora import DualLoraConfig, DualLoraLayer, composed_weights
from dual_lora.core import tokens
from dual_lora.core import whole as small

RANK = int(os.environ["RANK"])
STEPS = 3
IDS = torch.randint(0, 60, (2, 8), generator=torch.Generator().manual_seed(7))


class Block(nn.Module):
    """Norm and two linear layers beside a skip connection; 34 hidden features."""

    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 34), nn.Linear(34, 16)

    def forward(self, x):
        return x + self.down(self.up(self.norm(x)).tanh())


def adapted(base, seed=0, **options):
    torch.manual_seed(seed)
    options = dict(r=4, alpha=8, init_weights=False) | options
    return get_peft_model(base, DualLoraConfig(**options))


def layers(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, DualLoraLayer)}


def train(model, loss, steps=STEPS):
    """Losses, and the first step's gradients by name."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses, grads = [], {}
    for step in range(steps):
        value = loss(model)
        value.backward()
        if step == 0:
            grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
        optimizer.step()
        optimizer.zero_grad()
        losses.append(value.item())
    return losses, grads


def assert_same(got, expected):
    torch.testing.assert_close(torch.tensor(got[0]), torch.tensor(expected[0]), atol=1e-5, rtol=1e-4)
    assert len(set(got[0])) == STEPS, "nothing was trained"
    assert got[1].keys() == expected[1].keys()
    for name, grad in got[1].items():
        assert expected[1][name].any(), name
        torch.testing.assert_close(grad, expected[1][name], atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def blocks(**options):
    """A stack of blocks with an adapter of other random numbers in every process, and the same with the first one's."""
    torch.manual_seed(0)
    base = nn.Sequential(Block(), Block())
    whole = adapted(copy.deepcopy(base), target_modules=["up", "down"], **options)
    return whole, adapted(base, seed=RANK, target_modules=["up", "down"], **options)


def stack(sequence, mesh, **options):
    whole, model = blocks(**options)
    for block in model.base_model.model:
        plan = {"up.base_layer": ColwiseParallel(), "down.base_layer": RowwiseParallel()}
        if sequence:  # every process has some of the tokens, but between the two layers
            plan = {
                "norm": SequenceParallel(),
                "up": PrepareModuleInput(input_layouts=Shard(1), desired_input_layouts=Replicate()),
                "up.base_layer": ColwiseParallel(input_layouts=Replicate()),
                "down.base_layer": RowwiseParallel(output_layouts=Shard(1)),
            }
        parallelize_module(block, mesh, plan)
        block.norm.requires_grad_(False)  # SequenceParallel makes new parameters, which would train
    return whole, model


def by_torch(mesh, folder, sequence=False, **options):
    whole, model = stack(sequence, mesh, **options)
    x = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(1))

    def loss(m):
        if not sequence or m is whole:
            return m(x).square().sum() / 256
        part = m(x.chunk(2, dim=1)[RANK])
        total = part.square().sum() / 256
        shown = total.detach().clone()
        dist.all_reduce(shown)
        return total + (shown - total.detach())  # each process differentiates its tokens' share of the same number

    assert_same(train(model, loss), train(whole, loss))
    # Only this process's part of a weight was composed.
    seen = []
    original = small.compose
    small.compose = lambda weight, *a, **k: seen.append(tuple(weight.shape)) or original(weight, *a, **k)
    if not sequence:
        merging(whole, model, x)
        assert set(seen) <= {(34, 16), (16, 34), (17, 16), (16, 17)}
        assert (17, 16) in seen
    small.compose = original


def merging(whole, model, x):
    with torch.no_grad():
        for m in (whole, model):
            m.eval()
        expected = whole(x)
        torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-4)
        before = {n: m.get_base_layer().weight.to_local().clone() for n, m in layers(model).items()}
        model.merge_adapter()
        torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-4)
        assert not any(torch.equal(m.get_base_layer().weight.to_local(), before[n]) for n, m in layers(model).items())
        model.unmerge_adapter()
        assert all(torch.equal(m.get_base_layer().weight.to_local(), before[n]) for n, m in layers(model).items())


def by_plan(mesh, folder, **options):
    """transformers' own plan, on a Llama; saved by all, loaded into one process."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2)
    base = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, vocab_size=60, **sizes))
    if RANK == 0:
        base.save_pretrained(folder / "base")
    dist.barrier()
    options = dict(target_modules=["q_proj", "v_proj", "o_proj", "down_proj", "embed_tokens", "lm_head"]) | options
    whole = adapted(base, **options)
    parts = AutoModelForCausalLM.from_pretrained(folder / "base", tp_plan="auto")
    assert type(parts.model.layers[0].self_attn.q_proj.weight.data).__name__ == "DTensor"
    model = adapted(parts, seed=RANK, **options)

    def loss(m):
        return m(input_ids=IDS, labels=IDS).loss

    model.save_pretrained(folder / f"start{RANK}")
    assert_same(train(model, loss), train(whole, loss))
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(IDS).logits, whole.eval()(IDS).logits, atol=1e-4, rtol=1e-4)
        names = ["default", "__base__"]
        mixed = [m(input_ids=IDS, adapter_names=names).logits for m in (model, whole)]
        torch.testing.assert_close(*mixed, atol=1e-4, rtol=1e-4)
    model.save_pretrained(folder / f"adapter{RANK}")
    again = LlamaForCausalLM.from_pretrained(folder / "base")
    again = PeftModel.from_pretrained(again, folder / f"adapter{RANK}").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(IDS).logits, whole(IDS).logits, atol=1e-4, rtol=1e-4)


def refusals(mesh, folder):
    """What does not work says so."""
    said = {}

    def note(what, function):
        try:
            function()
        except (ValueError, RuntimeError) as error:
            said[what] = f"{type(error).__name__}: {error}"
        else:
            said[what] = "worked"

    class Embedded(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(20, 16)

        def forward(self, ids):
            return self.table(ids)

    embedded = adapted(Embedded(), target_modules=["table"])
    parallelize_module(
        embedded.base_model.model, mesh, {"table.base_layer": RowwiseParallel(input_layouts=Replicate())}
    )
    note("embedding", lambda: embedded(torch.arange(4)))

    _, model = stack(False, mesh)
    layer = next(iter(layers(model).values()))
    layer.base_layer._forward_pre_hooks.clear()
    layer.base_layer._forward_hooks.clear()
    note("plain input", lambda: layer(torch.randn(2, 16)))

    bare = nn.Sequential(nn.Linear(4, 4))
    bare[0]._hf_tp_plan = "colwise"
    note("bare part", lambda: adapted(bare, target_modules=["0"]))

    quantised = nn.Sequential(nn.Linear(4, 4))
    quantised[0]._hf_quantized_needs_local_tp = quantised[0]._is_hooked = True
    note("quantised", lambda: adapted(quantised, target_modules=["0"]))

    from torch.distributed.tensor import distribute_tensor

    convolution = adapted(nn.Sequential(nn.Conv1d(4, 6, 3)), target_modules=["0"])
    weight = convolution.base_model.model[0].base_layer.weight
    convolution.base_model.model[0].base_layer.weight = nn.Parameter(distribute_tensor(weight, mesh, [Shard(0)]))
    note("convolution", lambda: convolution(torch.randn(1, 4, 9)))
    note("convolution merged", convolution.merge_adapter)

    linear = adapted(nn.Sequential(nn.Linear(4, 6)), target_modules=["0"])
    weight = linear.base_model.model[0].base_layer.weight
    linear.base_model.model[0].base_layer.weight = nn.Parameter(distribute_tensor(weight, mesh, [Replicate()]))
    note("replicated", lambda: linear(torch.randn(1, 4)))
    if RANK == 0:
        (folder / "said.json").write_text(json.dumps(said))


def dropout(mesh, folder):
    """An adapter with dropout has a product of its own; here nothing is dropped, so that the numbers are known."""
    whole, model = stack(False, mesh, dropout=0.5)
    for m in (*layers(whole).values(), *layers(model).values()):
        m.dual_lora_dropout["default"].p = 0.0
    x = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(1))
    assert_same(*(train(m, lambda m: m(x).square().sum() / 256) for m in (model, whole)))


def merged_under_fsdp2(mesh, folder):
    """Every process merges its own rows; training goes on afterwards; what is not gathered is not saved as if whole."""
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    base = nn.Sequential(Block(), Block())
    whole = adapted(copy.deepcopy(base), target_modules=["up", "down"])
    model = adapted(base, target_modules=["up", "down"])
    for block in model.base_model.model:
        fully_shard(block)
    fully_shard(model)
    x = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(1))
    seen = []
    original = small.compose
    small.compose = lambda weight, *a, **k: seen.append(tuple(weight.shape)) or original(weight, *a, **k)
    with torch.no_grad():
        model(x)  # FSDP2 has set its memory aside by now
    merging(whole, model, x)
    small.compose = original
    assert {shape[0] for shape in seen if shape[0] < 16} == {8}
    assert (17, 16) in seen
    with torch.no_grad():
        torch.testing.assert_close(model(x), whole(x), atol=1e-5, rtol=1e-4)

    try:
        model.save_pretrained(folder / f"shards{RANK}")
    except (ValueError, RuntimeError, NotImplementedError) as error:
        (folder / f"shards{RANK}.txt").write_text(f"{type(error).__name__}: {error}")
    else:
        (folder / f"shards{RANK}.txt").write_text("saved")

    broken = next(iter(layers(model).values()))
    if RANK == 0:  # a number that the other process does not hold, and that Sign hides
        with torch.no_grad():
            broken.dual_lora_D["default"].to_local()[0, 0] = torch.nan
    before = broken.get_base_layer().weight.to_local().clone()
    with pytest.raises(ValueError, match="NaNs detected"):  # in both
        model.merge_adapter(safe_merge=True)
    assert torch.equal(broken.get_base_layer().weight.to_local(), before)


def idle_rows_under_fsdp2(mesh, folder):
    """One process holds nothing of A and C, and rows of B and D without a gradient: that is no layer that is idle."""
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = get_peft_model(
        nn.Sequential(nn.Linear(16, 16)), DualLoraConfig.paper(r=2, warmup_steps=0, target_modules=["0"])
    )
    fully_shard(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="All gradients of a layer")
        for _ in range(6):  # the check is made once, some steps on
            model(torch.ones(3, 16))[:, :4].square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()


def sampled(mesh, folder):
    """DDP and FSDP2 average what each process estimates from tokens of its own, which others' data do not share."""
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    def fresh():
        torch.manual_seed(0)
        return adapted(nn.Sequential(nn.Linear(16, 12)), target_modules=["0"], ste="identity", token_sampling=0.5)

    def step(model, x):
        """The factors' gradients, and the numbers that were drawn."""
        drawn, draw = [], tokens.WaterFilling.draw
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tokens.WaterFilling, "draw", lambda made, n, at: drawn.append(float(at)) or draw(made, n, at))
            torch.manual_seed(5)
            model(x).square().sum().backward()
        wanted = {n.removeprefix("module."): p.grad for n, p in model.named_parameters() if p.requires_grad}
        return {n: getattr(g, "full_tensor", lambda g=g: g)() for n, g in wanted.items()}, drawn

    def everywhere(number):
        found = [None, None]
        dist.all_gather_object(found, number)
        return found

    def sharded(model):
        return fully_shard(model) or model

    own = torch.randn(200, 16, generator=torch.Generator().manual_seed(RANK))
    alone, mine = step(fresh(), own)
    exact, _ = step(adapted(nn.Sequential(nn.Linear(16, 12)), target_modules=["0"], ste="identity"), own)
    for gradient in alone.values():
        dist.all_reduce(gradient)
    for wrap in (DistributedDataParallel, sharded):
        got, drawn = step(wrap(fresh()), own)
        assert drawn == mine
        one, other = everywhere(drawn)
        assert len(one) == len(other) == 1
        assert one != other, "two processes with one seed have drawn the same"
        for name, gradient in got.items():
            torch.testing.assert_close(gradient, alone[name] / 2)
            assert not torch.allclose(gradient, exact[name])
        same = torch.ones(200, 16) * torch.arange(1, 201).unsqueeze(1)
        one, other = everywhere(step(wrap(fresh()), same)[1])
        assert one == other, "replicas have drawn different tokens"


def reference_pass(mesh, folder):
    """Preference and policy training under FSDP2: a pass without the adapter between the steps, as by one process."""
    from torch.distributed.fsdp import fully_shard

    sizes = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2)

    def fresh(reshard):
        torch.manual_seed(0)
        base = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, vocab_size=60, **sizes))
        model = adapted(base, target_modules=["q_proj", "v_proj", "lm_head"])  # lm_head is sharded with the root
        if reshard is not None:
            for layer in model.base_model.model.model.layers:
                fully_shard(layer, reshard_after_forward=reshard)
            fully_shard(model, reshard_after_forward=reshard)
        return model

    def steps(model):
        factors = {n: p for n, p in model.named_parameters() if p.requires_grad}
        optimizer = torch.optim.SGD(factors.values(), lr=0.1)
        losses = []
        for _ in range(STEPS):
            with torch.no_grad(), model.disable_adapter():
                reference = model(IDS).logits.log_softmax(-1)
            output = model(IDS, labels=IDS)
            loss = output.loss + torch.nn.functional.kl_div(
                output.logits.log_softmax(-1), reference, log_target=True, reduction="batchmean"
            )
            loss.backward()
            assert all(p.requires_grad for p in factors.values()), "the reference pass has frozen the adapter"
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses, {n: getattr(p, "full_tensor", lambda p=p: p)().detach().clone() for n, p in factors.items()}

    start = {n: p.detach().clone() for n, p in fresh(None).named_parameters() if p.requires_grad}
    expected = steps(fresh(None))
    assert all(not torch.equal(value, start[name]) for name, value in expected[1].items()), "a factor has not moved"
    for reshard in (True, False):
        assert_same(steps(fresh(reshard)), expected)


def switched_under_fsdp2(mesh, folder):
    """Two adapters under FSDP2, trained in turn and used together, as by one process."""
    from torch.distributed.fsdp import fully_shard

    def fresh():
        torch.manual_seed(0)
        model = adapted(nn.Sequential(Block(), Block()), target_modules=["up", "down"])
        torch.manual_seed(5)
        model.add_adapter("other", DualLoraConfig(r=6, init_weights=False, target_modules=["down"]))
        return model

    x = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(1))

    def steps(model):
        losses = []
        for name in ("other", "default", "other"):
            model.set_adapter(name)
            loss, _ = train(model, lambda m: m(x).square().sum() / 256, steps=1)
            losses += loss
        model.base_model.set_adapter(["default", "other"], inference_mode=True)
        with torch.no_grad():
            return losses, {"together": model(x)}

    whole, model = fresh(), fresh()
    for block in model.base_model.model:
        fully_shard(block)
    fully_shard(model)
    assert_same(steps(model), steps(whole))


def written_under_fsdp2(mesh, folder):
    """What is written to shards between passes without gradients is seen by the next pass."""
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    whole = adapted(nn.Sequential(Block(), Block()), target_modules=["up", "down"]).eval()
    for _ in range(2):  # the second model takes the first one's place
        passes(copy.deepcopy(whole), copy.deepcopy(whole), fully_shard)


def passes(model, whole, fully_shard):
    for block in model.base_model.model:
        fully_shard(block)
    fully_shard(model)
    x = torch.randn(2, 1, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for _ in range(3):
            before = composed_weights.bytes_held
            model(x)
            assert composed_weights.bytes_held == before, "a gathered weight's version says nothing of its shards"
            torch.testing.assert_close(model(x), whole(x))
            assert composed_weights.bytes_held > before, "a layer that is not sharded keeps its weight"
            for p in (*model.parameters(), *whole.parameters()):
                p.mul_(0.9)
            composed_weights.clear()


def filled_after_sharding(mesh, folder):
    """As accelerate prepares a model for FSDP2: emptied, sharded, and filled with what stands in its state."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import distribute_tensor

    torch.manual_seed(0)
    whole = adapted(
        nn.Sequential(Block(), Block()), target_modules=["up", "down"], init_weights="paper", warmup_steps=4
    )
    model = copy.deepcopy(whole)
    for m in (whole, model):  # two of the warm-up's four steps are over, and none of a layer that had no data
        for layer in (layer for name, layer in layers(m).items() if name.endswith("up")):
            layer.count_step("default")
            layer.count_step("default")
    full, scales = model.state_dict(), {n: m.dual_lora_scale["default"].clone() for n, m in layers(model).items()}
    model.to("meta")
    for block in model.base_model.model:
        fully_shard(block)
    fully_shard(model)
    empty = model.state_dict()
    shards = {n: distribute_tensor(full[n].detach(), t.device_mesh, t.placements) for n, t in empty.items()}
    model.load_state_dict(shards, assign=True)
    for name, layer in layers(model).items():
        layer.dual_lora_scale["default"] = scales[name]  # accelerate puts back what is not in the state
        left = 2 if name.endswith("up") else 4
        assert float(layer.warmup_factor("default")) == 1 - left / 4
        assert int(layer.dual_lora_left["default"]) == left
    for m in (whole, model):  # at λ = 0 there is no gradient to be compared
        for layer in layers(m).values():
            layer.count_step("default")
    assert model.state_dict().keys() == full.keys()
    x = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(1))
    got, expected = (train(m, lambda m: m(x).square().sum() / 256) for m in (model, whole))
    assert_same((got[0], {n: g.full_tensor() for n, g in got[1].items()}), expected)


CASES = {
    "torch": by_torch,
    "identity": lambda mesh, folder: by_torch(mesh, folder, ste="identity"),
    "surrogate": lambda mesh, folder: by_torch(mesh, folder, ste="surrogate"),
    "sequence": lambda mesh, folder: by_torch(mesh, folder, sequence=True),
    "dropout": dropout,
    "plan": by_plan,
    "fsdp2": merged_under_fsdp2,
    "idle": idle_rows_under_fsdp2,
    "sampled": sampled,
    "reference": reference_pass,
    "filled": filled_after_sharding,
    "switched": switched_under_fsdp2,
    "written": written_under_fsdp2,
    "refusals": refusals,
}


def main(folder, cases):
    mesh = init_device_mesh("cpu", (2,))
    import time

    for case in cases:
        print(case, time.process_time())
        CASES[case](mesh, folder)
        dist.barrier()
        (folder / f"{case}.passed").touch()
