"""Training: the run folder is complete, a resumed run is the same run, failures lose nothing."""

import errno
import json
import os
import shutil
import signal
import warnings
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from processes import forked_together
from safetensors.torch import load_file, save_file
from tiny_study import die, in_child
from transformers import AutoTokenizer, LlamaConfig, RobertaConfig, RobertaModel

from dual_lora.lab.errors import UserError
from dual_lora.lab.files.folder import WHOLE, RunFolder
from dual_lora.lab.recipe.read import build_recipe, read_recipe
from dual_lora.lab.run import keep
from dual_lora.lab.run import train as training
from dual_lora.lab.run.evaluate import evaluate
from dual_lora.lab.run.train import run
from dual_lora.lab.run.watch import Watch


def adapter_of(folder):
    return load_file(next((folder / "adapter").glob("*.safetensors")))


def assert_same_adapter(one, other):
    one, other = adapter_of(one), adapter_of(other)
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def test_run_folder_is_complete(lm_values, tmp_path):
    result = run(build_recipe(lm_values), tmp_path / "run", progress=False)
    assert result.state == "finished"
    assert result.steps == 6
    record = json.loads((tmp_path / "run/record.json").read_text())
    assert record["versions"]["torch"] == torch.__version__
    assert record["seed"] == 0
    assert record["result"]["trainable_parameters"] == result.trainable_parameters > 0
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert lines[-1]["tokens"] == result.tokens
    assert build_recipe(yaml.safe_load((tmp_path / "run/recipe.yaml").read_text())).train.steps == 6
    checkpoints = [p.name for p in (tmp_path / "run/checkpoints").iterdir()]
    assert checkpoints == ["checkpoint-6"]
    assert not list((tmp_path / "run/adapter").glob("*.bin"))


