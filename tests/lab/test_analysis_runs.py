"""Whole runs, made by the laboratory's own training on tiny models, analysed from their folders and live."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from dual_lora.lab.analysis.analyze import _names, analyze, save
from dual_lora.lab.analysis.callback import AnalysisCallback
from dual_lora.lab.analysis.opened_run import open_run
from dual_lora.lab.analysis.trajectory import load_adapter_into, states_of
from dual_lora.lab.analysis.updates import adapted_layers, snapshot
from dual_lora.lab.analysis.walk import Options
from dual_lora.lab.errors import UserError
from dual_lora.lab.recipe.read import build_recipe
from dual_lora.lab.results import load_analysis
from dual_lora.lab.run.train import run

LAYERS = 14  # of the tiny language model


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_lm, questions):
    """Run folders of Dual LoRA, LoRA, PiSSA and full fine-tuning, four states each."""
    folder = tmp_path_factory.mktemp("runs")
    values = {
        "model": {"path": str(tiny_lm)},
        "data": {"train": str(questions / "train.json"), "test": str(questions / "test.json")},
        "train": {
            "steps": 6, "batch_size": 4, "accumulate": 2, "checkpoint_every": 2, "keep_checkpoints": 9, "log_every": 2,
            "learning_rate": 0.01,
        },
        "evaluate": {"tasks": ["loss"]},
    }  # fmt: skip
    methods = {
        "dual": {"name": "dual_lora", "r": 4, "warmup_steps": 4, "init_weights": "paper"},
        "lora": {"name": "lora", "r": 4},
        "pissa": {"name": "pissa", "r": 4},
        "full": {"name": "full"},
    }
    for name, method in methods.items():
        recipe = build_recipe({**values, "name": name, "method": method})
        live = [AnalysisCallback(folder / name / "analysis" / "live.jsonl", every=3)] if name == "dual" else []
        run(recipe, folder / name, progress=False, callbacks=live)
    return folder


@pytest.fixture(scope="module")
def analysis(runs):
    return analyze(
        [runs / "dual", runs / "lora", runs / "pissa", runs / "full"],
        runs / "full",
        Options(held_out=8),
        progress=False,
    )


def rows_of(table, **wanted):
    return [row for row in table if all(row.get(k) == v for k, v in wanted.items())]


def test_start_is_made_again_from_the_seed(runs):
    opened = open_run(runs / "dual")
    first = snapshot(opened.model)
    again = snapshot(open_run(runs / "dual").model)
    assert len(first) == LAYERS
    for name in first:
        a, b = first[name].update(), again[name].update()
        assert torch.equal(a.rows(0, 9), b.rows(0, 9))
    assert all(found.strength == 0 for found in first.values())


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"processes": "x"}, "processes 'x'"),
        ({"processes": 0}, "processes 0"),
        ({"total_steps": [3]}, r"total_steps \[3\]"),
        ({"total_steps": None}, "total_steps None"),
        ({"result": {"steps": math.nan}}, "how many steps"),
        ({"result": {"steps": "many"}}, "how many steps"),
        ({"result": []}, "how many steps"),
    ],
)
def test_a_record_of_other_values_is_said(changed, said, runs, tmp_path):
    shutil.copytree(runs / "dual", tmp_path / "run")
    record = json.loads((tmp_path / "run/record.json").read_text())
    (tmp_path / "run/record.json").write_text(json.dumps(record | changed))
    with pytest.raises(UserError, match=said):
        analyze([tmp_path / "run"], options=Options(held_out=0, ranks="none"), progress=False)


def test_rebuilt_batches_are_training_s(runs):
    opened = open_run(runs / "dual")
    batches = opened.step_batches
    assert [len(b["input_ids"]) for b in batches] == [4, 4]
    with torch.no_grad():
        loss = sum(float(opened.loss_of_batch(opened.model, b)) for b in batches)
    logged = json.loads((runs / "dual" / "metrics.jsonl").read_text().splitlines()[0])
    assert 0.5 * logged["loss"] < loss < 2 * logged["loss"]


def first_loss(folder):
    """What training logged of its first step, and the same from the rebuilt batches and model."""
    opened = open_run(folder)
    with torch.no_grad():
        rebuilt = sum(float(opened.loss_of_batch(opened.model, b)) for b in opened.step_batches)
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])["loss"], rebuilt


ONE_STEP = {"steps": 1, "batch_size": 4, "accumulate": 2, "log_every": 1}


@pytest.mark.parametrize(
    "more",
    [{}, {"data": {"learn_prompt": True}}, {"train": {"label_smoothing": 0.2}}],
    ids=["plain", "prompt", "smooth"],
)
def test_the_rebuilt_loss_is_training_s(more, tiny_lm, questions, tmp_path):
    values = {
        "model": {"path": str(tiny_lm)},
        "data": {"train": str(questions / "train.json"), **more.get("data", {})},
        "train": {**ONE_STEP, **more.get("train", {})},
    }
    run(build_recipe(values), tmp_path / "run", progress=False)
    logged, rebuilt = first_loss(tmp_path / "run")
    assert rebuilt == pytest.approx(logged, rel=1e-4)


def test_the_rebuilt_loss_of_a_regression_is_training_s(tiny_encoder, tmp_path):
    lines = [f"the sky is blue\t{i / 4}" if i % 2 else f"fire is red ?\t{i / 8}" for i in range(16)]
    (tmp_path / "train.tsv").write_text("text\tlabel\n" + "\n".join(lines) + "\n")
    values = {
        "model": {"path": str(tiny_encoder), "head": "regression"},
        "data": {"train": str(tmp_path / "train.tsv"), "validation": str(tmp_path / "train.tsv"), "format": "text"},
        "train": ONE_STEP,
    }
    run(build_recipe(values), tmp_path / "run", progress=False)
    logged, rebuilt = first_loss(tmp_path / "run")
    assert rebuilt == pytest.approx(logged, rel=1e-4)
    opened = open_run(tmp_path / "run")
    truth = torch.tensor([float(line.split("\t")[1]) for line in lines])
    assert opened.held_out_loss(16)(None) < float((truth**2).mean()) * 10


def test_rebuilt_batches_are_those_of_all_processes(runs, tmp_path):
    """Two processes take twice as many rows in a step, and rows of like length are then put together in other ways."""
    import shutil

    shutil.copytree(runs / "dual", tmp_path / "run")
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    (tmp_path / "run" / "record.json").write_text(json.dumps(record | {"processes": 2}))
    batches = open_run(tmp_path / "run").step_batches
    assert [len(b["input_ids"]) for b in batches] == [4, 4, 4, 4]
    assert {b["items"] for b in batches} == {sum(int((b["labels"] != -100).sum()) for b in batches)}


def test_a_start_from_gradients_is_made_again(lm_values, tmp_path):
    """LoRA-GA's start follows from the first rows, and sits in the base weights as well."""
    lm_values["method"] = {"name": "lora_ga", "r": 4}
    run(build_recipe(lm_values), tmp_path / "run", progress=False)
    opened = open_run(tmp_path / "run")
    assert len(opened.origin) == LAYERS
    parameters = dict(opened.model.named_parameters())
    saved = load_file(tmp_path / "run" / "start" / "adapter_model.safetensors")
    for name, tensor in saved.items():
        torch.testing.assert_close(parameters[name.replace(".weight", ".default.weight")], tensor)


