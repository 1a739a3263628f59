"""`recipes init` writes a recipe that trains; `check-data` says what would be trained on."""

import json
from pathlib import Path

import pytest
import yaml

from dual_lora.lab.data.check import check
from dual_lora.lab.data.guess import guess
from dual_lora.lab.data.records import Record, read_records
from dual_lora.lab.errors import UserError
from dual_lora.lab.recipe.read import read_recipe
from dual_lora.lab.recipe.schema import DataSection

TEXTS = [f"the sea is {word} ?" for word in ("red", "blue", "warm", "cold")]


def records(*rows):
    return [Record(row, f"row {number}") for number, row in enumerate(rows, 1)]


@pytest.mark.parametrize(
    ("rows", "form", "head", "fields"),
    [
        ([{"text": t, "label": "ab"[i % 2]} for i, t in enumerate(TEXTS)], "text", "classification", {}),
        (
            [{"id": i, "Review": t, "Sentiment": i % 2} for i, t in enumerate(TEXTS)],
            "text",
            "classification",
            {"text": "Review", "label": "Sentiment"},
        ),
        (
            [{"sentence1": t, "sentence2": t, "score": f"{i}.5"} for i, t in enumerate(TEXTS)],
            "text",
            "regression",
            {"text": "sentence1", "text_pair": "sentence2", "label": "score"},
        ),
        (
            [{"question1": t, "question2": f"is {t}", "is_duplicate": i % 2} for i, t in enumerate(TEXTS * 4)],
            "text",
            "classification",
            {"text": "question1", "label": "is_duplicate", "text_pair": "question2"},
        ),
        (
            [{"text": t, "tag_1": "ab"[i % 2], "tag_2": "cd"[i % 2], "label": i % 2} for i, t in enumerate(TEXTS)],
            "text",
            "classification",
            {},
        ),
        ([{"question": t, "answer": t} for t in TEXTS], "prompt", "causal", {"prompt": "question"}),
        ([{"prompt": t, "completion": t} for t in TEXTS], "prompt", "causal", {"answer": "completion"}),
        ([{"instruction": t, "input": "", "output": t} for t in TEXTS], "instruction", "causal", {}),
        ([{"conversations": [{"role": "user", "content": "?"}]}], "chat", "causal", {"messages": "conversations"}),
        ([{"line": f"sea||{t}"} for t in TEXTS], "facts", "causal", {}),
        (
            [{"a": t * 3, "b": "xy"[i % 2]} for i, t in enumerate(TEXTS * 4)],
            "text",
            "classification",
            {"text": "a", "label": "b"},
        ),
        ([{"de": t, "en": t[::-1]} for t in TEXTS], "prompt", "causal", {"prompt": "de", "answer": "en"}),
        (
            [{"Text": t, "Klasse": "xy"[i == 2]} for i, t in enumerate(TEXTS[:3])],
            "text",
            "classification",
            {"text": "Text", "label": "Klasse"},
        ),
        (
            [{"Tag": f"{i + 1}.1.2027", "Nachricht": t, "Art": "xy"[i == 2]} for i, t in enumerate(TEXTS * 4)],
            "text",
            "classification",
            {"text": "Nachricht", "label": "Art"},
        ),
        (  # dates repeat as classes do
            [{"Data": f"{i % 2 + 1}.1.2027", "Treść": t, "Pilność (1-6)": i % 3} for i, t in enumerate(TEXTS * 6)],
            "text",
            "classification",
            {"text": "Treść", "label": "Pilność (1-6)"},
        ),
        ([{"Kommentar": t} for t in TEXTS], "document", "causal", {"text": "Kommentar"}),
    ],
    ids=[
        *(
            "labelled",
            "named",
            "numbers",
            "numbered pair",
            "tags",
            "question",
            "completion",
            "alpaca",
            "chat",
            "facts",
            "unnamed",
            "pairs",
        ),
        *("few", "dated", "dates repeat", "alone"),
    ],
)
def test_the_task_is_guessed_from_the_columns(rows, form, head, fields):
    found = guess(records(*rows))
    assert (found.format, found.head, found.fields) == (form, head, fields)


