"""Tokens as servers write them: blanks in three ways, decoded one by one, or by their numbers."""

import pytest

from dual_lora.lab.verify.endpoint import Entry
from dual_lora.lab.verify.logprobs import text_of_token


class Pieces:
    """Decodes one token as SentencePiece's tokenizers do: without the blank that begins it."""

    vocabulary = ("▁is", "is", "▁", "\n", "Ġred")

    def convert_ids_to_tokens(self, token):
        return self.vocabulary[token]

    def decode(self, tokens):
        return self.vocabulary[tokens[0]].replace("Ġ", " ").removeprefix("▁")


def test_a_piece_keeps_its_blank():
    assert [text_of_token(Pieces(), token) for token in range(5)] == [" is", "is", "", "\n", " red"]


@pytest.mark.parametrize(
    ("told", "blanks", "expected"),
    [
        ({" is": -1.0, "is": -2.0}, True, -1.0),
        ({"▁is": -1.0, "is": -2.0}, True, -1.0),
        ({"Ġis": -1.0, "is": -2.0}, True, -1.0),
        ({"is": -2.0, "red": -1.0}, False, -2.0),  # decoded one by one: nothing else there can be it
        ({"is": -2.0, " red": -1.0}, True, None),  # this server writes blanks, so that is another token
        ({"is ": -2.0, "is": -1.0}, False, None),  # two may be
        ({"#": -3.0, "#7": -2.0, " is": -1.0}, True, -1.0),  # of a page in Markdown
        ({"red": -1.0}, False, None),
        ({"is": -2.0, " ": -1.0}, False, -2.0),  # a token of blanks alone is written so by every server
    ],
)
def test_a_token_is_found_as_it_is_written(told, blanks, expected):
    entry = Entry("x", -1.0, told)
    assert entry.value_of(7, " is", blanks) == expected
    assert entry.writes_blanks == any(name[0] in " ▁Ġ" and name != " " for name in told)


def test_a_token_s_number_tells_it_from_all_others():
    assert Entry("x", -1.0, {" is": -2.0}, {7: -1.0}).value_of(7, " is", True) == -1.0
    assert Entry("x", -1.0, {" is": -2.0}, {8: -1.0}).value_of(7, " is", True) is None


def test_a_blank_is_not_any_blank():
    assert Entry("x", -1.0, {"\n": -1.0}).value_of(7, " ", False) is None