def test_states_of_a_run(runs):
    found = states_of(runs / "dual")
    assert [p.step for p in found] == [0, 2, 4, 6]
    assert found[0].folder is None
    assert [p.step for p in states_of(runs / "dual", 2)] == [0, 6]
    with pytest.raises(UserError, match="at least 2"):
        states_of(runs / "dual", 1)


def test_every_layer_and_state_has_its_rows(analysis):
    dual, lora, pissa, full = analysis.runs
    for each in (dual, lora):
        assert each.steps == [0, 2, 4, 6]
        assert len(each.layers) == 4 * LAYERS
        assert len(each.likeness) == 3 * LAYERS
        assert len(each.gradients) == 3 * LAYERS
        assert len(each.first_step) == LAYERS
    assert len(full.layers) == 3 * LAYERS
    assert not full.likeness
    assert not full.gradients
    assert "changed 14 base weights" in pissa.notes[0]


def test_figures_make_sense(analysis):
    dual, lora, pissa, full = analysis.runs
    start, end = rows_of(dual.layers, step=0), rows_of(dual.layers, step=6)
    assert all(r["norm"] == 0 and r["strength"] == 0 for r in start)
    assert all(r["norm"] > 0 and r["strength"] == 1 for r in end)
    assert rows_of(dual.layers, step=2)[0]["strength"] == 0.5
    assert 0.3 < sum(r["zero"] for r in end) / LAYERS < 0.7
    assert all(r["zero"] + r["positive"] + r["negative"] == pytest.approx(1) for r in end)
    assert any(r["start_direction_flipped"] > 0 for r in end)
    assert all(r["rank_numerical"] <= 4 for r in rows_of(lora.layers, step=6))
    assert all(r["rank_numerical"] > 4 for r in end)
    assert all(r["rank_bound"] == min(r["O"], r["I"]) for r in end)
    assert all(r["magnitude_rank_numerical"] > 2 and r["direction_rank_numerical"] > 2 for r in end)
    assert all(r["norm"] == 0 for r in rows_of(pissa.layers, step=0))  # counted from the original weights
    assert all(r["norm"] > 0 for r in rows_of(pissa.layers, step=6))
    assert all("rank_effective" in r for r in rows_of(full.layers, step=6))
    assert -1 <= dual.magnitude_direction <= 1
    assert all(abs(r["share_magnitude"] + r["share_direction"] - 1) < 1e-9 for r in dual.gradients)
    assert all(-1 <= r["gradient_cosine"] <= 1 for r in dual.first_step + lora.first_step)