def test_columns_that_say_nothing_are_an_error():
    rows = [{"a": i, "b": t, "c": t} for i, t in enumerate(TEXTS)]
    with pytest.raises(UserError, match="not clear from the columns a, b, c: name a text and its class"):
        guess(records(*rows))
    for marks in ("2027-01-05", "5.1.2027 10:00", "17"):  # ask nothing
        with pytest.raises(UserError, match="not clear from the columns mark, text"):
            guess(records(*({"mark": marks, "text": t} for t in TEXTS)))
    assert guess(records(*rows), {"prompt": "b", "answer": "c"}).fields == {"prompt": "b", "answer": "c"}
    with pytest.raises(UserError, match="There is no column 'd' for answer: found a, b, c"):
        guess(records(*rows), {"prompt": "b", "answer": "d"})


def test_a_label_that_is_none_is_named():
    """One that a person named is taken or refused, never exchanged for another column."""
    rows = [{"text": t, "label": "ab"[i % 2], "other": t + "!"} for i, t in enumerate(TEXTS)]
    with pytest.raises(UserError, match="column 'other' has 4 different values in 4 records"):
        guess(records(*rows), {"text": "text", "label": "other"})
    rows = [{"text": t, "topic": "ab"[i % 2]} for i, t in enumerate(TEXTS * 5)]
    for named in ({"text": "text", "label": "text"}, {"label": "text"}):  # not exchanged for the topic
        with pytest.raises(UserError, match="column 'text' is named as the label"):
            guess(records(*rows), named)
    with pytest.raises(UserError, match="column 'labels' holds lists, expected one class"):
        guess(records(*({"text": t, "labels": ["a"]} for t in TEXTS)))
    with pytest.raises(UserError, match=r"column 'stars' holds numbers with a comma \('0,5'\)"):
        guess(records(*({"text": t, "stars": f"{i},5"} for i, t in enumerate(TEXTS))))


def test_a_named_label_needs_no_name_for_the_text():
    """A text that is found where nothing is named is also found where the label is."""
    rows = [{"Kanal": "xy"[i % 2], "Treść": t, "Pilność": i % 3} for i, t in enumerate(TEXTS * 6)]
    found = guess(records(*rows))
    assert (found.fields, found.rivals) == ({"text": "Treść", "label": "Kanal"}, ["Pilność"])
    found = guess(records(*rows), {"label": "Pilność"})
    assert (found.fields, found.classes, found.rivals) == ({"text": "Treść", "label": "Pilność"}, ["0", "1", "2"], [])
    with pytest.raises(UserError, match="column 'Nr' has 24 different values in 24 records"):
        guess(records(*({**row, "Nr": f"n{i}"} for i, row in enumerate(rows))), {"label": "Nr"})


def test_the_second_text_is_named():
    """A column that a person named is used as what it is named, or refused; never left out without a word."""
    rows = [{"frage": t + " Wirklich?", "antwort": t * 3, "passt": "ab"[i % 2]} for i, t in enumerate(TEXTS * 4)]
    pair = {"text": "frage", "text_pair": "antwort", "label": "passt"}
    for named in (pair, {"text_pair": "antwort", "label": "passt"}, {"text_pair": "antwort"}):
        assert guess(records(*rows), named).fields == pair
    numbered = [{"question1": t, "question2": f"is {t}", "label": i % 2} for i, t in enumerate(TEXTS)]
    assert guess(records(*numbered), {"text_pair": "question1"}).fields == {
        "text": "question2",
        "text_pair": "question1",
    }
    with pytest.raises(UserError, match="'antwort' is named as the text and as the text_pair: name another column"):
        guess(records(*rows), {"text": "antwort", "text_pair": "antwort"})
    for named in ("text", "text_pair", "label"):
        with pytest.raises(UserError, match=f"'passt' is named as the {named}, and the others look like .* prompt"):
            guess(records(*rows), {"prompt": "frage", "answer": "antwort", named: "passt"})


