"""Every record of a file gets a label with probabilities, a value, a choice or a text; what was interrupted goes on."""

import csv
import datetime
import decimal
import json
import os
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from dual_lora.lab.data.questions import read_questions
from dual_lora.lab.data.records import Record, read_records
from dual_lora.lab.errors import UserError
from dual_lora.lab.files.write import held
from dual_lora.lab.recipe.read import build_recipe
from dual_lora.lab.recipe.schema import DataSection
from dual_lora.lab.run import predict
from dual_lora.lab.run.results_file import check_cells, write_rows
from dual_lora.lab.run.train import run


def built(tmp_path_factory, name, values):
    folder = tmp_path_factory.mktemp(name) / "run"
    run(build_recipe(values), folder, progress=False)
    return folder


@pytest.fixture(scope="module")
def classifier(tmp_path_factory, tiny_encoder, reviews):
    """A run that tells warm (1) from cold (0), whose training records had no header."""
    data = {"train": str(reviews / "train.tsv"), "columns": ["label", "sentence"], "fields": {"text": "sentence"}}
    return built(tmp_path_factory, "classifier", {
        "model": {"path": str(tiny_encoder), "head": "classification"}, "method": {"name": "lora", "r": 4},
        "data": data, "train": {"steps": 40, "batch_size": 8, "learning_rate": 0.01},
    })  # fmt: skip


@pytest.fixture(scope="module")
def writer(tmp_path_factory, tiny_lm, questions):
    """A run of a language model."""
    return built(tmp_path_factory, "writer", {
        "model": {"path": str(tiny_lm)}, "method": {"name": "lora", "r": 4},
        "data": {"train": str(questions / "train.json")}, "train": {"steps": 3, "batch_size": 4},
        "evaluate": {"max_new_tokens": 3},
    })  # fmt: skip


@pytest.fixture
def sentences(tmp_path):
    """A CSV with a header and quoted cells, and no label."""
    file = tmp_path / "new.csv"
    with file.open("w", newline="") as opened:
        rows = csv.writer(opened)
        rows.writerow(["id", "sentence"])
        rows.writerows([f"n{i}", f"the sea, is {'warm' if i % 2 else 'cold'}"] for i in range(20))
    return file


def rows_of(file):
    if file.suffix == ".csv":
        with file.open(newline="") as opened:
            return list(csv.DictReader(opened))
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_labels_with_probabilities(classifier, sentences, call, tmp_path, suffix):
    out = tmp_path / f"labelled{suffix}"
    code, said, _ = call("predict", classifier, sentences, "--out", out, "--json")
    assert code == 0
    rows = rows_of(out)
    assert [row["id"] for row in rows] == [f"n{i}" for i in range(20)], "every field of a record, in their order"
    assert [row["predicted"] for row in rows] == [str(i % 2) for i in range(20)]
    told = rows[0] | (rows[0]["probabilities"] if suffix == ".jsonl" else {})
    names = ("0", "1") if suffix == ".jsonl" else ("p(0)", "p(1)")
    assert sum(float(told[name]) for name in names) == pytest.approx(1, abs=1e-5)
    assert float(rows[0]["probability"]) == max(float(told[name]) for name in names) > 0.5
    result = json.loads(said)
    assert result["counts"] == {"0": 10, "1": 10}
    assert (result["answered"], result["examples"], result["resumed_from"]) == (0, 20, 0)
    assert not list(tmp_path.glob("*.unfinished"))


def test_classes_that_are_numbers_stand_apart_from_their_counts(classifier, sentences, call, tmp_path):
    code, said, _ = call("predict", classifier, sentences, "--out", tmp_path / "labelled.csv")
    assert code == 0
    assert "0: 10 · 1: 10" in said


def test_probabilities_are_those_of_the_model_alone(classifier, sentences, call, tmp_path):
    """Whatever stands in the same batch."""
    for size in (1, 7):
        given = ("--out", tmp_path / f"{size}.jsonl", "--evaluate.batch-size", size)
        assert call("predict", classifier, sentences, *given)[0] == 0
    one, seven = (rows_of(tmp_path / f"{size}.jsonl") for size in (1, 7))
    for alone, together in zip(one, seven, strict=True):
        assert alone["probabilities"] == pytest.approx(together["probabilities"], abs=2e-5)