def test_likeness_is_to_the_same_step(analysis):
    dual = analysis.runs[0]
    assert {r["step"] for r in dual.likeness} == {2, 4, 6}
    mean = sum(r["cosine"] for r in rows_of(dual.likeness, step=6)) / LAYERS
    assert mean > 0.02  # both learned the same task from the same start
    learned = sum(r["learned_cosine"] for r in rows_of(dual.likeness, step=6)) / LAYERS
    assert learned > mean  # the random start is like nothing
    assert all("learned_cosine" not in r for r in analysis.runs[1].likeness)
    assert all(r["learned_share"] > 0 for r in rows_of(dual.layers, step=6))
    shares = {(r["step"], r["layer"]): r["learned_share"] for r in dual.layers if "learned_share" in r}
    for r in dual.likeness:  # all sizes include λ
        expected = shares[r["step"], r["layer"]] * r["norm_relative"]
        assert r["learned_norm_relative"] == pytest.approx(expected, rel=1e-5)


def test_a_run_is_perfectly_like_itself(runs):
    found = analyze([runs / "full"], None, Options(ranks="none"), progress=False).runs[0]
    assert found.reference is None
    assert not found.contribution


def test_contribution_rows(analysis):
    what = {(r["what"], r["group"]) for r in analysis.runs[0].contribution}
    assert ("set back to the start", "direction") in what
    assert ("drawn anew", "magnitude") in what


