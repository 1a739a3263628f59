"""A served adapter is judged over HTTP: by servers that echo prompts and by those that do not."""

import contextlib
import json
import shutil
import socket
import threading

import faulty
import pytest
from tiny_server import served

from dual_lora.lab.errors import UserError
from dual_lora.lab.model.opened import open_tuned
from dual_lora.lab.verify import prompts
from dual_lora.lab.verify.endpoint import Endpoint
from dual_lora.lab.verify.guesses import strengths
from dual_lora.lab.verify.logprobs import Probe
from dual_lora.lab.verify.verify import verify

KINDS = ["vllm", "llama.cpp"]
COLOURS = ("red", "blue", "cold", "good", "bad", "true", "false", "warm")


@pytest.fixture(scope="module")
def run_folder(tiny_values, tmp_path_factory):
    return faulty.trained(tmp_path_factory.mktemp("runs") / "dual", tiny_values, "dual_lora")


@pytest.fixture(scope="module")
def tuned(run_folder):
    return open_tuned(run_folder)


def judged(run_folder, url, **more):
    return verify(run_folder, endpoint=url, model="mine", **more)


@pytest.mark.parametrize("kind", KINDS)
def test_right_server_by_the_fingerprint_alone(kind, run_folder, tuned, tmp_path):
    """Neither data nor base is needed: the adapter's folder lies alone, and its base's name leads nowhere."""
    alone = tmp_path / "alone"
    shutil.copytree(run_folder / "adapter", alone)
    faulty.with_config(alone, base_model_name_or_path="/nowhere")
    (alone / "lab.json").unlink()
    with served(tuned.model, tuned.tokenizer, kind) as (url, asked):
        report = judged(alone, url)
    assert report.finding.word == "on", report.summary()
    assert report.prompts == "the fingerprint's"
    assert {path for path, _, _ in asked} <= {"/v1/completions", "/v1/chat/completions"}


STRENGTHS = [(0.0, "off"), (2.0, "merged twice"), (0.5, "λ below 1"), (1.5, "other scale"), (3.0, "other scale")]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("strength", "word", "own"), [*((*each, False) for each in STRENGTHS), (2.0, "merged twice", True)]
)
def test_wrong_strengths(kind, strength, word, own, run_folder, tuned, questions):
    """own: the user's prompts, which take the base here; how a strength is told does not depend on the prompts."""
    prompts = str(questions / "test.json") if own else None
    with strengths(tuned.model, lambda _: strength), served(tuned.model, tuned.tokenizer, kind) as (url, _):
        report = judged(run_folder, url, prompts=prompts)
    assert report.finding.word == word, report.summary()
    assert not any("template" in note for note in report.notes), "other weights begin other answers"


@pytest.mark.parametrize("kind", KINDS)
def test_lost_layers(kind, run_folder, tuned):
    lost = lambda name: 0.0 if ".layers.0." in name else 1.0  # noqa: E731
    with strengths(tuned.model, lost), served(tuned.model, tuned.tokenizer, kind) as (url, _):
        report = judged(run_folder, url)
    assert report.finding.word == "layers dropped", report.summary()


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_template(kind, run_folder, tuned):
    other = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    with served(tuned.model, tuned.tokenizer, kind, template=other) as (url, _):
        report = judged(run_folder, url)
    assert report.finding.word == "wrong chat template", report.summary()


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_that_was_cut_is_no_conversation(kind, run_folder, tuned, tmp_path, monkeypatch):
    """The server counts the tokens of the whole conversation, of which only the end was asked."""
    monkeypatch.setattr(prompts, "LONGEST", prompts.CONTINUED + 8)
    (tmp_path / "long.txt").write_text("".join(f"is the {colour} sky " + "warm " * 9 + "?\n" for colour in COLOURS))
    with served(tuned.model, tuned.tokenizer, kind) as (url, _):
        report = judged(run_folder, url, prompts=str(tmp_path / "long.txt"))
    assert report.finding.word == "on", report.summary()
    assert any("no chat template was checked" in note for note in report.notes)


