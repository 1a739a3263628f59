"""The paper's experiments: every recipe is complete, says who gave each setting, and fits its real model."""

import json
import math
import warnings
from pathlib import Path

import pytest
import torch
import yaml

from dual_lora.lab.cli import main
from dual_lora.lab.data.batches import mean_loss
from dual_lora.lab.data.encode import Prompter
from dual_lora.lab.data.examples import load_split
from dual_lora.lab.data.formats import Example
from dual_lora.lab.errors import UserError
from dual_lora.lab.model.empty import fit
from dual_lora.lab.recipe.families import KINDS, family, marked_yaml
from dual_lora.lab.recipe.read import build_recipe, identity, read_recipe, recipe_text, shipped_recipes
from dual_lora.lab.recipe.schema import DataSection, EvaluateSection
from dual_lora.lab.run.evaluate import evaluate
from dual_lora.lab.run.figures import figures, summary
from dual_lora.lab.run.scoring import search_of
from dual_lora.lab.run.train import run


def call(*arguments):
    """The command line, which leaves with exit code 0."""
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    assert not stop.value.code


PAPER = [name for name, path in shipped_recipes().items() if path.parent.name == "paper"]


def _settings(values, prefix=""):
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _settings(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


@pytest.mark.parametrize("name", PAPER)
def test_every_setting_has_a_source(name):
    text = recipe_text(name)
    values = yaml.safe_load(text)
    recipe = build_recipe(values)
    assert recipe == read_recipe(name)
    written = set(_settings({k: values[k] for k in ("model", "method", "data", "train", "evaluate")}))
    marked = [setting for given in recipe.origin.settings.values() for setting in given]
    assert sorted(marked) == sorted(written)
    assert {text.partition(":")[0] for text in recipe.origin.sources.values()} <= set(KINDS)
    learning_rate = next(line for line in text.splitlines() if line.startswith("  learning_rate"))
    assert learning_rate.partition("# ")[2].split()[0] in KINDS


def test_the_paper_s_models_and_tasks_are_all_there():
    models = ["llama-7b", "llama-13b", "llama-2-7b", "llama-3-8b", "llama-3-70b-instruct"]
    models += ["llama-3.2-1b", "llama-3.2-3b", "qwen3-1.7b", "qwen3-8b", "gemma-3-1b"]
    expected = {f"commonsense-{model}-{data}" for model in models for data in ("170k", "15k")}
    encoders = ["roberta-base", "roberta-large", "deberta-v3-base", "deberta-v2-xxlarge"]
    tasks = ["mnli", "sst2", "mrpc", "cola", "qnli", "qqp", "rte", "stsb"]
    expected |= {f"glue-{model}-{task}" for model in encoders for task in tasks}
    expected |= {"e2e-gpt2-medium", "e2e-gpt2-large"}
    expected |= {"commonsense-twin", "glue-twin-cola", "glue-twin-sst2", "e2e-twin"}
    assert set(PAPER) == expected
    assert len(read_recipe("commonsense-llama-7b-15k").data.tests) == 8


@pytest.fixture(scope="module")
def fitted():
    """Function: recipe name → its fit; recipes with the same model and method are built once."""
    known = {}

    def of(name):
        recipe = read_recipe(name)
        key = json.dumps([recipe.model.path, recipe.model.head, recipe.method], sort_keys=True)
        if key not in known:
            known[key] = fit(recipe)
        return known[key]

    return of


@pytest.mark.parametrize("name", [name for name in PAPER if "twin" not in name])
def test_recipes_fit_the_published_models(name, fitted):
    found = fitted(name)
    assert 0 < found.trainable < 0.02 * found.all_parameters or found.all_parameters < 5e8


@pytest.mark.parametrize(
    ("name", "layers", "trainable"),
    [
        # 32 blocks of rank 32: three of 4096 x 4096, two of 4096 x 11008
        ("commonsense-llama-7b-170k", 160, 32 * 32 * (3 * 8192 + 2 * 15104)),
        # 80 blocks of rank 32: q of 8192 x 8192, k and v of 8192 x 1024, two of 8192 x 28672
        ("commonsense-llama-3-70b-instruct-15k", 400, 80 * 32 * (16384 + 2 * 9216 + 2 * 36864)),
        # 24 blocks of rank 4: 1024 x 3072
        ("e2e-gpt2-medium", 24, 24 * 4 * 4096),
        # 12 blocks of rank 8: two of 768 x 768; a head of 768 x 768 and 768 x 2 with biases
        ("glue-roberta-base-sst2", 24, 24 * 8 * 1536 + 768 * 768 + 768 + 2 * 768 + 2),
    ],
)
def test_layers_and_parameters_by_hand(name, layers, trainable, fitted):
    assert sum(fitted(name).layers.values()) == layers
    assert fitted(name).trainable == trainable


@pytest.mark.parametrize("name", ["e2e-gpt2-medium", "commonsense-qwen3-1.7b-15k"])
def test_a_recipe_says_all_that_its_model_needs(name):
    """No setting is left to be guessed from the layers, with a warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="fan_in_fan_out")
        fit(read_recipe(name))


def test_a_target_that_no_layer_has():
    with pytest.raises(UserError, match="has no layer gate"):
        fit(read_recipe("e2e-gpt2-medium", {"method": {"target_modules": ["c_attn", "gate"]}}))


def test_a_changed_setting_is_no_longer_its_source_s():
    origin = read_recipe("commonsense-llama-7b-170k", {"train": {"learning_rate": 3e-4}}).origin
    assert origin.source_of("train.learning_rate") == "yours"
    assert origin.source_of("train.epochs") == "paper"
    assert origin.source_of("train.log_every") is None


def test_families_say_what_is_wrong(tmp_path):
    def write(**values):
        path = tmp_path / f"f{len(list(tmp_path.iterdir()))}.yaml"
        path.write_text(yaml.safe_dump({"family": "f", "sources": {"us": "ours: we"}, **values}))
        return path

    with pytest.raises(UserError, match="'me' is none of the sources us"):
        family(write(twins={"a": {"me": {"train": {"steps": 1}}}}))
    with pytest.raises(UserError, match="has to begin with paper or predecessor or ours"):
        family(write(sources={"us": "we"}))
    with pytest.raises(UserError, match="cells b are no combinations"):
        family(write(axes={"x": {"a": {"us": {}}}}, cells={"b": {"us": {}}}))
    with pytest.raises(UserError, match="is no family of recipes"):
        family(write(recipes=[]))
    path = write(common={"us": {"train": {"steps": 1, "seed": 2}}}, axes={"x": {"a": {"us": {"train": {"seed": 3}}}}})
    assert family(path)["f-a"]["train"] == {"steps": 1, "seed": 3}


def test_marked_yaml_is_the_same_yaml():
    values = {"a": {"b": 1e-4, "c": [1, "x: y"]}, "d": "hub:a,b:c", "e": None}
    text = marked_yaml(values, {"a.b": "paper", "d": "ours # here"}, "default")
    assert yaml.safe_load(text) == values
    assert [line.partition("# ")[2] for line in text.splitlines()] == ["", "paper", "default", "ours # here", "default"]


def test_the_documented_tables_are_the_recipes(fitted):
    lines = (Path(__file__).parents[2] / "docs/reference/paper.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    glue = {row[0]: row for row in rows if row[0].startswith("glue-") and row[0] in PAPER}
    assert set(glue) == {name for name in PAPER if name.startswith("glue-") and "twin" not in name}
    for name, (_, rate, epochs, batch, length, warm, decay, source) in glue.items():
        recipe = read_recipe(name)
        train = recipe.train
        assert [float(rate), float(epochs), int(batch), float(decay)] == [
            train.learning_rate, train.epochs, train.batch_size, train.weight_decay
        ], name  # fmt: skip
        assert int(length) == recipe.data.max_length, name
        steps = train.arguments.get("warmup_steps")
        assert warm == (f"{steps} steps" if steps else f"{train.lr_warmup:g}"), name
        assert recipe.origin.source_of("train.learning_rate") == source, name
    commonsense = [row for row in rows if row[0].endswith("-170k, -15k")]
    assert len(commonsense) == 10
    for row in commonsense:
        for data in ("170k", "15k"):
            name = f"commonsense-{row[0].removesuffix('-170k, -15k')}-{data}"
            recipe = read_recipe(name)
            assert row[1] == recipe.model.path
            assert row[2] == f"{recipe.method['r']}, {recipe.method['alpha']}"
            assert int(row[3].replace(",", "")) == fitted(name).trainable
            assert float(row[4]) == recipe.train.learning_rate
            assert row[5] == recipe.origin.source_of("train.learning_rate")


# What the recipes need of the laboratory


def test_several_test_sets_are_measured_apart(lm_values, questions, tmp_path):
    part = tmp_path / "part.json"
    part.write_text(json.dumps(json.loads((questions / "test.json").read_text())[:3]))
    lm_values["data"] |= {"test": None, "tests": {"all": str(questions / "test.json"), "part": str(part)}}
    recipe = build_recipe(lm_values)
    examples = load_split(recipe.data, "test")
    assert [e.part for e in examples].count("part") == 3
    figures = evaluate(lm_values["model"]["path"], recipe.data, recipe.evaluate, progress=False).metrics["base"]
    assert figures["loss"] == pytest.approx((figures["loss/all"] + figures["loss/part"]) / 2)
    assert figures["loss/all"] != figures["loss/part"]
    with pytest.raises(UserError, match=r"both data\.test and data\.tests"):
        load_split(recipe.data.model_copy(update={"test": "x.json"}), "test")


def test_sources_are_joined_and_references_stay_together(questions, tmp_path):
    (tmp_path / "a.txt").write_text("pub||a pub\npub||one pub\nbar||a bar\n")
    both = load_split(DataSection(train=f"{questions / 'train.json'} + {questions / 'test.json'}"), "train")
    assert len(both) == 48 + 16
    some = load_split(DataSection(test=str(tmp_path / "a.txt"), test_prompts=1, seed=1), "test")
    assert [e.answer for e in some] in (["a pub", "one pub"], ["a bar"])


def test_the_prompt_of_llm_adapters(tiny_lm):
    from transformers import AutoTokenizer

    prompter = Prompter(AutoTokenizer.from_pretrained(tiny_lm), "llm-adapters")
    i = "                "
    assert prompter.prompt_text(({"role": "user", "content": "Is fire warm?\n\nAnswer format: true/false"},)) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.  \n"
        f"\n{i}### Instruction:\n{i}Is fire warm?\n\nAnswer format: true/false\n{i}\n{i}### Response:\n{i}"
    )


def test_the_prompt_can_be_learned(tiny_lm, lm_values):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_lm)
    example = load_split(build_recipe(lm_values).data, "test")[0]
    answer, everything = (Prompter(tokenizer, "plain", learn).encode(example) for learn in (False, True))
    assert everything.labels == [-100, *everything.input_ids[1:]], "nothing tells the first token"
    assert everything.input_ids == answer.input_ids
    assert answer.labels != answer.input_ids


def test_smoothed_labels():
    torch.manual_seed(0)
    logits, labels = torch.randn(1, 4, 7), torch.tensor([[-100, 3, 5, 1]])
    logs = logits[0, :-1].log_softmax(-1)
    expected = -sum(0.9 * logs[i, t] + 0.1 * logs[i].mean() for i, t in enumerate([3, 5, 1])) / 3
    assert mean_loss({"logits": logits}, labels, smoothing=0.1) == pytest.approx(float(expected))


def test_a_head_for_one_number(encoder_values, tmp_path):
    encoder_values["model"]["head"] = "regression"
    trained = run(build_recipe(encoder_values), tmp_path / "run", progress=False)
    result = evaluate(tmp_path / "run/adapter", progress=False)
    assert set(result.metrics["tuned"]) == {"pearson", "spearman", "mse"}
    assert result.metrics["tuned"]["pearson"] > 0.8
    assert evaluate(trained.tuned, progress=False).metrics == result.metrics
    with pytest.raises(UserError, match="which has a head for regression"):
        evaluate(trained.tuned, spec=EvaluateSection(tasks=["classification"]), progress=False)


def test_a_correlation_that_is_not_defined_is_left_out():
    def figures_of(predicted, labels):
        rows = [{"predicted": value} for value in predicted]
        return set(summary("regression", rows, [Example("", text=("x",), label=label) for label in labels]))

    assert (
        figures_of([0.5], ["1"]) == figures_of([0.5, 0.7], ["1", "1"]) == figures_of([2.0, 2.0], ["1", "0"]) == {"mse"}
    )
    assert figures_of([0.5, 0.7], ["1", "0"]) == {"mse", "pearson", "spearman"}
    rows = [{"predicted": value} for value in (0.5, 0.7, 0.1, 0.2)]
    sets = [Example("", text=("x",), label=label, part=part) for label, part in zip("1011", "aabb", strict=True)]
    for order in ([0, 1, 2, 3], [2, 3, 0, 1]):
        found = figures("regression", [rows[i] for i in order], [sets[i] for i in order])
        assert set(found) == {"mse", "mse/a", "mse/b", "pearson/a", "spearman/a"}


def test_search_for_an_answer():
    assert search_of(EvaluateSection()) == {}
    assert search_of(EvaluateSection(beams=10, length_penalty=0.8, no_repeat_ngram=4)) == {
        "num_beams": 10, "length_penalty": 0.8, "no_repeat_ngram": 4
    }  # fmt: skip


def test_runs_of_before_keep_their_identity(lm_values):
    plain, beams = build_recipe(lm_values), build_recipe({**lm_values, "evaluate": {"beams": 4}})
    assert not {"tests", "learn_prompt", "test_prompts"} & set(identity(plain)["data"])
    assert not {"beams", "length_penalty"} & set(identity(plain)["evaluate"])
    assert identity(beams)["evaluate"]["beams"] == 4
    assert "origin" not in identity(read_recipe("e2e-twin"))


def test_figures_of_others_stand_beside_ours(lm_values, tmp_path, capsys):
    lm_values["train"]["steps"] = 1
    lm_values["origin"] = {
        "sources": {"paper": "paper: them"},
        "settings": {"paper": ["train.steps"]},
        "reported": {"paper": {"exact_match": 0.93, "choice": "+0.9 over LoRA"}},
    }
    run(build_recipe(lm_values), tmp_path / "run", progress=False)
    assert json.loads((tmp_path / "run/record.json").read_text())["origin"]["settings"] == {"paper": ["train.steps"]}
    call("evaluate", tmp_path / "run")
    shown = capsys.readouterr().out
    assert "paper" in shown
    assert "0.9300" in shown
    assert "+0.9 over LoRA" in shown
    call("evaluate", tmp_path / "run", "--json")
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["reported"]["paper"]["exact_match"] == 0.93
    # They are not figures of other records.
    recipe = tmp_path / "run/recipe.yaml"
    for other in (["--data.test-limit", "3"], ["--recipe", recipe, "--data.test-limit", "3"]):
        call("evaluate", tmp_path / "run", *other, "--json")
        assert "reported" not in json.loads(capsys.readouterr().out.splitlines()[-1])


def test_commands(capsys):
    call("recipes", "--json")
    assert set(PAPER) <= set(json.loads(capsys.readouterr().out))
    call("recipes", "list", "e2e")
    assert "e2e-gpt2-large" in capsys.readouterr().out
    call("recipes", "list", "commonsense")
    assert "commonsense-llama-3-70b-instruct-170k " in capsys.readouterr().out, "in full in 80 columns"
    call("recipes", "show", "e2e-gpt2-medium", "--full")
    shown = capsys.readouterr().out
    assert yaml.safe_load(shown)["train"]["seed"] == 110
    assert all("# " in line for line in shown.splitlines() if line.startswith("  ") and not line.endswith(":"))
    call("recipes", "check", "e2e-gpt2-medium", "--json")
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["layers"] == {"c_attn": 24}
    assert math.isfinite(found["memory"])
    assert found["memory"] > 355e6 * 4
