"""How errors of libraries are said in one line."""

import pytest

from dual_lora.lab.errors import UserError, described, is_disk_full

TWO = "size mismatch:\n    for layer 0\n    for layer 1"


@pytest.mark.parametrize(
    ("error", "plain", "lines", "said"),
    [
        (ValueError("no such\n  thing"), (), None, "ValueError: no such thing"),
        (UserError("no such thing"), (), None, "no such thing"),
        (ValueError("no such thing"), (ValueError,), None, "no such thing"),
        (KeyError("no such thing"), (ValueError,), None, "KeyError: 'no such thing'"),
        (RuntimeError(TWO), (Exception,), 1, "size mismatch:"),
        (RuntimeError(TWO), (Exception,), 2, "size mismatch: for layer 0"),
        (RuntimeError(f"\n{TWO}"), (), 1, "RuntimeError: size mismatch:"),
        (AssertionError(), (Exception,), 1, "AssertionError"),  # it says nothing, so its kind is all there is
        (AssertionError(" \n"), (), None, "AssertionError"),
    ],
)
def test_an_error_is_one_line_with_its_kind_where_that_says_more(error, plain, lines, said):
    assert described(error, *plain, lines=lines) == said


def test_what_was_noted_on_an_error_is_said_and_left_out_of_its_first_line():
    error = ValueError("no such thing")
    error.add_note("in the first layer")
    assert described(error) == "ValueError: no such thing in the first layer"
    assert described(error, lines=1) == "ValueError: no such thing"


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "x"),
        RuntimeError("[enforce fail at inline_container.cc:672] . PytorchStreamWriter failed writing file data/1"),
        RuntimeError("basic_ios::clear: iostream error"),  # of torch's writer, as it is opened
    ],
)
def test_a_full_disk_is_known_whoever_says_it(error):
    assert is_disk_full(error)
    assert not is_disk_full(RuntimeError("size mismatch"))