def test_records_with_labels_say_how_often_they_agree(classifier, reviews, call, tmp_path):
    out = tmp_path / "out.jsonl"
    code, said, _ = call("predict", classifier, reviews / "test.tsv", "--out", out)
    assert code == 0
    assert "agree" in said
    assert "24 of 24" in said
    assert all(row["predicted"] == row["label"] for row in rows_of(out))


def test_commands_that_load_a_model_say_so_at_once(writer, call, tmp_path):
    """A large one takes minutes, in which a silent command looks stuck. Standard output has the results alone."""
    for command, said in (
        (["generate", writer, "sky ?", "--max-new-tokens", 1], f"loading {writer}"),
        (["evaluate", writer, "--data.test", "x.json", "--evaluate.split", "test"], f"loading {writer}"),
        (["merge", writer, tmp_path / "merged"], f"merging {writer} into {tmp_path / 'merged'}"),
        (["verify", writer], f"comparing log-probabilities with those of {writer}"),
    ):
        _, out, heard = call(*command)
        assert heard.startswith(said), command
        assert said not in out


def test_texts_and_choices(writer, questions, call, tmp_path):
    out = tmp_path / "texts.jsonl"
    asked = [record | {"output": None} for record in json.loads((questions / "test.json").read_text())]
    for record in asked:
        del record["answer"], record["output"]
    (tmp_path / "asked.json").write_text(json.dumps(asked))
    assert call("predict", writer, tmp_path / "asked.json", "--out", out)[0] == 0
    rows = rows_of(out)
    assert len(rows) == len(asked)
    assert all(isinstance(row["predicted"], str) and row["instruction"] for row in rows)
    alone = json.loads(call("generate", writer, asked[0]["instruction"], "--max-new-tokens", 3, "--json")[1])
    assert rows[0]["predicted"] == alone["answer"].strip()
    given = ("--out", tmp_path / "c.csv", "--data.choices", "true", "false", "--limit", 5)
    assert call("predict", writer, tmp_path / "asked.json", *given)[0] == 0
    rows = rows_of(tmp_path / "c.csv")
    assert {row["predicted"] for row in rows} <= {"true", "false"}
    assert len(rows) == 5
    assert all(float(row["p(true)"]) + float(row["p(false)"]) == pytest.approx(1, abs=1e-5) for row in rows)
    again = ("--out", tmp_path / "again.csv", "--data.choices", "true", "true", "false", "--limit", 5)
    assert call("predict", writer, tmp_path / "asked.json", *again)[0] == 0
    assert rows_of(tmp_path / "again.csv") == rows, "a choice that is named twice is no likelier"


def test_what_was_interrupted_goes_on(classifier, sentences, call, tmp_path, monkeypatch):
    import dual_lora.lab.run.predict as predicting

    whole, parts = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
    small = ("--evaluate.batch-size", 2)
    assert call("predict", classifier, sentences, "--out", whole, *small)[0] == 0
    real, computed = predicting.class_rows, []

    def dying(asked):
        computed.append(len(asked.examples))
        if len(computed) == 2:
            raise KeyboardInterrupt
        return real(asked)

    monkeypatch.setattr(predicting, "BATCHES", 3)
    monkeypatch.setattr(predicting, "class_rows", dying)
    assert call("predict", classifier, sentences, "--out", parts, *small)[0] != 0
    unfinished = tmp_path / "parts.jsonl.unfinished"
    with unfinished.open("a") as file:
        file.write('{"predicted": "0", "prob')  # a kill in the middle of a line
    assert not parts.exists()
    code, said, _ = call("predict", classifier, sentences, "--out", parts, *small, "--json")
    assert code == 0
    assert json.loads(said)["resumed_from"] == 6
    assert sum(computed[2:]) == 14, "what was there is not computed again"
    assert parts.read_text() == whole.read_text()
    assert not unfinished.exists()


