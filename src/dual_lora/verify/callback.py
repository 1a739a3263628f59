"""A callback for transformers' Trainer that notices an adapter that does not train, for any method of PEFT."""

import contextlib
import random
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from dual_lora._warning import warn
from dual_lora.verify.template import rendered

ROWS = 8  # training rows that are looked at
ROWS_ASKED = 2  # of which the saved adapter is asked
FEWEST_STEPS = 4  # a rate and a B that start at zero keep other factors still for three
IGNORED = -100  # the label that losses of PyTorch leave out
MARK = "xyzzy"  # an answer, to find what a chat template writes after one
FILLED = 0.5  # what stands in every trained tensor before the saved ones are loaded


class VerifyAdapter(TrainerCallback):
    """A callback that says early when a run trains nothing, or not what was meant: `Trainer(…,
    callbacks=[VerifyAdapter()])`.

    At the start: do the answers carry the loss, not the padding, and is the end-of-turn token learned? After `steps`
    optimizer steps: has every trained tensor had a gradient, and has it moved? At the end: does the adapter, saved and
    loaded anew, give the same logits? Works in every trainer that takes transformers' callbacks (TRL, Axolotl,
    LLaMA-Factory) and for every method of PEFT. It changes nothing of the run.

    steps: that a tensor has to get its first gradient and to move. A warm-up from λ = 0 or from a learning rate of 0
    takes one or two. strict: raise ValueError in place of a warning. Afterwards `problems` and `notes` hold what was
    said, in sentences; `problems` is empty after a run in which all was well. tokenizer: left out, the trainer's own.
    answers: False where rows are pieces of texts, most of which have no end: then it need not be learned.
    """

    def __init__(self, steps: int = 10, strict: bool = False, tokenizer: Any = None, answers: bool = True):
        self.steps, self.strict, self.tokenizer, self.answers = steps, strict, tokenizer, answers
        self.problems: list[str] = []
        self.notes: list[str] = []
        self._trained: dict[str, Tensor] = {}
        self._silent: set[str] = set()  # names that have had no gradient yet
        self._before: dict[str, tuple[float, float]] = {}
        self._batch: dict[str, Any] | None = None
        self._first = 0
        self._judged = False

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **more: Any) -> None:
        self.problems, self.notes, self._judged, self._first = [], [], False, state.global_step
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not named:
            self._say("no parameter is trained: every one has requires_grad=False")
        # DeepSpeed gives no tensor a gradient; `accelerate launch` brings it without `args.deepspeed`.
        under_deepspeed = getattr(args, "deepspeed", None) or getattr(args, "deepspeed_plugin", None)
        if under_deepspeed or any(is_shard(p) for p in named.values()):
            self.notes.append(
                "the trained tensors are sharded: gradients, movement and the saved adapter were not checked"
            )
            named = {}
        self._trained, self._silent = named, set(named)
        self._before = {name: _sums(p) for name, p in named.items()}
        try:
            self._batch = _first_rows(more.get("train_dataloader"))
        except Exception as error:  # a data set or collator of the user's, which may want anything
            self._batch = None
            self.notes.append(f"no training rows could be looked at ({type(error).__name__}: {error})")
        if self._batch is not None:
            problems, notes = label_problems(self._batch, self.tokenizer or more.get("processing_class"), self.answers)
            self.notes += notes
            for problem in problems:
                self._say(problem)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        for name in list(self._silent):
            gradient = self._trained[name].grad
            if gradient is not None and bool((gradient != 0).any()):
                self._silent.discard(name)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step - self._first >= self.steps and not self._judged:
            self._judge(self.steps)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        taken = state.global_step - self._first
        if not self._judged and taken >= FEWEST_STEPS:
            self._judge(taken)
        elif not self._judged:
            self.notes.append(f"{taken} steps are too few to see whether every trained tensor moves")
        if self._trained and taken and self._batch is not None and state.is_world_process_zero:
            self._check_saved(model)
        self._trained, self._before, self._batch = {}, {}, None

    def _judge(self, steps: int) -> None:
        self._judged = True
        trained = {name: p for name, p in self._trained.items() if p.requires_grad}  # others were frozen on purpose
        if silent := self._silent & trained.keys():
            self._say(
                f"{_some(silent)} of {len(self._trained)} trained tensors had no gradient in {steps} steps: "
                "nothing that they compute reaches the loss"
            )
        still = {n for n, p in trained.items() if n not in self._silent and _sums(p) == self._before[n]}
        if still:
            self._say(
                f"{_some(still)} of {len(self._trained)} trained tensors have a gradient and did not move in "
                f"{steps} steps: does the optimizer hold them, and is the learning rate above 0?"
            )

    def _check_saved(self, model: Any) -> None:
        try:
            apart = saved_differences(model, self._batch or {}, self._trained)
        except Exception as error:  # whatever a method of PEFT does not support; the run itself is well
            self.notes.append(f"the saved adapter was not loaded anew ({type(error).__name__}: {error})")
            return
        if apart is None:
            self.notes.append("the saved adapter was not loaded anew: this method does not allow it within a run")
        elif apart:
            self._say(f"the adapter, saved and loaded anew, gives other logits (by up to {apart:.3g})")

    def _say(self, problem: str) -> None:
        self.problems.append(problem)
        text = f"VerifyAdapter of Dual LoRA: {problem}."
        if self.strict:
            raise ValueError(text)
        warn(text, stacklevel=3)


