"""Answers by the commonsense protocol: the first label of the task's kind, wherever it stands; none is wrong."""

import pytest

from dual_lora.lab.errors import UserError
from dual_lora.lab.run.scoring import LABELS, answer_in


@pytest.mark.parametrize(
    ("text", "target", "found"),
    [
        ("the correct answer is true", "true", "true"),
        ("the correct answer is false", "true", "false"),
        ("it is untrue, so false", "false", "true"),  # the protocol looks at letters, not at words
        ("True", "true", ""),
        ("the correct answer is answer3", "answer3", "answer3"),
        ("not answer2 but answer3", "answer3", "answer2"),
        ("answer5", "answer1", "answer5"),  # also where the question has four answers
        ("answer6", "answer1", ""),
        ("answer10", "answer1", "answer1"),
        ("the correct answer is solution2", "solution1", "solution2"),
        ("the correct answer is option1", "option2", "option1"),
        ("option3", "option2", ""),
        ("the correct answer is ending4", "ending4", "ending4"),
        ("answer1 or false?", "true", "false"),  # labels of another kind do not count
        ("", "true", ""),
    ],
)
def test_commonsense_protocol(text, target, found):
    assert answer_in(text, "commonsense", target) == found


@pytest.mark.parametrize("labels", LABELS, ids=lambda labels: labels[0])
def test_every_label_is_found_in_the_sentence_that_is_trained(labels):
    for label in labels:
        assert answer_in(f"the correct answer is {label}", "commonsense", labels[0]) == label


def test_regular_expressions_give_their_last_group():
    assert answer_in("so 12 + 3 = 15", r"= (\d+)", "15") == "15"
    assert answer_in("nothing", r"\d", "15") == ""


def test_other_tasks_have_no_labels():
    with pytest.raises(UserError, match="'blue' is no label of these tasks"):
        answer_in("blue", "commonsense", "blue")