@pytest.mark.parametrize(
    "changed", ["adapter/adapter_model.safetensors", "adapter/adapter_config.json", "base", "model"]
)
def test_what_another_model_in_the_same_folder_said_is_not_gone_on_with(
    changed, writer, questions, call, tmp_path, monkeypatch, tiny_lm
):
    import dual_lora.lab.run.predict as predicting

    source = tmp_path / ("base" if changed == "model" else "adapter")
    shutil.copytree(tiny_lm, tmp_path / "base")
    shutil.copytree(writer / "adapter", tmp_path / "adapter")
    (tmp_path / "adapter/lab.json").unlink()  # an adapter of PEFT's own does not know its base's weights
    given = (source, questions / "test.json", "--out", tmp_path / "out.jsonl", "--data.max-length", 48)
    given += ("--evaluate.max-new-tokens", 1) if changed == "model" else ("--base", tmp_path / "base")
    with monkeypatch.context() as stopping:
        stopping.setattr(predicting, "write_rows", lambda *_: pytest.fail("stopped"))
        with pytest.raises(pytest.fail.Exception):
            call("predict", *given)
    file = tmp_path / changed
    file = tmp_path / "base/model.safetensors" if file.suffix not in (".json", ".safetensors") else file
    if file.suffix == ".json":
        file.write_text(json.dumps(json.loads(file.read_text()) | {"lora_alpha": 99}))
    else:
        twice = {name: weight * 2 for name, weight in load_file(file).items()}
        save_file(twice, file, metadata={"format": "pt"})
    code, _, said = call("predict", *given)
    assert code == 1
    assert "results of other records, another model or other settings" in " ".join(said.split())


def test_two_commands_do_not_write_the_same_results(classifier, sentences, call, tmp_path):
    with held(tmp_path / "out.csv"):
        code, _, err = call("predict", classifier, sentences, "--out", tmp_path / "out.csv")
    assert code == 1
    assert "is being written by another command" in " ".join(err.split())


def test_a_file_that_came_meanwhile_stays(classifier, sentences, call, tmp_path, monkeypatch):
    out = tmp_path / "out.csv"
    code, _, err = call("predict", classifier, sentences, "--out", tmp_path / "expected.csv")
    assert code == 0, err

    def late(*given):
        out.write_text("mine")
        return class_rows(*given)

    class_rows = predict.class_rows
    monkeypatch.setattr(predict, "class_rows", late)
    code, _, err = call("predict", classifier, sentences, "--out", out)
    assert code == 1
    assert "has come meanwhile" in err
    assert out.read_text() == "mine"
    out.unlink()
    monkeypatch.setattr(predict, "class_rows", lambda *_: pytest.fail("it was done again"))
    code, _, err = call("predict", classifier, sentences, "--out", out)
    assert code == 0, err
    assert out.read_text() == (tmp_path / "expected.csv").read_text()


def test_other_records_or_settings_are_not_gone_on_with(classifier, sentences, call, tmp_path):
    out = tmp_path / "out.jsonl"
    (tmp_path / "out.jsonl.unfinished").write_text('{"of": "something else"}\n{"predicted": "0"}\n')
    code, _, err = call("predict", classifier, sentences, "--out", out)
    assert code == 1
    assert "results of other records, another model or other settings" in err
    (tmp_path / "out.jsonl.unfinished").write_text("no json\n")
    assert "is damaged" in call("predict", classifier, sentences, "--out", out)[2]
    assert call("predict", classifier, sentences, "--out", out, "--overwrite")[0] == 0
    code, _, err = call("predict", classifier, sentences, "--out", out)
    assert code == 1
    assert "is there already: give --overwrite" in err
    (tmp_path / "link.jsonl.unfinished").symlink_to(tmp_path / "elsewhere")
    assert "is a link" in call("predict", classifier, sentences, "--out", tmp_path / "link.jsonl")[2]


@pytest.mark.parametrize(
    ("text", "given", "message"),
    [
        ("id,words,more\n1,warm,x\n", (), "3 columns, expected 2 (label, sentence)"),
        ("sentence,predicted\nwarm,1\n", (), "has a field 'predicted', which is the name of a result"),
        ("sentence\nwarm\n", ("--limit", 0), "expected at least 1 record"),
        ("sentence\nwarm\n", ("--out", "out.parquet"), "expected a .jsonl or a .csv file"),
        ("sentence\n", (), "holds no records"),
    ],
)
def test_errors_come_before_the_model(classifier, call, tmp_path, monkeypatch, text, given, message):
    monkeypatch.setattr("dual_lora.lab.model.opened.open_tuned", lambda *_: pytest.fail("the model was loaded"))
    (tmp_path / "x.csv").write_text(text)
    monkeypatch.chdir(tmp_path)
    code, _, err = call("predict", classifier, "x.csv", *given)
    assert code == 1
    assert message in " ".join(err.split())


