"""A chat template that has no end is ended, and leaves the process's timer as it was."""

import signal
import threading

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from dual_lora.verify import template, time_limit
from dual_lora.verify.callback import end_tokens

LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{{ b }}{% endfor %}{% endfor %}"
TALK = [{"role": "user", "content": "x"}]


def tokenizer(text):
    made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"x": 0, "</s>": 1}, unk_token="x")))
    made.chat_template, made.eos_token = text, "</s>"
    return made


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="Windows has no such timer")
@pytest.mark.parametrize("text", ["{{ 9**(9**9) }}", "{{ (messages|length + 8)**(9**9) }}", LOOP])
def test_a_template_without_end_is_ended(text, monkeypatch):
    monkeypatch.setattr(template, "SECONDS", 0.1)
    monkeypatch.setattr(time_limit, "AGAIN", 0.1)
    before = signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL)[0] > 0
    with pytest.raises(TimeoutError, match="takes longer than"):
        template.rendered(tokenizer(text), TALK)
    assert end_tokens(tokenizer(text)) == {1}
    assert (signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL)[0] > 0) == before


def test_a_text_without_end_reaches_no_tokenizer():
    with pytest.raises(ValueError, match="makes 30,000,000 characters of one conversation"):
        template.rendered(tokenizer("{{ 'a' * 30000000 }}"), TALK)


def test_a_plain_one_is_written_everywhere():
    said = []
    thread = threading.Thread(
        target=lambda: said.append(template.rendered(tokenizer("a{{ messages[0].content }}"), TALK))
    )
    thread.start()
    thread.join()
    assert said == ["ax"] == [template.rendered(tokenizer("a{{ messages[0].content }}"), TALK)]
