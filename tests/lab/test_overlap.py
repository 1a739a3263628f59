"""Parts of the data that are held out by group, and records that stand in two sets."""

from __future__ import annotations

import json
import os
import warnings

import pytest

pytest.importorskip("pydantic")

from tiny_study import write_study

from dual_lora.lab.data.examples import item_of, load_split
from dual_lora.lab.data.overlap import shared, undeclared
from dual_lora.lab.errors import UserError
from dual_lora.lab.recipe.read import identity, read_recipe, shipped_recipes
from dual_lora.lab.recipe.schema import DataSection, Recipe
from dual_lora.lab.study import plan
from dual_lora.lab.study.read import read_study


@pytest.fixture
def facts(tmp_path):
    """Ten prompts with three to seven answers each."""
    lines = [f"place {p}||answer {a} of {p}" for p in range(10) for a in range(3 + p % 5)]
    (tmp_path / "facts.txt").write_text("\n".join(lines) + "\n")
    return tmp_path / "facts.txt"


def parts(data):
    return [load_split(data, split) for split in ("train", "validation")]


def test_groups_are_held_out_whole(facts):
    by_line = DataSection(train=str(facts), holdout=12)
    train, held = parts(by_line)
    assert {item_of(e) for e in held} & {item_of(e) for e in train}, "by line, prompts lie on both sides"
    train, held = parts(by_line.model_copy(update={"group": "prompt"}))
    assert not {item_of(e) for e in held} & {item_of(e) for e in train}
    assert 12 <= len(held) < 12 + 7
    assert len(train) + len(held) == 50
    assert parts(by_line.model_copy(update={"group": "prompt"}))[1] == held, "always the same"
    assert parts(by_line.model_copy(update={"group": "prompt", "seed": 1}))[1] != held


def test_a_group_may_be_a_field_of_the_records(tmp_path):
    rows = [{"prompt": f"p{i}", "answer": "a", "document": i // 5} for i in range(40)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train, held = parts(DataSection(train=str(file), holdout=10, group="document"))
    assert {e.group for e in held}
    assert not {e.group for e in held} & {e.group for e in train}
    assert [e.group for e in held] == [e.group for e in sorted(held, key=lambda e: int(e.group))]
    with pytest.raises(UserError, match=r"rows.jsonl, line 1: field 'chapter' is missing"):
        parts(DataSection(train=str(file), holdout=10, group="chapter"))
    with pytest.raises(UserError, match=r"holdout is 39, which takes every group .* 8 in all"):
        parts(DataSection(train=str(file), holdout=39, group="document"))


def test_without_a_group_the_parts_are_what_they_were(facts):
    _, held = parts(DataSection(train=str(facts), holdout=5))
    assert [e.where.rpartition(" ")[2] for e in held] == ["4", "25", "27", "34", "49"] or len(held) == 5


def test_records_in_two_sets_are_counted_and_declared(facts):
    test = facts.with_name("test.txt")
    test.write_text("place 3||another answer\nplace 99||new\n")
    data = DataSection(train=str(facts), test=str(test), holdout=12, group="prompt")
    assert [found[:4] for found in shared(data)] in ([("test", "train", 1, 2)], [("validation", "test", 6, 13)])
    assert "data.overlap: " in undeclared(data)
    assert undeclared(data.model_copy(update={"overlap": "all"})) == ""
    assert undeclared(data.model_copy(update={"overlap": 6})) == ""
    by_line = undeclared(DataSection(train=str(facts), holdout=12))
    assert "validation records are training records too" in by_line
    assert "data.group: prompt" in by_line


def test_the_same_prompt_in_other_groups_is_shared_too(tmp_path):
    def records(name, document):
        file = tmp_path / name
        file.write_text("".join(f'{{"prompt": "{i} ?", "answer": "x", "of": "{document}{i}"}}\n' for i in range(8)))
        return str(file)

    data = DataSection(train=records("a.jsonl", "a"), test=records("b.jsonl", "b"), group="of")
    assert [found[:4] for found in shared(data)] == [("test", "train", 8, 8)]
    assert f"for example {shared(data)[0].first} and {shared(data)[0].like})" in undeclared(data)
    assert [[where.rpartition("/")[2] for where in found[4:]] for found in shared(data)] == [
        ["b.jsonl, line 1", "a.jsonl, line 1"]
    ]


def test_what_an_earlier_turn_asks_is_shared_too(tmp_path):
    def chat(*texts):
        return {"messages": [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(texts)]}

    (tmp_path / "train.jsonl").write_text(json.dumps(chat("sky?", "blue", "and fire?", "red")) + "\n")
    tests = [chat("sky?", "grey"), chat("and fire?", "red"), chat("sky?", "blue", "and fire?", "hot")]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(one) + "\n" for one in tests))
    data = DataSection(train=str(tmp_path / "train.jsonl"), test=str(tmp_path / "test.jsonl"))
    assert [(each.of, each.found, each.size) for each in shared(data)] == [("test", 2, 3)]
    greeted = [chat("hello", "hi", question, "yes") for question in ("sky?", "fire?")]
    for name, record in zip(("train", "test"), greeted, strict=True):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(record) + "\n")
    assert shared(data) == [], "a greeting is nothing that is asked"


def test_a_conversation_is_kept_with_one_that_goes_on_from_it(tmp_path):
    def chat(*texts):
        return {"messages": [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(texts)]}

    file = tmp_path / "chats.jsonl"
    some = [
        [chat(f"{i}?", "so"), chat(f"{i}?", "so", "why?", "as"), chat(f"{i}?", "no", "why?", "as")] for i in range(9)
    ]
    file.write_text("".join(json.dumps(one) + "\n" for each in some for one in each))
    for seed in range(5):
        data = DataSection(train=str(file), holdout=6, group="prompt", seed=seed)
        assert shared(data) == []
        assert [len(load_split(data, split)) for split in ("train", "validation")] == [21, 6]
    assert shared(data.model_copy(update={"group": None}))