def saved_differences(model: Any, batch: dict[str, Any], trained: dict[str, Tensor]) -> float | None:
    """Return how far the logits are from those of the adapter after it is saved and loaded, beyond what two runs differ
    by.

    None where it cannot be told within the model. Its tensors are the same bits afterwards.
    """
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTuner
    from peft.utils import load_peft_weights, set_peft_model_state_dict

    if not isinstance(model, PeftModel) or not isinstance(model.base_model, BaseTuner):
        return None
    name = model.active_adapter
    # Loading gives AdaLoRA's factors other shapes.
    if not isinstance(name, str) or model.peft_config[name].peft_type == "ADALORA":
        return None
    with tempfile.TemporaryDirectory() as folder, _evaluating(model), torch.no_grad():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.save_pretrained(folder, selected_adapters=[name])
        saved = folder if name == "default" else str(Path(folder) / name)
        expected, noise = _logits(model, batch), 0.0
        if expected is None:
            return None
        noise = float((_logits(model, batch) - expected).abs().max())
        kept = [(parameter, parameter.detach().clone()) for parameter in trained.values()]
        try:
            for parameter, _ in kept:
                parameter.fill_(FILLED)
            set_peft_model_state_dict(model, load_peft_weights(saved, device="cpu"), adapter_name=name)
            apart = float((_logits(model, batch) - expected).abs().max())
        finally:
            for parameter, value in kept:
                parameter.copy_(value)
    largest = 1e-6 * float(expected.abs().max())
    return 0.0 if apart <= 2 * noise + largest else apart


def is_shard(parameter: Any) -> bool:
    """Whether this is a part of a tensor only (FSDP2's, ZeRO-3's)."""
    return type(parameter).__name__ == "DTensor" or hasattr(parameter, "ds_id") or hasattr(parameter, "_local_tensor")


def _logits(model: Any, batch: dict[str, Any]) -> Any:
    inputs = {
        k: v[:ROWS_ASKED].to(model.device)
        for k, v in batch.items()
        if isinstance(v, Tensor) and k != "labels" and v.dim()
    }
    more = {k: v for k, v in batch.items() if k == "logits_to_keep"}
    logits = getattr(model(**inputs, **more), "logits", None)
    return logits.float() if isinstance(logits, Tensor) else None


