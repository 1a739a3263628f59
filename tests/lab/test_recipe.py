"""Recipes: one source for YAML and flags; every wrong field or value is named with the nearest right one."""

import warnings

import pytest

from dual_lora.lab.advise.advise import folder_of
from dual_lora.lab.commands.parameters import flag_values, flags
from dual_lora.lab.errors import UserError
from dual_lora.lab.recipe.read import build_recipe, read_recipe, shipped_recipes
from dual_lora.lab.recipe.schema import Recipe

MINIMAL = {"model": {"path": "somewhere"}}


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_are_valid_and_survive_a_round_trip(name):
    import yaml

    recipe = read_recipe(name)
    assert recipe.name == name
    assert recipe.about
    assert build_recipe(yaml.safe_load(recipe.to_yaml())) == recipe


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": {}}, "field 'model.path' is missing: write path: …, or give --model.path"),
        ({}, r"field 'model' is missing: write model: \{path: …\}, or give --model.path\."),
        ({**MINIMAL, "trian": {}}, "unknown field 'trian'. Did you mean 'train'"),
        ({**MINIMAL, "train": {"learning_rat": 1}}, "unknown field 'train.learning_rat'. Did you mean 'learning_rate'"),
        ({**MINIMAL, "train": ["steps", 4]}, r"train is \['steps', 4\], expected a mapping of"),
        (
            {**MINIMAL, "evaluate": {"extract": "("}},
            r"evaluate.extract is '\(': '\(' is not a regular expression: missing",
        ),
        (
            {**MINIMAL, "method": "lora"},
            "method is 'lora', expected method: {name: lora}, or as a flag --method.name",
        ),
        ({**MINIMAL, "learning_rate": 1}, "unknown field 'learning_rate'. Did you mean 'train.learning_rate'"),
        ({**MINIMAL, "train": {"schedule": "cosin"}}, "train.schedule is 'cosin', expected.*Did you mean 'cosine'"),
        ({**MINIMAL, "data": {"fields": {"text_pairs": "x"}}}, "no format reads a field 'text_pairs'.*text_pair"),
        ({**MINIMAL, "train": {"steps": 0}}, "train.steps is 0: input should be greater than or equal to 1"),
        ({**MINIMAL, "train": {"steps": "many"}}, "train.steps is 'many'"),
        ({**MINIMAL, "train": {"learning_rate": -1}}, "train.learning_rate is -1"),
        ({**MINIMAL, "evaluate": {"tasks": ["choices"]}}, "evaluate.tasks.0 is 'choices'.*Did you mean 'choice'"),
        ({**MINIMAL, "train": {"steps": 0}, "data": {"holdout": -1}}, "data.holdout.*train.steps"),
    ],
)
def test_wrong_fields_and_values(values, message):
    with pytest.raises(UserError, match=message):
        build_recipe(values)


def test_overrides_lie_over_the_file(write_recipe):
    path = write_recipe({**MINIMAL, "method": {"name": "lora", "r": 8}, "train": {"steps": 5, "seed": 3}})
    recipe = read_recipe(path, {"method": {"r": 4}, "train": {"steps": 7}})
    assert recipe.method == {"name": "lora", "r": 4}
    assert (recipe.train.steps, recipe.train.seed) == (7, 3)


def test_another_method_does_not_inherit_settings():
    assert Recipe.merged({"method": {"name": "dual_lora", "r1": 8}}, {"method": {"name": "lora"}})["method"] == {
        "name": "lora"
    }


@pytest.mark.parametrize(
    ("given", "dropped"),
    [({"name": "lora"}, "r: 16"), ({"name": "lora", "r": 16}, ""), ({"r": 4}, ""), ({"name": "full"}, "")],
)
def test_settings_that_another_method_does_not_take_over_are_named(given, dropped, write_recipe):
    from dual_lora.lab.commands.train import _chosen, _warn_of_dropped

    path = str(write_recipe({**MINIMAL, "method": {"name": "dual_lora", "r": 16}}))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        _warn_of_dropped(path, {"method": given}, _chosen(path, {"method": given}, None, False))
    assert [f"does not take over the recipe's {dropped}." in str(one.message) for one in seen] == [True] * bool(dropped)