def test_same_seed_same_adapter_other_seed_other_adapter(lm_values, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        lm_values["train"]["seed"] = seed
        run(build_recipe(lm_values), tmp_path / name, progress=False)
    assert_same_adapter(tmp_path / "a", tmp_path / "b")
    with pytest.raises(AssertionError):
        assert_same_adapter(tmp_path / "a", tmp_path / "c")


def straight_and_stopped(recipe, folder, monkeypatch):
    """The run whole, and the same stopped in its fifth step, each in a folder of that name."""
    run(recipe, folder / "straight", progress=False)
    with monkeypatch.context() as patch:
        stop_after(5, patch)
        with pytest.raises(Stopped):
            run(recipe, folder / "stopped", progress=False)


@pytest.mark.parametrize("method", ["dual_lora", "dora", "full"])
def test_resume_equals_no_stop_for(method, lm_values, tmp_path, monkeypatch, capsys):
    """Stopped in the fifth of eight steps; the fourth, which the metrics know already, is past the checkpoint."""
    lm_values["method"] = {"name": method} if method == "full" else {"name": method, "r": 4}
    lm_values["train"] |= {"steps": 8, "accumulate": 2, "checkpoint_every": 3}
    recipe = build_recipe(lm_values)
    straight_and_stopped(recipe, tmp_path, monkeypatch)
    run(recipe, tmp_path / "stopped", resume=True)
    assert "Continuing from step 3 of 8." in capsys.readouterr().err
    if method == "full":
        one, other = (load_file(tmp_path / f / "model/model.safetensors") for f in ("straight", "stopped"))
        assert all(torch.equal(one[k], other[k]) for k in one)
    else:
        assert_same_adapter(tmp_path / "straight", tmp_path / "stopped")

    def metrics(folder):
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [(line["step"], line["loss"], line["tokens"]) for line in lines]

    assert metrics(tmp_path / "straight") == metrics(tmp_path / "stopped")


def test_a_run_s_recipe_is_the_one_that_its_last_session_had(lm_values, tmp_path, monkeypatch):
    """As its record and the adapter's note: `--resume` takes another evaluation and, on more devices, fewer rows."""
    from dual_lora.lab.model.opened import open_tuned
    from dual_lora.lab.recipe.read import read_recipe

    lm_values["train"] |= {"steps": 6, "checkpoint_every": 2}
    with monkeypatch.context() as patch:
        stop_after(3, patch)
        with pytest.raises(Stopped):
            run(build_recipe(lm_values), tmp_path / "run", progress=False)
    lm_values["evaluate"] = {"tasks": ["choice"], "batch_size": 3}
    run(build_recipe(lm_values), tmp_path / "run", resume=True, progress=False)
    kept = read_recipe(tmp_path / "run")
    assert kept.evaluate.tasks == ["choice"]
    assert kept == open_tuned(tmp_path / "run").recipe


def test_a_line_of_metrics_is_the_mean_of_all_its_steps_after_a_stop_too(lm_values, tmp_path, monkeypatch):
    """Lines at 4, 8 and 9, checkpoints at 3 and 6, stopped after 5: the steps before a checkpoint count in the line
    that comes after it."""
    lm_values["train"] |= {"steps": 9, "log_every": 4, "checkpoint_every": 3}
    recipe = build_recipe(lm_values)
    straight_and_stopped(recipe, tmp_path, monkeypatch)
    with monkeypatch.context() as patch:
        stop_after(7, patch)
        with pytest.raises(Stopped):
            run(recipe, tmp_path / "stopped", resume=True, progress=False)
    run(recipe, tmp_path / "stopped", resume=True, progress=False)
    one, other = (
        [json.loads(line) for line in (tmp_path / folder / "metrics.jsonl").read_text().splitlines()]
        for folder in ("straight", "stopped")
    )
    assert [line["step"] for line in one] == [line["step"] for line in other] == [4, 8, 9]
    assert [line["loss"] for line in one] == pytest.approx([line["loss"] for line in other], rel=1e-6)


def test_a_start_from_gradients_is_saved_as_a_change_of_the_untouched_base(lm_values, tmp_path):
    """LoRA-GA's start sits in the base weights as well; the saved adapter has to fit the base that everybody has."""
    from dual_lora.lab.model.opened import open_tuned

    lm_values["method"] = {"name": "lora_ga", "r": 4}
    trained = run(build_recipe(lm_values), tmp_path / "run", progress=False).tuned
    opened = open_tuned(tmp_path / "run")
    assert opened.model.peft_config["default"].r == 8
    tokens = torch.arange(6)[None]
    with torch.no_grad():
        one, other = (t.model(input_ids=tokens).logits for t in (trained, opened))
        with opened.model.disable_adapter():
            untouched = opened.model(input_ids=tokens).logits
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert (other - untouched).abs().max() > 1e-3


class Stopped(Exception):
    pass


def stop_after(step, patch):
    from dual_lora.lab.run.watch import Watch

    original = Watch.on_step_end

    def on_step_end(self, args, state, control, **more):
        original(self, args, state, control, **more)
        if state.global_step == step:
            raise Stopped

    patch.setattr(Watch, "on_step_end", on_step_end)


def killed(values, out, where, step):
    """Train in a fork of this process, which SIGKILL ends at that point; returns its exit code."""

    def train():
        if where == "step":
            original = Watch.on_step_end

            def on_step_end(self, args, state, control, **more):
                original(self, args, state, control, **more)
                if state.global_step == step:
                    die()

            Watch.on_step_end = on_step_end
        if where == "save":
            saves = transformers.Trainer._save_rng_state

            def save(self, folder):
                if folder.endswith(f"-{step}"):
                    Path(folder, "scheduler.pt").write_bytes(b"")
                    die()
                saves(self, folder)

            transformers.Trainer._save_rng_state = save
        if where == "adapter":
            keep.write_note = lambda *_: die()
        run(build_recipe(values), out, progress=False)

    return in_child(train)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(("where", "step"), [("step", 1), ("step", 5), ("save", 4), ("adapter", 0)])
def test_sigkill_loses_nothing(where, step, lm_values, tmp_path):
    """Killed before the first checkpoint, between two, in the middle of writing one, and of writing the adapter."""
    out = tmp_path / "killed"
    assert killed(lm_values, out, where, step) == -signal.SIGKILL
    if where == "save":
        assert (out / "checkpoints/checkpoint-4/optimizer.pt").is_file()
    assert not (out / "adapter").exists()
    run(build_recipe(lm_values), out, resume=True, progress=False)
    run(build_recipe(lm_values), tmp_path / "straight", progress=False)
    assert_same_adapter(tmp_path / "straight", out)


def test_a_checkpoint_without_all_its_bytes_is_passed_over(lm_values, tmp_path, monkeypatch):
    lm_values["train"]["keep_checkpoints"] = 3
    with monkeypatch.context() as patch:
        stop_after(5, patch)
        with pytest.raises(Stopped):
            run(build_recipe(lm_values), tmp_path / "run", progress=False)
    folder = RunFolder(tmp_path / "run")
    cut = folder.checkpoints / "checkpoint-4/optimizer.pt"
    cut.write_bytes(cut.read_bytes()[:-10])
    (folder.checkpoints / "checkpoint-5").mkdir()
    assert folder.last_checkpoint() == (2, folder.checkpoints / "checkpoint-2")
    assert sorted(p.name for p in folder.checkpoints.iterdir()) == ["checkpoint-2", "checkpoint-4", "checkpoint-5"]
    assert (folder.checkpoints / "checkpoint-2" / WHOLE).is_file()


def test_output_folder_is_never_overwritten_unasked(lm_values, tmp_path, capsys):
    recipe = build_recipe(lm_values)
    run(recipe, tmp_path / "run", progress=False)
    before = (tmp_path / "run/record.json").read_bytes()
    with pytest.raises(UserError, match=r"not empty.*--resume.*--overwrite"):
        run(recipe, tmp_path / "run", progress=False)
    assert run(recipe, tmp_path / "run", resume=True).state == "finished"
    assert "nothing was trained now" in " ".join(capsys.readouterr().err.split())
    assert (tmp_path / "run/record.json").read_bytes() == before
    run(recipe, tmp_path / "run", overwrite=True, progress=False)
    assert (tmp_path / "run/record.json").read_bytes() != before


@pytest.mark.parametrize("text", [None, "", "{", '{"state": "finished"}', '{"state": "finished", "result": {"x": 1}}'])
def test_a_finished_run_whose_record_is_damaged_is_not_trained_anew(text, lm_values, tmp_path):
    recipe, out = build_recipe(lm_values), tmp_path / "run"
    run(recipe, out, progress=False)
    weights = (out / "adapter/adapter_model.safetensors").stat()
    (out / "record.json").unlink()
    if text is not None:
        (out / "record.json").write_text(text)
    with pytest.raises(UserError, match=r"record .* cannot be read .*--overwrite"):
        run(recipe, out, resume=True, progress=False)
    assert (out / "adapter/adapter_model.safetensors").stat() == weights
    assert (out / "record.json").is_file() == (text is not None)


def test_what_a_kill_before_the_recipe_leaves_is_no_obstacle(lm_values, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/recipe.yaml.part").write_text("name: r")
    assert run(build_recipe(lm_values), tmp_path / "run", resume=True, progress=False).state == "finished"


def test_overwrite_refuses_a_folder_that_is_no_run(lm_values, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter.txt").write_text("ten years")
    with pytest.raises(UserError, match="is not a run"):
        run(build_recipe(lm_values), tmp_path / "thesis", overwrite=True, progress=False)
    assert (tmp_path / "thesis/chapter.txt").read_text() == "ten years"


def test_folder_in_use_is_refused(lm_values, tmp_path):
    held = RunFolder(tmp_path / "run")
    held.open(resume=False, overwrite=False)
    with pytest.raises(UserError, match="in use by another run"):
        run(build_recipe(lm_values), tmp_path / "run", progress=False)
    held.close()
    run(build_recipe(lm_values), tmp_path / "run", progress=False)


def test_resume_with_another_recipe_names_what_changed(lm_values, tmp_path):
    run(build_recipe(lm_values), tmp_path / "run", progress=False)
    lm_values["train"]["learning_rate"] = 0.5
    lm_values["method"]["r"] = 8
    with pytest.raises(UserError, match=r"other values of method\.r, train\.learning_rate"):
        run(build_recipe(lm_values), tmp_path / "run", resume=True, progress=False)


def test_resume_on_another_number_of_processes_says_what_fits(lm_values, tmp_path):
    """Half as many examples at once would be another run, of other examples."""
    out = tmp_path / "run"
    run(build_recipe(lm_values), out, progress=False)
    record = json.loads((out / "record.json").read_text())
    assert (record["processes"], record["rows_at_once"]) == (1, 4)
    record = {**record, "state": "running", "processes": 2, "rows_at_once": 8}
    (out / "record.json").write_text(json.dumps(record))
    with pytest.raises(
        UserError, match=r"took 8 examples at once, on 2 process(.|\n)*Resume it with --train\.batch-size 8"
    ):
        run(build_recipe(lm_values), out, resume=True, progress=False)
    lm_values["train"]["batch_size"] = 8
    assert run(build_recipe(lm_values), out, resume=True, progress=False).state == "finished"


def test_nan_loss_stops_and_keeps_the_last_good_checkpoint(lm_values, tmp_path, monkeypatch):
    from dual_lora.lab.run import loop

    original = loop._Loss.__call__
    calls = []

    def poisoned(self, *args, **more):
        calls.append(1)
        return original(self, *args, **more) * (float("nan") if len(calls) == 5 else 1)

    with monkeypatch.context() as patch:
        patch.setattr(loop._Loss, "__call__", lambda self, *a, **k: _poison(self, poisoned, *a, **k))
        with pytest.raises(UserError, match=r"loss became nan at step 5\..*checkpoint-4.*--resume"):
            run(build_recipe(lm_values), tmp_path / "run", progress=False)
    assert not (tmp_path / "run/adapter").exists()
    run(build_recipe(lm_values), tmp_path / "run", resume=True, progress=False)
    run(build_recipe(lm_values), tmp_path / "straight", progress=False)
    assert_same_adapter(tmp_path / "straight", tmp_path / "run")


def _poison(loss, poisoned, *args, **more):
    value = poisoned(loss, *args, **more)
    loss.watch.losses[-1] = value.detach()
    return value


def test_full_disk_is_one_sentence_and_can_be_resumed(lm_values, tmp_path, monkeypatch):
    import transformers

    original = transformers.Trainer._save_optimizer_and_scheduler

    def full(self, folder):
        if folder.endswith("-4"):
            raise OSError(errno.ENOSPC, "No space left on device")
        original(self, folder)

    with monkeypatch.context() as patch:
        patch.setattr(transformers.Trainer, "_save_optimizer_and_scheduler", full)
        with pytest.raises(UserError, match=r"disk is full.*checkpoint-2.*--resume"):
            run(build_recipe(lm_values), tmp_path / "run", progress=False)
    run(build_recipe(lm_values), tmp_path / "run", resume=True, progress=False)
    run(build_recipe(lm_values), tmp_path / "straight", progress=False)
    assert_same_adapter(tmp_path / "straight", tmp_path / "run")


def test_the_record_says_why_a_run_stopped(lm_values, tmp_path, monkeypatch):
    """torch.save reports a full disk by a RuntimeError of its own, seen on a full tmpfs."""
    import transformers

    def full(self, folder):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 26176 vs 26064")

    monkeypatch.setattr(transformers.Trainer, "_save_optimizer_and_scheduler", full)
    with pytest.raises(UserError, match=r"disk is full.*no checkpoint yet"):
        run(build_recipe(lm_values), tmp_path / "run", progress=False)
    record = json.loads((tmp_path / "run/record.json").read_text())
    assert record["state"] == "stopped"
    assert "disk is full" in record["error"]


@pytest.mark.slow
def test_two_processes_train_what_one_trains(lm_values, tmp_path, write_recipe):
    lm_values["method"] = {"name": "dual_lora", "r": 4}
    lm_values["data"] |= {"holdout": 11, "overlap": 48}
    lm_values["train"] |= {"batch_size": 4, "validate_every": 3}
    alone = run(build_recipe(lm_values), tmp_path / "one", progress=False)
    lm_values["train"] |= {"batch_size": 2}
    first, second = forked_together(["train", write_recipe(lm_values), "--out", tmp_path / "two", "--json"], tmp_path)
    (printed, _), (nothing, _) = said = first.communicate(), second.communicate()
    assert first.returncode == second.returncode == 0, said
    assert nothing == "", "only the first process speaks"
    both = json.loads(printed)
    assert both["state"] == "finished"
    assert both["validation_loss"] == pytest.approx(alone.validation_loss, rel=1e-4), "11 rows in batches of 2 x 5"
    one, two = adapter_of(tmp_path / "one"), adapter_of(tmp_path / "two")
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=1e-4, rtol=1e-3)


def test_examples_that_are_too_long_are_counted(lm_values, tmp_path, questions):
    records = json.loads((questions / "train.json").read_text())
    records[3]["instruction"] = "sea " * 60
    data = tmp_path / "long.json"
    data.write_text(json.dumps(records))
    lm_values["data"] |= {"train": str(data), "max_length": 40}
    lm_values["train"]["steps"] = 1
    assert run(build_recipe(lm_values), tmp_path / "run", progress=False).left_out == 1
    lm_values["data"]["max_length"] = 5
    with pytest.raises(UserError, match=r"All 48 examples are longer than data\.max_length = 5"):
        run(build_recipe(lm_values), tmp_path / "other", progress=False)
    assert not (tmp_path / "other").exists()


def test_ramp_is_a_tenth_of_the_steps_when_left_out():
    from dual_lora.lab.model.methods import method_config

    paper = {"name": "dual_lora", "r": 4, "init_weights": "paper"}
    assert method_config({"name": "dual_lora", "r": 4}, "causal", 200, []).warmup_steps is None
    assert method_config(paper, "causal", 200, []).warmup_steps == 20
    assert (
        method_config(
            {"name": "dual_lora", "r": 4, "warmup_steps": 7, "init_weights": "paper"}, "causal", 200, []
        ).warmup_steps
        == 7
    )


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"name": "dual_lorra"}, "no method 'dual_lorra'. Did you mean 'dual_lora'"),
        ({"name": "lora", "lora_alfa": 2}, "no field 'lora_alfa'. Did you mean 'lora_alpha'"),
        ({"name": "lora", "r": 0}, "positive integer.* 0"),
        ({"name": "lora", "target_modules": ["nowhere"]}, r"nowhere.*Its linear layers are called q_proj, .*"),
        ({"name": "dual_lora", "target_modules": "kproj,v_proj"}, "called q_proj, .* give several names as a list"),
        ({"name": "full", "r": 3}, "full takes no settings"),
        ({"name": "lora", "init_lora_weights": "eva"}, "EVA's start needs a pass over the data"),
    ],
)
def test_wrong_methods(method, message, lm_values, tmp_path):
    lm_values["method"] = method
    with pytest.raises(UserError, match=message):
        run(build_recipe(lm_values), tmp_path / "run", progress=False)


