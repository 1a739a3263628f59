"""The capability table tries things for real; our column is pinned, and so is what tells the others apart."""

import json
import subprocess
import sys

import pytest
import torch

from dual_lora import capabilities

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


@pytest.mark.slow
def test_command_line():
    command = [sys.executable, "-W", "ignore", "-m", "dual_lora.capabilities", "--json"]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    rows = json.loads(output.splitlines()[-1])
    assert rows["nn.Linear"]["Dual LoRA"][0] == "yes"