def test_a_name_that_is_no_methods_is_said_before_its_settings(write_recipe, recwarn):
    from dual_lora.lab.commands.train import _chosen, _warn_of_dropped

    path = str(write_recipe({**MINIMAL, "method": {"name": "dual_lora", "r": 16}}))
    given = {"method": {"name": "lorra"}}
    with pytest.raises(UserError, match="There is no method 'lorra'"):
        _warn_of_dropped(path, given, _chosen(path, given, None, False))
    assert not [one for one in recwarn if "take over" in str(one.message)]


@pytest.mark.parametrize(
    ("name", "field"),
    [("prompt_tuning", "num_virtual_tokens"), ("p_tuning", "num_virtual_tokens"), ("adaption_prompt", "adapter_len")],
)
def test_a_size_that_a_method_leaves_open_is_asked_for(name, field):
    from dual_lora.lab.model.methods import method_config

    with pytest.raises(UserError, match=f"method {name} needs {field}.*--method.{field} [0-9]+"):
        method_config({"name": name}, "causal", 10, [])


@pytest.mark.parametrize("written", [{"name": "dual_lora", "r": 64}, {"r": 64}])
@pytest.mark.parametrize("given", ["dual-lora", "Dual_LoRA", "dual_lora"])
def test_a_method_in_another_spelling_is_the_same(written, given):
    values = Recipe.merged({**MINIMAL, "method": written}, {"method": {"name": given}})
    assert build_recipe(values).method == {"name": "dual_lora", "r": 64}


def test_what_is_given_is_not_outweighed_by_what_the_recipe_says_otherwise():
    train = {"steps": 9, "rates": {".*": 2.0}, "arguments": {"warmup_steps": 50, "use_cpu": True}}
    given = {"epochs": 2.0, "lr_warmup": 0.1, "rates": {"lora_B": 4.0}}
    found = build_recipe(Recipe.merged({**MINIMAL, "train": train}, {"train": given})).train
    assert (found.steps, found.epochs, found.lr_warmup, found.arguments) == (None, 2.0, 0.1, {"use_cpu": True})
    assert list(found.rates.items()) == [("lora_B", 4.0), (".*", 2.0)], "the first that fits counts"
    same = Recipe.merged({"train": {"steps": 60, "epochs": 1.0}}, {"train": {"epochs": 1}})["train"]
    assert "steps" not in same, "epochs of the same number are asked for too"
    held = Recipe.merged({"data": {"validation": "v.jsonl", "train": "t.jsonl"}}, {"data": {"holdout": 20}})["data"]
    assert held == {"train": "t.jsonl", "holdout": 20}, "validation records would be taken in their place"
    kept = {"validation": "v.jsonl", "holdout": 20}
    assert Recipe.merged({"data": {"validation": "v.jsonl"}}, {"data": kept})["data"] == kept
    both = Recipe.merged({"train": train}, {"train": {"epochs": 2.0, "steps": 3, "arguments": {"warmup_steps": 1}}})[
        "train"
    ]
    assert (both["steps"], both["arguments"]["warmup_steps"]) == (3, 1)


@pytest.mark.parametrize(("path", "revision"), [("me/other", None), ("me/tiny", "v2")])
def test_another_base_has_not_the_revision_of_the_recipe_s(path, revision):
    values = {**MINIMAL, "model": {"path": "me/tiny", "revision": "v2"}}
    assert build_recipe(Recipe.merged(values, {"model": {"path": path}})).model.revision == revision
    assert build_recipe(Recipe.merged(values, {"model": {"path": path, "revision": "v3"}})).model.revision == "v3"