def test_every_format_is_read_without_an_answer(tmp_path):
    def asked(lines, data=None, head="causal", name="x.jsonl"):
        (tmp_path / name).write_text(lines if isinstance(lines, str) else json.dumps(lines) + "\n")
        return read_questions(str(tmp_path / name), DataSection.model_validate(data or {}), head)[1][0]

    assert asked({"prompt": "a?"}).prompt == ({"role": "user", "content": "a?"},)
    assert asked({"q": "a?"}, {"fields": {"prompt": "q", "answer": "reply"}}).prompt[0]["content"] == "a?"
    assert asked({"prompt": "a?", "answer": "b"}).answer == "b"
    assert asked({"instruction": "a", "input": "b"}).prompt[0]["content"] == "a\n\nb"
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    assert list(asked({"messages": chat}).prompt) == chat
    assert list(asked({"messages": [*chat, {"role": "assistant", "content": "x"}]}).prompt) == chat
    assert asked("name[x]\n", {"format": "facts"}, name="x.txt").prompt[0]["content"] == "name[x]"
    assert asked("why?\n", name="x.txt").prompt[0]["content"] == "why?"
    assert asked("fine\n", head="classification", name="x.txt").text == ("fine",)
    assert asked({"text": "a", "text_pair": "b"}, head="classification").text == ("a", "b")
    assert asked({"text": "a", "label": 1}, head="classification").label == "1"
    with pytest.raises(
        UserError, match=r"no field to predict from\. Expected prompt, .* has message\. .*--data.fields.prompt mess"
    ):
        asked({"message": "a"})
    with pytest.raises(UserError, match=r"Name the field: --data.fields.messages dialog\."):
        asked({"dialog": chat})
    with pytest.raises(UserError, match=r"has Nr, note\. Name the field: --data\.fields\.prompt note\.$"):
        asked("Nr,note\n1,how warm is the sea ?\n2,why ?\n", {"format": "prompt"}, name="x.csv")
    with pytest.raises(
        UserError, match=r"Expected q; the record has prompt, answer\. .*--data.fields.prompt prompt\.$"
    ):
        asked({"prompt": "a?", "answer": "much longer"}, {"format": "prompt", "fields": {"prompt": "q"}})
    renamed = {"format": "text", "fields": {"text": "note", "label": "kind"}}
    dated = "day,message\n2027-01-05,why ?\n2027-01-06,how warm is the sea ?\n"
    for data, expected in ((renamed, "note"), ({}, "prompt, .*, text")):
        named = rf"Expected {expected}; the record has day, message\. Name the field: --data\.fields\.text message\.$"
        with pytest.raises(UserError, match=named):
            asked(dated, data, "classification", "x.csv")
    for short in ("day,message\n2027-01-05,ok\n", "nr,message\n1000000,ok\n"):  # longer than what they mark
        with pytest.raises(UserError, match=r"Name the field: --data\.fields\.text message\.$"):
            asked(short, {}, "classification", "x.csv")
    with pytest.raises(UserError, match=r"Name the field: --data\.fields\.text message\.$"):
        asked("who,message\nIda,why ?\nIvo,how warm is the sea ?\n", {}, "classification", "x.csv")
    with pytest.raises(
        UserError, match=r"x.jsonl, line 1: the record has only a text, and a language model needs a prompt"
    ):
        asked({"text": "a", "label": "b"}, {"format": "text"})
    with pytest.raises(UserError, match=r"the record has no field text|fit no format"):
        asked({"prompt": "a"}, head="classification")


def test_class_names_are_where_people_look_for_them(classifier, call, tmp_path, tiny_encoder):
    """In the card's code, which runs as it is, in the adapter's configuration, and in what is merged."""
    import re

    from peft import AutoPeftModelForSequenceClassification, PeftConfig

    adapter = classifier / "adapter"
    names = {0: "0", 1: "1"}
    told = PeftConfig.from_pretrained(str(adapter)).auto_mapping
    assert {int(i): name for i, name in told["id2label"].items()} == names
    assert told["base_model_class"] == "BertForSequenceClassification"
    more = re.search(r"id2label=(\{.*?\}), label2id=(\{.*?\})", (adapter / "README.md").read_text())
    assert eval(more[1]) == names
    model = AutoPeftModelForSequenceClassification.from_pretrained(
        str(adapter), id2label=eval(more[1]), label2id=eval(more[2])
    )
    assert model.config.id2label == names
    assert call("merge", classifier, tmp_path / "merged")[0] == 0
    assert json.loads((tmp_path / "merged/config.json").read_text())["label2id"] == {"0": 0, "1": 1}
    assert Path(tiny_encoder, "config.json").is_file()
    code, _, said = call("evaluate", tmp_path / "merged")
    assert code == 1
    assert "but a classifier (BertForSequenceClassification): `dual-lora predict` takes one" in " ".join(said.split())
    assert "use `dual-lora predict`" in " ".join(call("generate", classifier, "warm ?")[2].split())