@pytest.fixture
def table(tmp_path, monkeypatch):
    """Reviews with a class, as people have them."""
    monkeypatch.chdir(tmp_path)
    lines = [f"{i},the sea is {'warm' if i % 2 else 'cold'} ?,{'good' if i % 2 else 'bad'}\n" for i in range(40)]
    (tmp_path / "my reviews.csv").write_text("id,review,sentiment\n" + "".join(lines))
    return tmp_path / "my reviews.csv"


def test_a_first_recipe_trains(table, tiny_encoder, call):
    code, out, err = call("recipes", "init", "mine.yaml", "--data", table.name, "--base", tiny_encoder)
    assert code == 0, err
    assert "review is the text, sentiment is the label" in " ".join(out.split())
    recipe = read_recipe("mine.yaml")
    assert (recipe.name, recipe.model.head, recipe.data.holdout) == ("mine", "classification", 4)
    assert recipe.data.fields == {"text": "review", "label": "sentiment"}
    assert all(
        line.count("#")
        for line in Path("mine.yaml").read_text().splitlines()
        if "quantize" in line or "patience" in line
    )
    code, out, err = call("train", "mine.yaml", "--train.steps", 1, "--train.validate-every", 1, "--json")
    assert code == 0, err
    code, _, err = call("recipes", "init", "mine.yaml", "--data", table.name, "--base", tiny_encoder)
    assert code == 1
    assert "exists already" in err
    assert "Write another one (mine-2.yaml), or go on with this one (`dual-lora check-data mine.yaml`)" in err


def test_a_first_recipe_names_what_else_could_be_the_label(table, tiny_encoder, call):
    """By a name that is known or by values; of a table that a person reads again after months."""
    head, *lines = table.read_text().splitlines()
    extra = [f"{line},{i % 3},{i % 5},2027-01-0{i % 2 + 1},n{i}" for i, line in enumerate(lines)]
    table.write_text("\n".join([f"{head},stars,kind: a,day,no", *extra]) + "\n")
    given = ("--data", table.name, "--base", tiny_encoder)
    code, out, err = call("recipes", "init", "mine.yaml", *given)
    assert code == 0, err
    assert "or --label stars, --label 'kind: a'" in " ".join(out.replace("│", "").split())
    said = "# The label is guessed. It could also be: stars, 'kind: a' (fields: {label: COLUMN})"
    assert said in Path("mine.yaml").read_text()
    assert read_recipe("mine.yaml").data.fields == {"text": "review", "label": "sentiment"}
    assert call("recipes", "init", "named.yaml", *given, "--label", "stars")[0] == 0
    assert "could also be" not in Path("named.yaml").read_text()


@pytest.mark.parametrize(("words", "rows", "times"), [(4, 8, 1), (100, 4, 2), (900, 1, 8)])
def test_a_first_recipe_of_a_language_model_fits_into_a_small_memory(words, rows, times, tmp_path, tiny_lm, call):
    """Its logits are the most: eight records a step, whatever their length."""
    lines = [json.dumps({"prompt": "is it red ? " * words, "answer": f"{i}"}) + "\n" for i in range(20)]
    (tmp_path / "x.jsonl").write_text("".join(lines))
    file = tmp_path / "mine.yaml"
    code, _, err = call("recipes", "init", file, "--data", tmp_path / "x.jsonl", "--base", tiny_lm)
    assert code == 0, err
    recipe = read_recipe(file)
    assert (recipe.train.batch_size, recipe.train.accumulate) == (rows, times)
    assert recipe.evaluate.batch_size == (16 if rows == 8 else 2 * rows), "a validation holds logits too"


