"""Seeded examples of requests and their tool calls, and three honest test sets.

The seed decides everything: which phrasings and which values are held out of training, and every example.

| set | phrasing | values |
|---|---|---|
| `train` | seen | seen |
| `combinations` | seen, word by word | seen, but never together in one call, nor this request |
| `values` | seen, word by word | every string and number, every entry of a list, is new |
| `phrasings` | new sentences | seen |

*Seen* means that it occurs in the training examples that were generated, not that it could have occurred.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from dual_lora.lab.data.tool_calls import TEST_SETS as TEST_SETS
from dual_lora.lab.data.tool_calls import messages_for
from tool_calls.schema import TOOLS, Argument, Bag, Entry, Tool, Value

HELD_OUT_PHRASINGS = 4  # of each tool's sentences
HELD_OUT_VALUES = 0.2  # of each open set of values

_CHOICE = re.compile(r"\[([^\]]*)\]")
_SLOT = re.compile(r"\{(\w+)\}")


class Example(NamedTuple):
    """One request and the call that answers it, with what it was made of."""

    tool: Tool
    wording: str  # a phrasing with its choices made: "Set a timer for {minutes} minutes called {label}."
    arguments: dict[str, Value]

    @property
    def request(self) -> str:
        slots = {argument.name: argument for argument in self.tool.arguments}
        return _SLOT.sub(lambda slot: slots[slot[1]].spoken(self.arguments[slot[1]]), self.wording)

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


def wordings(phrasing: str) -> list[str]:
    """Every way to make the choices of a phrasing: "[a|b] timer" is "a timer" and "b timer"."""
    choice = _CHOICE.search(phrasing)
    if choice is None:
        sentence = re.sub(r" +([,.?!;]|$)", r"\1", re.sub(r"  +", " ", phrasing)).strip()
        return [sentence[0].upper() + sentence[1:]]
    before, after = phrasing[: choice.start()], phrasing[choice.end() :]
    return [wording for option in choice[1].split("|") for wording in wordings(before + option + after)]


def generate(seed: int, train: int = 1_000, test: int = 100) -> Splits:
    """The four sets of a seed, evenly over the tools: `train` examples, and `test` examples in each test set.

    Raises:
        ValueError: a set is too small to hold one example of every tool.
    """
    if min(train, test) < len(TOOLS):
        raise ValueError(
            f"train={train} and test={test}: each set holds all {len(TOOLS)} tools, so ask for {len(TOOLS)} or more"
        )
    splits = Splits([], [], [], [])
    held_out = _held_out_values(seed)
    for tool, train_share, test_share in zip(TOOLS, _shares(train), _shares(test), strict=True):
        # A stream of its own for each tool: adding a phrasing to one leaves the others' examples alone.
        rng = random.Random(f"{seed} {tool.name}")
        for whole, part in zip(splits, _of_tool(tool, train_share, test_share, held_out, rng), strict=True):
            whole.extend(part)
    rng = random.Random(seed)
    for examples in splits:
        rng.shuffle(examples)
    return splits


def _shares(total: int) -> list[int]:
    return [total // len(TOOLS) + (index < total % len(TOOLS)) for index in range(len(TOOLS))]


def _held_out_values(seed: int) -> set[Entry]:
    """A share of every open set, held out for all tools at once: a room that is new is new to light and heating."""
    held_out: set[Entry] = set()
    for argument in (argument for tool in TOOLS for argument in tool.arguments if not argument.closed):
        ranked = sorted(argument.pool, key=lambda entry: random.Random(f"{seed} {entry}").random())
        held_out.update(ranked[: round(HELD_OUT_VALUES * len(ranked))])
    return held_out


def _of_tool(tool: Tool, train: int, test: int, held_out: set[Entry], rng: random.Random) -> Splits:
    lines = rng.sample(tool.phrasings, len(tool.phrasings))
    new_lines, train_lines = lines[:HELD_OUT_PHRASINGS], lines[HELD_OUT_PHRASINGS:]
    train_pools, new_pools = {}, {}
    for argument in tool.arguments:
        new = () if argument.closed else tuple(entry for entry in argument.pool if entry in held_out)
        train_pools[argument.name] = tuple(entry for entry in argument.pool if entry not in new)
        new_pools[argument.name] = new or argument.pool

    taken: set[str] = set()  # no call twice, over all four sets
    trained = _draw(tool, _evenly(train_lines, train, rng), train_pools, taken, rng)
    seen_wordings = sorted({example.wording for example in trained})
    seen_pools = {argument.name: _seen_entries(argument, trained) for argument in tool.arguments}
    return Splits(
        trained,
        _draw(tool, rng.choices(seen_wordings, k=test), seen_pools, taken, rng),
        _draw(tool, rng.choices(seen_wordings, k=test), new_pools, taken, rng),
        _draw(tool, _evenly(new_lines, test, rng), seen_pools, taken, rng),
    )


def _evenly(lines: Sequence[str], count: int, rng: random.Random) -> list[str]:
    """`count` wordings, every line equally often."""
    return [rng.choice(wordings(lines[index % len(lines)])) for index in range(count)]


def _seen_entries(argument: Argument, examples: Iterable[Example]) -> tuple[Entry, ...]:
    seen: dict[Entry, None] = {}  # a set that keeps the order, so that a seed means one result
    for example in examples:
        value = example.arguments[argument.name]
        seen.update(dict.fromkeys(value if isinstance(value, list) else [value]))
    return tuple(seen)


def _draw(
    tool: Tool, sentences: Iterable[str], pools: Mapping[str, Sequence[Entry]], taken: set[str], rng: random.Random
) -> list[Example]:
    """An example for each sentence, with values from `pools`, whose calls are not in `taken` (and are then)."""
    bags = {name: Bag(pool, rng) for name, pool in pools.items()}
    drawn = []
    for wording in sentences:
        for _ in range(200):
            arguments = {argument.name: argument.draw(bags[argument.name]) for argument in tool.arguments}
            example = Example(tool, wording, arguments)
            twice = len({json.dumps(value) for value in arguments.values()}) < len(arguments)  # EUR to EUR
            if not twice and example.answer not in taken:
                break
        else:
            raise ValueError(
                f"{tool.name}: no new call after {len(taken)} different ones. Ask for fewer examples, or, where there "
                "are few to train on, for more of those: test sets combine what training has seen."
            )
        taken.add(example.answer)
        drawn.append(example)
    return drawn