@pytest.mark.parametrize(
    "rows",
    [
        ["[1]"],
        ['{"x": 1}'],
        ['{"predicted": [1], "probability": 1, "probabilities": {}}'],
        ['{"predicted": "0", "probability": "x", "probabilities": {}}'],
        ['{"predicted": "0", "probability": 1, "probabilities": "x"}'],
        ['{"predicted": "0", "probability": 1, "probabilities": {"0": 1, "1": 0}}'] * 21,
        ['{"predicted": "0", "probability": 1, "probabilities": {"0": 1, "a column of its own": 0}}'],
        ['{"predicted": "=1+1", "probability": 1, "probabilities": {"0": 1, "1": 0}}'],
        ['{"predicted": "0", "probability": NaN, "probabilities": {"0": NaN, "1": 0}}'],
        ['{"predicted": "a text"}'],
    ],
)
def test_results_that_no_session_has_left_are_an_error(rows, classifier, sentences, call, tmp_path, monkeypatch):
    monkeypatch.setattr("dual_lora.lab.run.predict._inputs_digest", lambda *_: "same")
    (tmp_path / "out.csv.unfinished").write_text("\n".join(['{"of": "same"}', *rows]) + "\n")
    code, _, said = call("predict", classifier, sentences, "--out", tmp_path / "out.csv")
    assert code == 1
    assert "the results so far, is damaged" in " ".join(said.split())


def test_results_that_seem_to_be_larger_than_the_memory_are_not_read_whole(
    classifier, sentences, call, tmp_path, monkeypatch
):
    monkeypatch.setattr("dual_lora.lab.run.predict._inputs_digest", lambda *_: "same")
    with (tmp_path / "out.csv.unfinished").open("w") as file:
        file.write('{"of": "same"}\n')
        file.truncate(2**36)  # which takes no room on the disk
    said = call("predict", classifier, sentences, "--out", tmp_path / "out.csv")[2]
    assert "the results so far, is damaged" in " ".join(said.split())


@pytest.mark.parametrize("linked", [True, False])
def test_a_file_of_the_user_is_not_written_over(linked, classifier, sentences, call, tmp_path):
    (mine := tmp_path / "mine").write_text("a text without a line feed")
    unfinished = tmp_path / "out.csv.unfinished"
    if linked:
        os.link(mine, unfinished)
    else:
        unfinished.write_text(mine.read_text())
    code, _, said = call("predict", classifier, sentences, "--out", tmp_path / "out.csv")
    assert code == 1
    assert ("is a link" if linked else "is damaged") in " ".join(said.split())
    assert unfinished.read_text() == mine.read_text() == "a text without a line feed"


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_dates_and_decimals_of_a_record_are_written(suffix, tmp_path):
    """The results of hours were there, and no command could write them."""
    values = {
        "when": datetime.datetime(2026, 1, 2, 3),
        "much": decimal.Decimal("1.50"),
        "days": [datetime.date(1, 2, 3)],
    }
    write_rows(tmp_path / f"out{suffix}", [Record(values, "here")], [{"predicted": "yes"}])
    (row,) = rows_of(tmp_path / f"out{suffix}")
    assert (row["when"], row["much"], row["predicted"]) == ("2026-01-02 03:00:00", "1.50", "yes")
    assert "0001-02-03" in str(row["days"])


def test_a_carriage_return_begins_no_row(tmp_path):
    write_rows(tmp_path / "r.csv", [Record({"id": "a\rb"}, "1")], [{"predicted": "x\r=1+cmd"}])
    with (tmp_path / "r.csv").open(newline="") as file:
        assert list(csv.reader(file)) == [["id", "predicted"], ["a\rb", "x\r=1+cmd"]]


@pytest.mark.parametrize(("said", "written"), [("=1+1", "'=1+1"), ("@x", "'@x"), ("+1", "+1"), ("-0.5", "-0.5")])
def test_what_a_model_says_is_no_formula(said, written, tmp_path):
    for name in ("a.csv", "a.jsonl"):
        write_rows(tmp_path / name, [Record({"id": "=2"}, "1")], [{"predicted": said}])
    (row,) = csv.DictReader((tmp_path / "a.csv").open(newline=""))
    assert row == {"id": "=2", "predicted": written}, "the records are the user's"
    assert json.loads((tmp_path / "a.jsonl").read_text())["predicted"] == said


