"""The generator of the demo's data: typed calls, one seed one result, and test sets that training has not seen."""

from __future__ import annotations

import difflib
import itertools
import json
import re
from collections import Counter

import pytest

from dual_lora.lab.data import tool_calls as tool_calls_data
from tool_calls import TEST_SETS, TOOLS, Example, Splits, generate
from tool_calls.generator import HELD_OUT_PHRASINGS, wordings

SEEDS = (0, 1, 2)
PYTHON_TYPE = {
    "string": str,
    "enum": str,
    "integer": int,
    "number": float,
    "boolean": bool,
    "array": list,
}


@pytest.fixture(scope="module", params=SEEDS)
def splits(request: pytest.FixtureRequest) -> Splits:
    return generate(request.param)


def phrasing_of(example: Example) -> str:
    """The line of the tool that the example's wording comes from."""
    [line] = [line for line in example.tool.phrasings if example.wording in wordings(line)]
    return line


def entries_of(example: Example) -> set[tuple[str, object]]:
    """The example's open values, list entries one by one, as (kind, value)."""
    found = set()
    for argument in example.tool.arguments:
        value = example.arguments[argument.name]
        if not argument.closed:
            found |= {(argument.kind, entry) for entry in (value if isinstance(value, list) else [value])}
    return found


def named_entries(example: Example) -> set[tuple[str, object]]:
    """All values with the argument that holds them: (argument, value)."""
    return {
        (name, entry)
        for name, value in example.arguments.items()
        for entry in (value if isinstance(value, list) else [value])
    }


# --- the tools ---


def test_eight_tools_or_more_with_every_kind_of_argument():
    assert len(TOOLS) >= 8
    kinds = {argument.kind for tool in TOOLS for argument in tool.arguments}
    assert kinds == set(PYTHON_TYPE)


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.name)
def test_every_wording_names_every_argument_once(tool):
    names = sorted(argument.name for argument in tool.arguments)
    for line in tool.phrasings:
        for wording in wordings(line):
            assert sorted(re.findall(r"{(\w+)}", wording)) == names, wording
            assert not re.search(r"[\[\]|]|  | [.,?!;]", wording), wording


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.name)
def test_phrasings_are_different_sentences_not_small_edits(tool):
    """Words in common, slots among them, between the closest wordings of two lines; 1.0 is the same sentence."""
    words = [[re.findall(r"{\w+}|[\w'-]+", wording.lower()) for wording in wordings(line)] for line in tool.phrasings]
    for (i, one), (j, other) in itertools.combinations(enumerate(words), 2):
        closest = max(difflib.SequenceMatcher(None, a, b, autojunk=False).ratio() for a in one for b in other)
        assert closest <= 0.75, (tool.phrasings[i], tool.phrasings[j])


def test_choices_are_expanded_and_spaces_closed():
    assert wordings("[a|the] {x} timer[, please|].") == [
        "A {x} timer, please.",
        "A {x} timer.",
        "The {x} timer, please.",
        "The {x} timer.",
    ]


# --- the examples ---


def test_answers_are_typed_json_in_the_order_of_the_schema(splits):
    for example in itertools.chain(*splits):
        call = json.loads(example.answer)
        assert call["name"] == example.tool.name
        assert list(call["arguments"]) == [argument.name for argument in example.tool.arguments]
        for argument in example.tool.arguments:
            assert type(call["arguments"][argument.name]) is PYTHON_TYPE[argument.kind], example.answer


def test_every_value_is_copied_from_the_request(splits):
    for example in itertools.chain(*splits):
        for argument in example.tool.arguments:
            value = example.arguments[argument.name]
            copied = (
                [argument.spoken(value)]
                if argument.kind == "boolean"
                else [
                    entry if isinstance(entry, str) else json.dumps(entry)
                    for entry in (value if isinstance(value, list) else [value])
                ]
            )
            for words in copied:
                assert re.search(rf"(?<![\w.]){re.escape(words)}(?!\w)", example.request), (words, example.request)


