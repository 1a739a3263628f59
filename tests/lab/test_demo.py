"""The demo from data to merged model on a tiny language model; on the real one it is slow."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from dual_lora.lab import demo
from dual_lora.lab.commands.card import duration
from dual_lora.lab.commands.demo import _card, _readable
from dual_lora.lab.data import tool_calls
from dual_lora.lab.data.tool_calls import TEST_SETS
from dual_lora.lab.errors import UserError


def tiny(model: Path) -> dict[str, Any]:
    """Sizes and overrides that run in seconds."""
    overrides = {
        "model": {"path": str(model), "dtype": "float32"},
        "train": {"steps": 2, "batch_size": 4},
        "evaluate": {"max_new_tokens": 4},
    }
    return {"examples": 20, "test_examples": 10, "overrides": overrides, "progress": False}


@pytest.fixture(scope="module")
def finished(tiny_lm, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "out"
    assert not demo.run(out, **tiny(tiny_lm)).reused
    return out


def test_everything_is_made_and_counted(finished):
    result = demo.read_result(finished)
    assert result is not None
    assert result.examples == 20
    assert {name: counts[1] for name, counts in result.exact_match["base"].items()} == dict.fromkeys(TEST_SETS, 10)
    assert result.exact_match["tuned"].keys() == set(TEST_SETS)
    assert result.merged_same == [10, 10]
    assert set(result.seconds) == {"training", "evaluation", "merging and checking"}
    assert min(result.seconds.values()) > 0
    assert 0 < result.training_memory <= result.peak_memory
    assert result.trainable_parameters > 0
    assert [row["set"] for row in result.shown] == [name for name in TEST_SETS for _ in range(demo.SHOWN)]


def test_counts_are_those_of_the_items_on_disk(finished):
    result = demo.read_result(finished)
    for name in TEST_SETS:
        answers = [json.loads(line)["messages"][-1]["content"] for line in (finished / "data" / f"{name}.jsonl").open()]
        for variant in ("base", "tuned"):
            lines = (finished / "evaluation" / variant / name / "items.jsonl").read_text().splitlines()
            predicted = [row["predicted"] for row in map(json.loads, lines) if row["variant"] == variant]
            right = sum(a == b for a, b in zip(predicted, answers, strict=True))
            assert result.exact_match[variant][name] == [right, 10]


def test_the_merged_model_is_plain(finished):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(finished / "merged")
    assert not [name for name, _ in model.named_parameters() if "lora" in name]


def test_a_second_demo_uses_what_is_there(finished, tiny_lm, monkeypatch):
    monkeypatch.setattr(demo, "_make", lambda *_: pytest.fail("made again"))
    again = demo.run(finished, **tiny(tiny_lm))
    assert again.reused
    assert again.exact_match == demo.read_result(finished).exact_match


def test_a_demo_cut_short_goes_on_without_training_again(finished, tiny_lm, tmp_path, monkeypatch):
    import shutil

    out = tmp_path / "out"
    shutil.copytree(finished, out)
    (out / "demo.json").unlink()
    shutil.rmtree(out / "merged")
    monkeypatch.setattr("dual_lora.lab.run.train._train", lambda *_: pytest.fail("trained again"))
    # The copy lies elsewhere: its recipe still names the first folder's data, as an interrupted run's own would.
    recipe = (out / "run" / "recipe.yaml").read_text().replace(str(finished), str(out))
    (out / "run" / "recipe.yaml").write_text(recipe)
    result = demo.run(out, **tiny(tiny_lm))
    assert result.exact_match == demo.read_result(finished).exact_match
    assert result.merged_same == [10, 10]


def test_another_seed_in_the_same_folder_is_refused(finished, tiny_lm):
    before = (finished / "demo.json").read_text()
    with pytest.raises(UserError, match=r"'seed': 0.* not .*'seed': 1.*--out, or --overwrite"):
        demo.run(finished, seed=1, **tiny(tiny_lm))
    assert (finished / "demo.json").read_text() == before


def test_a_folder_of_something_else_is_left_alone(tmp_path, tiny_lm):
    (tmp_path / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="not empty and holds no demo"):
            demo.run(tmp_path, overwrite=overwrite, **tiny(tiny_lm))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_overwrite_removes_the_demo_and_nothing_else(finished, tmp_path, tiny_lm, monkeypatch):
    import shutil

    out = tmp_path / "out"
    shutil.copytree(finished, out)
    (out / "merged/notes.txt").write_text("mine")
    before = sorted(out.rglob("*"))
    with pytest.raises(UserError, match=r"merged/notes\.txt(.|\n)*Nothing was removed"):
        demo.run(out, overwrite=True, **tiny(tiny_lm))
    with pytest.raises(UserError, match=r"give another --out\.$"):  # which would not be overwritten
        demo.run(out, seed=1, **tiny(tiny_lm))
    assert sorted(out.rglob("*")) == before
    (out / "merged/notes.txt").unlink()
    monkeypatch.setattr(demo, "_make", lambda out, *_: sorted(path.name for path in out.iterdir()))
    assert demo.run(out, overwrite=True, **tiny(tiny_lm)) == ["data", "settings.json"]


def test_a_demo_cut_short_before_its_data_goes_on(tmp_path, tiny_lm, monkeypatch):
    class Killed(Exception):
        pass

    def killed(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(tool_calls, "copy_to", killed)
        with pytest.raises(Killed):
            demo.run(tmp_path / "out", **tiny(tiny_lm))
    monkeypatch.setattr(demo, "_make", lambda out, *_: sorted(path.name for path in out.iterdir()))
    assert demo.run(tmp_path / "out", **tiny(tiny_lm)) == ["data", "settings.json"]


def test_an_interrupted_training_says_how_to_go_on(tmp_path, tiny_lm, monkeypatch):
    from dual_lora.lab.run import train

    class Stopped:
        state, seconds, stopped_by = "interrupted", 1.0, 2

    monkeypatch.setattr(train, "run", lambda *_, **__: Stopped())
    with pytest.raises(KeyboardInterrupt, match="same command goes on"):
        demo.run(tmp_path / "out", **tiny(tiny_lm))
    assert demo.read_result(tmp_path / "out") is None


def test_a_request_of_ones_own_is_answered_by_the_merged_model(finished):
    from dual_lora.lab.model.opened import open_tuned

    answer = demo.ask(finished, "the sky is ?")
    model = open_tuned(str(finished / "merged"))
    prompt = [*tool_calls.messages_for("the sky is ?")]
    ids = model.tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    new = model.model.generate(**ids, do_sample=False, max_new_tokens=4)[0, ids["input_ids"].shape[1] :]
    assert answer == model.tokenizer.decode(new, skip_special_tokens=True).strip()


def test_questions_that_cannot_be_answered(finished, tmp_path):
    with pytest.raises(UserError, match=r"no finished demo in .*`dual-lora demo` makes one"):
        demo.ask(tmp_path, "anything")
    with pytest.raises(UserError, match="request is empty"):
        demo.ask(finished, "  ")


def test_a_record_of_another_version_is_named(tmp_path):
    (tmp_path / "settings.json").write_text('{"seed": 0, "examples": 20, "test_examples": 10}')
    for text in ('{"folder": "x", "colour": "red"}', '{"folder":'):
        (tmp_path / "demo.json").write_text(text)
        with pytest.raises(UserError, match=r"demo\.json is damaged or of another version.*--overwrite"):
            demo.read_result(tmp_path)


def test_an_answer_is_shown_in_lines_if_it_is_json():
    assert _readable('{"name": "x", "arguments": {}}').startswith('{\n  "name": "x"')
    assert _readable("Sure!") == "Sure!"


def test_the_card_shows_what_was_measured(finished):
    result = demo.read_result(finished)
    result.exact_match["tuned"]["values"] = [9, 10]
    result.reused = True
    result.shown[0] |= {"before": "[bold]Sure[/bold]", "after": "right", "expected": "right"}
    screen = Console(file=io.StringIO(), width=160)
    screen.print(_card(result))
    text = screen.file.getvalue()
    for part in (
        "9/10 = 90%",
        "[bold]Sure[/bold]",
        "right ✓",
        "10 of 10 answers",
        "20 examples, seed 0",
        "--overwrite",
    ):
        assert part in text, text
    assert f"{result.trainable_parameters:,} trained" in text


def test_no_duration_of_sixty_seconds():
    assert [duration(s) for s in (59.94, 59.96, 119.8, 3599.7)] == ["59.9 s", "1 min 0 s", "2 min 0 s", "1 h 0 min"]


def test_the_base_is_asked_less_than_the_tuned_model(finished, tiny_lm, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "BASE_EXAMPLES", 3)
    result = demo.run(tmp_path / "out", **tiny(tiny_lm))
    assert {name: count for name, (_, count) in result.exact_match["base"].items()} == dict.fromkeys(TEST_SETS, 3)
    assert result.exact_match["tuned"] == demo.read_result(finished).exact_match["tuned"]
    assert result.merged_same == [3, 3]


def test_the_demo_keeps_the_precision_that_its_run_chose(tiny_lm, tmp_path, monkeypatch):
    """`auto` is settled once: evaluation and merged model have what training had, whatever is faster by then."""
    from safetensors import safe_open

    from dual_lora.lab.model import precision
    from dual_lora.lab.model.opened import open_tuned

    options = tiny(tiny_lm)
    options["overrides"]["model"]["dtype"] = "auto"
    monkeypatch.setattr(precision, "fast_precision", lambda *_: precision.Fast("bf16", "stub"))
    demo.run(tmp_path / "out", **options)
    monkeypatch.setattr(precision, "fast_precision", lambda *_: precision.Fast("fp32", "stub"))
    (weights,) = (tmp_path / "out" / "merged").glob("*.safetensors")
    with safe_open(weights, "pt") as file:
        assert {str(file.get_tensor(name).dtype) for name in file.keys()} == {"torch.bfloat16"}  # noqa: SIM118
    assert open_tuned(tmp_path / "out" / "run").model.base_model.model.dtype == torch.bfloat16


def names_a_known_tool(answer: str) -> bool:
    """Whether an answer is a JSON call of one of the tools, with exactly its arguments."""
    try:
        call = json.loads(answer)
    except json.JSONDecodeError:
        return False
    calls = [json.loads(answer["content"]) for _, _, answer in tool_calls.chats("train")]
    arguments = {known["name"]: set(known["arguments"]) for known in calls}
    return isinstance(call, dict) and set(call.get("arguments") or {}) == arguments.get(call.get("name"))


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.model
@pytest.mark.timeout(1800)
def test_the_real_model_learns_in_a_few_steps(tmp_path):
    """Twenty steps teach the form of a call: the right tool's arguments by their names, which no luck writes."""
    pytest.importorskip("gguf")
    shorter = {"train": {"steps": 20, "batch_size": 4}}
    result = demo.run(tmp_path / "out", examples=80, test_examples=6, overrides=shorter, progress=False)
    assert all(right == 0 for right, _ in result.exact_match["base"].values())
    answers = {}
    for variant in ("base", "tuned"):
        lines = [
            line
            for name in TEST_SETS
            for line in (tmp_path / "out" / "evaluation" / variant / name / "items.jsonl").read_text().splitlines()
        ]
        answers[variant] = [names_a_known_tool(json.loads(line)["predicted"]) for line in lines]
    assert sum(answers["base"]) == 0
    assert sum(answers["tuned"]) >= len(answers["tuned"]) / 3
    assert result.merged_same == [6, 6]


def test_the_card_names_a_command_that_can_be_typed(monkeypatch):
    """`make demo` runs .venv/bin/dual-lora with no environment active."""
    from dual_lora.lab.commands import demo as command

    monkeypatch.setattr("sys.argv", [".venv/bin/dual-lora", "demo"])
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert command._command_name() == ".venv/bin/dual-lora"
    monkeypatch.setattr("shutil.which", lambda name: f"/bin/{name}")
    assert command._command_name() == "dual-lora"
