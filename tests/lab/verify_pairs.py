"""Pairs of an adapter and a candidate, right or faulty, in fp32, bf16 and on a 4-bit base, and what verify says.

`python tests/lab/verify_pairs.py 200` prints a table of verdicts: what a candidate is, what is said.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator

import torch
from peft import LoHaConfig, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from dual_lora import DualLoraConfig
from dual_lora.lab.model.opened import Tuned
from dual_lora.lab.verify.diagnose import judge
from dual_lora.lab.verify.guesses import ModelGuesses, known_of, strengths
from dual_lora.lab.verify.logprobs import Probe, score

METHODS = {
    "dual_lora": lambda: DualLoraConfig.paper(r=4, warmup_steps=0, target_modules="all-linear", task_type="CAUSAL_LM"),
    "lora": lambda: LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    "loha": lambda: LoHaConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"], task_type="CAUSAL_LM"),
}
PRECISIONS = ("fp32", "bf16", "nf4")
FAULTS = {"right": None, "off": 0.0, "half": None, "λ 0.5": 0.5, "twice": 2.0, "other": None}


def plain_model(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        initializer_range=0.1, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def train(model, probes: list[Probe], steps: int = 12) -> None:
    """Teach the answers of the probes, half of the way: an adapter that is sure of nothing, and of some things."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    ids = torch.tensor([probe.ids for probe in probes])
    labels = torch.full_like(ids, -100)
    for row, probe in enumerate(probes):
        labels[row, list(probe.places)] = ids[row, list(probe.places)]
    model.train()
    for _ in range(steps):
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def some_probes(seed: int, count: int = 16) -> list[Probe]:
    chance = torch.Generator().manual_seed(seed)
    start = int(torch.randint(3, 60, (1,), generator=chance))
    probes = []
    for i in range(count):  # an answer counts on from the question, by a step that the seed gives
        question = torch.randint(3, 64, (8,), generator=chance).tolist()
        answer = [3 + (question[-1] + (k + 1) * start) % 61 for k in range(8)]
        probes.append(Probe(tuple(question + (answer if i % 3 else answer[::-1])), tuple(range(8, 16))))
    return probes


def in_four_bits(model, folder: str):
    from transformers import BitsAndBytesConfig

    model.save_pretrained(folder)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, device_map="cpu", dtype=torch.float32
    ).eval()


@functools.cache
def trained(seed: int, of: int, method: str) -> PeftModel:
    """The model of a seed with an adapter that has learnt the probes of a seed; nobody changes it."""
    adapted = get_peft_model(plain_model(seed), METHODS[method]())
    train(adapted, some_probes(of))
    return adapted


def verdict(seed: int, precision: str, fault: str) -> str:
    """What is said of one pair. precision: of the candidate; every other 4-bit pair has its reference in it too."""
    method = list(METHODS)[seed % (2 if precision == "nf4" else 3)]  # PEFT has no LoHa on a 4-bit base
    probes = some_probes(seed)
    adapted = reference = trained(seed, seed, method)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        candidate = adapted
        if fault == "other":
            candidate = trained(seed, seed + 1000, method)
        if precision == "nf4":
            candidate.save_pretrained(f"{folder}/adapter")
            base = in_four_bits(plain_model(seed), f"{folder}/base")
            candidate = PeftModel.from_pretrained(base, f"{folder}/adapter")
            if seed // 2 % 2 and fault != "other":
                reference = candidate
        half = "layers.0.", "layers.1."
        at = FAULTS[fault]
        of = (lambda name: 0.0 if any(h in name for h in half) else 1.0) if fault == "half" else lambda _: at
        if fault not in ("right", "other"):
            stack.enter_context(strengths(candidate, of))
        if precision == "nf4":
            found = score(candidate, probes)
        elif precision == "bf16":
            found = score(copy.deepcopy(candidate).to(torch.bfloat16), probes)
        elif fault == "right":
            found = score(copy.deepcopy(candidate).merge_and_unload(), probes)
        else:
            found = score(candidate, probes)
        stack.close()
        tuned = Tuned(reference, None, "pair")
        return judge(found, known_of(tuned, probes), ModelGuesses(reference, probes), exact=precision == "fp32").word


def table(pairs: range, faults, precisions=PRECISIONS) -> Iterator[tuple[str, str, Counter]]:
    for fault in faults:
        for precision in precisions:
            yield precision, fault, Counter(verdict(seed, precision, fault) for seed in pairs)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for precision, fault, words in table(range(int(sys.argv[1])), sys.argv[2:] or list(FAULTS)):
        print(f"{precision:5} {fault:6} {dict(words)}", flush=True)
