"""A chat template that has no end is ended, and leaves the process's timer as it was."""

import os
import signal
import subprocess
import sys
import threading
import time

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
    profiled = signal.getitimer(signal.ITIMER_PROF)
    with pytest.raises(TimeoutError, match="takes longer than"):
        template.rendered(tokenizer(text), TALK)
    assert end_tokens(tokenizer(text)) == {1}
    assert (signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL)[0] > 0) == before
    assert signal.getitimer(signal.ITIMER_PROF) == profiled


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="Windows has no such timer")
def test_a_slow_template_has_one_time_for_all_conversations(monkeypatch):
    """A thousand conversations of 59 s each would have no end that anybody sees."""
    monkeypatch.setattr(template, "SECONDS", 1.0)
    monkeypatch.setattr(template, "EACH", 0.001)
    slow = tokenizer("{% for a in range(30) %}{% for b in range(9999) %}{% endfor %}{% endfor %}")
    began = time.monotonic()
    with pytest.raises(TimeoutError, match="or for several together"):
        _ = [template.rendered(slow, TALK) for _ in range(1000)]
    assert time.monotonic() - began < 10
    assert template.rendered(tokenizer("x"), TALK) == "x"  # another one has its own


STUCK = """
{% set lists = namespace(a=[1], b=[1]) %}
{% for _ in range(60) %}{% set lists.a, lists.b = [lists.a, lists.a], [lists.b, lists.b] %}{% endfor %}
{{ lists.a == lists.b }}"""


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="Windows has no such timer")
def test_a_template_that_heeds_no_signal_ends_with_the_process():
    """To compare two lists of lists is one operation, and no signal's function runs before its end."""
    code = f"""
import sys
sys.path.insert(0, {os.path.dirname(__file__)!r})
from test_template import STUCK, TALK, template, time_limit, tokenizer
template.rendered(tokenizer("x"), TALK)  # the first one imports: on a slow machine for longer than the limit below
template.SECONDS, time_limit.STUCK = 0.5, 0.5
template.rendered(tokenizer("x"), TALK)
template.rendered(tokenizer(STUCK), TALK)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == -signal.SIGPROF
    assert "in rendered" in done.stderr


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