def test_what_sampled_tokens_would_add(runs, tmp_path):
    (file,) = {save(analyze([runs / "dual"], options=Options(what="sampling"), progress=False), tmp_path / "s.json")}
    found = load_analysis(file)
    assert found.layers.empty
    assert found.gradients.empty
    assert len(found.sampling) == 14  # two blocks of seven linear layers
    assert {*found.sampling.step} == {6}
    assert (found.sampling.added_50 <= found.sampling.added_25 * 1.01).all()
    assert (found.sampling.added_25 < found.sampling.added_10).all()
    assert (found.sampling.zero_rows > 0).any()  # tokens of prompts in the last block
    assert found.sampling.added_25.is_monotonic_decreasing
    (note,) = analyze([runs / "full"], options=Options(what="sampling"), progress=False).runs[0].notes
    assert "no adapted layers" in note


def test_live_callback_counts_the_flips_of_single_steps(analysis):
    live = analysis.runs[0].live
    assert {r["step"] for r in live} == {1, 3, 6}
    assert len(live) == 3 * LAYERS
    last, end = rows_of(live, step=6), rows_of(analysis.runs[0].layers, step=6)
    by_layer = {r["layer"]: r for r in end}
    for row in last:
        other = by_layer[row["layer"]]
        assert row["start_direction_flipped"] == pytest.approx(other["start_direction_flipped"])
        assert row["zero"] == pytest.approx(other["zero"])
        assert row["step_direction_flipped"] <= 1
        assert row["share_magnitude"] + row["share_direction"] == pytest.approx(1)
    assert all(r["strength"] == 0.25 for r in rows_of(live, step=1))


def test_saved_as_json_without_nan(analysis, tmp_path):
    analysis.runs[0].first_step[0]["gradient_cosine"] = math.nan
    found = json.loads(save(analysis, tmp_path / "a" / "analysis.json").read_text())
    assert found["format"] == "dual-lora analysis"
    assert found["runs"][0]["first_step"][0]["gradient_cosine"] is None
    assert found["made"]["versions"]["torch"]


def test_layers_can_be_chosen(runs):
    found = analyze([runs / "dual"], None, Options(layers=r"0.*q_proj", ranks="none", held_out=0), progress=False)
    assert {r["layer"] for r in found.runs[0].layers} == {"model.layers.0.self_attn.q_proj"}
    with pytest.raises(UserError, match="none of 14 layers"):
        analyze([runs / "dual"], None, Options(layers="nothing"), progress=False)
    with pytest.raises(UserError, match="not a regular expression"):
        analyze([runs / "dual"], None, Options(layers="("), progress=False)


def test_what_is_no_run_or_does_not_belong_together(runs, tmp_path):
    with pytest.raises(UserError, match="is not a run: it holds no recipe"):
        analyze([tmp_path], progress=False)
    with pytest.raises(UserError, match="'cuda:77' cannot be used here"):
        analyze([runs / "dual"], device="cuda:77", progress=False)
    with pytest.raises(UserError, match="held_out is -4"):
        analyze([runs / "dual"], None, Options(held_out=-4), progress=False)
    with pytest.raises(UserError, match="expected full fine-tuning"):
        analyze([runs / "dual"], runs / "lora", progress=False)
    with pytest.raises(UserError, match="No run was given"):
        analyze([])
    with pytest.raises(UserError, match="dual is given twice"):
        analyze([runs / "dual", runs / "lora" / ".." / "dual"], progress=False)


def test_runs_of_one_name_are_told_apart(tmp_path):
    paths = [tmp_path / one / "runs" / "dual" for one in ("first", "second")] + [tmp_path / "first" / "runs" / "lora"]
    assert _names(paths) == ["first/runs/dual", "second/runs/dual", "lora"]