def test_every_field_of_a_recipe_is_a_flag_with_help():
    def leaves(model, prefix=""):
        for name, field in model.model_fields.items():
            inner = field.annotation
            if hasattr(inner, "model_fields"):
                yield from leaves(inner, f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}", field.description

    known = dict(leaves(Recipe))
    assert all(known.values())
    assert set(flags(Recipe).model_fields) == set(Recipe.model_fields)


def test_values_of_method_flags_are_yaml():
    given = flags(Recipe).model_validate({"method": {"r": "8", "use-dora": "true", "target_modules": "[q_proj]"}})
    assert flag_values(given) == {"method": {"r": 8, "use_dora": True, "target_modules": ["q_proj"]}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "not valid YAML"),
        ("name: a\n  model: {}\n", "is not valid YAML in line 2, column 8: mapping values are not allowed here."),
        ("just words", "holds a text, expected a mapping with model, method, data, train"),
        ("a:\n\tb: 1", "is not valid YAML: line 2 has a tab, expected blanks"),
        ("- 1", "holds a list"),
        ("", "is empty, expected a mapping"),
        ("!!python/name:x", "YAML"),
    ],
)
def test_broken_files(text, message, tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_recipe(path)


@pytest.mark.parametrize(
    "origin", ["a paper", [1], {"settings": "x"}, {"settings": {"a": 3}}, {"settings": {"a": ["b"]}, "sources": 3}]
)
def test_an_origin_of_another_shape_is_said(origin, tiny_values, write_recipe):
    with pytest.raises(UserError, match="origin"):
        read_recipe(write_recipe(tiny_values | {"origin": origin}), {"train": {"seed": 3}})


def test_missing_recipe_suggests_a_shipped_one():
    with pytest.raises(UserError, match=r"There is no recipe 'boolq-smolm2'\. Did you mean 'boolq-smollm2'"):
        read_recipe("boolq-smolm2")
    with pytest.raises(UserError, match=r"no recipe 'boolq'\. Did you mean 'boolq-"):
        read_recipe("boolq")
    with pytest.raises(UserError, match=r"no recipe file nowhere/r\.yaml"):
        read_recipe("nowhere/r.yaml")


def test_what_is_no_recipe_leads_to_one(tmp_path):
    (tmp_path / "reviews.csv").write_text("text,label\na,b\n")
    with pytest.raises(UserError, match=r"a file of records, expected a recipe\. `dual-lora recipes init"):
        read_recipe(tmp_path / "reviews.csv")
    with pytest.raises(UserError, match=r"is a folder without a recipe\.yaml"):
        read_recipe(tmp_path)
    (tmp_path / "syn.yaml").write_text("name: a\n")
    with pytest.raises(UserError, match=r"lists those that are shipped") as raised:
        read_recipe(tmp_path / "nothere.yaml")
    assert "Did you mean" not in str(raised.value), "the end of all names is no likeness"


def test_a_missing_recipe_file_suggests_its_neighbour(tmp_path):
    (tmp_path / "mine.yaml").write_text("")
    with pytest.raises(UserError, match=r"no recipe file .*miine\.yaml\. Did you mean 'mine\.yaml'\?"):
        read_recipe(tmp_path / "miine.yaml")


def test_a_field_with_a_point_is_shown_as_a_file_writes_it():
    with pytest.raises(UserError, match=r"unknown field 'train\.epochs': it is written train: \{epochs: …\} here"):
        build_recipe({"model": {"path": "x"}, "train.epochs": 1})


def test_a_recipe_without_a_name_has_that_of_its_file(tmp_path):
    """Two of them would share the folder of a run, or of an advice."""
    file = tmp_path / "my ü dpo.yaml"
    file.write_text("model: {path: my-model}\ndata: {train: my.jsonl}\n")
    assert read_recipe(file).name == "my-ü-dpo"
    assert folder_of(file, None).name == "advise-my-ü-dpo"
    assert read_recipe(file, {"name": "other"}).name == "other"
    file.write_text("name: mine\n" + file.read_text())
    assert read_recipe(file).name == "mine"
