"""What a tool call is: a tool, its typed arguments, and the pool of values that each argument draws from.

An argument knows what can be drawn, the JSON value of a draw, and the words that stand for it in a request. All but
booleans are copied from the request character by character.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import NamedTuple

from tool_calls import values as v
from tool_calls.phrasings import PHRASINGS

Entry = str | int | float  # what a pool holds
Value = str | int | float | bool | list[str]  # what an argument holds


class Bag:
    """Entries in random order, all of them once before one comes again: few examples then show many values."""

    def __init__(self, entries: Sequence[Entry], rng: random.Random):
        self.entries, self.rng = entries, rng
        self.left: list[Entry] = []

    def take(self, count: int) -> list[Entry]:
        """`count` different entries, or all if there are not so many."""
        count = min(count, len(self.entries))
        if len(self.left) < count:
            self.left = self.rng.sample(self.entries, len(self.entries))
        return [self.left.pop() for _ in range(count)]


class Argument(NamedTuple):
    """A typed argument. Enums and booleans are *closed*: all their values occur in training."""

    name: str
    kind: str  # "string", "integer", "number", "boolean", "enum", "array"
    pool: tuple[Entry, ...]
    words: tuple[str, ...] = ()  # booleans only: what stands for each entry of the pool in a request

    @property
    def closed(self) -> bool:
        return self.kind in ("boolean", "enum")

    def draw(self, bag: Bag) -> Value:
        """One value of the entries in `bag`; an array gets one to three different ones."""
        if self.kind == "array":
            return [str(entry) for entry in bag.take(bag.rng.choice((1, 2, 2, 3)))]
        [drawn] = bag.take(1)
        return bool(drawn) if self.kind == "boolean" else drawn

    def spoken(self, value: Value) -> str:
        """The words for `value` in a request: `["milk", "eggs"]` is "milk and eggs", `21.5` is "21.5"."""
        if self.kind == "boolean":
            return self.words[self.pool.index(bool(value))]
        if isinstance(value, list):
            return value[0] if len(value) == 1 else f"{', '.join(value[:-1])} and {value[-1]}"
        return value if isinstance(value, str) else json.dumps(value)


class Tool(NamedTuple):
    name: str
    arguments: tuple[Argument, ...]

    @property
    def phrasings(self) -> tuple[str, ...]:
        return PHRASINGS[self.name]

    def call(self, arguments: dict[str, Value]) -> str:
        """The answer that the model has to give: one line of JSON, arguments in the order of the schema."""
        ordered = {argument.name: arguments[argument.name] for argument in self.arguments}
        return json.dumps({"name": self.name, "arguments": ordered}, ensure_ascii=False)


def _halves(low: int, high: int) -> tuple[float, ...]:
    return tuple(step / 2 for step in range(2 * low, 2 * high + 1))


AMOUNTS = tuple(round(0.05 * step, 2) for step in range(21, 9_000, 7))
TIMES = tuple(f"{hour}:{minute:02d}" for hour in range(5, 24) for minute in range(0, 60, 5))
DATES = tuple(f"{day} {month}" for month in v.MONTHS for day in range(1, 29))

TOOLS: tuple[Tool, ...] = (
    Tool(
        "set_timer",
        (Argument("minutes", "integer", tuple(range(2, 100))), Argument("label", "string", v.LABELS)),
    ),
    Tool(
        "get_weather",
        (
            Argument("city", "string", v.CITIES),
            Argument("days", "integer", tuple(range(2, 22))),
            Argument("unit", "enum", v.UNITS),
        ),
    ),
    Tool("send_message", (Argument("to", "string", v.NAMES), Argument("text", "string", v.TEXTS))),
    Tool(
        "set_temperature",
        (Argument("room", "string", v.ROOMS), Argument("celsius", "number", _halves(12, 29))),
    ),
    Tool(
        "set_light",
        (
            Argument("room", "string", v.ROOMS),
            Argument("on", "boolean", (True, False), ("on", "off")),
            Argument("time", "string", TIMES),
        ),
    ),
    Tool("add_items", (Argument("list", "string", v.LISTS), Argument("items", "array", v.ITEMS))),
    Tool(
        "convert_currency",
        (
            Argument("amount", "number", AMOUNTS),
            Argument("source", "enum", v.CURRENCIES),
            Argument("target", "enum", v.CURRENCIES),
        ),
    ),
    Tool(
        "play_music",
        (
            Argument("artist", "string", v.ARTISTS),
            Argument("volume", "integer", tuple(range(5, 100))),
            Argument("shuffle", "boolean", (True, False), ("shuffled", "in order")),
        ),
    ),
    Tool(
        "create_event",
        (
            Argument("title", "string", v.TITLES),
            Argument("date", "string", DATES),
            Argument("guests", "array", v.NAMES),
        ),
    ),
    Tool("translate", (Argument("text", "string", v.PHRASES), Argument("language", "enum", v.LANGUAGES))),
)
