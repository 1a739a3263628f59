"""What a stranger's recipe, adapter or data file may not do: hang, fill the memory, or end in a traceback."""

import itertools
import json
import math
import os
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from dual_lora.lab import yaml_text
from dual_lora.lab.data.records import read_records
from dual_lora.lab.errors import UserError
from dual_lora.lab.interrupt import exit_status
from dual_lora.lab.model.bounds import check_finite_weights
from dual_lora.lab.model.methods import method_config
from dual_lora.lab.model.opened import open_tuned
from dual_lora.lab.patterns import Pattern
from dual_lora.lab.read import parse_yaml, read_json_lines, read_object
from dual_lora.lab.recipe.read import build_recipe, read_recipe
from dual_lora.lab.recipe.schema import EvaluateSection
from dual_lora.lab.run.evaluate import evaluate
from dual_lora.lab.run.train import run
from dual_lora.lab.study.plan import Plan
from dual_lora.lab.study.read import build_study, read_study

pytestmark = pytest.mark.timeout(120)  # what hangs is the failure
TRAP = "(.|.)*x"  # two ways for each character: 2^n of them


@pytest.fixture(scope="module")
def trained(tiny_lm, questions, tmp_path_factory):
    """A finished run of Dual LoRA."""
    values = {
        "model": {"path": str(tiny_lm)},
        "method": {"name": "dual_lora", "r": 4},
        "data": {"train": str(questions / "train.json"), "test": str(questions / "test.json")},
        "train": {"steps": 1, "batch_size": 4, "checkpoint_every": 1},
    }
    folder = tmp_path_factory.mktemp("trained") / "run"
    run(build_recipe(values), folder, progress=False)
    return folder