@pytest.mark.parametrize("name", ["lora", "dual_lora", "loha"])
def test_targets_of_which_an_encoder_has_none(name, encoder_values, tmp_path):
    """Its new head is left out besides, and PEFT then says that nothing was targeted."""
    encoder_values["method"] = {"name": name, "r": 4, "target_modules": ["nowhere"]}
    with pytest.raises(
        UserError, match=r"No modules were targeted.*Its linear layers are called query, key, value"
    ) as e:
        run(build_recipe(encoder_values), tmp_path / "run", progress=False)
    assert str(e.value).count("Its linear layers") == 1


@pytest.mark.parametrize("name", ["lora", "dual_lora", "loha"])
def test_a_target_that_is_not_there_is_said(name, lm_values, tmp_path):
    lm_values["method"] = {"name": name, "r": 4, "target_modules": ["q_proj", "vproj"]}
    lm_values["train"] |= {"steps": 1}
    with pytest.warns(UserWarning, match=r"names vproj, which no module is\. Did you mean 'v_proj'"):
        run(build_recipe(lm_values), tmp_path / "run", progress=False)


@pytest.mark.parametrize(
    "fields",
    [
        {"exclude_modules": ["down_proj"]},
        {"target_modules": ["q_proj", "down_proj"], "exclude_modules": ["down_proj"]},
        {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head"]},
    ],
)
def test_targets_that_are_there_are_not_warned_of(fields, lm_values, tmp_path):
    lm_values["method"] = {"name": "lora", "r": 4, **fields}
    lm_values["train"] |= {"steps": 1}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="method.target_modules names")
        run(build_recipe(lm_values), tmp_path / "run", progress=False)


