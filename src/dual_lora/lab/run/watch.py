"""Trainer callbacks for what is seen and written while a run goes on."""

import math
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from transformers import TrainerCallback

from dual_lora.lab.errors import NotFinite, UserError
from dual_lora.lab.files.folder import RunFolder
from dual_lora.lab.files.write import json_text, mark_whole, write_json
from dual_lora.lab.interrupt import Stopped, on_signals
from dual_lora.lab.model.device import best_device, process_count
from dual_lora.lab.progress import Bar, console
from dual_lora.lab.read import read_object
from dual_lora.lab.run.failures import check_finite
from dual_lora.lab.run.sealed import seal

LOOK_AFTER = 30.0  # seconds of steps, before the processor time that the threads got is looked at
SECONDS = "seconds.json"  # in a checkpoint: the training time until then, and the loss since the last line
ECHO = 10.0  # seconds within which a launcher passes on the Ctrl-C that its processes have had from the terminal
FULL_SHARE = 0.6  # of all threads' time; two threads that wait for each other get about half


class Watch(TrainerCallback):
    """Shows progress, writes metrics, declares checkpoints whole, stops at NaN and when asked to.

    tokens: how many have been seen after each step, from 0 on. earlier: seconds of the sessions before this one.
    keep: how many checkpoints stay. losses: filled by the loss function, one entry a micro-batch.
    """

    def __init__(self, folder: RunFolder, bar: Bar, tokens: list[int], earlier: float, keep: int, main: bool):
        self.folder, self.bar, self.tokens, self.earlier = folder, bar, tokens, earlier
        self.keep, self.main = keep, main
        self.losses: list[torch.Tensor] = []
        self.begun = False  # whether a step of this session has: what fails before is the checkpoint
        self.stopped_by = 0  # the signal that asked for the end
        self._since = self._before = (0.0, 0)  # the last line: sum of losses, steps; of those, in earlier sessions
        self._saved_since: tuple[float, int] = 0.0, 0  # the same at the last checkpoint, over all processes
        self._start: float | None = None
        self._first = 0
        self._end: float | None = None
        self._paused = 0.0  # seconds of validation and checkpoints, which are no training
        self._step_ended = 0.0
        self._looked = False
        self._second: tuple[float, float] | None = None  # the clocks after the first step, which also warms up

    def seconds(self) -> float:
        """Training time of this session, without validation and the writing of checkpoints."""
        if self._start is None:
            return 0.0
        return (self._end or time.perf_counter()) - self._start - self._paused

    def _pause(self) -> None:
        """Exclude the time since the step's end, or since the last pause, from the training time."""
        now = time.perf_counter()
        self._paused += now - self._step_ended
        self._step_ended = now

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._pause()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._start = self._step_ended = time.perf_counter()
        self._first = state.global_step
        with suppress(OSError, ValueError, KeyError, TypeError):
            total, steps = read_object(self.folder.checkpoints / f"checkpoint-{self._first}" / SECONDS)["since_line"]
            self._since = self._before = float(total), int(steps)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._end = time.perf_counter()
        if state.global_step >= state.max_steps:
            self.bar.also("checking that what is saved gives the same answers")

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.begun = True

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        step = state.global_step
        loss = float(sum(self.losses)) if self.losses else math.nan  # one wait for the device a step
        self.losses.clear()
        if not math.isfinite(loss):
            raise NotFinite(f"The loss became {loss} at step {step}.")
        self._since = self._since[0] + loss, self._since[1] + 1
        rate = (self.tokens[step] - self.tokens[self._first]) / self.seconds()
        self.bar.to(step, f"batch loss {loss:.4f} · {rate:,.0f} tokens/s")
        self._look_at_threads()
        if step >= state.max_steps:
            control.should_log = True  # the loss of the end is known however rarely it is logged
        if self._asked_to_stop(args.device):
            control.should_save = control.should_training_stop = True
        if control.should_save:
            check_finite(model, step)
        self._step_ended = time.perf_counter()

    def _look_at_threads(self) -> None:
        """Say once if the threads got far less processor time than there was: then fewer of them may be faster."""
        now = time.perf_counter(), time.process_time()
        if self._second is None:
            self._second = now
        wall, busy = now[0] - self._second[0], now[1] - self._second[1]
        threads = torch.get_num_threads()
        if self._looked or wall < LOOK_AFTER:
            return
        self._looked = True
        if threads > 1 and busy < FULL_SHARE * threads * wall and self.bar.shown and best_device() == "cpu":
            console.print(
                f"{threads} threads got the time of {busy / wall:.1f} cores: other work holds some, and threads wait "
                f"for each other. OMP_NUM_THREADS={max(1, round(busy / wall))} may be faster.",
                soft_wrap=True,
            )

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if not logs or "train_runtime" in logs:
            return
        if "loss" in logs:
            logs = {**logs, "loss": self._mean_loss_of_run(logs["loss"])}
        if not self.main:
            return
        if "eval_loss" in logs:
            self._pause()
        line = {"step": state.global_step, **{k: v for k, v in logs.items() if k != "epoch"}}
        line |= {"tokens": self.tokens[state.global_step], "seconds": round(self.earlier + self.seconds(), 3)}
        with self.folder.metrics.open("a", encoding="utf-8") as file:
            file.write(json_text(line) + "\n")

    def _mean_loss_of_run(self, loss: float) -> float:
        """Return Trainer's mean over this session's steps since the last line, with those of earlier sessions in it."""
        (total, before), (_, steps) = self._before, self._since
        self._since = self._before = self._saved_since = 0.0, 0
        return (total + loss * (steps - before)) / steps if before else loss

    def newest_loss(self, lines: list[dict[str, Any]]) -> float | None:
        """The mean over the steps since the last line, as the end of an interrupted run has them; else that line's."""
        total, steps = self._saved_since
        return total / steps if steps else next((line["loss"] for line in reversed(lines) if "loss" in line), None)

    def _losses_since_line(self, args: Any) -> tuple[float, int]:
        """The sum of losses, over the rows of all processes, of the steps since the last line."""
        (before, _), (total, steps) = self._before, self._since
        own, processes = total - before, process_count()
        if processes > 1 and torch.distributed.is_initialized():  # a launcher may have said a number and no more
            # Trainer has multiplied each one's loss, in place, so that their mean is that of all rows.
            parts = torch.tensor(own, dtype=torch.float32, device=args.device)
            torch.distributed.all_reduce(parts)
            own = float(parts) / processes
        return before + own, steps

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.barrier()  # every process has written its part
        self._pause()
        since_line = self._saved_since = self._losses_since_line(args)
        if self.main:
            checkpoint = self.folder.checkpoints / f"checkpoint-{state.global_step}"
            known: dict[str, Any] = {"seconds": round(self.earlier + self.seconds(), 3), "since_line": since_line}
            write_json(checkpoint / SECONDS, known)
            if any(checkpoint.glob("global_step*")):  # DeepSpeed's
                seal(checkpoint)
            mark_whole(checkpoint)
            self.folder.keep_newest(self.keep)
        self._pause()

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """The first signal ends the run after the current step, with a checkpoint; a second Ctrl-C at once.

        A second SIGTERM does not: a launcher and a scheduler both send it, and who cannot wait sends SIGKILL. Ctrl-C
        reaches the processes of a launcher twice, from the terminal and from the launcher.
        """
        came = 0.0

        def finish_step(number: int) -> None:
            nonlocal came
            echo = process_count() > 1 and time.monotonic() - came < ECHO
            if self.stopped_by and number == signal.SIGINT and not echo:
                raise Stopped(number)
            came = came or time.monotonic()
            if not self.stopped_by and self.main and self.bar.shown:
                _say_that_it_stops(number)
            self.stopped_by = self.stopped_by or number

        with on_signals(finish_step):
            yield

    def _asked_to_stop(self, device: torch.device) -> bool:
        """Whether a signal has come, to this process or another of the run: all have to stop after the same step."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return self.stopped_by > 0
        latest = torch.tensor(self.stopped_by, device=device)
        torch.distributed.all_reduce(latest, torch.distributed.ReduceOp.MAX)
        self.stopped_by = self.stopped_by or int(latest)
        return int(latest) > 0


def _say_that_it_stops(number: int) -> None:
    """A line on standard error, past Python's stream, which may be in the middle of a write."""
    once_more = " Ctrl-C once more stops at once." if number == signal.SIGINT else ""
    with suppress(OSError):
        os.write(2, f"\nStopping after this step, with a checkpoint.{once_more}\n".encode())


class RankAllocation(TrainerCallback):
    """A callback that tells AdaLoRA of every step, so that it gives its ranks away; without it, it is LoRA,
    silently."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        try:
            model.base_model.update_and_allocate(state.global_step + 1)
        except KeyError as error:  # it looks for what an earlier step should have measured
            raise UserError(
                f"AdaLoRA cannot give its ranks away in {state.max_steps} steps: train longer, or set method.tinit and "
                "method.tfinal to fewer steps."
            ) from error