def test_columns_without_a_name(tmp_path, tiny_encoder, call, monkeypatch):
    """pandas writes one on the left, for its index; a spreadsheet leaves empty ones on the right."""
    monkeypatch.chdir(tmp_path)
    rows = [f"{i},the sea is {i} ?,{'good' if i % 3 else 'bad'}" for i in range(30)]
    tables = {"index": (",body of it,kind", rows), "margin": ("no,body of it,kind,,", [f"{row},," for row in rows])}
    for name, (head, lines) in tables.items():
        Path(f"{name}.csv").write_text("\n".join([head, *lines]) + "\n")
        code, out, err = call("recipes", "init", f"{name}.yaml", "--data", f"{name}.csv", "--base", tiny_encoder)
        assert code == 0, err
        assert read_recipe(f"{name}.yaml").data.fields == {"text": "body of it", "label": "kind"}
        assert ("(a column without a name) is not used" in out) == (name == "index")
        assert "empty cells" not in call("check-data", f"{name}.yaml")[1]
    Path("note.csv").write_text("text,label,\na b,x,\nc d,y,look\n")
    assert [record.values[""] for record in read_records("note.csv")] == ["", "look"], "a cell is never lost"
    Path("twice.csv").write_text("text,,,label\na b,1,2,x\n")
    with pytest.raises(UserError, match="has two columns without a name: give one of them another name"):
        read_records("twice.csv")