@pytest.fixture
def source(trained, tmp_path):
    """A copy of it, to be changed."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_finite_weights_of_every_kind(kind):
    weights = {"good": torch.ones(3).to(kind), "whole": torch.ones(3, dtype=torch.int32)}
    check_finite_weights(weights, "The adapter")
    with pytest.raises(UserError, match=r"1 of 3 weights \(the first is bad\)"):
        check_finite_weights(weights | {"bad": torch.tensor([1.0, math.nan]).to(kind)}, "The adapter")


def poison(run_folder, value=math.nan):
    file = run_folder / "adapter/adapter_model.safetensors"
    weights = load_file(file)
    next(w for name, w in weights.items() if w.is_floating_point())[0, 0] = value
    save_file(weights, file)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    "command",
    [
        ["evaluate", "RUN"],
        ["merge", "RUN", "OUT"],
        ["export", "RUN", "OUT", "--to", "lora", "--rank", "2"],
        ["generate", "RUN", "is fire warm ?"],
        ["analyze", "RUN"],
    ],
    ids=lambda command: command[0],
)
def test_an_adapter_of_nan_is_no_result(command, value, source, tmp_path, call):
    poison(source, value)
    places = {"RUN": source, "OUT": tmp_path / "out"}
    code, out, err = call(*(str(places.get(word, word)) for word in command), "--json")
    assert code == 1
    assert "holds NaN or infinity in 1 of " in err
    assert "Traceback" not in err
    assert "error" in json.loads(out)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", [torch.int32, torch.bool, torch.complex64], ids=str)
def test_an_adapter_of_other_numbers_is_no_result(kind, source):
    file = source / "adapter/adapter_model.safetensors"
    weights = load_file(file)
    save_file({name: weight if name.endswith("_left") else weight.to(kind) for name, weight in weights.items()}, file)
    with pytest.raises(UserError, match=r"holds .* as (I32|BOOL|C64), expected floating-point numbers"):
        open_tuned(source)


def test_a_full_model_of_nan_is_no_result(lm_values, tmp_path):
    lm_values["method"] = {"name": "full"}
    lm_values["train"]["steps"] = 1
    run(build_recipe(lm_values), tmp_path / "run", progress=False)
    file = tmp_path / "run/model/model.safetensors"
    weights = load_file(file)
    next(iter(weights.values())).fill_(math.nan)
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match="holds NaN or infinity"):
        open_tuned(tmp_path / "run")


def test_figures_that_come_from_nan_are_no_score(source, lm_values):
    tuned = open_tuned(source)
    with torch.no_grad():
        next(tuned.model.parameters()).fill_(math.nan)  # in memory: a base of NaN, an overflow
    recipe = build_recipe(lm_values)
    for task in ("choice", "loss"):
        with pytest.raises(UserError, match=r"computes NaN or infinity on 16 of 16 examples"):
            evaluate(tuned, recipe.data, recipe.evaluate.model_copy(update={"tasks": [task]}), progress=False)


@pytest.mark.parametrize("more", [{"tasks": ["exact_match"]}, {"tasks": ["bleu"], "beams": 2, "no_repeat_ngram": 2}])
def test_texts_that_come_from_nan_are_no_score(more, source, lm_values):
    """Of logits that are all NaN the first token counts as the likeliest: the score would be a plain 0."""
    tuned = open_tuned(source)
    with torch.no_grad():
        next(tuned.model.parameters()).fill_(math.nan)
    recipe = build_recipe(lm_values)
    with pytest.raises(UserError, match=r"computes NaN or infinity where it writes, so it has no score"):
        evaluate(tuned, recipe.data, recipe.evaluate.model_copy(update=more), progress=False)


def test_a_figure_that_does_not_exist_is_null_in_json(capsys):
    from dual_lora.lab.commands.card import finish

    finish({"pearson": math.nan, "loss": [math.inf, 1.5]}, None, True)
    printed = capsys.readouterr().out
    assert json.loads(printed, parse_constant=pytest.fail) == {"pearson": None, "loss": [None, 1.5]}


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"])
def test_a_pattern_without_an_end_never_reaches_peft(field, lm_values, tmp_path, monkeypatch):
    monkeypatch.setattr("dual_lora.verify.patterns.SECONDS", 1.0)
    lm_values["method"] |= {field: {TRAP: 2} if field.endswith("_pattern") else TRAP}
    with pytest.raises(UserError, match=rf"{field} '\(\.\|\.\)\*x' takes too long on this model's names"):
        run(build_recipe(lm_values), tmp_path / "run", progress=False)


def test_an_adapters_pattern_without_an_end(source, monkeypatch):
    monkeypatch.setattr("dual_lora.verify.patterns.SECONDS", 1.0)
    change(source / "adapter/adapter_config.json", target_modules=TRAP)
    with pytest.raises(UserError, match="takes too long"):
        open_tuned(source)


def test_patterns_that_end_train_as_before(lm_values, tmp_path):
    lm_values["method"] |= {"target_modules": r".*\.(q|v)_proj", "rank_pattern": {r"layers\.(0|1)\..*q_proj": 2}}
    run(build_recipe(lm_values), tmp_path / "run", progress=False)
    shapes = {name: tuple(w.shape) for name, w in load_file(tmp_path / "run/adapter/adapter_model.safetensors").items()}
    assert {shape[0] for name, shape in shapes.items() if "q_proj.lora_A" in name} == {2}
    assert {shape[0] for name, shape in shapes.items() if "v_proj.lora_A" in name} == {4}


@pytest.mark.parametrize("given", [{"adam_beta1": 7}, {"lr_scheduler_kwargs": {"x": 1}}])
def test_arguments_that_only_the_optimizer_refuses(given, lm_values, tmp_path):
    lm_values["train"] |= {"arguments": given, "schedule": "cosine"}
    with pytest.raises(UserError, match=r"Training could not begin: .* Look at train\.arguments \((adam|lr)_"):
        run(build_recipe(lm_values), tmp_path / "run", progress=False)


def test_a_base_in_fp16_without_autocast_trains(lm_values, tmp_path):
    lm_values["model"]["dtype"] = "float16"
    lm_values["method"] = {"name": "dual_lora", "r": 4}
    assert run(build_recipe(lm_values), tmp_path / "run", progress=False).state == "finished"


def test_our_own_searches_end(monkeypatch):
    from dual_lora.lab.run.scoring import answer_in

    monkeypatch.setattr("dual_lora.lab.patterns.SECONDS", 0.3)
    with pytest.raises(UserError, match=r"evaluate\.extract: .* takes too long"):
        answer_in("a" * 60 + "b", "(a|a)*$", "")
    with pytest.raises(UserError, match="takes too long"):
        Pattern("(a|a)*$", "train.rates").search("a" * 60 + "b")
    pattern = Pattern("(a|a)*$", "train.rates")
    pattern._left = 1e-9  # many names, each a little
    with pytest.raises(UserError, match="takes too long"):
        pattern.search("a" * 60 + "b")


@pytest.mark.parametrize("prompt", ["Answer format: " + "/a" * 40 + " b", " " * 200_000 + "x", "Answer1" * 20_000])
def test_a_prompts_list_of_answers_is_read_in_one_pass(prompt):
    from dual_lora.lab.data.formats import _choices_in

    assert _choices_in(prompt) == []
    assert _choices_in("is it ?\n\nAnswer format: true/false \n") == ["true", "false"]


@pytest.mark.parametrize(
    ("change_of", "said"),
    [
        ({"layer_replication": [[0, 2]] * 20_000}, "layer_replication makes a model of 40,000 layers"),
        ({"layer_replication": 7}, "expected pairs"),
        ({"rank_pattern": [1]}, "rank_pattern"),
        ({"r": 10**9}, "r holds 1,000,000,000, and no weight"),
        ({"rank_pattern": {"q_proj": 10**8}}, "rank_pattern holds 100,000,000"),
        ({"target_modules": "["}, "is not a regular expression"),
        ({"init_lora_weights": "lora_ga", "lora_ga_config": {"x": 1}}, "lora_ga_config: .* unexpected .* 'x'"),
    ],
)
def test_a_methods_bounds(change_of, said, lm_values, tmp_path):
    lm_values["method"] |= change_of
    with pytest.raises(UserError, match=said):
        run(build_recipe(lm_values), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def change(file, **values):
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_a_rank_that_the_file_does_not_hold_is_not_drawn(source, monkeypatch):
    """3,000 of 2 · 10⁶ numbers would be drawn before PEFT sees that the shapes differ."""
    from dual_lora.lab.model import bounds

    monkeypatch.setattr(bounds, "SMALL", 10**5)
    change(source / "adapter/adapter_config.json", r=4000, r1=2000, r2=2000)
    monkeypatch.setattr("peft.PeftModel.from_pretrained", pytest.fail)
    with pytest.raises(
        UserError, match=r"r holds 4,000, which may take .* numbers, and adapter_model\.safetensors has"
    ):
        open_tuned(source)


@pytest.mark.parametrize(
    "text", ["[1]", "3", '{"recipe": 1}', '{"classes": []}', '{"recipe": {}, "classes": 7}', "[" * 10**5]
)
def test_a_note_of_another_shape(text, source):
    (source / "adapter/lab.json").write_text(text)
    with pytest.raises(UserError, match=r"lab\.json"):
        open_tuned(source)


def test_a_task_is_measured_once():
    assert EvaluateSection(tasks=["choice", "loss", "choice"]).tasks == ["choice", "loss"]


def test_tensors_without_an_end_are_not_looked_up(source, monkeypatch):
    """28 MB name 300,000 empty ones, each of which is looked for in the model: a minute and more."""
    monkeypatch.setattr("dual_lora.lab.model.bounds.FEW", 1000)
    monkeypatch.setattr("dual_lora.lab.model.bounds.MOST_TENSORS", 1)
    file = source / "adapter" / "adapter_model.safetensors"
    own = load_file(file)
    save_file(own | {f"base_model.model.x{i}.lora_A.weight": torch.zeros(0) for i in range(1000)}, file)
    with pytest.raises(UserError, match=r"holds 1,\d+ tensors, and at most 1,000 are read"):
        open_tuned(source)
    save_file(own | {f"base_model.model.x{i}.lora_A.weight": torch.zeros(0) for i in range(10)}, file)
    with pytest.warns(UserWarning, match="10 tensors that this model has no place for"):
        open_tuned(source)


def test_classes_without_an_end_are_no_head_s(source):
    """Each has a row, which is drawn before the file of the weights is looked at."""
    change(source / "adapter/lab.json", classes=list(map(str, range(100_001))))
    with pytest.raises(UserError, match="100,001 names, expected at most 100,000"):
        open_tuned(source)


@pytest.mark.parametrize("text", ["[]", "3", "[" * 10**5, '{"X": 3}'])
def test_a_calibration_of_another_shape_is_none(text, tmp_path, monkeypatch):
    from dual_lora.lab.cost import calibrate

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(calibrate, "machine", lambda: "X")
    calibrate.cache_file().parent.mkdir()
    calibrate.cache_file().write_text(text)
    assert calibrate.known_rates() is None
    calibrate._keep({"costs": {}})
    assert calibrate.known_rates() == {"costs": {}}


BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join(['*' + a] * 10)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGED = "a: &a {x: 1}\n" + "".join(
    f"{b}: &{b} {{<<: [{', '.join(['*' + a] * 10)}]}}\n" for a, b in zip("abcdefghij", "bcdefghijk", strict=True)
)


ROW = "a0: &a0 {b0: 1}\n" + "".join(f"a{i}: &a{i} {{b{i}: 1, <<: *a{i - 1}}}\n" for i in range(1, 13_000))


@pytest.mark.parametrize(
    "text", [BOMB, MERGED, ROW, "a: &a [*a]", "[" * 5000], ids=["aliases", "merges", "row", "itself", "deep"]
)
def test_a_yaml_bomb(text, tmp_path):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(UserError, match=r"recipe\.yaml"):
        read_recipe(tmp_path / "recipe.yaml")


@pytest.mark.parametrize("number", ["1:" * 200_000 + "1", "-" + "9:" * 200_000 + "1.5"])
def test_a_number_of_base_60_is_a_text(number):
    """YAML 1.1 has such numbers, and PyYAML takes minutes for a long one."""
    assert parse_yaml(f"a: {number}", "x") == {"a": number}


def test_numbers_are_those_of_yaml_1_2():
    text = "[1e-4, 010, 0o17, 0xff, .5, 5., -1.5E+3, .inf, -.INF, +3, 1e3, 1:30, 1_000, e5]"
    inf = math.inf
    expected = [1e-4, 10, 15, 255, 0.5, 5.0, -1500.0, inf, -inf, 3, 1000.0, "1:30", "1_000", "e5"]
    found = parse_yaml(text, "x")
    assert found == expected
    assert list(map(type, found)) == list(map(type, expected))
    assert math.isnan(parse_yaml(".NaN", "x"))


def test_a_text_that_looks_like_a_number_comes_back_as_a_text():
    values = ["1e3", "1:30", "010", "1_0", "0o7", ".5", 1e-5, 3, "x"]
    assert yaml_text.load(yaml_text.dump(values)) == yaml.safe_load(yaml_text.dump(values)) == values


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1\nb: 2\na: 3", "it has the name 'a' twice"),
        ("x: {a: 1, a: 2}", "it has the name 'a' twice"),
        ("x: " + "9" * 10_000, "10,000 digits"),
        ("x: 0x" + "f" * 10_000, "10,002 digits"),
    ],
)
def test_yaml_that_is_refused(text, said):
    with pytest.raises(UserError, match=said):
        parse_yaml(text, "x")


def test_what_is_merged_twice_is_no_name_that_stands_twice():
    text = "y: &y {b: 0, c: 1}\na: &x {<<: *y, b: 1}\nd: {<<: *x, b: 2}\ne: {<<: *x}"
    assert parse_yaml(text, "x")["d"] == {"b": 2, "c": 1}


def test_aliases_of_honest_size_are_welcome():
    assert parse_yaml("a: &a {x: 1}\nb: {<<: *a, y: 2}\nc: [*a, *a]", "it")["b"] == {"x": 1, "y": 2}


@pytest.mark.parametrize(
    ("train", "said"),
    [
        ({"steps": 3 * 10**9}, "3,000,000,000 steps of 4 examples; at most"),
        ({"steps": None, "epochs": 1e300}, "at most 50,000,000 examples"),
        ({"steps": None, "batch_size": 10**5, "accumulate": 10**5}, "1 steps of 10,000,000,000 examples; at most"),
        ({"steps": None, "epochs": math.inf}, r"train\.epochs is inf: input should be a finite number"),
        ({"learning_rate": math.nan}, "finite number"),
        ({"batch_size": 10**12}, "less than or equal to"),
        ({"seed": 2**64}, "less than 4294967296"),
        ({"arguments": {"fsdp_config": "/dev/zero"}}, "fsdp_config names a file, which may have no end"),
        (
            {"arguments": {"optim_target_modules": ["q_proj", r"((\w|\.)+)+!"]}},
            "optim_target_modules.* might never end",
        ),
    ],
)
def test_a_loop_without_an_end(train, said, lm_values, tmp_path):
    lm_values["train"] |= train
    with pytest.raises(UserError, match=said):
        run(build_recipe(lm_values), tmp_path / "run", progress=False)


@pytest.mark.parametrize(
    "change_of",
    [
        {"seeds": 10**10},
        {"sweep": {f"method.a{i}": list(range(50)) for i in range(8)}},
        {"search": {"space": {f"method.a{i}": list(range(50)) for i in range(8)}}},
        {"search": {"space": {"learning_rate": [1e-3]}, "trials": 10**9}},
        {"search": {"space": {"learning_rate": [1e-3]}, "seeds": 10**9}},
        {"tasks": [f"t{i}" for i in range(90_000)]},
        {"tasks": {f"t{i}": "boolq-smollm2" for i in range(1500)}, "models": {f"m{i}": {} for i in range(1500)}},
        {"sweep": {f"method.a{i}": [1] for i in range(30_000)}},
        {"search": {"space": {f"method.a{i}": {"low": 1, "high": 2} for i in range(20_000)}, "trials": 10_000}},
    ],
    ids=["seeds", "sweep", "grid", "trials", "search-seeds", "tasks", "models", "sweep-axes", "search-axes"],
)
def test_a_study_without_an_end(change_of):
    with pytest.raises(UserError, match=r"expected at most|less than or equal to|1,000,000 points"):
        build_study({"name": "s", "tasks": ["boolq-smollm2"], "methods": ["lora"], **change_of})


@pytest.mark.parametrize(
    ("change_of", "said"),
    [
        ({"sweep": {"train.weight_decay": [i / 1e4 for i in range(1001)]}}, "1,001 methods times tasks times models"),
        (
            {"search": {"space": {"learning_rate": [1e-3]}, "seeds": 9000}, "seeds": [*range(50_000, 95_000)]},
            "54,000 runs",
        ),
    ],
    ids=["methods", "runs"],
)
def test_a_plan_of_more_than_can_be_looked_at_in_minutes(change_of, said):
    study = build_study({"name": "s", "tasks": ["boolq-smollm2"], "methods": ["lora"], **change_of})
    with pytest.raises(UserError, match=f"{said}, expected at most"):
        Plan.read(study)


def test_of_a_large_grid_only_the_points_that_are_tried_are_made():
    values = list(range(1000))
    space = {"learning_rate": [1e-3, 1e-2], "train.batch_size": [1, 2, 3]}
    methods = {f"m{i}": {"name": "lora", "search": {"method.a": values, "method.b": values}} for i in range(200)}
    study = build_study({"name": "s", "tasks": ["x"], "methods": methods, "search": {"space": space}})
    found = [tuple(point.values()) for point in study.search.points()]
    assert found == list(itertools.product(*space.values()))  # in this order, which trials' keys do not depend on
    assert len({tuple(point.values()) for point in study.search.points(methods["m0"]["search"])}) == 6


def test_a_study_that_extends_itself_by_another_path(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.yaml").write_text("extends: sub/../a.yaml\nname: a")
    with pytest.raises(UserError, match="in turn"):
        read_study(tmp_path / "a.yaml")
    for i in range(12):
        (tmp_path / f"s{i}.yaml").write_text(f"extends: s{i + 1}.yaml\nname: a")
    with pytest.raises(UserError, match="a row of more than 10 studies"):
        read_study(tmp_path / "s0.yaml")


def test_a_rank_rule_divides_by_no_zero():
    from dual_lora.lab.study.rank_rule import rank_denominator, rank_rule

    assert rank_rule("2r", 8, "x") == 16
    assert rank_rule("r/2", 8, "x") == 4
    assert rank_rule("0.5 r", 8, "x") == 4
    for text in ("r/0", "r/0.0", "r/..", "1.2.3r", " " * 10**6 + "q"):
        assert rank_rule(text, 8, "x") == text
        assert rank_denominator([text, "r/4"], 2) == 4
    for rank in (1e308, "", True, -4, 10**400):
        with pytest.raises(UserError, match="expected a whole number of bearable size"):
            rank_rule("sqrt(r)", rank, "x")


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize("text", ["[" * 10**5, "9" * 10_000, "[{]", r'[{"prompt": "\ud800", "answer": "a"}]'])
def test_data_that_no_parser_bears(suffix, text, tmp_path):
    file = tmp_path / f"data{suffix}"
    file.write_text(text)
    with pytest.raises(UserError, match="not valid JSON"):
        read_records(str(file))


@pytest.mark.parametrize(
    "wrong", [{"tools": True}, {"choices": 7}, {"messages": [{"role": [], "content": {}}]}, {"messages": 3}]
)
def test_records_of_another_shape(wrong, lm_values, tmp_path):
    turns = [{"role": "user", "content": "is"}, {"role": "assistant", "content": "red"}]
    (tmp_path / "data.json").write_text(json.dumps([{"messages": turns, **wrong}]))
    lm_values["data"] = {"train": str(tmp_path / "data.json")}
    with pytest.raises(UserError, match=r"data\.json, record 1: "):
        run(build_recipe(lm_values), tmp_path / "run", progress=False)


def test_a_chat_template_that_raises_is_said(tiny_lm):
    from dual_lora.lab.data.encode import Prompter
    from dual_lora.lab.model.load import load_tokenizer

    tokenizer = load_tokenizer(str(tiny_lm))
    tokenizer.chat_template = "{{ raise_exception('no system here') }}"
    with pytest.raises(UserError, match=r"chat template does not take these messages .*no system here"):
        Prompter(tokenizer, "chat").prompt_text(({"role": "system", "content": "x"},))


@pytest.mark.parametrize("template", ["{% if false %}x{% endif %}", "   "])
def test_an_empty_prompt_is_said(template, tiny_lm):
    """The model would fail on it, and a score of answers to nothing would mean nothing."""
    from dual_lora.lab.data.encode import Prompter
    from dual_lora.lab.model.load import load_tokenizer

    tokenizer = load_tokenizer(str(tiny_lm))
    tokenizer.chat_template = template
    with pytest.raises(UserError, match=r"chat template makes an empty prompt .* roles are user\."):
        Prompter(tokenizer, "chat").prompt_ids(({"role": "user", "content": "is"},))


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("fifo", r"record\.json is neither a file nor a folder\. .*use another folder"),
        ("endless", r"record\.json is a link to /dev/zero\. .*use another folder"),
        ("list", r"The record .* could not be read"),
    ],
    ids=["fifo", "endless", "list"],
)
def test_a_record_that_is_none(what, said, source, tmp_path):
    record = source / "record.json"
    record.unlink()
    if what == "fifo":
        os.mkfifo(record)
    elif what == "endless":
        record.symlink_to("/dev/zero")
    else:
        record.write_text("[1]")
    with pytest.raises((ValueError, OSError)):
        read_object(record)
    shutil.rmtree(source / "adapter")
    recipe = build_recipe(yaml.safe_load((source / "recipe.yaml").read_text()))
    with pytest.raises(UserError, match=said):
        run(recipe, source, resume=True, progress=False)


@pytest.mark.parametrize("name", [".x:lora", "x..y:lora", ":lora"])
def test_a_module_that_is_no_module(name):
    with pytest.raises(UserError):
        method_config({"name": name, "bogus": 1}, "causal", 1, [])


def test_fields_of_another_kind_are_said():
    with pytest.raises(UserError, match="rank_pattern must be a mapping"):
        method_config({"name": "dual_lora", "rank_pattern": [1]}, "causal", 1, [])
    with pytest.raises(UserError, match="has no field"):
        method_config({"name": "lora", 3: 1}, "causal", 1, [])


def test_a_name_that_is_no_text(call):
    code, _, err = call("merge", "run-\udcff", "out")
    assert code == 1
    assert "is not UTF-8" in err


@pytest.mark.parametrize("there", [True, False])
def test_an_output_that_is_a_link_is_followed(there, source, tmp_path):
    from dual_lora.lab.export.export import merge

    if there:
        (tmp_path / "big-disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "big-disk")
    merge(source, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "big-disk/config.json").is_file()
    with pytest.raises(UserError, match="is not empty"):
        merge(source, tmp_path / "link")


def test_a_token_that_the_model_does_not_have_is_said(tiny_lm, tmp_path, call):
    base = shutil.copytree(tiny_lm, tmp_path / "base")
    held = json.loads((base / "tokenizer.json").read_text())
    more = {
        "id": len(held["model"]["vocab"]),
        "content": "more",
        **dict.fromkeys(("lstrip", "rstrip", "special"), False),
    }
    held["added_tokens"].append(more | {"single_word": False, "normalized": False})
    (base / "tokenizer.json").write_text(json.dumps(held))
    code, _, said = call("generate", base, "is the more", "--max-new-tokens", 1)
    assert code == 1
    assert "a token or a position that it has no embedding for" in " ".join(said.split())


def test_exit_status_is_128_and_the_signal():
    assert exit_status(KeyboardInterrupt()) == 130


@pytest.mark.parametrize(
    ("end", "said"),
    [
        ('{"a": ', None),  # still being written
        ("", None),
        ('{"a": \n', "line 2 is no JSON"),
        ("[1]\n", "line 2 holds a JSON list"),
        ("[" * 10**5 + "\n", "line 2 is no JSON"),
    ],
)
def test_a_row_is_left_out_of_json_lines_only_while_it_is_written(end, said, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n' + end)
    if said is None:
        assert read_json_lines(tmp_path / "rows.jsonl") == [{"a": 1}]
    else:
        with pytest.raises(ValueError, match=said):
            read_json_lines(tmp_path / "rows.jsonl")


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_model.bin", "chat_template.jinja"])
@pytest.mark.parametrize("through", [False, True], ids=["pipe", "link to a pipe"])
def test_a_pipe_in_an_adapter_is_not_waited_for(name, through, source, tmp_path):
    adapter = shutil.copytree(source / "adapter", tmp_path / "adapter")
    (adapter / name).unlink(missing_ok=True)
    os.mkfifo(pipe := tmp_path / "pipe" if through else adapter / name)
    if through:
        (adapter / name).symlink_to(pipe)
    with pytest.raises(UserError, match="neither a file nor a folder, so it was not read"):
        open_tuned(adapter)


def test_a_pipe_in_a_base_is_not_waited_for(tiny_lm, tmp_path):
    base = shutil.copytree(tiny_lm, tmp_path / "base")
    (base / "model.safetensors").unlink()
    os.mkfifo(base / "model.safetensors")
    with pytest.raises(UserError, match="neither a file nor a folder"):
        open_tuned(base)


@pytest.mark.parametrize("kind", ["packed", "a view", "no numbers", "lists of lists"])
def test_weights_of_an_older_base_take_no_more_than_their_file(kind, tiny_lm, tmp_path):
    """Of some hundred kilobytes torch would make gigabytes."""
    base = shutil.copytree(tiny_lm, tmp_path / "base")
    held, file = load_file(base / "model.safetensors"), base / "pytorch_model.bin"
    (base / "model.safetensors").unlink()
    torch.save(held, file)
    open_tuned(base)
    nested = []
    for _ in range(9):
        nested = [nested] * 10
    more = {"a view": torch.zeros(1).expand(10**5, 10**5), "lists of lists": nested}
    more["no numbers"] = torch.sparse_coo_tensor(torch.zeros(2, 0), torch.zeros(0), (10**5, 10**5))
    torch.save(held | {"more": more.get(kind, torch.zeros(10**6))}, file)
    if kind == "packed":
        with zipfile.ZipFile(file) as archive:
            entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in entries.items():
                archive.writestr(name, content)
    with pytest.raises(UserError, match=r"packed entry|of which it has fewer|that is not plain|5,000,000 values"):
        open_tuned(base)


@pytest.mark.parametrize("index", [None, "model.safetensors.index.json", "pytorch_model.bin.index.json"])
def test_nor_do_those_of_a_base_in_the_hub_s_cache(index, tiny_lm, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    base = shutil.copytree(tiny_lm, tmp_path / "models--some--body/snapshots/1")
    (tmp_path / "models--some--body/refs").mkdir()
    (tmp_path / "models--some--body/refs/main").write_text("1")
    held, file = load_file(base / "model.safetensors"), base / ("other.bin" if index else "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    if index:
        (base / index).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(held, file.name)}))
    torch.save(held, file)
    open_tuned("some/body")
    torch.save(held | {"more": torch.zeros(1).expand(10**5, 10**5)}, file)
    with pytest.raises(UserError, match=f"{file.name} holds .* of which it has fewer"):
        open_tuned("some/body")


def test_a_number_without_an_end_in_an_adapter(source):
    change(source / "adapter/adapter_config.json", r=10**9 + 2, r1=2, r2=10**9)
    with pytest.raises(UserError, match=r"The adapter .* r holds 1,000,000,002, and no weight of this model"):
        open_tuned(source)


def test_a_configuration_of_a_weights_size_is_not_read(source):
    change(source / "adapter/adapter_config.json", about="x" * 5_000_000)
    with pytest.raises(UserError, match=r"could not be read: .* bytes, and at most"):
        open_tuned(source)


def test_a_pattern_that_takes_long_to_compile(monkeypatch):
    from dual_lora.lab import patterns

    monkeypatch.setattr(patterns, "COMPILED", 1.0)
    for trap in ("(?:(?:(?:a{90}){90}){90}){90}", "(?:ab){1000000000}"):
        with pytest.raises(ValueError, match="takes too long to be compiled"):
            Pattern(trap, "train.rates")
    assert Pattern(r"lora_[AB]{1}\.", "train.rates").search("x.lora_A.y")


def test_a_pattern_of_a_tokenizer_that_is_given_up_is_said(tiny_lm, tmp_path, call):
    base = shutil.copytree(tiny_lm, tmp_path / "base")
    held = json.loads((base / "tokenizer.json").read_text())
    pattern = {"type": "Split", "pattern": {"Regex": r"(é+\s?)*$"}, "behavior": "Isolated", "invert": False}
    (base / "tokenizer.json").write_text(json.dumps(held | {"pre_tokenizer": pattern}))
    code, _, said = call("generate", base, "é" * 60 + "?", "--max-new-tokens", 1)
    assert code == 1
    assert "A library crashed" in " ".join(said.split())


def packed(*names):
    return {
        "quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_skip_modules": names}
    }


def by_torchao(kind):
    return {"quantization_config": {"quant_method": "torchao", "quant_type": {"default": kind}}}


# What torchao has by these names calls torch.save, with any file of the user's.
SAVED = {
    "_type": "_replace_with_custom_fn_if_matches_filter",
    "_data": {
        "model": "anything",
        "replacement_fn": {"_type": "torch.dtype", "_data": "save"},
        "filter_fn": {"_type": "torch.dtype", "_data": "FatalError"},
        "extra_args": ["/home/me/thesis.tex"],
    },
}


def test_names_of_what_is_packed_as_published_models_have_them():
    from dual_lora.lab.model.location import check_searched

    patterns = [r"re:.*self_attn.(q|k|v)_proj$", r"+:.*\.(?:1[0-9]|2[0-9])\..*gate.*", "re:vision_tower.*", "bfloat16"]
    check_searched("a model", [*patterns, *(f"model.layers.{i}.mlp.gate" for i in range(1000))])


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"attn_implementation": "kernels-community/flash-attn"}, "code would be fetched from the hub"),
        ({"_attn_implementation": "somebody/else@main:f"}, "code would be fetched from the hub"),
        ({"_attn_implementation_internal": "somebody/else"}, "code would be fetched from the hub"),
        ({"text_config": {"attn_implementation": "somebody/else"}}, "code would be fetched from the hub"),
        ({"attn_implementation": {"text_config": "somebody/else"}}, "code would be fetched from the hub"),
        ({"vision_config": {"model_args": {"checkpoint_path": "a.pth"}}}, "by which timm would load files"),
        ({"vision_config": {"architecture": "hf-hub:somebody/else"}}, "by which timm would load files"),
        ({"backbone": "local-dir:/home"}, "by which timm would load files"),
        ({"model_type": "detr", "backbone": "somebody/else"}, "transformers may ask the hub"),
        ({"vision_config": {"model_type": "detr", "backbone": "resnet50"}}, "transformers may ask the hub"),
        ({"vision_config": {"backbone": "somebody/else"}}, "transformers may ask the hub"),
        (by_torchao(SAVED), "which torchao might call"),
        ({"text_config": by_torchao({"_type": "FqnToConfig", "_data": {"of": [SAVED]}})}, "which torchao might call"),
        ({"num_hidden_layers": 10**6}, "has num_hidden_layers 1,000,000, expected at most 1,000"),
        ({"num_labels": 10**8}, "has num_labels 100,000,000"),
        ({"intermediate_size": 10**8}, "has intermediate_size 100,000,000, expected at most 1,000,000"),
        ({"max_position_embeddings": 10**9}, "has max_position_embeddings 1,000,000,000, expected at most 20,000,000"),
        (packed(r"((\w|\.)+)+!"), "in a layer's name might never end"),
        ({"text_config": packed(r"(?x: (\w|\.)+ #\n +)!")}, "in a layer's name might never end"),
        (packed(".*" * 5 + "!"), "in a layer's name might never end"),
        (packed("a{99999}"), "in a layer's name might never end"),
        (packed(*(f"{i}.*" for i in range(200))), "has 200 patterns, expected at most 100"),
        (packed(*map(str, range(6000))), "names and values, expected at most 5,000"),
    ],
)
def test_a_models_settings_fetch_no_code_and_have_an_end(values, said, tiny_lm, tmp_path, monkeypatch):
    from transformers import AutoConfig

    from dual_lora.lab.model.empty import load_config
    from dual_lora.lab.model.load import load_model
    from dual_lora.lab.recipe.schema import ModelSection
    from dual_lora.lab.verify.candidate import load_candidate

    monkeypatch.setattr(AutoConfig, "from_pretrained", lambda *_, **__: pytest.fail("it was built"))
    base = shutil.copytree(tiny_lm, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | values))
    attempts = (
        lambda: load_model(ModelSection(path=str(base))),
        lambda: load_config(str(base)),
        lambda: load_candidate(str(base), []),
    )
    for attempt in attempts:
        with pytest.raises(UserError, match=said):
            attempt()


def test_what_torchao_packed_is_no_call():
    """The settings of torchao's own writer pass, and no function of torch's in the place of a number's type."""
    from dual_lora.verify.parts import check_parts

    plain = {"_type": "Float8WeightOnlyConfig", "_version": 2, "_data": {
        "weight_dtype": {"_type": "torch.dtype", "_data": "float8_e4m3fn"},
        "granularity": [{"_type": "PerRow", "_data": {"dim": -1}}],
        "mapping_type": {"_type": "MappingType", "_data": "SYMMETRIC"},
    }}  # fmt: skip
    check_parts(by_torchao({"_type": "FqnToConfig", "_data": {"fqn_to_config": {"_default": plain}}}))
    for name in ("save", "no such type", None):
        plain["_data"]["weight_dtype"]["_data"] = name
        with pytest.raises(ValueError, match="which torchao might call"):
            check_parts(by_torchao({"_type": "FqnToConfig", "_data": {"fqn_to_config": {"_default": plain}}}))


def test_a_part_that_timm_builds_may_have_sizes():
    """As published models have them, such as PerceptionLM."""
    from dual_lora.verify.parts import check_parts

    own = {"depth": 23, "img_size": [448, 448], "global_pool": "", "act_layer": "gelu", "init_values": 0.1}
    check_parts({"vision_config": {"architecture": "vit_pe_core_large_patch14_336", "model_args": own}})
    check_parts({"vision_config": {"model_type": "timm_backbone", "backbone": "resnet50"}})
    check_parts({"vision_config": {"model_type": "detr", "backbone": "r", "backbone_config": {"model_type": "resnet"}}})
    check_parts({"model_type": "llama", "backbone": "a word of its own"})
    for key, value in (("pretrained_cfg", {"file": "a.pth"}), ("cache_dir", "."), ("block", ["a/b"])):
        with pytest.raises(ValueError, match="by which timm would load files"):
            check_parts({"vision_config": {"model_args": own | {key: value}}})