def test_a_table_of_results_is_written_as_its_records_are(classifier, call, tmp_path):
    """A spreadsheet that writes semicolons and a byte order mark reads the results only with both. An empty cell is
    said."""
    file, out = tmp_path / "new.csv", tmp_path / "out.csv"
    file.write_bytes("\ufeffid;sentence\r\n1;the sea, it is wärm\r\n2;\r\n".encode())
    code, said, err = call("predict", classifier, file, "--out", out)
    assert code == 0, err
    assert "1 without a text, whose results mean nothing; the first:" in " ".join(said.replace("│", " ").split())
    assert "line 3" in said
    first = "\ufeffid;sentence;predicted;probability;p(0);p(1)\n1;the sea, it is wärm;"
    assert out.read_bytes().startswith(first.encode())
    assert [record.values["id"] for record in read_records(str(out))] == ["1", "2"]


def test_a_merged_classifier_says_what_its_run_does(classifier, sentences, call, tmp_path):
    assert call("merge", classifier, tmp_path / "merged")[0] == 0
    for source, out in ((classifier, "run"), (tmp_path / "merged", "merged")):
        code, _, said = call(
            "predict", source, sentences, "--data.fields.text", "sentence", "--out", tmp_path / f"{out}.csv"
        )
        assert code == 0, said
    one, other = (rows_of(tmp_path / f"{name}.csv") for name in ("run", "merged"))
    assert [row["predicted"] for row in one] == [row["predicted"] for row in other]
    assert [float(row["p(1)"]) for row in one] == pytest.approx([float(row["p(1)"]) for row in other], abs=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        {"id2label": {"0": "a", "1": "a"}},
        {"id2label": {"0": "a", "2": "b"}},
        {"id2label": {"0": "a", "1": "\ud800"}},
        {"id2label": {"0": "a", "1": ["b"]}},
        {"id2label": {"0": "a"}},
        {"id2label": {str(number): f"c{number}" for number in range(1001)}},
        {"id2label": None},
        {"problem_type": "multi_label_classification"},
        {"architectures": ["BertModel"]},
    ],
    ids=str,
)
def test_a_classifier_without_a_name_for_each_class_is_refused(config, sentences, call, tmp_path):
    known = {"architectures": ["BertForSequenceClassification"], "model_type": "bert", "id2label": {"0": "a", "1": "b"}}
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text(json.dumps(known | config))
    (tmp_path / "model/model.safetensors").touch()
    code, _, said = call("predict", tmp_path / "model", sentences, "--data.fields.text", "sentence")
    assert code == 1
    assert ("but a classifier" in said) == ("architectures" not in config)


def test_a_classifier_without_weights_for_its_head_is_refused(tiny_encoder, sentences, call, tmp_path):
    """A new head would say something of every record."""
    shutil.copytree(tiny_encoder, tmp_path / "model")
    file = tmp_path / "model/config.json"
    named = {"architectures": ["BertForSequenceClassification"], "id2label": {"0": "a", "1": "b"}}
    file.write_text(json.dumps(json.loads(file.read_text()) | named))
    code, _, said = call("predict", tmp_path / "model", sentences, "--data.fields.text", "sentence")
    assert code == 1
    assert "has no weights for classifier: copy it whole" in " ".join(said.split())


@pytest.mark.parametrize(("names", "why"), [(["a", "a"], "a name stands twice"), (["\ud800", "b"], "surrogates")])
def test_class_names_of_a_stranger_are_names(names, why, classifier, sentences, call, tmp_path):
    shutil.copytree(classifier, tmp_path / "run")
    note = json.loads((tmp_path / "run/adapter/lab.json").read_text())
    (tmp_path / "run/adapter/lab.json").write_text(json.dumps(note | {"classes": names}))
    code, _, said = call("predict", tmp_path / "run", sentences, "--out", tmp_path / "out.csv")
    assert code == 1
    assert "the note of the recipe, is damaged" in " ".join(said.split())
    assert why in " ".join(said.split())


def test_records_that_share_no_field_make_no_endless_table(tmp_path):
    records = [Record({"text": "a", f"k{i}": 1}, "") for i in range(5000)]
    check_cells(tmp_path / "a.jsonl", records)
    with pytest.raises(UserError, match="5,000 records with 5,001 different fields would be nearly empty"):
        check_cells(tmp_path / "a.csv", records)
    check_cells(tmp_path / "a.csv", [Record(dict.fromkeys(map(str, range(5000)), 1), "")] * 5000)
