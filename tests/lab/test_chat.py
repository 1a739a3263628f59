"""A conversation: what is kept, the adapter off and on, the end of an answer, and no terminal."""

import json

import pytest

from dual_lora.lab.commands import chat as command
from dual_lora.lab.errors import UserError
from dual_lora.lab.model.chat import Conversation
from dual_lora.lab.model.opened import open_tuned
from dual_lora.lab.recipe.read import build_recipe
from dual_lora.lab.run.train import run


@pytest.fixture(scope="module")
def trained(tiny_values, tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat") / "run"
    method = {"name": "dual_lora", "r": 4}
    train = {"steps": 30, "batch_size": 8, "learning_rate": 0.02}
    run(build_recipe(tiny_values | {"method": method, "train": train}), folder, progress=False)
    return folder


@pytest.fixture
def talk(trained):
    return Conversation(open_tuned(trained), None, {"max_new_tokens": 4})


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_answer_out_of_nan_is_named(temperature, talk):
    """A finite alpha of 1e300 is enough: the answer was the token of the number 0, and nothing was said of it."""
    next(p for n, p in talk.tuned.model.named_parameters() if "norm" in n).data.fill_(float("nan"))
    talk.options["temperature"] = temperature
    with pytest.raises(UserError, match="computes NaN or infinity where it writes: its answer means nothing"):
        "".join(talk.ask("is the fire warm ?"))


def test_what_was_said_is_kept(talk):
    first = "".join(talk.ask("is the fire warm ?"))
    assert talk.messages == [
        {"role": "user", "content": "is the fire warm ?"},
        {"role": "assistant", "content": first},
    ]
    "".join(talk.ask("is the ice cold ?"))
    assert [message["role"] for message in talk.messages] == ["user", "assistant"] * 2
    talk.clear()
    assert talk.messages == []
    talk.begin("sea")
    "".join(talk.ask("is the ice cold ?"))
    talk.clear()
    assert talk.messages == [{"role": "system", "content": "sea"}]


def test_an_answer_that_is_stopped_ends_the_model_s_work(talk):
    import threading

    talk.options["max_new_tokens"] = 40
    before = threading.active_count()
    pieces = talk.ask("is the fire warm ?")
    next(pieces)
    pieces.close()
    assert threading.active_count() == before


def test_more_than_the_model_reads(talk):
    with pytest.raises(UserError, match=r"The conversation has \d+ tokens, but the model reads at most 64"):
        list(talk.ask("sea " * 80))
    assert talk.messages == []


def test_the_adapter_off_and_on(talk, tiny_lm):
    asked = "is the fire warm ?"
    tuned = "".join(talk.ask(asked))
    talk.clear()
    talk.switch(False)
    base = "".join(talk.ask(asked))
    assert base != tuned
    plain = Conversation(open_tuned(tiny_lm), None, {"max_new_tokens": 4})
    assert base == "".join(plain.ask(asked))
    with pytest.raises(UserError, match="has no adapter"):
        plain.switch(True)


def test_a_conversation_at_a_terminal(trained, call, monkeypatch):
    lines = iter(["is the fire warm ?", "", "/adapter off", "/adapter x", "/nothing", "/system sea", "/help", "/exit"])
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    asked = []
    monkeypatch.setattr("builtins.input", lambda prompt: asked.append(prompt) or next(lines))
    code, out, err = call("chat", trained, "--max-new-tokens", 3)
    assert code == 0, err
    assert asked[0] == "> "
    assert asked[3] == "(base) > "
    assert "Write /adapter on or /adapter off." in out
    assert "There is no /nothing." in out
    assert out.count("/exit ends") == 2


def test_the_end_of_the_input_ends_it(trained, call, monkeypatch):
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)

    def nothing(_):
        raise EOFError

    monkeypatch.setattr("builtins.input", nothing)
    assert call("chat", trained)[0] == 0


def test_one_question_needs_no_terminal(trained, call):
    code, out, err = call("chat", trained, "--once", "is the fire warm ?", "--json")
    assert code == 0, err
    answer = json.loads(out)["answer"]
    code, out, _ = call("chat", trained, "--once", "is the fire warm ?")
    assert out.strip() == answer.strip()


def test_without_a_terminal_it_says_what_to_do(trained, call, monkeypatch):
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
    code, _, err = call("chat", trained)
    assert code == 1
    assert "needs a terminal: give one question with --once TEXT" in err
    assert command.HELP