def test_sizes_are_as_asked_and_even_over_the_tools():
    splits = generate(3, train=205, test=47)
    assert {name: len(examples) for name, examples in splits._asdict().items()} == {
        "train": 205,
        **dict.fromkeys(TEST_SETS, 47),
    }
    for examples in splits:
        counts = Counter(example.tool.name for example in examples)
        assert len(counts) == len(TOOLS)
        assert max(counts.values()) - min(counts.values()) <= 1


def test_a_set_too_small_or_too_large_raises_a_clear_error():
    with pytest.raises(ValueError, match="train=1000 and test=9: each set holds all 10 tools"):
        generate(0, test=9)
    with pytest.raises(ValueError, match="Ask for fewer examples"):
        generate(0, train=60_000)
    with pytest.raises(ValueError, match="for more of those"):
        generate(0, train=10, test=50)


# --- one seed, one result ---


def test_a_seed_gives_the_same_examples_each_time_and_another_seed_gives_others():
    assert generate(5, 300, 40) == generate(5, 300, 40)
    held_out = [{phrasing_of(example) for example in generate(seed, 300, 40).phrasings} for seed in (5, 6)]
    assert held_out[0] != held_out[1]


# --- nothing leaks ---


def test_no_request_and_no_call_occurs_twice(splits):
    for part in (lambda example: example.request, lambda example: example.answer):
        counts = Counter(part(example) for example in itertools.chain(*splits))
        assert not [text for text, count in counts.items() if count > 1]


def test_combinations_are_new_but_all_their_parts_were_trained(splits):
    wordings_seen = {(example.tool.name, example.wording) for example in splits.train}
    for example in splits.combinations:
        assert (example.tool.name, example.wording) in wordings_seen
    _assert_values_were_trained(splits, splits.combinations)


def test_values_are_new_and_their_sentences_were_trained(splits):
    wordings_seen = {(example.tool.name, example.wording) for example in splits.train}
    entries_seen = set().union(*(entries_of(example) for example in splits.train))
    for example in splits.values:
        assert (example.tool.name, example.wording) in wordings_seen
        assert entries_of(example).isdisjoint(entries_seen), example.request


def test_phrasings_are_new_and_their_values_were_trained(splits):
    lines_seen = {(example.tool.name, phrasing_of(example)) for example in splits.train}
    lines_tested = {(example.tool.name, phrasing_of(example)) for example in splits.phrasings}
    assert lines_tested.isdisjoint(lines_seen)
    assert len(lines_tested) == HELD_OUT_PHRASINGS * len(TOOLS)
    _assert_values_were_trained(splits, splits.phrasings)


def _assert_values_were_trained(splits: Splits, examples: list[Example]) -> None:
    seen = {(example.tool.name, *entry) for example in splits.train for entry in named_entries(example)}
    for example in examples:
        assert {(example.tool.name, *entry) for entry in named_entries(example)} <= seen, example.request


# --- on disk ---


def test_written_sets_are_chats_one_a_line(tmp_path):
    splits = generate(4, 50, 20)
    splits.write(tmp_path / "data")
    for name, examples in splits._asdict().items():
        lines = (tmp_path / "data" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        assert [json.loads(line) for line in lines] == [example.chat() for example in examples]
    assert [message["role"] for message in examples[0].chat()["messages"]] == ["system", "user", "assistant"]


def test_the_package_carries_what_seed_0_gives(tmp_path):
    generate(0, train=600).write(tmp_path)
    for name in ("train", *TEST_SETS):
        assert (tool_calls_data.FOLDER / f"{name}.jsonl").read_text() == (tmp_path / f"{name}.jsonl").read_text()
    assert [len(tool_calls_data.chats(name)) for name in ("train", *TEST_SETS)] == [600, 100, 100, 100]


def test_a_part_is_the_first_records_and_holds_most_tools(tmp_path):
    tool_calls_data.copy_to(tmp_path, train=64, test=10)
    lines = (tmp_path / "train.jsonl").read_text().splitlines()
    assert [json.loads(line)["messages"] for line in lines] == tool_calls_data.chats("train")[:64]
    assert len((tmp_path / "values.jsonl").read_text().splitlines()) == 10
    assert {json.loads(chat[-1]["content"])["name"] for chat in tool_calls_data.chats("train", 64)} == {
        tool.name for tool in TOOLS
    }