def test_a_first_recipe_keeps_conversations_together(tmp_path, tiny_lm, call, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def chat(number):
        turns = [{"role": "user", "content": f"the sea {number} ?"}, {"role": "assistant", "content": "red"}]
        return {"messages": turns}

    Path("x.jsonl").write_text("".join(json.dumps(chat(i % 20)) + "\n" for i in range(40)))
    code, _, err = call("recipes", "init", "x.yaml", "--data", "x.jsonl", "--base", tiny_lm)
    assert code == 0, err
    assert read_recipe("x.yaml").data.group == "prompt"
    assert "overlap" not in call("check-data", "x.yaml")[1]


def test_a_first_recipe_holds_no_text_out_that_it_trains_on(tmp_path, tiny_encoder, call, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for often, group in ((2, "prompt"), (40, None)):  # 40 of a kind: one text would be all of the validation records
        rows = [f"the sea is {'warm ' * (1 + i // often)}?,{'good' if i % 3 else 'bad'}\n" for i in range(80)]
        Path("x.csv").write_text("text,label\n" + "".join(rows))
        code, _, err = call("recipes", "init", f"x{often}.yaml", "--data", "x.csv", "--base", tiny_encoder)
        assert code == 0, err
        recipe = read_recipe(f"x{often}.yaml")
        assert recipe.data.group == group
    assert "overlap" not in call("check-data", "x2.yaml")[1]


def test_a_first_recipe_for_a_text_counts_records_as_a_run_does(tmp_path, tiny_lm, call, monkeypatch):
    """A file of sentences is one text, of which nothing can be held out."""
    monkeypatch.chdir(tmp_path)
    Path("diary.txt").write_text("".join(f"the sea is red ? {i}\n" for i in range(60)))
    code, out, err = call("recipes", "init", "x.yaml", "--data", "diary.txt", "--base", tiny_lm)
    assert code == 0, err
    assert "1 text, none held out" in out
    assert "diary.txt: 1 text, all of which is learned." in Path("x.yaml").read_text()
    assert (read_recipe("x.yaml").train.batch_size, read_recipe("x.yaml").train.accumulate) == (2, 4)
    code, out, err = call("check-data", "x.yaml", "--data.max-length", 64)
    assert code == 0, err
    assert "of at most 64 tokens, into which the text is cut" in out
    code, _, err = call("train", "x.yaml", "--train.steps", 1, "--data.max-length", 64, "--train.batch-size", 1)
    assert code == 0, err
    assert "teaches the end" not in err, "a piece of a text has no end"


def test_a_first_recipe_takes_joined_sources(table, tiny_encoder, call):
    rows = table.read_text().splitlines(keepends=True)
    for name, part in (("a.csv", rows[1:20]), ("b.csv", rows[20:])):
        Path(name).write_text(rows[0] + "".join(part))
    sources = "a.csv + b.csv"
    code, out, err = call("recipes", "init", "joined.yaml", "--data", sources, "--base", tiny_encoder)
    assert code == 0, err
    assert f"{len(rows) - 1}, 4 of them held out" in out
    assert call("check-data", "joined.yaml")[0] == 0
    assert read_recipe("joined.yaml").data.train == sources


def test_a_name_with_blanks_becomes_a_folders(table, tiny_encoder, call):
    code, _, err = call("recipes", "init", "my ü recipe.yaml", "--data", table.name, "--base", tiny_encoder)
    assert code == 0, err
    assert read_recipe("my ü recipe.yaml").name == "my-ü-recipe"
    assert "dual-lora train 'my ü recipe.yaml'\n" in Path("my ü recipe.yaml").read_text()
    with pytest.raises(UserError, match=r"name is 'a b', expected letters, digits, .* because it names a folder"):
        read_recipe("my ü recipe.yaml", {"name": "a b"})
    with pytest.raises(UserError, match=r"attention is 'me/mine', expected letters, digits and '_' alone"):
        read_recipe("my ü recipe.yaml", {"model": {"attention": "me/mine"}})


def test_preferences_begin_with_dpo(tmp_path, tiny_lm, call, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"is {i} red ?", "chosen": "true", "rejected": "false"} for i in range(40)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, _, err = call("recipes", "init", "mine.yaml", "--data", "x.jsonl", "--base", tiny_lm)
    assert code == 0, err
    recipe = read_recipe("mine.yaml")
    assert (recipe.objective.name, recipe.data.format, recipe.train.learning_rate) == ("dpo", "preference", 1e-4)
    assert recipe.data.max_length == 128  # with room for a template
    assert (recipe.train.batch_size, recipe.train.accumulate) == (4, 2)  # of two answers each


@pytest.mark.parametrize("name", ["x.jsonl", "x\nname: other.jsonl", "x\u2028name: other.jsonl"])
def test_a_class_or_a_file_of_several_lines_stays_out_of_the_comments(name, tmp_path, tiny_encoder, call, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"text": f"sea {i}", "label": "good\nname: other" if i % 2 else "bad"} for i in range(8)]
    (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, _, err = call("recipes", "init", "mine.yaml", "--data", name, "--base", tiny_encoder)
    assert code == 0, err
    written = yaml.safe_load(Path("mine.yaml").read_text())
    assert (written["name"], written["data"]["train"]) == ("mine", name)


def checked(call, *arguments):
    code, out, err = call("check-data", *arguments, "--json")
    assert out, err
    return code, json.loads(out)


def test_what_would_be_trained_on(table, tiny_encoder, call):
    code, found = checked(call, table, "--base", tiny_encoder)
    (train,) = found["sets"]
    assert (code, found["good"], found["head"]) == (0, True, "classification")
    assert (train["records"], train["labels"], train["errors"]) == (40, {"bad": 20, "good": 20}, [])
    assert train["duplicates"] == 38
    assert train["lengths"] == {"median": 5, "95 %": 5, "longest": 5}
    assert train["columns"] == ["id", "review", "sentiment"]


def test_every_command_takes_the_columns_that_check_data_names(tmp_path, tiny_encoder, call, monkeypatch):
    """Without these options train and predict raise an error, and it names the same ones."""
    monkeypatch.chdir(tmp_path)
    lines = [f"{i};the sea is {'warm' if i % 2 else 'cold'} ?;{'gut' if i % 2 else 'öde'}\n" for i in range(20)]
    Path("x.csv").write_text("Nr;Text;Klasse\n" + "".join(lines))
    Path("named.csv").write_text("text,label\n" + "the sea is warm ?,gut\nthe sea is cold ?,öde\n" * 4)
    Path("odd.csv").write_text("a,b,c\n1,x y,z\n2,y x,w\n")
    code, out, err = call("check-data", "x.csv")
    said = " ".join(out.replace("│", " ").split())
    options = "--data.fields.text Text --data.fields.label Klasse"
    assert (code, "Nr is not used, Text is the text, Klasse is the label" in said) == (0, True), err
    assert f"options {options}, for train and predict " in said
    code, _, err = call("check-data", "odd.csv")
    assert "(--data.fields.text and --data.fields.label, or --data.fields.prompt" in " ".join(err.split())
    train = ("train", "--model.path", tiny_encoder, "--model.head", "classification", "--train.steps", 1)
    code, _, err = call(*train, "--data.train", "x.csv", "--out", "run")
    assert f"Say which field is which: {options}, in a recipe" in err
    code, _, err = call(*train, "--data.train", "named.csv", "--out", "named")
    assert code == 0, err
    code, _, err = call("predict", "named", "x.csv")
    assert f"Name the field: {options}." in err
    assert call("predict", "named", "x.csv", *options.split())[0] == 0
    assert call(*train, "--data.train", "x.csv", *options.split(), "--out", "run")[0] == 0


def test_records_that_cannot_be_used_end_it_with_status_one(table, call):
    with table.open("a") as file:
        file.write("41,,good\n42,the ice,\n43,the sea is warm ?,bad\n")
    code, found = checked(call, table, "--test", table)
    train, test = found["sets"]
    assert code == 1
    assert train["empty"] == {"review": 1, "sentiment": 1}
    assert [error.partition(":")[0].rpartition(" ")[2] for error in train["errors"]] == ["42", "43"]
    assert any("several labels" in warning for warning in train["warnings"])
    assert test["records"] == 43


def test_one_reason_is_said_once(table, call):
    fields = ("--data.fields.text", "review", "--data.fields.label", "sentimnt")
    code, found = checked(call, table, "--data.format", "text", *fields)
    (error,) = found["sets"][0]["errors"]
    assert code == 1
    assert "line 2: field 'sentimnt' is missing, found id, review, sentiment. Did you mean 'sentiment'?" in error
    assert error.endswith("The same in 39 more records.")
    code, out, _ = call("check-data", table, "--test", "none.csv")
    assert code == 1
    assert "format   ," not in out


def test_sets_that_are_not_apart_and_other_labels(table, tmp_path, call):
    other = tmp_path / "test.csv"
    other.write_text("review,sentiment\nthe sea is warm ?,good\n")
    code, found = checked(call, table, "--test", other)
    assert code == 0
    assert any("1 of 1 test records are training records too" in text for text in found["sets"][0]["warnings"])
    broken = tmp_path / "broken.csv"
    broken.write_text(table.read_text() + "9999,,good\n")
    code, found = checked(call, broken, "--test", other, "--data.holdout", 4)
    assert code == 1
    (why,) = (text for text in found["sets"][0]["warnings"] if "1 of 1 test records are training records too" in text)
    assert "data.group" not in why, "which keeps no test record out of the training records"
    other.write_text("review,sentiment\nthe sea is red ?,splendid\n")
    code, found = checked(call, table, "--test", other)
    assert code == 1
    assert found["sets"][1]["errors"] == ["Labels that the training records do not have: splendid."]


def test_a_recipes_data_in_its_models_tokens(lm_values, write_recipe, call):
    lm_values["data"] |= {"max_length": 8}
    code, found = checked(call, write_recipe(lm_values))
    assert code == 1
    assert "longer than data.max_length = 8 tokens" in found["sets"][0]["errors"][0]
    code, out, _ = call("check-data", write_recipe(lm_values), "--data.max-length", 64)
    assert code == 0
    assert "tokens" in out


def test_a_file_that_is_not_there(call, tmp_path):
    code, _, err = call("check-data", tmp_path / "none.csv")
    assert code == 1
    assert "There is no data file" in err


@pytest.mark.timeout(60)  # what hangs is the failure
def test_records_with_a_field_of_their_own_each(tmp_path, call):
    """Many fields and many records: nothing goes through every record for each field."""
    lines = [{"text": "a b", "label": i % 2, f"k{i}": 1} for i in range(20_000)]
    (tmp_path / "s.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = DataSection(train=str(tmp_path / "s.jsonl"), format="text")
    (found,) = check(data, "classification")
    assert found.empty["k0"] == 19_999
    assert "text" not in found.empty
    code, _, said = call("check-data", tmp_path / "s.jsonl")
    assert code == 1
    assert "have 2,002 different fields, expected at most 1,000" in " ".join(said.split())