def test_a_run_of_another_base_or_of_other_records_is_not_analysed(tiny_lm, questions, tmp_path):
    base, data = shutil.copytree(tiny_lm, tmp_path / "base"), tmp_path / "train.json"
    shutil.copy(questions / "train.json", data)
    values = {"model": {"path": str(base)}, "data": {"train": str(data)}, "train": ONE_STEP}
    run(build_recipe(values | {"method": {"name": "lora", "r": 4}}), tmp_path / "run", progress=False)
    data.write_text(json.dumps(json.loads(data.read_text())[1:]))
    with pytest.raises(UserError, match="started with other training records"):
        analyze([tmp_path / "run"], progress=False)
    tensors = load_file(base / "model.safetensors")
    save_file({name: value * 3 for name, value in tensors.items()}, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="started with other base model's weights: put them back"):
        analyze([tmp_path / "run"], progress=False)


def test_a_run_that_is_none_is_said_before_the_others_are_analysed(runs, tmp_path, monkeypatch):
    import dual_lora.lab.analysis.analyze as module

    monkeypatch.setattr(module, "open_run", lambda *_: pytest.fail("a run was analysed first"))
    with pytest.raises(UserError, match="is not a run: it holds no recipe"):
        analyze([runs / "dual", tmp_path], progress=False)


def test_runs_of_different_models_are_noted(runs, tmp_path):
    import shutil

    shutil.copytree(runs / "lora", tmp_path / "other")
    recipe = tmp_path / "other" / "recipe.yaml"
    path = next(line for line in recipe.read_text().splitlines() if line.strip().startswith("path:"))
    where = path.partition("path:")[2].strip()
    shutil.copytree(where, tmp_path / "model")
    recipe.write_text(recipe.read_text().replace(where, str(tmp_path / "model")))
    quick = Options(states=2, ranks="none", gradients=False, held_out=0)
    first, second = analyze([runs / "lora", tmp_path / "other"], None, quick, progress=False).runs
    assert not first.notes
    assert "Of another model" in second.notes[-1]
    assert "than lora" in second.notes[-1]


def test_without_held_out_records_the_rest_is_analysed(runs, questions, tmp_path):
    import shutil

    own = tmp_path / "own"
    shutil.copytree(runs / "dual", own)
    text = (own / "recipe.yaml").read_text()
    (own / "recipe.yaml").write_text(text.replace(f"test: {questions / 'test.json'}", "test: null"))
    (run,) = analyze([own], None, Options(states=2, ranks="none", gradients=False), progress=False).runs
    assert run.layers
    assert not run.contribution
    assert "names no held-out records" in run.notes[-1]
    (own / "recipe.yaml").write_text(text.replace(str(questions / "test.json"), str(tmp_path / "gone.json")))
    with pytest.raises(UserError, match=r"There is no data file .*gone\.json"):
        analyze([own], progress=False)


def test_another_model_s_reference_is_refused(runs, tiny_lm, tmp_path):
    import shutil

    other = tmp_path / "other"
    shutil.copytree(runs / "full", other)
    text = (other / "recipe.yaml").read_text()
    (other / "recipe.yaml").write_text(text.replace(str(tiny_lm), "elsewhere"))
    with pytest.raises(UserError, match="another model"):
        analyze([runs / "dual"], other, progress=False)


def test_a_method_without_weight_updates_raises_a_clear_error(tiny_lm, questions, tmp_path):
    values = {
        "name": "prompts",
        "model": {"path": str(tiny_lm)},
        "method": {"name": "prompt_tuning", "num_virtual_tokens": 4},
        "data": {"train": str(questions / "train.json")},
        "train": {"steps": 1, "batch_size": 4},
    }
    run(build_recipe(values), tmp_path / "prompts", progress=False)
    with pytest.raises(UserError, match=r"prompt_tuning .* changes no weights"):
        analyze([tmp_path / "prompts"], progress=False)