def _sums(parameter: Tensor) -> tuple[float, float]:
    """Two sums that a step changes, in fp64 (in fp32 where the device has none)."""
    wide = parameter.detach().to(torch.float32 if parameter.device.type == "mps" else torch.float64)
    return float(wide.sum()), float(wide.square().sum())


def _first_rows(dataloader: Any) -> dict[str, Any] | None:
    """The first rows of a data set as its collator puts them together; without drawing from any random stream."""
    dataset: Any = getattr(dataloader, "dataset", None)
    collate = getattr(dataloader, "collate_fn", None)
    if collate is None or not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        return None
    with _random_state_kept():
        batch = collate([dataset[i] for i in range(min(ROWS, len(dataset)))])
    return dict(batch) if hasattr(batch, "keys") else None


@contextlib.contextmanager
def _random_state_kept() -> Iterator[None]:
    numpy: Any = sys.modules.get("numpy")  # where nobody has imported it, nobody draws from it
    python, array = random.getstate(), numpy.random.get_state() if numpy else None
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        if numpy:
            numpy.random.set_state(array)


@contextlib.contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _some(names: set[str]) -> str:
    first = min(names)
    return f"1 ({first})" if len(names) == 1 else f"{len(names)} ({first}, …)"


def label_problems(batch: dict[str, Any], tokenizer: Any = None, answers: bool = True) -> tuple[list[str], list[str]]:
    """(problems, notes) of a batch with input_ids and labels [rows, tokens]; nothing of a batch of another kind."""
    ids, labels, mask = (batch.get(name) for name in ("input_ids", "labels", "attention_mask"))
    if not _is_tokens(ids) or not _is_tokens(labels) or ids.shape != labels.shape:  # type: ignore[union-attr]
        return [], ["the batches hold no labels of tokens: what carries the loss was not checked"]
    assert isinstance(ids, Tensor)
    assert isinstance(labels, Tensor)
    learned = labels != IGNORED
    if not bool(learned.any()):
        return [f"no token of the first {len(ids)} rows carries the loss: every label is {IGNORED}"], []
    problems, notes = [], []
    real = mask.bool() if isinstance(mask, Tensor) and mask.shape == ids.shape else torch.ones_like(learned)
    if bool((learned & ~real).any()):
        problems.append("padding carries the loss: there are labels where the attention mask is 0")
    if float((labels != ids)[learned & real].float().mean()) > 0.5:
        problems.append(
            "most labels are not the token at their own place: transformers' models shift labels themselves"
        )
    if bool(learned[real].all()):
        notes.append("every token carries the loss, prompts too")
    ends = end_tokens(tokenizer) if answers else set()
    if ends:
        is_end = torch.isin(ids, torch.tensor(sorted(ends), device=ids.device)) & real
        if not bool((is_end & learned).any()):
            written = " or ".join(repr(tokenizer.decode([end])) for end in sorted(ends))
            hidden = " It stands in the rows, but its label is ignored." if bool(is_end.any()) else ""
            problems.append(
                f"no row of the first {len(ids)} teaches the end of an answer ({written}): the model will not learn to "
                f"stop.{hidden}".removesuffix(".")
            )
    return problems, notes


def end_tokens(tokenizer: Any) -> set[int]:
    """The token that ends a text, and the one that the chat template writes after an answer."""
    ends: set[int] = set()
    if isinstance(getattr(tokenizer, "eos_token_id", None), int):
        ends.add(tokenizer.eos_token_id)
    if not getattr(tokenizer, "chat_template", None):
        return ends
    talk = [{"role": "user", "content": "?"}, {"role": "assistant", "content": MARK}]
    try:
        after = rendered(tokenizer, talk).rpartition(MARK)[2]
    except Exception:  # a template is a program of somebody else's, and may refuse any conversation
        return ends
    following = tokenizer(after, add_special_tokens=False).input_ids
    return ends | set(next(([i] for i in following if tokenizer.decode([i]).strip()), []))


def _is_tokens(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 2 and not value.is_floating_point()