def test_other_tokenizer(run_folder, tuned, tmp_path, tiny_lm):
    shutil.copytree(tiny_lm, tmp_path / "other")
    file = tmp_path / "other/tokenizer.json"
    saved = json.loads(file.read_text())
    names = list(saved["model"]["vocab"])
    saved["model"]["vocab"] = {name: i for i, name in enumerate([*names[:4], *reversed(names[4:])])}
    file.write_text(json.dumps(saved))
    from transformers import AutoTokenizer

    with served(tuned.model, AutoTokenizer.from_pretrained(tmp_path / "other"), "vllm") as (url, _):
        report = judged(run_folder, url)
    assert report.finding.word == "other tokenizer", report.summary()


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ((200, {}, b"<html>"), "did not answer in JSON"),
        ((200, {}, b"[" * 100000), "did not answer in JSON"),
        ((200, {}, b'{"choices": []}'), "gives no log-probabilities"),
        ((302, {"Location": "http://127.0.0.1:9/"}, b""), "another address"),
        ((500, {}, b'{"error": {"message": "out of \\u001b[31mmemory"}}'), "out of  [31mmemory"),
        ((400, {}, b'{"detail": "Unsupported fields: logprobs"}'), "Unsupported fields: logprobs"),
        ((401, {}, b""), "DUAL_LORA_API_KEY"),
    ],
)
def test_bad_servers_get_one_sentence(answer, said, run_folder, tuned):
    with served(tuned.model, tuned.tokenizer, answer=answer) as (url, _), pytest.raises(UserError) as caught:
        judged(run_folder, url)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize("every", [False, True])
def test_a_part_of_a_character_comes_without_logprobs(every, monkeypatch):
    """llama.cpp's server holds it back until the rest is there: a server of Chinese or of emojis is no broken one."""
    entry = {"token": "a", "logprob": -1.0}
    whole = {"logprobs": {"content": [{**entry, "top_logprobs": [entry]}]}}
    part = {"text": "\ufffd", "logprobs": None}
    server = Endpoint("http://127.0.0.1:9/v1", "mine")
    told = lambda path, body: {"choices": [part if every or len(body["prompt"]) == 2 else whole]}  # noqa: E731
    monkeypatch.setattr(server, "_post", told)
    probes = [Probe((5, 6, 7, 8), (1, 2, 3))]
    if every:
        with pytest.raises(UserError, match="gives no log-probabilities"):
            server.score(probes, dict.fromkeys(range(9), "a"))
    else:
        answer = server.score(probes, dict.fromkeys(range(9), "a"))
        assert (answer.kept, answer.found.tolist()) == ([0, 2], [-1.0, -1.0])


def test_a_number_without_end_is_no_logprob(run_folder, tuned):
    told = {"tokens": ["a"], "token_logprobs": [None], "top_logprobs": [{"a": -(10**400)}]}
    answer = (200, {}, json.dumps({"choices": [{"logprobs": told}]}).encode())
    with served(tuned.model, tuned.tokenizer, answer=answer) as (url, _), pytest.raises(UserError) as caught:
        judged(run_folder, url)
    assert "gives no log-probabilities" in str(caught.value)


def test_a_server_that_answers_byte_by_byte_is_not_waited_for(run_folder):
    """Each byte comes within the time, the answer never does."""
    end = threading.Event()

    def drip(connection):
        while not end.wait(0.1):
            with contextlib.suppress(OSError):
                connection.send(b"H")

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=lambda: drip(server.accept()[0]), daemon=True).start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}/v1"
        with pytest.raises(UserError, match="did not answer within 1 s"):
            judged(run_folder, url, timeout=1.0)
        end.set()


def test_no_server_no_logprobs_no_model(run_folder, tuned):
    with pytest.raises(UserError, match="cannot be reached"):
        judged(run_folder, "http://127.0.0.1:9/v1")
    with served(tuned.model, tuned.tokenizer, "plain") as (url, _):
        with pytest.raises(UserError, match="gives no log-probabilities"):
            judged(run_folder, url)
        with pytest.raises(UserError, match="no model 'other'"):
            verify(run_folder, endpoint=url, model="other")
    for wrong in ("localhost:8000", "file:///etc/passwd", "http://me:secret@localhost/v1", "http://localhost/v1?x=1"):
        with pytest.raises(UserError) as caught:
            judged(run_folder, wrong)
        assert "secret" not in str(caught.value)
    with pytest.raises(UserError, match="needs --model"):
        verify(run_folder, endpoint="http://127.0.0.1:9/v1")


def test_the_token_comes_from_the_environment_and_is_never_shown(run_folder, tuned, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-hidden")
    with served(tuned.model, tuned.tokenizer, token="sk-hidden") as (url, asked):
        report = judged(run_folder, url)
    assert report.finding.word == "on"
    assert asked[0][2]["Authorization"] == "Bearer sk-hidden"
    assert "sk-hidden" not in json.dumps(report.summary())
    with served(tuned.model, tuned.tokenizer, token="another") as (url, _), pytest.raises(UserError) as caught:
        judged(run_folder, url)
    assert "sk-hidden" not in str(caught.value)