@pytest.mark.timeout(60)
def test_a_conversation_of_answers_without_an_end_is_read_in_one_pass(tmp_path):
    """What is before each answer was kept as a text: gigabytes of a file of 1 MB, in a study's --dry-run too."""
    turns = [{"role": ("user", "assistant")[i % 2], "content": "sea"} for i in range(20_000)]
    (tmp_path / "train.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    (tmp_path / "test.jsonl").write_text(json.dumps({"messages": turns[:9998]}) + "\n")
    data = DataSection(train=str(tmp_path / "train.jsonl"), test=str(tmp_path / "test.jsonl"))
    assert [found[:4] for found in shared(data)] == [("test", "train", 1, 1)]


def test_a_study_refuses_what_its_recipe_does_not_declare(tmp_path):
    file = write_study(tmp_path)
    lines = [(tmp_path / name).read_text().splitlines(True) for name in ("train.jsonl", "test.jsonl")]
    (tmp_path / "test.jsonl").write_text("".join(lines[1] + lines[0][:3]))
    with pytest.raises(UserError, match=r"tasks.letters: .* of 43 test records are training records too .*overlap: 2"):
        plan.lay_out(plan.Plan.read(read_study(file)))
    study = read_study(write_study(tmp_path, overrides={"data": {"overlap": 3}}))
    said = plan.lay_out(plan.Plan.read(study))[0].overlap
    assert said.startswith("Of letters, ")
    assert said.endswith("; the recipe declares it.")
    memory = {"train": str(tmp_path / "train.jsonl"), "test": str(tmp_path / "train.jsonl"), "overlap": "all"}
    study = read_study(write_study(tmp_path, overrides={"data": memory}))
    assert (
        "48 of 64" in plan.lay_out(plan.Plan.read(study))[0].overlap
        or "64 test records" in plan.lay_out(plan.Plan.read(study))[0].overlap
    )


def test_a_run_warns_and_goes_on(lm_values, tmp_path):
    """The tiny questions are eight in all, so most of the test set was trained on."""
    from dual_lora.lab.recipe.read import build_recipe
    from dual_lora.lab.run.train import run

    lm_values["train"] |= {"steps": 1}
    with pytest.warns(UserWarning, match=r"16 of 16 test records are training records too"):
        run(build_recipe(lm_values), tmp_path / "run", progress=False)
    lm_values["data"]["overlap"] = 16
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="The sets")
        run(build_recipe(lm_values), tmp_path / "declared", progress=False)


def test_a_run_warns_of_labels_that_training_lacks(encoder_values, tmp_path):
    from dual_lora.lab.recipe.read import build_recipe
    from dual_lora.lab.run.train import run

    (test := tmp_path / "test.tsv").write_text("1\tthe sea is warm\nsplendid\tthe sea is red\n")
    encoder_values["data"]["test"] = str(test)
    encoder_values["train"] |= {"steps": 1}
    with pytest.warns(
        UserWarning, match=r"have labels that no training record has \('splendid'\): `dual-lora evaluate` stops"
    ):
        run(build_recipe(encoder_values), tmp_path / "run", progress=False)


def test_a_declaration_makes_no_other_run_and_a_group_does(lm_values):
    plain = Recipe.model_validate(lm_values)
    declared = plain.model_copy(update={"data": plain.data.model_copy(update={"overlap": 7})})
    grouped = plain.model_copy(update={"data": plain.data.model_copy(update={"group": "prompt"})})
    assert identity(plain) == identity(declared) != identity(grouped)
    assert not {"group", "overlap"} & set(identity(plain)["data"])


def test_shipped_recipes_declare_what_their_data_share():
    from dual_lora.lab.data.records import data_folder

    if not (data_folder() / "glue").is_dir():
        pytest.skip("the real data are not here")
    local = ("sst2-minilm", "cola-minilm", "arc-easy-smollm2", "boolq-smollm2", "e2e-smollm2", "glue-twin-cola")
    for name in local:
        data = read_recipe(name).data
        assert undeclared(data) == "", name
        assert not data.overlap or shared(data), f"{name} declares what it does not have"
    assert set(local) <= set(shipped_recipes())
    held = read_recipe("e2e-smollm2", {"data": {"holdout": 100}}).data
    assert shared(held) == [], "E2E is split by prompt"
    by_line = held.model_copy(update={"group": None})
    assert [found.found for found in shared(by_line)] == [50], "as the published studies had it"


@pytest.mark.parametrize("several", [False, True])
def test_a_file_that_has_changed_is_read_again(several, tmp_path):
    """Sets that were looked through are not read again, unless a file is another one by its size or time."""
    train, test = tmp_path / "train.jsonl", tmp_path / "test.jsonl"
    line = '{"prompt": "%s", "answer": "x"}\n'
    train.write_text(line % "a")
    test.write_text(line % "b")
    data = DataSection(train=str(train), **({"tests": {"one": str(test)}} if several else {"test": str(test)}))
    assert shared(data) == []
    train.write_text(line % "a" + line % "b")
    assert [each.of for each in shared(data)] == ["test"]
    test.write_text(line % "c")
    os.utime(test, ns=(1, 1))  # later writes of one moment may have one time
    assert shared(data) == []
    test.write_text(line % "b")
    assert [each.of for each in shared(data)] == ["test"]
    test.unlink()
    assert shared(data) == []
