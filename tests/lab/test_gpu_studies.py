"""The studies for one large card: planned without one, and run with tiny models on tiny data of the same format."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import yaml

pytest.importorskip("peft")

from tiny_study import write_model

from dual_lora.lab.cost.calibrate import CARDS, SHARE, card
from dual_lora.lab.data.records import read_records
from dual_lora.lab.errors import UserError
from dual_lora.lab.judge import metamath
from dual_lora.lab.judge.peft import read_peft
from dual_lora.lab.recipe.read import build_recipe, read_recipe
from dual_lora.lab.run.scoring import answer_in
from dual_lora.lab.study.compare import compare
from dual_lora.lab.study.forecast import forecast
from dual_lora.lab.study.job import Job, data_digest
from dual_lora.lab.study.perform import _constant_answer_scores, _item_weights
from dual_lora.lab.study.read import build_study, read_study

# The eight tasks: labels, records of the published test sets, and about how many characters a question has.
TASKS = {
    "boolq": (["true", "false"], 3270, 120),
    "piqa": (["solution1", "solution2"], 1838, 420),
    "social_i_qa": (["answer1", "answer2", "answer3"], 1954, 300),
    "hellaswag": (["ending1", "ending2", "ending3", "ending4"], 10042, 640),
    "winogrande": (["option1", "option2"], 1267, 230),
    "ARC-Easy": (["answer1", "answer2", "answer3", "answer4"], 2376, 330),
    "ARC-Challenge": (["answer1", "answer2", "answer3", "answer4"], 1172, 380),
    "openbookqa": (["answer1", "answer2", "answer3", "answer4"], 500, 260),
}
# Of commonsense_170k, by task.
MIXTURE = {
    "boolq": 9427, "piqa": 16113, "social_i_qa": 33410, "hellaswag": 39905, "winogrande": 63238, "ARC-Easy": 2251,
    "ARC-Challenge": 1119, "openbookqa": 4957,
}  # fmt: skip
TRAINING = sum(MIXTURE.values())


def questions(task, count, draw, length):
    """Records of a commonsense task in the format of LLM-Adapters; the right label is the question's first letter's."""
    labels = TASKS[task][0]
    for number in range(count):
        right = draw.choice(labels)
        asked = f"{task} {number} {draw.random()} {right} " + "words " * (length // 8)
        listed = "" if task == "boolq" else "".join(f"{label.capitalize()}: a " for label in labels)
        form = f"Answer format: {'/'.join(labels)}"
        text = f"Please choose the correct answer to the question: {asked}\n\n{listed}\n\n{form}"
        yield {"instruction": text, "input": "", "output": f"the correct answer is {right}", "answer": right}


def commonsense(folder, train, test, length=None):
    """The training set and the eight test sets; `train` and `test` give the number of records."""
    draw = random.Random(0)
    (folder / "commonsense").mkdir(parents=True)
    mixed = [r for task in TASKS for r in questions(task, train(task), draw, length or TASKS[task][2])]
    (folder / "commonsense" / "commonsense_170k.json").write_text(json.dumps(mixed))
    for task in TASKS:
        (folder / "commonsense" / task).mkdir()
        records = list(questions(task, test(task), draw, length or TASKS[task][2]))
        (folder / "commonsense" / task / "test.json").write_text(json.dumps(records))


def mathematics(folder, train, test, call):
    """MetaMathQA and GSM8K as the hub has them, made into records by the module that does so for the real ones."""
    draw = random.Random(0)
    pairs = [(draw.randrange(10**6), draw.randrange(9)) for _ in range(train + test)]
    asked = [f"{i}: what is {a} and {b}? " + "Think well. " * 12 for i, (a, b) in enumerate(pairs)]
    meta = [{"query": q, "response": f"{a}+{b}. " * 20 + f"The answer is: {a + b}", "type": "GSM_Rephrased"}
            for q, (a, b) in zip(asked[:train], pairs, strict=False)]  # fmt: skip
    gsm = [
        {"question": q, "answer": f"Add.\n#### {a + b:,}"}
        for q, (a, b) in zip(asked[train:], pairs[train:], strict=True)
    ]
    (folder / "meta.json").write_text(json.dumps(meta))
    (folder / "gsm.jsonl").write_text("".join(json.dumps(r) + "\n" for r in gsm))
    call(
        ["--train", str(folder / "meta.json"), "--test", str(folder / "gsm.jsonl"), "--out", str(folder / "metamathqa")]
    )


@pytest.mark.slow
def test_the_paper_s_table_is_planned_under_eight_hours_of_one_card(tmp_path, monkeypatch, call):
    """By published figures, which the command says. Test sets have their published sizes; of the training records there
    is a twentieth, for the study writes its steps down.
    """
    monkeypatch.setenv("DUAL_LORA_DATA", str(tmp_path))
    commonsense(tmp_path, lambda task: MIXTURE[task] // 20, lambda task: TASKS[task][1])
    code, out, _ = call(
        "compare", "gpu-commonsense", "--out", tmp_path / "out", "--dry-run", "--on", "h100-80gb", "--json"
    )
    assert code == 0
    expected = json.loads(out)
    rows = expected["rows"]
    assert [row["method"] for row in rows] == ["lora", "dora", "clip", "surrogate"]
    assert {(row["trials"], row["seeds"], row["steps"]) for row in rows} == {(3, 3, 10600)}
    assert max(abs(row["mismatch"]) for row in rows) < 0.05
    assert 3600 < expected["seconds"] < 8 * 3600, expected["seconds"]
    assert max(row["peak_memory"] for row in rows) < 0.9 * expected["memory"]
    assert "published figures" in expected["basis"]
    assert "nothing was measured" in expected["basis"]
    recipe = read_recipe("commonsense-llama-3.2-1b-170k", read_study("gpu-commonsense").overrides)
    epochs = recipe.train.steps * recipe.train.batch_size / (TRAINING - recipe.data.holdout)
    assert epochs == pytest.approx(1, abs=0.01)
    assert not (tmp_path / "out").exists()


def smaller(name, folder, **over):
    """The shipped study with a tiny model and a few steps; methods, search, seeds and data are its own."""
    study = read_study(name).model_dump(mode="json")
    write_model(folder / "model")
    config = folder / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 1024}))
    for method in study["methods"].values():
        method.update({k: 4 for k in ("r",) if k in method})
    small = {
        "model": {"path": str(folder / "model"), "dtype": "float32"},
        "train": {"steps": 2, "gradient_checkpointing": False},
    }
    small["evaluate"] = {"max_new_tokens": 3}
    for part, values in over.items():
        small.setdefault(part, {}).update(values)
    for part, values in small.items():
        study["overrides"].setdefault(part, {}).update(values)
    study["search"] |= {"train": {"steps": 1}, "extend": 0}
    study["seeds"] = study["seeds"][:2]
    study["budget"]["tolerance"] = 0.5  # of a rank of 4, DoRA's magnitudes are a large part
    return build_study(study)


@pytest.mark.slow
def test_the_paper_s_table_runs(tmp_path, monkeypatch):
    """One training is judged on all eight tasks; the score is their mean, in which each counts alike."""
    monkeypatch.setenv("DUAL_LORA_DATA", str(tmp_path))
    counts = {task: 2 + number for number, task in enumerate(TASKS)}
    commonsense(tmp_path, lambda _: 6, counts.get, length=4)
    study = smaller("gpu-commonsense", tmp_path, data={"holdout": 8, "overlap": 0, "max_length": 512})
    results = compare(study, tmp_path / "out", progress=False)
    assert results["failed"] == []
    assert results["complete"]
    assert len(results["comparisons"]) == 3
    for m in results["methods"]:
        assert m["items"] == sum(counts.values())
        assert len(m["trials"]) == 3
        for seed in m["seeds"]:
            each = [seed["figures"][f"exact_match/{task}"] for task in TASKS]
            assert seed["score"] == pytest.approx(np.mean(each))
            assert seed["score"] == pytest.approx(seed["figures"]["exact_match"])


@pytest.mark.slow
def test_peft_s_setting_runs_and_its_results_are_peft_s(tmp_path, monkeypatch, call):
    monkeypatch.setenv("DUAL_LORA_DATA", str(tmp_path))
    mathematics(tmp_path, 40, 6, metamath.main)
    study = smaller("gpu-metamathqa", tmp_path, data={"holdout": 8})
    results = compare(study, tmp_path / "out", progress=False)
    assert results["failed"] == []
    assert results["complete"]
    code, _, _ = call("judge", tmp_path / "out", "--peft", tmp_path / "suite")
    assert code == 0
    written = sorted((tmp_path / "suite" / "results").glob("*.json"))
    assert len(written) == 4 * 2
    scores = read_peft(tmp_path / "suite")
    assert {row.metric for row in scores.rows} == {"test accuracy"}
    trained = json.loads(written[0].read_text())["run_info"]["train_config"]
    assert (trained["batch_size"], trained["max_seq_length"], trained["lr_scheduler"]) == (4, 768, "cosine")


@pytest.mark.slow
@pytest.mark.long
def test_peft_s_setting_is_planned(tmp_path, monkeypatch):
    monkeypatch.setenv("DUAL_LORA_DATA", str(tmp_path))
    mathematics(tmp_path, 2000, 1319, metamath.main)
    expected = forecast("gpu-metamathqa", tmp_path / "out", on="h100-80gb")
    assert {(row["trials"], row["seeds"], row["steps"]) for row in expected.rows} == {(3, 5, 5000)}
    assert max(abs(row["mismatch"]) for row in expected.rows) < 0.05
    assert 3600 < expected.seconds < 8 * 3600, expected.seconds
    assert max(row["peak_memory"] for row in expected.rows) < 0.9 * expected.memory


def test_the_recipe_is_peft_s_setting():
    recipe = read_recipe("metamathqa-llama-3.2-3b")
    train = recipe.train
    assert recipe.model.path == "meta-llama/Llama-3.2-3B"
    assert (train.steps, train.batch_size, train.weight_decay, train.schedule, train.lr_warmup) == (
        5000,
        4,
        0.1,
        "cosine",
        0.1,
    )
    assert (train.max_grad_norm, recipe.data.max_length, recipe.data.learn_prompt) == (1.0, 768, True)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("So it is 4.\nThe answer is: 16", "16"),
        ("#### 1,080", "1080"),
        ("The answer is 5. No, wait. The answer is 7.", "7"),
        ("The final answer is: $12%.\n\nMore text.", "12"),
        ("It is 4.", None),
        ("The answer is: ", None),
    ],
)
def test_numbers_at_the_end(text, number):
    assert metamath.number_in(text) == number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("4 * 4 = 16. The answer is: 16", "16"),
        ("The answer is: 16. The answer is: 17.\n\nQuestion: more", "17"),
        ("#### 18.0", "18.0"),
        ("The answer is: $25", "25"),
        ("I do not know.", ""),
    ],
)
def test_the_recipe_finds_the_number_in_a_text(text, number):
    assert answer_in(text, read_recipe("metamathqa-llama-3.2-3b").evaluate.extract, "1") == number


def test_what_is_no_mathematics_is_refused(tmp_path):
    (tmp_path / "other.json").write_text(json.dumps([{"query": "a", "reply": "b"}]))
    with pytest.raises(UserError, match=r"other.json, record 1: field 'response' is missing, found query, reply"):
        metamath.main(
            ["--train", str(tmp_path / "other.json"), "--test", str(tmp_path / "other.json"), "--out", str(tmp_path)]
        )
    (tmp_path / "none.json").write_text(json.dumps([{"query": "a", "response": "b", "question": "a", "answer": "b"}]))
    with pytest.raises(UserError, match="holds no record that ends with an answer"):
        metamath.main(
            ["--train", str(tmp_path / "none.json"), "--test", str(tmp_path / "none.json"), "--out", str(tmp_path)]
        )


def test_mathematics_keeps_what_it_was_given(tmp_path):
    mathematics(tmp_path, 5, 3, metamath.main)
    (first, *_) = read_records(str(tmp_path / "metamathqa" / "test.json"))
    assert first.values["instruction"].startswith("Question: 5: what is ")
    assert first.values["instruction"].endswith("Think step by step.\nAnswer:")
    assert float(first.values["answer"]) > 0
    assert first.values["output"].startswith("Add.\n#### ")


class Item:
    def __init__(self, part, target=""):
        self.part, self.target = part, target


def test_each_test_set_counts_alike():
    items = [Item("a", "x")] * 3 + [Item("b", "y")]
    right = np.array([1.0, 1.0, 1.0, 0.0])
    assert _item_weights(items, 4) == pytest.approx([2 / 3] * 3 + [2])
    assert (right * _item_weights(items, 4)).mean() == 0.5
    assert _item_weights([Item("")] * 5, 3) == [1.0] * 3, "items of a loss may be fewer than records"
    assert _constant_answer_scores("choice", items) == {"constant": 1.0}
    assert _constant_answer_scores("choice", [Item("", "x"), Item("", "x"), Item("", "y")]) == {
        "constant": pytest.approx(2 / 3)
    }


def test_a_changed_test_set_makes_another_run(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text('{"prompt": "a", "answer": "b"}\n')
    data = {"tests": {name: str(tmp_path / f"{name}.jsonl") for name in "ab"}}
    recipe = build_recipe({"model": {"path": "x"}, "data": data})

    def key():
        return Job("final", recipe, "", "t", "m", 1, "choice", "test", data=data_digest(recipe)).key

    first = key()
    (tmp_path / "b.jsonl").write_text('{"prompt": "a", "answer": "c"}\n')
    assert key() != first


def test_cards_say_where_their_figures_come_from():
    for known in CARDS:
        assert known.source, known.name
        assert known.cost.rate == SHARE * known.flops
        assert 1e13 < known.flops < 5e15
        assert 5e11 < known.bandwidth < 1e13
    assert card("H100-80GB").memory == 80e9
    with pytest.raises(UserError, match=r"no card 'h100-80g'\. Did you mean 'h100-80gb'"):
        card("h100-80g")


def test_a_card_is_for_a_plan_alone(call):
    code, _, err = call("compare", "quick", "--on", "h100-80gb")
    assert code == 1
    assert "--on names a card for --dry-run" in " ".join(err.split())


def test_every_study_for_a_card_is_tested_here():
    from dual_lora.lab.study.read import shipped_studies

    assert {name for name in shipped_studies() if name.startswith("gpu-")} == {"gpu-commonsense", "gpu-metamathqa"}
    for name in ("gpu-commonsense", "gpu-metamathqa"):
        assert {"clip", "surrogate"} == {
            m.fields["ste"] for m in read_study(name).methods.values() if m.name == "dual_lora"
        }
        assert yaml.safe_load(yaml.safe_dump(read_study(name).model_dump(mode="json")))