@pytest.mark.parametrize("method", ["lora", "dual_lora"])
def test_a_head_of_several_layers_is_opened_again(method, encoder_values, tmp_path):
    """RoBERTa's: PEFT saves the whole of it, and the run saved its parts besides."""
    old = AutoTokenizer.from_pretrained(encoder_values["model"]["path"])
    config = RobertaConfig(
        vocab_size=len(old), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=80, pad_token_id=old.pad_token_id,
    )  # fmt: skip
    RobertaModel(config).save_pretrained(tmp_path / "base")
    old.save_pretrained(tmp_path / "base")
    encoder_values["model"]["path"] = str(tmp_path / "base")
    encoder_values["method"] = {"name": method, "r": 4, "target_modules": ["query", "value"]}
    encoder_values["train"] |= {"steps": 2}
    result = run(build_recipe(encoder_values), tmp_path / "run", progress=False)
    assert evaluate(tmp_path / "run", progress=False).metrics == evaluate(result.tuned, progress=False).metrics


@pytest.mark.parametrize("method", ["lora", "dora", "rslora", "pissa", "hira", "loha", "vera", "adalora", "full"])
def test_any_method_trains(method, lm_values, tmp_path):
    lm_values["method"] = {"name": method}
    lm_values["train"] |= {"steps": 3, "learning_rate": 0.01}
    result = run(build_recipe(lm_values), tmp_path / "run", progress=False)
    assert result.state == "finished"
    assert result.adapter_bytes > 0


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_checkpointing": True},
        {"autocast": "bf16"},
        {"optimizer": "loraplus"},
        {"optimizer": "adafactor", "schedule": "cosine"},
        {"arguments": {"adam_beta1": 0.9, "adam_beta2": 0.99}},
    ],
)
def test_training_options(options, lm_values, tmp_path):
    lm_values["train"] |= options
    assert run(build_recipe(lm_values), tmp_path / "run", progress=False).loss < 3


