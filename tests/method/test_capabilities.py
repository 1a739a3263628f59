"""The capability table tries things for real; our column is pinned, and so is what tells the others apart."""

import json
from importlib import metadata

import capabilities
import pytest
import torch

NOT_THERE = {"add_weighted_adapter, a sum in one"}  # ReLU and Sign are not linear
LIBRARIES = {"bitsandbytes 4 bit", "bitsandbytes 8 bit", "HQQ", "torchao int8"}


@pytest.fixture(scope="module")
def table():
    return capabilities.table()


def test_our_column(table):
    for row, answers in table.items():
        answer = answers["Dual LoRA"]
        if row in LIBRARIES and answer.mark == "?":
            continue
        if row == "torch.compile, one graph" and torch.__version__ < "2.7":
            continue  # torch 2.6 breaks the graph at `vars(module)`; the results are the same
        assert answer.mark == ("–" if row in NOT_THERE else "yes"), f"{row}: {answer.reason}"


def test_what_is_not_there_says_what_to_do_instead(table):
    for row in NOT_THERE:
        assert "set_adapter" in table[row]["Dual LoRA"].reason


def test_the_table_can_say_no(table):
    """Facts about the others that were found before: were these "yes", the probes would be worthless."""
    assert table["mixed batch (adapter_names)"]["HiRA"].mark == "–"
    assert table["unmerge exact, 100 times in bf16"]["LoRA"].mark == "–"
    assert table["convert_to_lora, right at full rank"]["DoRA"].mark == "–"
    assert table["MultiheadAttention, packed"]["DoRA"].mark == "–"
    assert table["nn.Linear"]["LoRA"].mark == "yes"


def test_a_missing_library_is_not_a_no():
    def without(make):
        import a_library_that_does_not_exist  # noqa: F401

    assert capabilities._try(without, None).mark == "?"


def test_the_kept_table_is_what_was_tried(table):
    """`dual-lora info` prints the kept one; write it again with `python conformance/capabilities.py --write`."""
    kept = json.loads(capabilities.KEPT.read_text())
    if any(metadata.version(name).split("+")[0] != version for name, version in kept["versions"].items()):
        pytest.skip(f"the kept table is that of {kept['versions']}")
    for row, answers in table.items():
        for name, answer in answers.items():
            assert answer.mark in (kept["table"][row][name][0], "?"), (row, name, answer.reason)
