"""Seeded examples of requests and their tool calls, and three honest test sets.

The seed decides everything: which phrasings and which values are held out of training, and every example.

| set | phrasing | values |
|---|---|---|
| `train` | seen | seen |
| `combinations` | seen, word by word | seen, but never together in one call, nor this request |
| `values` | seen, word by word | every string and number, every entry of a list, is new |
| `phrasings` | new sentences | seen |

*Seen* means that it occurs in the training examples that were really generated, not that it could have occurred.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from dual_lora.lab.toolcalls.schema import TOOLS, Argument, Tool, Value

SYSTEM_PROMPT = "Reply with one JSON tool call."
HELD_OUT_PHRASINGS = 4  # of each tool's sentences
HELD_OUT_VALUES = 0.25  # of each open set of values
TEST_SETS = ("combinations", "values", "phrasings")

_CHOICE = re.compile(r"\[([^\]]*)\]")
_SLOT = re.compile(r"\{(\w+)\}")
Pools = dict[str, Sequence[str | int | float]]


class Example(NamedTuple):
    """One request and the call that answers it, with what it was made of."""

    tool: Tool
    phrasing: str  # the line of `PHRASINGS`
    wording: str  # that line with its choices made: "Set a timer for {minutes} minutes called {label}."
    arguments: dict[str, Value]

    @property
    def request(self) -> str:
        spoken = {
            argument.name: argument.spoken(self.arguments[argument.name]) for argument in self.tool.arguments
        }
        return _SLOT.sub(lambda match: spoken[match[1]], self.wording)

    @property
    def answer(self) -> str:
        return self.tool.call(self.arguments)

    def chat(self) -> dict[str, list[dict[str, str]]]:
        """The example as a chat record, the form that `dual-lora train` and `evaluate` read."""
        return {
            "messages": [*messages_for(self.request), {"role": "assistant", "content": self.answer}],
        }


class Splits(NamedTuple):
    train: list[Example]
    combinations: list[Example]
    values: list[Example]
    phrasings: list[Example]

    def write(self, folder: Path) -> None:
        """Each set as `<folder>/<name>.jsonl`, one chat a line."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, examples in self._asdict().items():
            lines = (json.dumps(example.chat(), ensure_ascii=False) + "\n" for example in examples)
            (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def messages_for(request: str) -> list[dict[str, str]]:
    """The prompt of a request: the model is not told the tools, it learns them."""
    return [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": request}]


def wordings(phrasing: str) -> list[str]:
    """Every way to make the choices of a phrasing: "[a|b] timer" is "a timer" and "b timer"."""
    choice = _CHOICE.search(phrasing)
    if choice is None:
        sentence = re.sub(r" +([,.?!;]|$)", r"\1", re.sub(r"  +", " ", phrasing)).strip()
        return [sentence[0].upper() + sentence[1:]]
    heads = (
        phrasing[: choice.start()] + option + phrasing[choice.end() :] for option in choice[1].split("|")
    )
    return [wording for head in heads for wording in wordings(head)]


def generate(seed: int, train: int = 1_000, test: int = 100) -> Splits:
    """The four sets of a seed: `train` examples, and `test` examples for each test set, evenly over the tools.

    Raises:
        ValueError: a set is too small to hold one example of every tool.
    """
    if min(train, test) < len(TOOLS):
        raise ValueError(
            f"train={train} and test={test}: each set holds every tool at least once, so ask for {len(TOOLS)} or more"
        )
    splits = Splits([], [], [], [])
    for tool, train_share, test_share in zip(TOOLS, _shares(train), _shares(test), strict=True):
        # A stream of its own for each tool: adding a phrasing to one leaves the others' examples alone.
        rng = random.Random(f"{seed} {tool.name}")
        for whole, part in zip(splits, _tool_splits(tool, train_share, test_share, rng), strict=True):
            whole.extend(part)
    rng = random.Random(seed)
    for examples in splits:
        rng.shuffle(examples)
    return splits


def _shares(total: int) -> list[int]:
    return [total // len(TOOLS) + (index < total % len(TOOLS)) for index in range(len(TOOLS))]


def _tool_splits(tool: Tool, train: int, test: int, rng: random.Random) -> Splits:
    lines = rng.sample(tool.phrasings, len(tool.phrasings))
    new_lines, train_lines = lines[:HELD_OUT_PHRASINGS], lines[HELD_OUT_PHRASINGS:]
    train_pools: Pools = {}
    new_pools: Pools = {}
    for argument in tool.arguments:
        pool = rng.sample(argument.pool, len(argument.pool))
        held_out = 0 if argument.closed else round(HELD_OUT_VALUES * len(pool))
        train_pools[argument.name] = pool[held_out:]
        new_pools[argument.name] = pool[:held_out] or pool

    seen_calls: set[str] = set()

    def draw(wordings_: Iterable[str], pools: Pools, phrasing_of: Callable[[str], str]) -> list[Example]:
        """One example for each wording; no call is drawn twice in all the sets."""
        drawn = []
        for wording in wordings_:
            example = _fresh(tool, phrasing_of(wording), wording, pools, rng, seen_calls)
            seen_calls.add(example.answer)
            drawn.append(example)
        return drawn

    line_of = {wording: line for line in tool.phrasings for wording in wordings(line)}
    trained = draw(_cycle(train_lines, train, rng), train_pools, line_of.__getitem__)
    seen_wordings = sorted({example.wording for example in trained})
    seen_pools = {argument.name: _seen_values(argument, trained) for argument in tool.arguments}
    return Splits(
        trained,
        draw((rng.choice(seen_wordings) for _ in range(test)), seen_pools, line_of.__getitem__),
        draw((rng.choice(seen_wordings) for _ in range(test)), new_pools, line_of.__getitem__),
        draw(_cycle(new_lines, test, rng), seen_pools, line_of.__getitem__),
    )


def _cycle(lines: Sequence[str], count: int, rng: random.Random) -> list[str]:
    """`count` wordings, every line equally often."""
    return [rng.choice(wordings(lines[index % len(lines)])) for index in range(count)]


def _seen_values(argument: Argument, examples: Iterable[Example]) -> list[str | int | float]:
    seen: dict[str | int | float, None] = {}  # a set that keeps the order, so that a seed means one result
    for example in examples:
        value = example.arguments[argument.name]
        seen.update(dict.fromkeys(value if isinstance(value, list) else [value]))
    return list(seen)


def _fresh(
    tool: Tool, phrasing: str, wording: str, pools: Pools, rng: random.Random, taken: set[str]
) -> Example:
    for _ in range(200):
        arguments = {argument.name: argument.draw(pools[argument.name], rng) for argument in tool.arguments}
        spoken = [json.dumps(value) for value in arguments.values()]
        example = Example(tool, phrasing, wording, arguments)
        # Converting EUR to EUR is no request.
        if len(set(spoken)) == len(spoken) and example.answer not in taken:
            return example
    raise ValueError(
        f"no unused combination of values is left for {tool.name}: ask for fewer examples than {len(taken)} a tool"
    )