def test_loraplus_hurries_both_factors_on_the_output_s_side(lm_values):
    from dual_lora.lab.model.load import load_model
    from dual_lora.lab.model.methods import apply_method, method_config
    from dual_lora.lab.run.loop import optimizer_of

    lm_values["method"] = {"name": "dual_lora", "r": 4}
    lm_values["train"] |= {"optimizer": "loraplus", "loraplus_ratio": 8.0, "learning_rate": 0.01}
    recipe = build_recipe(lm_values)
    model = apply_method(load_model(recipe.model), method_config(recipe.method, "causal", 3, []), recipe.model, seed=0)
    rates = {id(p): group["lr"] for group in optimizer_of(model, recipe).param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert rates[id(parameter)] == pytest.approx(0.08 if name.split(".")[-2][-1] in "BD" else 0.01), name


def test_rates_move_each_group_at_its_own_pace(lm_values, tmp_path):
    """The first step of Adam moves an entry by its rate, whatever its gradient."""
    from dual_lora.lab.model.load import load_model
    from dual_lora.lab.model.methods import apply_method, method_config

    lm_values["method"] = {"name": "dual_lora", "r": 4, "warmup_steps": 0, "init_weights": "paper"}
    lm_values["train"] |= {"steps": 1, "learning_rate": 0.01, "lr_warmup": 0.0, "arguments": {"adam_epsilon": 1e-30}}
    lm_values["train"]["rates"] = {"dual_lora_D": 4.0, "dual_lora_[CD]": 0.5}
    recipe = build_recipe(lm_values)
    start = apply_method(load_model(recipe.model), method_config(recipe.method, "causal", 1, []), recipe.model, seed=0)
    start = {name: p for name, p in start.named_parameters() if p.requires_grad}
    for name, parameter in run(recipe, tmp_path / "run", progress=False).tuned.model.named_parameters():
        if name in start:
            rate = 0.01 * {"C": 0.5, "D": 4.0}.get(name.split(".")[-2][-1], 1.0)
            assert (parameter - start[name]).abs().median().item() == pytest.approx(rate, rel=0.01), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rates": {"lora_[": 2.0}}, r"train.rates is .*lora_\[.* is not a regular expression"),
        ({"rates": {"dual_lora_D": 0.0}}, "dual_lora_D: 0.0 is no multiple of a learning rate"),
        ({"rates": {"magnitude": 2.0}}, "train.rates: 'magnitude' fits no trainable parameter"),
        ({"arguments": {"dataloader_num_workers": 100_000}}, "dataloader_num_workers is 100000, expected 0 to 256"),
        ({"arguments": {"adam_beta_2": 0.9}}, "no field 'adam_beta_2'. Did you mean 'adam_beta2'"),
        ({"optimizer": "adamw_tosrch"}, "adamw_tosrch.*Did you mean 'adamw_torch'"),
        ({"validate_every": 2}, r"The recipe names no validation records: set data\.validation, .*or data\.holdout"),
    ],
)
def test_wrong_training_options(options, message, lm_values, tmp_path):
    lm_values["train"] |= options
    with pytest.raises(UserError, match=message):
        run(build_recipe(lm_values), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists(), "the next try would find a folder that is not empty"


def test_validation_losses_stand_in_the_metrics(lm_values, tmp_path):
    from dual_lora.lab.run.evaluate import evaluate

    answers = [" ".join(["red"] * (1 + i % 7)) for i in range(48)]  # so that batches weigh by tokens
    records = [{"instruction": "is the sky blue ?", "input": "", "output": answer} for answer in answers]
    (tmp_path / "uneven.json").write_text(json.dumps(records))
    lm_values["data"] |= {"train": str(tmp_path / "uneven.json"), "holdout": 8, "overlap": 48}
    lm_values["train"]["validate_every"] = 3
    lm_values["evaluate"] = {"tasks": ["loss"], "split": "validation", "batch_size": 3, "base": False}
    result = run(build_recipe(lm_values), tmp_path / "run", progress=False)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "eval_loss" in line] == [3, 6]
    assert result.examples == 40
    measured = evaluate(result.tuned, progress=False).metrics["tuned"]["loss"]
    assert result.validation_loss == pytest.approx(measured, rel=1e-4)


def test_a_validation_loss_counts_answers_alone_and_says_what_it_leaves_out(lm_values, tmp_path):
    from dual_lora.lab.run.evaluate import evaluate

    lm_values["data"] |= {"validation": lm_values["data"]["test"], "learn_prompt": True, "overlap": "all"}
    lm_values["train"]["validate_every"] = 6
    lm_values["evaluate"] = {"tasks": ["loss"], "split": "validation", "base": False}
    result = run(build_recipe(lm_values), tmp_path / "run", progress=False)
    measured = evaluate(result.tuned, progress=False).metrics["tuned"]["loss"]
    assert result.validation_loss == pytest.approx(measured, rel=1e-4)
    records = json.loads(Path(lm_values["data"]["test"]).read_text())
    (tmp_path / "long.json").write_text(json.dumps([*records, {**records[0], "instruction": "is red ? " * 200}]))
    lm_values["data"]["validation"] = str(tmp_path / "long.json")
    with pytest.warns(UserWarning, match=f"leaves out 1 of {len(records) + 1} validation records"):
        run(build_recipe(lm_values), tmp_path / "other", progress=False)


def test_adalora_begins_anew_rather_than_with_other_ranks(lm_values, tmp_path, monkeypatch):
    """Its checkpoints do not hold the averages that choose the ranks."""
    lm_values["method"] = {"name": "adalora", "init_r": 6, "target_r": 2, "tinit": 2, "tfinal": 1}
    lm_values["train"] |= {"steps": 8, "checkpoint_every": 3}
    recipe = build_recipe(lm_values)
    straight_and_stopped(recipe, tmp_path, monkeypatch)
    with pytest.warns(UserWarning, match="the run begins anew"):
        run(recipe, tmp_path / "stopped", resume=True, progress=False)
    assert_same_adapter(tmp_path / "straight", tmp_path / "stopped")


def test_without_a_checkpoint_the_run_s_recipe_is_the_one_that_goes_on(lm_values, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(1, patch)
        with pytest.raises(Stopped):
            run(build_recipe(lm_values), tmp_path / "run", progress=False)
    lm_values["train"]["batch_size"] = 2
    run(build_recipe(lm_values), tmp_path / "run", resume=True, progress=False)
    assert read_recipe(tmp_path / "run").train.batch_size == 2


def test_a_value_of_minus_hundred_is_one(encoder_values, tmp_path):
    """Labels of classes and tokens have -100 for none, and Trainer counts values in the same way."""
    (tmp_path / "values.jsonl").write_text("".join(f'{{"text": "red", "label": {v}}}\n' for v in (-100, 1, 2, -100)))
    encoder_values["model"]["head"] = "regression"
    encoder_values["data"] = {"train": str(tmp_path / "values.jsonl")}
    encoder_values["train"] |= {"steps": 1, "batch_size": 4, "learning_rate": 1e-9}
    loss = run(build_recipe(encoder_values), tmp_path / "run", progress=False).loss
    assert loss == pytest.approx((2 * 100**2 + 1 + 4) / 4, rel=0.1)


def test_gradients_that_blow_up_never_reach_a_checkpoint(lm_values, tmp_path):
    lm_values["train"] |= {"learning_rate": 1e25, "max_grad_norm": 0, "schedule": "constant", "lr_warmup": 0}
    with pytest.raises(UserError, match=r"Training stopped.*Lower train\.learning_rate"):
        run(build_recipe(lm_values), tmp_path / "run", progress=False)
    for checkpoint in (tmp_path / "run/checkpoints").glob("*/adapter_model.safetensors"):
        assert all(torch.isfinite(t).all() for t in load_file(checkpoint).values())


def test_accumulation_changes_nothing_but_memory(lm_values, tmp_path):
    """The loss is the mean over all answers of a step, however the step is cut (one step: the same rows)."""
    lm_values["method"] = {"name": "lora", "r": 4}
    for name, batch, accumulate in (("one", 8, 1), ("two", 4, 2)):
        lm_values["train"] |= {"batch_size": batch, "accumulate": accumulate, "steps": 1}
        run(build_recipe(lm_values), tmp_path / name, progress=False)
    losses = [json.loads((tmp_path / n / "metrics.jsonl").read_text().splitlines()[0])["loss"] for n in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_adalora_s_regulariser_is_part_of_its_loss(lm_values, tmp_path):
    """PEFT adds it to a loss of the model's own, which training here does not ask for."""
    from dual_lora.lab.run.loop import orthogonality

    kept = {}
    for weight in (0.0, 50.0):
        lm_values["method"] = {"name": "adalora", "init_r": 4, "target_r": 2, "orth_reg_weight": weight}
        result = run(build_recipe(lm_values), tmp_path / str(weight), progress=False)
        kept[weight] = load_file(tmp_path / str(weight) / "adapter" / "adapter_model.safetensors")
    assert any(not torch.equal(kept[0.0][name], tensor) for name, tensor in kept[50.0].items())
    model = result.tuned.model.train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name)
    ids = torch.tensor([[4, 7, 8, 9]])
    whole = model(input_ids=ids, labels=ids).loss
    bare = model.base_model.model(input_ids=ids, labels=ids).loss
    assert float(orthogonality(model)) == pytest.approx(float(whole - bare), rel=1e-4)
    assert orthogonality(model.base_model.model) == 0.0


@pytest.mark.parametrize("method", [{"name": "lora", "r": 4}, {"name": "dual_lora", "r": 4}])
def test_lora_plus_has_the_recipe_s_decay_and_betas(method, lm_values, tmp_path):
    from dual_lora.lab.model.methods import apply_method, method_config
    from dual_lora.lab.run.loop import optimizer_of
    from dual_lora.lab.run.prepare import prepare

    lm_values["method"] = method | {"target_modules": ["q_proj", "embed_tokens"]}
    lm_values["train"] |= {
        "optimizer": "loraplus", "weight_decay": 0.5, "learning_rate": 0.01,
        "arguments": {"adam_beta1": 0.5, "adam_epsilon": 1e-6},
    }  # fmt: skip
    recipe = build_recipe(lm_values)
    loaded = prepare(recipe).loaded
    model = apply_method(loaded, method_config(recipe.method, "causal", 6, loaded.fresh), recipe.model, 0)
    groups = [group for group in optimizer_of(model, recipe).param_groups if group["params"]]
    assert {group["weight_decay"] for group in groups} == {0.5}
    assert {(group["betas"], group["eps"]) for group in groups} == {((0.5, 0.999), 1e-6)}
    assert min(group["lr"] for group in groups) == 0.01, "no group at PEFT's 1e-6"


@pytest.mark.parametrize(
    "key", ["label_smoothing_factor", "group_by_length", "data_seed", "auto_find_batch_size", "accelerator_config"]
)
def test_arguments_that_would_do_nothing_or_change_the_rows_of_a_step_are_refused(key, lm_values, tmp_path):
    lm_values["train"]["arguments"] = {key: 1}
    with pytest.raises(UserError, match=key):
        run(build_recipe(lm_values), tmp_path / "run", progress=False)


def test_a_method_with_a_loss_of_its_own_is_refused(lm_values, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "OWN_LOSS", ("LORA",))
    with pytest.raises(UserError, match="adds a loss of its own"):
        run(build_recipe(lm_values), tmp_path / "run", progress=False)


def stopped(values, out):
    """A run that is stopped after its third step."""
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_training_stop = control.should_save = state.global_step >= 3

    return run(build_recipe(values), out, progress=False, callbacks=[Stop()])


def test_other_records_or_another_base_are_not_resumed(lm_values, tmp_path):
    data, base = tmp_path / "train.json", tmp_path / "base"
    data.write_bytes(Path(lm_values["data"]["train"]).read_bytes())
    shutil.copytree(lm_values["model"]["path"], base)
    lm_values["data"]["train"], lm_values["model"] = str(data), {"path": str(base)}
    assert stopped(lm_values, tmp_path / "run").state == "interrupted"
    before = data.read_text()
    data.write_text(before.replace('"true"', '"red"'))
    with pytest.raises(UserError, match=r"started with other training records .*--overwrite"):
        run(build_recipe(lm_values), tmp_path / "run", resume=True, progress=False)
    data.write_text(before)
    weights = base / "model.safetensors"
    kept = weights.read_bytes()
    save_file({n: -t for n, t in load_file(weights).items()}, weights, {"format": "pt"})
    with pytest.raises(UserError, match=r"started with other base model's weights: put them back"):
        run(build_recipe(lm_values), tmp_path / "run", resume=True, progress=False)
    weights.write_bytes(kept)
    assert run(build_recipe(lm_values), tmp_path / "run", resume=True, progress=False).state == "finished"


def test_rows_beyond_the_model_s_positions_are_said(lm_values, tmp_path):
    records = [{"prompt": "is the fire warm ? " * 20, "answer": "true"}] * 8
    (tmp_path / "long.json").write_text(json.dumps(records))
    lm_values["data"] = {"train": str(tmp_path / "long.json"), "template": "plain"}
    longest = LlamaConfig.from_pretrained(lm_values["model"]["path"]).max_position_embeddings
    lm_values["data"]["max_length"] = 4 * longest
    lm_values["train"] |= {"steps": 1}
    with pytest.warns(UserWarning, match=rf"the model knows {longest} positions: set data.max_length to {longest}"):
        run(build_recipe(lm_values), tmp_path / "run", progress=False)


def test_records_of_another_kind_are_no_empty_rows(lm_values, tiny_lm, tmp_path):
    """Sources that are joined have each its own format."""
    from dual_lora.lab.model.opened import open_tuned

    odd = tmp_path / "odd.jsonl"
    odd.write_text('{"text": "the sea", "label": "1"}\n')
    joined = f"{lm_values['data']['train']} + {odd}"
    own = lm_values["data"] | {"validation": lm_values["data"]["test"]}
    lm_values["train"]["validate_every"] = 2
    for data in ({"train": joined}, {"validation": joined}):
        lm_values["data"] = own | data
        with pytest.raises(UserError, match=r"odd.jsonl, line 1: the record has a text and a label"):
            run(build_recipe(lm_values), tmp_path / "run", progress=False)
    recipe = build_recipe({**lm_values, "data": own | {"test": joined}})
    for task in ("loss", "exact_match"):
        spec = recipe.evaluate.model_copy(update={"tasks": [task]})
        with pytest.raises(UserError, match=r"odd.jsonl, line 1 and .*train.json, record 1 are not of one kind"):
            evaluate(open_tuned(tiny_lm), recipe.data, spec, progress=False)
