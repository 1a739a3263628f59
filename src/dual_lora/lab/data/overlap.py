"""Records that stand in two of train, validation and test: what is asked there may have been learned by heart."""

import functools
from pathlib import Path
from typing import NamedTuple

from dual_lora.lab.data.examples import digests, item_of, last_digest, load_split
from dual_lora.lab.data.formats import Example
from dual_lora.lab.data.records import find, joined, stamp
from dual_lora.lab.errors import UserError
from dual_lora.lab.recipe.schema import DataSection

WORDS = {"train": "training", "validation": "validation", "test": "test"}
PAIRS = (("validation", "test"), ("test", "train"), ("validation", "train"))
Stamp = tuple[Path, int, int]


class Shared(NamedTuple):
    """`found` of the `size` records of one set have their prompt, text or group in another; where the first one is, and
    the one like it."""

    of: str
    among: str
    found: int
    size: int
    first: str
    like: str

    @property
    def words(self) -> str:
        """The fact in words."""
        return f"{self.found} of {self.size} {WORDS[self.of]} records are {WORDS[self.among]} records too"


def shared(data: DataSection) -> list[Shared]:
    """Return the records that the recipe's sets share. Sets that are not there, or on a hub, are left out.

    The runs of a study ask for the same records again and again: these are read once, until a file changes.
    """
    return list(_read(data.model_dump_json(), _stamps(data))[0])


@functools.lru_cache(maxsize=64)
def _read(section: str, stamps: tuple[Stamp | None, ...]) -> tuple[tuple[Shared, ...], tuple[str, ...]]:
    """Return the records that the sets share, and the labels that `unlearned` names: the records are read once for
    both."""
    data = DataSection.model_validate_json(section)
    sets = {split: found for split in WORDS if (found := _records(data, split))}
    labels = {split: {example.label for example in examples} for split, examples in sets.items()}
    learned = labels.pop("train", set())
    strange = set().union(*labels.values()) - learned if learned else set()
    return tuple(shared_by(sets)), tuple(sorted(strange))


def shared_by(sets: dict[str, list[Example]]) -> list[Shared]:
    """Return what these sets share; keys: as those of `WORDS`."""
    places = {
        split: {asked: example.where for example in reversed(examples) for asked in _all_prompts_of(example)}
        for split, examples in sets.items()
    }
    found = []
    for of, among in PAIRS:
        if of in sets and among in sets:
            there = places[among]
            alike = [(e.where, there[min(both)]) for e in sets[of] if (both := _prompts_of(e) & there.keys())]
            found += [Shared(of, among, len(alike), len(sets[of]), *alike[0])] if alike else []
    return found


def _stamps(data: DataSection) -> tuple[Stamp | None, ...]:
    """Return the stamp of each file; None for a file that is not there."""

    def of(source: str) -> Stamp | None:
        try:
            return stamp(find(source))
        except (UserError, OSError):
            return None

    sources = filter(None, [data.train, data.validation, data.test, *data.tests.values()])
    return tuple(of(one) for source in sources for one in joined(source))


def undeclared(data: DataSection, found: list[Shared] | None = None) -> str:
    """Say how the recipe's sets overlap, and what to do; "" where they do not, or where it declares what they share.

    found: what `shared` found, where it was asked already.
    """
    if data.overlap == "all":
        return ""
    over = [each for each in (shared(data) if found is None else found) if each.found > data.overlap]
    if not over:
        return ""
    together = (
        ", or set data.group: prompt, which keeps such records in one set"
        if data.holdout and not data.validation and data.group is None and any(each[:2] == PAIRS[2] for each in over)
        else ""
    )
    return (
        f"{' and '.join(each.words for each in over)} (the same prompt or text; for example {over[0].first} and "
        f"{over[0].like}). Remove them{together}, or allow them with data.overlap: {max(each.found for each in over)}."
    )


def unlearned(data: DataSection) -> list[str]:
    """The labels of validation and test records that no training record has: a classifier cannot be measured there."""
    return list(_read(data.model_dump_json(), _stamps(data))[1])


def _prompts_of(example: Example) -> set[str]:
    """Return an example's question, and the group that it belongs to."""
    asked = item_of(example)
    if example.messages:
        asked = last_digest(example.prompt or example.messages)
    return {asked, example.group} - {""}


def _all_prompts_of(example: Example) -> set[str]:
    """The same, and in a conversation what is asked before each of its answers."""
    before, turns = "", set()
    for message, after in digests(example.messages):
        if message["role"] == "assistant" and before:
            turns.add(before)
        before = after
    return _prompts_of(example) | turns


def _records(data: DataSection, split: str) -> list[Example]:
    source = (data.train if data.holdout and not data.validation else data.validation) if split == "validation" else (
        getattr(data, split) or " + ".join(data.tests.values()) * (split == "test")
    )  # fmt: skip
    if not source or "hub:" in source:
        return []
    try:
        return load_split(data, split)
    except (UserError, OSError):
        return []  # whoever needs these records will say what is wrong with them
