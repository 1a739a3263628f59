"""One process of a distributed run: trains a tiny model and writes what it saw. Called by test_distributed.py."""

import json
import os
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from dual_lora import DualLoraConfig, DualLoraLayer

BATCH, LENGTH, VOCABULARY = 4, 9, 100


def base_model():
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2)
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, vocab_size=VOCABULARY, **sizes))


def batches(start, stop):
    generator = torch.Generator().manual_seed(1)
    for step in range(stop):
        ids = torch.randint(0, VOCABULARY, (BATCH, LENGTH), generator=generator)
        if step >= start:
            yield ids


def main(kind, folder, steps, resume=None):
    """kind: single, ddp, fsdp2, zero0 … zero3; the last ones in a process of a group. resume: an earlier folder."""
    rank, world = (0, 1) if kind == "single" else (int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    model = base_model()
    done = 0
    if resume:
        model = PeftModel.from_pretrained(model, resume, is_trainable=True)
        done = json.loads(Path(resume, "seen.json").read_text())["steps"]
    else:
        config = DualLoraConfig.paper(r=8, warmup_steps=5, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, config)

    def optimizer():
        return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)

    if kind == "fsdp2":
        from torch.distributed.fsdp import fully_shard

        for layer in model.base_model.model.model.layers:
            fully_shard(layer)
        fully_shard(model)
        run, opt = model, optimizer()
    elif kind.startswith("zero"):
        import deepspeed

        options = {
            "train_micro_batch_size_per_gpu": BATCH // world,
            "zero_optimization": {"stage": int(kind[-1])},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 10**9,
        }
        run, opt, *_ = deepspeed.initialize(model=model, optimizer=optimizer(), config=options)
    else:
        run, opt = (model if kind == "single" else torch.nn.parallel.DistributedDataParallel(model)), optimizer()

    layer = next(m for m in model.modules() if isinstance(m, DualLoraLayer))
    losses, factors = [], []
    for ids in batches(done, done + steps):
        mine = ids.chunk(world)[rank]
        loss = run(input_ids=mine, labels=mine).loss
        if kind.startswith("zero"):
            run.backward(loss)
            run.step()
        else:
            loss.backward()
            opt.step()
            opt.zero_grad()
        mean = loss.detach().clone()
        if world > 1:
            dist.all_reduce(mean)
        losses.append(mean.item() / world)
        factors.append(float(layer.warmup_factor("default")))

    state = full_state(kind, model)
    if rank == 0:
        model.save_pretrained(folder, state_dict=state)
        seen = {"losses": losses, "warmup": factors, "steps": done + steps}
        Path(folder, "seen.json").write_text(json.dumps(seen))
    if kind != "single":
        dist.barrier()


def full_state(kind, model):
    """The whole adapter's state on rank 0, as accelerate gathers it for each strategy."""
    if kind == "fsdp2":
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if kind == "zero3":
        import deepspeed

        with deepspeed.zero.GatheredParameters([p for p in model.parameters() if p.requires_grad]):
            return {k: v.clone() for k, v in model.state_dict().items() if "dual_lora_" in k}
    return model.state_dict()
