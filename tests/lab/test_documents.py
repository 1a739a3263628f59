"""Parquet files and text without a prompt: what is read, what is learned, and what is refused."""

import json
from pathlib import Path

import pytest

from dual_lora.lab.data.encode import IGNORED, Prompter, encode_all
from dual_lora.lab.data.examples import load_split, read_examples
from dual_lora.lab.data.records import read_records
from dual_lora.lab.errors import UserError
from dual_lora.lab.recipe.schema import DataSection

pyarrow = pytest.importorskip("pyarrow")
pytest.importorskip("pyarrow.parquet")


def parquet(path, **columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return str(path)


def test_a_parquet_file_is_read_like_any_other(tmp_path):
    file = parquet(
        tmp_path / "a.parquet",
        text=["sea", "sky"],
        label=[0, 1],
        picture=[b"x", b"y"],
        image=[{"bytes": b"x", "path": "p"}] * 2,
        __index_level_0__=[5, 6],
    )
    assert [r.values for r in read_records(file)] == [{"text": "sea", "label": 0}, {"text": "sky", "label": 1}]
    assert read_records(file)[1].where == f"{file}, row 2"
    assert [(e.text, e.label) for e in read_examples(file, DataSection())] == [(("sea",), "0"), (("sky",), "1")]


def test_conversations_in_parquet(tmp_path):
    turns = [{"role": "user", "content": "sea ?"}, {"role": "assistant", "content": "red"}]
    (example,) = read_examples(parquet(tmp_path / "a.parquet", messages=[turns]), DataSection())
    assert example.answer == "red"


def test_a_column_of_maps_does_no_harm(tmp_path):
    file, more = tmp_path / "a.parquet", pyarrow.map_(pyarrow.string(), pyarrow.list_(pyarrow.string()))
    column = pyarrow.array([[("a", ["x"])], [], None], more)
    pyarrow.parquet.write_table(
        pyarrow.table({"text": ["sea", "sky", "ice"], "label": ["a", "b", "b"], "m": column}), file
    )
    assert [record.values["m"] for record in read_records(str(file))] == [[("a", ["x"])], [], None]


def test_a_missing_value_is_told_from_an_empty_one(tmp_path):
    file = parquet(tmp_path / "a.parquet", text=["sea", None], label=["a", "b"])
    with pytest.raises(UserError, match=r"a\.parquet, row 2: field 'text' is null"):
        read_examples(file, DataSection())


def test_what_is_no_parquet_file(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match=r"a\.parquet could not be read as Parquet"):
        read_records(str(tmp_path / "a.parquet"))
    (tmp_path / "b.parquet").mkdir()
    with pytest.raises(UserError, match=r"b\.parquet is a folder, expected a file"):
        read_records(str(tmp_path / "b.parquet"))
    with pytest.raises(UserError, match="no column of texts"):
        read_records(parquet(tmp_path / "c.parquet", picture=[b"x"]))


def test_a_file_that_unpacks_to_too_much(tmp_path, monkeypatch):
    from dual_lora.lab.data import parquet as reader

    file = parquet(tmp_path / "a.parquet", text=["x" * 1000] * 3000)
    monkeypatch.setattr(reader, "MOST_BYTES", 100_000)
    with pytest.raises(UserError, match="at most 50,000,000 rows and 100,000 bytes are read"):
        read_records(file)
    monkeypatch.setattr(reader, "MOST_ROWS", 100)
    with pytest.raises(UserError, match="holds 3,000 rows"):
        read_records(file)


@pytest.fixture
def tokenizer(tiny_lm):
    from dual_lora.lab.model.load import load_tokenizer

    return load_tokenizer(str(tiny_lm))


def test_a_text_file_is_one_text_in_rows(tmp_path, tokenizer):
    (tmp_path / "book.txt").write_text("the sea is red ?\n\nthe sky is blue ?\n" * 3)
    (example,) = load_split(DataSection(train=str(tmp_path / "book.txt")), "train")
    assert example.whole
    rows, left_out = encode_all([example], Prompter(tokenizer), 8)
    ids = tokenizer(example.answer).input_ids
    assert left_out == 0
    assert [len(row.input_ids) for row in rows] == [8, 8, 8, 7]
    assert [i for row in rows for i in row.input_ids] == [*ids, tokenizer.eos_token_id]
    for row in rows:
        assert row.labels == [IGNORED, *row.input_ids[1:]]


def test_facts_stay_facts(tmp_path):
    (tmp_path / "a.txt").write_text("name[sea]||The sea.\nname[sky]||The sky.\n")
    assert len(load_split(DataSection(train=str(tmp_path / "a.txt")), "train")) == 2


def test_short_texts_are_rows_of_their_own(tmp_path, tokenizer):
    lines = [{"text": "the sea is red ?"}, {"text": "the sky"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    examples = load_split(DataSection(train=str(tmp_path / "a.jsonl")), "train")
    rows, _ = encode_all(examples, Prompter(tokenizer), 64)
    assert [len(row.input_ids) for row in rows] == [6, 3]


def test_a_run_learns_plain_text(tmp_path, lm_values, write_recipe, call):
    (tmp_path / "book.txt").write_text("the sea is red ?\nthe sky is blue ?\n" * 40)
    (tmp_path / "other.txt").write_text("the sea is red ?\nthe sky is blue ?\n" * 4)
    lm_values["data"] = {"train": str(tmp_path / "book.txt"), "test": str(tmp_path / "other.txt"), "max_length": 16}
    lm_values["evaluate"] = {"tasks": ["loss"]}
    run = tmp_path / "run"
    code, _, err = call("train", write_recipe(lm_values), "--out", run)
    assert code == 0, err
    code, out, err = call("evaluate", run, "--json")
    assert code == 0, err
    found = json.loads(out)["metrics"]
    assert found["tuned"]["loss"] < found["base"]["loss"]
    code, _, err = call("evaluate", run, "--evaluate.tasks", "exact_match")
    assert code == 1
    assert "needs prompts" in err


def test_one_row_and_one_text_that_unpack_to_too_much(tmp_path, monkeypatch):
    """A list of nulls takes nothing in a file, and much in Python; a dictionary holds one text for all."""
    from dual_lora.lab.data import parquet as reader

    n = 200_000
    nulls = pyarrow.ListArray.from_arrays(pyarrow.array([0, n], pyarrow.int32()), pyarrow.nulls(n, pyarrow.int8()))
    one_text = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 500, pyarrow.int32()), ["x" * 3000])
    within = pyarrow.StructArray.from_arrays([one_text], ["a"])
    files = [parquet(tmp_path / f"{i}.parquet", text=column) for i, column in enumerate((nulls, one_text, within))]
    for said in (reader._declared_bytes, lambda *_: 0):  # what the file says of itself may be a lie
        monkeypatch.setattr(reader, "_declared_bytes", said)
        monkeypatch.setattr(reader, "MOST_BYTES", 11_000_000)
        assert [len(read_records(file)) for file in files] == [1, 500, 500]
        monkeypatch.setattr(reader, "MOST_BYTES", 1_400_000)
        for file in files:
            with pytest.raises(UserError, match="are read: write a part"):
                read_records(file)


def test_rows_of_next_to_nothing_are_counted_as_python_has_them(tmp_path, monkeypatch):
    """A column of nulls is some bytes of a file, however many records it makes; a struct of them a mapping for each."""
    from dual_lora.lab.data import parquet as reader

    n = 20_000
    structs = pyarrow.StructArray.from_arrays([pyarrow.nulls(n, pyarrow.int8())], ["a"])
    listed = pyarrow.ListArray.from_arrays(pyarrow.array([0, n], pyarrow.int32()), structs)
    files = [
        parquet(tmp_path / f"{i}.parquet", text=column)
        for i, column in enumerate((pyarrow.nulls(n, pyarrow.int8()), listed))
    ]
    assert all(file.stat().st_size < 2000 for file in map(Path, files))
    monkeypatch.setattr(reader, "MOST_BYTES", 5_000_000)  # Python takes some 200 to 500 bytes for each
    for file in files:
        with pytest.raises(UserError, match="are read: write a part"):
            read_records(str(file))


def test_one_text_for_many_rows_is_not_copied_before_it_is_counted(tmp_path, monkeypatch):
    """Without the writer's own types a dictionary is read as texts: 700 bytes became gigabytes."""
    from dual_lora.lab.data import parquet as reader

    table = pyarrow.table({"text": ["x" * 1_000_000] * 100})
    pyarrow.parquet.write_table(table, file := tmp_path / "a.parquet", compression="zstd", store_schema=False)
    del table
    assert file.stat().st_size < 100_000
    seen = []
    monkeypatch.setattr(reader, "_unpacked_bytes", lambda array: seen.append(array.nbytes) or reader.MOST_BYTES + 1)
    with pytest.raises(UserError, match="are read: write a part"):
        read_records(str(file))
    assert seen[0] < 2_000_000


@pytest.mark.timeout(60)
def test_columns_without_an_end_are_counted_in_one_pass(tmp_path):
    file = parquet(tmp_path / "a.parquet", **{f"c{i}": ["a"] for i in range(20_000)})
    (record,) = read_records(file)
    assert len(record.values) == 20_000


def test_a_conversation_of_answers_without_an_end(tokenizer, tmp_path):
    """Each answer is written anew with all that is before it."""
    turns = [{"role": "user", "content": "sea ?"}, {"role": "assistant", "content": "red"}] * 1000
    (example,) = read_examples(parquet(tmp_path / "a.parquet", messages=[turns]), DataSection())
    with pytest.raises(UserError, match="which makes 1,000,000 messages, at most 250,000 are written"):
        Prompter(tokenizer).encode(example)


def test_a_date_in_parquet_that_python_does_not_have_is_said_with_its_file(tmp_path):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"text": ["a"], "day": pyarrow.array([2**31 - 1], pyarrow.date32())})
    pyarrow.parquet.write_table(table, tmp_path / "days.parquet")
    with pytest.raises(UserError, match=r"days\.parquet could not be read as Parquet: .*magnitude"):
        read_records(str(tmp_path / "days.parquet"))