def test_damaged_and_missing_checkpoints(runs, tmp_path):
    opened = open_run(runs / "dual")
    with pytest.raises(UserError, match="holds no adapter_model"):
        load_adapter_into(opened.model, tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(UserError, match="damaged"):
        load_adapter_into(opened.model, tmp_path)
    assert len(adapted_layers(opened.model)) == LAYERS


def test_a_reference_that_lacks_a_state_is_said(runs, tmp_path):
    """Else the likeness of the end would be missing without a word."""
    import shutil

    from dual_lora.lab.files.folder import RunFolder

    shutil.copytree(runs / "full", tmp_path / "full")
    shutil.rmtree(RunFolder(tmp_path / "full").whole_checkpoints()[6])
    shutil.rmtree(RunFolder(tmp_path / "full").result)
    little = Options(states=2, ranks="none", gradients=False, held_out=0)
    (run,) = analyze([runs / "lora"], tmp_path / "full", little, progress=False).runs
    assert run.likeness == []
    assert any("kept no state of step 6: no likeness is given there" in note for note in run.notes)


@pytest.mark.parametrize("method", ["dual", "lora", "pissa"])
def test_a_checkpoint_with_too_few_or_other_tensors_is_refused(runs, tmp_path, method):
    """Else a layer would keep what it had in the state before, and be shown as if it had not moved."""
    from safetensors.torch import load_file, save_file

    opened = open_run(runs / method)
    whole = load_file(states_of(runs / method)[-1].folder / "adapter_model.safetensors")
    first = next(iter(whole))
    rest = {key: tensor for key, tensor in whole.items() if key != first}
    for tensors in (rest, rest | {first.replace("layers.0", "layers.9"): whole[first]}):
        save_file(tensors, tmp_path / "adapter_model.safetensors")
        with pytest.raises(UserError, match="does not fit the run's recipe"):
            load_adapter_into(opened.model, tmp_path)
    save_file(whole, tmp_path / "adapter_model.safetensors")
    load_adapter_into(opened.model, tmp_path)


def test_a_start_that_was_taken_out_of_the_base_is_put_back_for_ratios(runs, analysis, tiny_lm):
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_lm)
    for row in rows_of(analysis.runs[2].layers, step=6):
        weight = base.get_submodule(row["layer"]).weight
        assert row["norm_ratio"] == pytest.approx(row["norm"] / float(weight.detach().norm()), rel=1e-4)


def test_norms_are_those_of_what_acts(analysis):
    """At step 2 λ is 2/4: figures that name a size have it, all of them alike."""
    full = {row["layer"]: row["norm"] for row in rows_of(analysis.runs[3].layers, step=2)}
    norms = {row["layer"]: row["norm"] for row in rows_of(analysis.runs[0].layers, step=2)}
    for row in rows_of(analysis.runs[0].likeness, step=2):
        assert row["norm_relative"] == pytest.approx(norms[row["layer"]] / full[row["layer"]], rel=1e-4)


def test_every_row_of_a_layer_has_its_size(analysis):
    dual = analysis.runs[0]
    sizes = {row["layer"]: (row["O"], row["I"]) for row in dual.layers}
    for table in (dual.gradients, dual.first_step, dual.live, dual.likeness):
        assert all((row["O"], row["I"]) == sizes[row["layer"]] for row in table)


def test_older_analyses_get_the_sizes_and_other_steps_are_not_mixed():
    from dual_lora.lab.report.insights import at_a_glance
    from dual_lora.lab.results import with_sizes

    layers = [{"step": 6, "layer": "a", "O": 10, "I": 10}, {"step": 6, "layer": "b", "O": 100, "I": 100}]
    run = {
        "name": "x", "method": {"name": "dual_lora"}, "steps": [0, 4, 6], "seed": 1, "magnitude_direction": None,
        "layers": layers, "first_step": [], "live": [],
        "gradients": [{"step": 6, "layer": "a", "cut": 1.0}, {"step": 6, "layer": "b", "cut": 0.0}],
        "likeness": [{"step": 4, "layer": "a", "O": 10, "I": 10, "cosine": 0.7}],
    }  # fmt: skip
    (row,) = at_a_glance(with_sizes({"runs": [run]})["runs"])
    assert row["cut"] == pytest.approx(100 / 10100)
    assert row.get("cosine") is None
