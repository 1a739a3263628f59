"""What an advice is about: a recipe, a run's folder, or options of which a recipe is written."""

import json
import os

import pytest

from dual_lora.lab.advise.paired import paired_study
from dual_lora.lab.advise.source import source_of
from dual_lora.lab.errors import UserError
from dual_lora.lab.recipe.read import build_recipe, read_recipe


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, start in (("my data.csv", 0), ("test.csv", 100)):
        lines = [f"the sea {i} is warm,{'good' if i % 2 else 'bad'}\n" for i in range(start, start + 20)]
        (tmp_path / name).write_text("review,sentiment\n" + "".join(lines))
    return tmp_path


def test_options_make_a_recipe_the_same_one_each_time(here, tiny_encoder):
    given = None, str(tiny_encoder), "my data.csv", "test.csv", None
    file = source_of(*given)
    assert file.startswith("studies/my-data-")
    recipe = read_recipe(file)
    assert (recipe.model.head, recipe.data.test, recipe.data.fields["label"]) == (
        "classification",
        "test.csv",
        "sentiment",
    )
    assert source_of(*given) == file
    study = paired_study(file)
    assert study.overrides["train"]["keep_best"] is False
    assert read_recipe(file, study.overrides).train.validate_every is None
    (here / file).write_text("name: other\n")
    with pytest.raises(UserError, match="differs from what these options make"):
        source_of(*given)
    (here / file).unlink()
    os.mkfifo(here / file)
    with pytest.raises(UserError, match="differs from what these options make"):
        source_of(*given)


def test_a_recipe_with_other_records(here, lm_values, write_recipe, questions):
    recipe = write_recipe(lm_values)
    assert source_of(str(recipe), None, None, None, None) == str(recipe)
    file = source_of(str(recipe), None, None, str(questions / "train.json"), here / "out" / "study")
    assert file.startswith(str(here / "out"))
    assert read_recipe(file).data.test == str(questions / "train.json")
    assert read_recipe(file).train == build_recipe(lm_values).train


def test_too_little_is_said(here, call):
    code, _, err = call("advise", "--base", "x")
    assert code == 1
    assert "Missing here: --data, --test" in " ".join(err.split())


def test_a_dry_run_from_a_run_s_folder(here, lm_values, write_recipe, call):
    lm_values["data"]["overlap"] = "all"
    assert call("train", write_recipe(lm_values), "--out", "run", "--train.steps", 1)[0] == 0
    code, out, err = call("advise", "run", "--minutes", 600, "--dry-run", "--json")
    assert code == 0, err
    assert json.loads(out)["study"] == "advise-tiny"
