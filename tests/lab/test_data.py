"""Data: every format read, every defect named with its file and line, labels on the answer alone, order by seed."""

import json
import warnings
from collections import Counter
from copy import deepcopy

import pytest

from dual_lora.lab.data import tool_calls
from dual_lora.lab.data.batches import Collator, collator, left_padded, training_order
from dual_lora.lab.data.encode import IGNORED, VALUE, Encoded, Prompter, class_names, encode_texts
from dual_lora.lab.data.examples import load_split, read_examples
from dual_lora.lab.data.formats import Example
from dual_lora.lab.data.records import hub_split, read_records, same_records
from dual_lora.lab.errors import UserError
from dual_lora.lab.recipe.schema import DataSection


@pytest.fixture
def file(tmp_path):
    def write(name, text):
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


@pytest.fixture(scope="module")
def tokenizer(tiny_lm):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_lm)


def test_formats(file):
    chat = {"messages": [{"role": "user", "content": "sky ?"}, {"role": "assistant", "content": "blue"}]}
    sources = [
        (file("a.jsonl", json.dumps(chat) + "\n"), {}),
        (file("b.json", json.dumps([{"instruction": "sky ?", "input": "", "output": "blue"}])), {}),
        (file("c.tsv", "prompt\tanswer\nsky ?\tblue\n"), {}),
        (file("d.txt", "sky ? || blue\n"), {}),
        (file("e.csv", 'q,a\n"sky ?",blue\n'), {"fields": {"prompt": "q", "answer": "a"}}),
        (file("f.csv", '"prompt";answer;"more, or less"\n"sky ?";blue;"1;2"\n'), {}),
        (file("g.csv", "answer\tprompt\nblue\tsky ?\n"), {}),
        (file("h.csv", "blue;sky ?\n"), {"columns": ["answer", "prompt"]}),
    ]
    for path, more in sources:
        (example,) = read_examples(path, DataSection(train=path, **more))
        assert (example.prompt[-1]["content"], example.answer) == ("sky ?", "blue"), path


ASKED, ANSWERED = {"role": "user", "content": "sky ?"}, {"role": "assistant", "content": "blue"}


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "sky ?", "completion": "blue"},
        {"prompt": [ASKED], "completion": [ANSWERED]},
        {"prompt": [ASKED], "answer": [ANSWERED]},
        {"conversations": [{"from": "human", "value": "sky ?"}, {"from": "gpt", "value": "blue"}]},
        {"conversations": [ASKED, ANSWERED]},
        {"messages": [{"from": "user", "value": "sky ?"}, {"from": "assistant", "value": "blue"}]},
    ],
)
def test_names_that_trl_and_sharegpt_use(record, file):
    (example,) = read_examples(file("a.jsonl", json.dumps(record)), DataSection())
    assert (example.messages, example.answer, example.target) == ((ASKED, ANSWERED), "blue", "blue")


def test_a_conversation_s_system_message_comes_first(file):
    said = [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "sky ?"},
        {"from": "gpt", "value": "blue"},
    ]
    (example,) = read_examples(file("a.jsonl", json.dumps({"conversations": said})), DataSection())
    assert example.messages == ({"role": "system", "content": "Be brief."}, ASKED, ANSWERED)


def test_of_completion_and_answer_the_answer_is_learned_and_this_is_said(file):
    path = file("a.jsonl", json.dumps({"prompt": "2 + 2?", "completion": "Two and two are 4.", "answer": "4"}))
    with pytest.warns(UserWarning, match="hold completion, which is not read"):
        assert read_examples(path, DataSection())[0].answer == "4"
    (example,) = read_examples(path, DataSection(fields={"answer": "completion"}))
    assert example.answer == "Two and two are 4."


SEPARATORS = "one\u2028two\u2029three\x85four\x0cfive\x0bsix\x1cseven"  # where `str.splitlines` cuts


def test_lines_end_at_line_feeds_alone(tmp_path):
    record = json.dumps({"prompt": SEPARATORS, "answer": "blue"}, ensure_ascii=False)
    (tmp_path / "a.jsonl").write_text(f"{record}\r\n{record}\n", encoding="utf-8", newline="")
    (tmp_path / "b.txt").write_text(f"{SEPARATORS}||blue\n{SEPARATORS}||blue", encoding="utf-8")
    for name in ("a.jsonl", "b.txt"):
        found = read_examples(str(tmp_path / name), DataSection())
        assert [(e.prompt[-1]["content"], e.answer) for e in found] == [(SEPARATORS, "blue")] * 2
        assert [e.where.rpartition(", ")[2] for e in found] == ["line 1", "line 2"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", '{"prompt": "sky ?", "answer": "blue"}\n'),
        ("a.json", '[{"prompt": "sky ?", "answer": "blue"}]'),
        ("a.csv", "prompt,answer\nsky ?,blue\n"),
        ("a.csv", '"prompt";"answer"\nsky ?;blue\n'),
        ("a.csv", '\ufeff"prompt","answer"\nsky ?,blue\n'),  # joined from a file that had one and was empty
        ("a.tsv", "prompt\tanswer\nsky ?\tblue\n"),
        ("a.txt", "sky ?||blue\n"),
    ],
)
def test_a_byte_order_mark_is_no_part_of_the_first_field(name, text, tmp_path):
    (tmp_path / name).write_text(text, encoding="utf-8-sig")
    (example,) = read_examples(str(tmp_path / name), DataSection())
    assert (example.prompt[-1]["content"], example.answer) == ("sky ?", "blue")


def test_llm_adapters_record_gives_choices_and_answers_for_each(file):
    record = {
        "instruction": "Q\n\nAnswer format: true/false",
        "input": "",
        "output": "the correct answer is true",
        "answer": "true",
    }
    (example,) = read_examples(file("r.json", json.dumps([record])), DataSection())
    assert example.choices == ("true", "false")
    assert example.answer_with("false") == "the correct answer is false"


LISTED = {
    "instruction": "Choose: What is it that\n\nAnswer1: one: two. Answer2: an Answer Answer3: 5\n\n"
    "Answer format: answer1/answer2/answer3",
    "output": "the correct answer is answer2",
    "answer": "answer2",
}


def test_answers_in_words_leave_the_list_out(file):
    (example,) = read_examples(file("a.json", json.dumps([LISTED])), DataSection(answers="text"))
    assert example.prompt == ({"role": "user", "content": "Choose: What is it that"},)
    assert example.choices == ("one: two.", "an Answer", "5")
    assert example.answer == example.target == "an Answer"
    assert example.messages[-1] == {"role": "assistant", "content": "an Answer"}
    assert example.answer_with("5") == "5"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"answer": "answer9"}, r"'answer9' is none of the answers that the prompt lists \(1, 2, 3\)"),
        ({"instruction": "Is it?\n\nAnswer format: true/false", "answer": "true"}, "none: expected Answer1"),
    ],
)
def test_answers_in_words_need_a_list_that_holds_the_right_one(change, said, file):
    with pytest.raises(UserError, match=said):
        read_examples(file("a.json", json.dumps([{**LISTED, **change}])), DataSection(answers="text"))


def test_table_without_header_and_renamed_fields(reviews):
    data = DataSection(train=str(reviews / "train.tsv"), columns=["label", "sentence"], fields={"text": "sentence"})
    examples = load_split(data, "train")
    assert class_names(examples) == ["0", "1"]
    assert all(("warm" in e.text[0]) == (e.label == "1") for e in examples)


def test_hub_name_with_split(tmp_path):
    (tmp_path / "train.jsonl").write_text(json.dumps({"prompt": "sky ?", "answer": "blue"}) + "\n")
    (example,) = read_examples(f"hub:{tmp_path}:train", DataSection())
    assert example.where == f"hub:{tmp_path}:train, record 1"


@pytest.mark.parametrize(
    "wrong",
    [{"test": "hub:a/b"}, {"validation": "hub:a/b,c"}, {"tests": {"x": "hub:a/b:test", "y": "y.json + hub:a/b"}}],
)
def test_what_judges_names_its_split_of_a_hub(wrong):
    """Without one it is the training records."""
    with pytest.raises(ValueError, match=r"hub:a/b(,c)? names no split: write hub:a/b(,c)?:test"):
        DataSection(**wrong)
    assert DataSection(train="hub:a/b", test="hub:a/b:test", tests={"x": "x.json + hub:a/b,c:validation"})


CHAT = '{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": %s}]}'


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"prompt": "x", "answer": "y"}\n{"prompt": "x"}\n', r"a\.jsonl, line 2: field 'answer' is miss"),
        ("a.jsonl", '{"prompt": "x", "answer": "y"}\n\n{oops\n', r"a\.jsonl, line 3: not valid JSON"),
        ("a.json", "[\n{},\n{]", r"a\.json, line 3: not valid JSON"),
        ("a.json", '{"a": 1}', "holds a JSON dict, expected a list"),
        ("a.json", '[{"instruction": "x", "output": "y"}, 3]', "record 2: int found"),
        ("a.json", '[{"prompt": "x", "answer": "y"}, {"prompt": "x"}]', "record 2: field 'answer' is"),
        ("a.json", '[{"instruction": "x", "output": ["y"]}]', "record 1: field 'output' is a list, expected text"),
        ("a.json", '[{"prompt": "x", "answer": " "}]', "record 1: the answer is empty"),
        ("a.json", '[{"question": "x"}]', "fields question fit no format"),
        ("a.json", "[]", "holds no records"),
        ("a.json", "", "holds no records"),
        ("a.tsv", "prompt\tanswer\nx\ty\nx\n", r"a\.tsv, line 3: 1 columns, expected 2 \(prompt, answer\)"),
        ("a.txt", "x||y\nx\n", r"a\.txt, line 2: expected facts\|\|sentence"),
        ("a.jsonl", '{"messages": [{"role": "user", "content": "x"}]}', "line 1: the last message has to be"),
        ("a.jsonl", '{"messages": "x"}', "line 1: messages has to be a list"),
        ("a.jsonl", '{"conversations": [{"from": "tool", "value": "x"}]}', "conversations is from 'tool', expected"),
        ("a.jsonl", '{"conversations": [{"from": "gpt"}]}', "a message of conversations holds from, expected role and"),
        ("a.jsonl", '{"conversations": [{"from": "human", "value": "x"}]}', "line 1: the last message has to be"),
        ("a.jsonl", '{"prompt": [{"role": "user", "content": "x"}], "completion": "y"}', "field 'prompt' is a list"),
        ("a.jsonl", CHAT % "null", "line 1: the content of the message of role 'assistant' is null, expected text"),
        ("a.jsonl", CHAT % '[{"type": "text", "text": "x"}]', "of role 'assistant' is list, expected text"),
        ("a.xml", "<a/>", "unknown kind of data file"),
        ("a.csv", "text,text,label\nx,y,1\n", "has two columns 'text'"),
        ("a.csv", 'prompt,answer\n"x\nx",y\nx\n', r"a\.csv, line 4: 1 columns"),
        ("a.csv", 'prompt;answer\n"x"x;y\n', "line 2: .* followed by a semicolon"),
        ("a.csv", "prompt,answer\nx,y\nprompt, answer\nx,z\n", r"line 3 holds the names of the columns once more"),
        ("a.csv", '"text",b\nx,y\n\ufeff"text",b\nx,z\n', r"line 3 holds the names of the columns once more"),
        ("a.tsv", "text\tlabel\nx\ty\ntext\tlabel\n", r"line 3 holds the names of the columns once more"),
        ("a.csv", "prompt,answer\n,y\n", r"a\.csv, line 2: the cell 'prompt' is empty"),
        ("a.csv", "text,label\n,1\n", r"a\.csv, line 2: the cell 'text' is empty"),
        ("a.csv", "text,text_pair,label\nx,,1\n", r"the cell 'text_pair' is empty"),
        ("a.csv", "text,label\nx,\n", r"line 2: the cell 'label' is empty\. Fill it, or take the line out\.$"),
        ("a.csv", "prompt,answer\nx,\n", r"the cell 'answer' is empty\. Fill it, or take the line out\.$"),
        ("a.csv", "text,label\nx,\ny,1\n,1\n", r"line 2: .*\. One more record cannot be read: `dual-lora check-data`"),
        ("a.csv", "text,label\nx,\n,1\n,1\n", r"line 2: .*\. 2 more records cannot be read: `dual-lora check-data`"),
        ("a.csv", "instruction,input,output\n,x,y\n", r"the cell 'instruction' is empty"),
        ("a.jsonl", '{"prompt": "x", "prompt": "z", "answer": "y"}', r"line 1: not valid JSON \(the name 'prompt' st"),
        ("a.json", '[{"messages": [{"role": "user", "role": "x"}]}]', r"the name 'role' stands twice in one object"),
        ("a.json", '[{"instruction": "x", "output": "y", "answer": ["y"]}]', "field 'answer' is a list, expected text"),
        ("a.json", '[{"prompt": "x", "answer": "y", "choices": [{"a": 1}]}]', "record 1: a choice is a dict"),
    ],
)  # fmt: skip
def test_defects_are_named_with_their_place(name, text, message, file):
    with pytest.raises(UserError, match=message):
        read_examples(file(name, text), DataSection())


def test_a_renamed_field_is_called_as_in_its_file(file):
    data = DataSection(fields={"text": "Review body", "label": "Stars"})
    with pytest.raises(UserError, match=r"a\.csv, line 2: the cell 'Review body' is empty"):
        read_examples(file("a.csv", "Review body,Stars\n,good\n"), data)
    with pytest.raises(UserError, match=r"a\.jsonl, line 1: field 'Stars' is null"):
        read_examples(file("a.jsonl", '{"Review body": "x", "Stars": null}'), data)


def test_a_call_of_a_tool_may_stand_in_a_prompt_and_is_not_learned(file, tokenizer):
    """Templates know how to write it; as an answer to learn it is no text."""
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "weather"}]}
    asked, said = {"role": "user", "content": "sky ?"}, {"role": "assistant", "content": "blue"}
    (example,) = read_examples(file("a.jsonl", json.dumps({"messages": [asked, call, said]})), DataSection())
    assert example.prompt[1] == call
    with pytest.raises(UserError, match="holds tool_calls, and content alone is learned"):
        Prompter(tokenizer).encode(example)
    with pytest.raises(UserError, match="A prompt: the content of the message of role 'assistant' is null"):
        Prompter(tokenizer, "plain").prompt_text(example.prompt)
    (number,) = read_examples(file("b.jsonl", CHAT % "42"), DataSection())
    assert number.answer == "42"


def test_missing_files_say_where_they_were_sought(tmp_path, monkeypatch):
    (tmp_path / "train.json").write_text("[]")
    monkeypatch.setenv("DUAL_LORA_DATA", str(tmp_path))
    with pytest.raises(UserError, match=r"no data file .*trian\.json.* Did you mean 'train\.json'"):
        read_records("trian.json")
    with pytest.raises(UserError, match="set DUAL_LORA_DATA"):
        read_records("nowhere/x.json")
    with pytest.raises(UserError, match=r"is a folder, expected a file.* In it: .*train\.json\.$"):
        read_records(str(tmp_path))
    with pytest.raises(UserError, match=r"The recipe names no test records: set data\.test"):
        load_split(DataSection(train="x"), "test")


def test_holdout_and_limits_are_fixed_and_apart(questions):
    data = DataSection(train=str(questions / "train.json"), holdout=8, train_limit=20)
    train, held = load_split(data, "train"), load_split(data, "validation")
    assert (len(train), len(held)) == (20, 8)
    assert not {e.where for e in train} & {e.where for e in held}
    assert load_split(data, "train") == train
    with pytest.raises(UserError, match=r"data\.holdout is 48, but .* holds only 48"):
        load_split(DataSection(train=str(questions / "train.json"), holdout=48), "train")


def test_records_without_a_group_do_not_belong_together(file):
    lines = [f"red {i} ?,yes,{i // 40 if i >= 160 else ''}" for i in range(200)]
    source = str(file("a.csv", "\n".join(["prompt,answer,document", *lines]) + "\n"))
    for seed in range(8):
        data = DataSection(train=source, group="document", holdout=10, seed=seed)
        train, held = load_split(data, "train"), load_split(data, "validation")
        assert len(train) + len(held) == 200
        assert 10 <= len(held) < 10 + 40, "up to a group more, as of records that have one"
        assert not {e.group for e in train} & {e.group for e in held} - {""}


def turns(*pairs):
    messages = tuple({"role": role, "content": text} for role, text in pairs)
    return Example("here", messages, answer=messages[-1]["content"])


def test_labels_stand_on_the_answer_alone(tokenizer):
    encoded = Prompter(tokenizer).encode(turns(("user", "sky ?"), ("assistant", "blue sky")))
    assert tokenizer.decode(encoded.input_ids) == "<s> user : sky ? </s> <s> assistant : blue sky </s>"
    learned = [i for i in encoded.labels if i != IGNORED]
    assert tokenizer.decode(learned) == "blue sky </s>"
    assert encoded.input_ids[-len(learned) :] == learned
    assert encoded.label_tail == len(learned)


def test_every_answer_of_a_conversation_is_learned(tokenizer):
    example = turns(("user", "sky ?"), ("assistant", "blue"), ("user", "fire ?"), ("assistant", "red"))
    encoded = Prompter(tokenizer).encode(example)
    assert tokenizer.decode([i for i in encoded.labels if i != IGNORED]) == "blue </s> red </s>"
    whole = tokenizer.apply_chat_template(list(example.messages), tokenize=False)
    assert encoded.input_ids == tokenizer(whole, add_special_tokens=False).input_ids


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"tool_calls": [{"function": {"name": "look"}}]}, "holds tool_calls"),
        ({"function_call": {"name": "look"}}, "holds function_call"),
        ({"reasoning_content": "Let me see."}, "holds reasoning_content"),
        ({"weight": 0}, "has weight 0"),
    ],
)
@pytest.mark.parametrize("turn", [1, 3])
def test_what_an_answer_holds_beside_its_content_is_no_part_of_it(more, said, turn, file, tokenizer):
    def learned(text):
        for example in read_examples(file("a.jsonl", text), DataSection()):
            Prompter(tokenizer).encode(example)

    chat = [{"role": ("user", "assistant")[i % 2], "content": "sky"} for i in range(4)]
    learned(json.dumps({"messages": chat}) + "\n")
    chat[turn] |= more
    with pytest.raises(UserError, match=said):
        learned(json.dumps({"messages": chat}) + "\n")
    chat[turn] |= {"tool_calls": [], "function_call": {}, "reasoning_content": "\n", "thinking": False, "weight": 1}
    learned(json.dumps({"messages": chat}) + "\n")


def test_several_answers_need_a_chat_template(tokenizer):
    example = turns(("user", "sky ?"), ("assistant", "blue"), ("user", "fire ?"), ("assistant", "red"))
    for template in ("plain", "alpaca"):
        with pytest.raises(UserError, match=f"the {template} template rewrites earlier turns"):
            Prompter(tokenizer, template).encode(example)


def test_the_date_in_a_prompt_is_the_same_tomorrow(tokenizer):
    own = deepcopy(tokenizer)
    own.chat_template = "{{ strftime_now('%Y-%m-%d') }} " + own.chat_template
    messages = ({"role": "user", "content": "sky ?"},)
    assert Prompter(own).prompt_text(messages) == "2024-07-26 " + Prompter(tokenizer).prompt_text(messages)
    own.chat_template = "{{ date_string }} " + tokenizer.chat_template
    assert Prompter(own).prompt_text(messages).startswith("26 Jul 2024 <s>")


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ('{"prompt": NaN, "answer": "x"}', "'prompt' is nan"),
        ('{"prompt": "x", "answer": NaN}', "'answer' is nan"),
        ('{"text": "x", "label": NaN}', "'label' is nan"),
        ('{"text": "x", "label": " "}', "label is empty"),
    ],
)
def test_a_missing_value_is_no_text(record, said, file):
    with pytest.raises(UserError, match=said):
        read_examples(file("a.jsonl", record + "\n"), DataSection())


def test_an_empty_text_is_one_where_it_can_be_told_from_a_missing_one(file):
    [example] = read_examples(file("a.jsonl", '{"prompt": "", "answer": "y"}\n'), DataSection())
    assert example.messages[0]["content"] == ""
    [one, other] = read_examples(
        file("a.csv", "instruction,input,output,set\nx,,y,\nx,z,y,1\n"), DataSection(group="set")
    )
    assert (one.messages[0]["content"], one.group, other.group) == ("x", "", "1")


@pytest.mark.parametrize("name", ["system", "history"])
@pytest.mark.parametrize(
    "record",
    [
        {"instruction": "q", "output": "a"},
        {"prompt": "q", "answer": "a"},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
    ],
)
def test_what_stands_before_a_prompt_and_nobody_reads_is_said(name, record, file):
    with pytest.warns(UserWarning, match=f"hold {name}, which is not read"):
        read_examples(file("a.jsonl", json.dumps({**record, name: ["before"]}) + "\n"), DataSection())


def test_a_system_message_may_have_a_field_as_well(file):
    turns = [{"role": role, "content": text} for role, text in (("system", "S"), ("user", "q"), ("assistant", "a"))]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_examples(file("a.jsonl", json.dumps({"messages": turns, "system": "S"}) + "\n"), DataSection())


@pytest.mark.parametrize("template", ["chat", "plain"])
def test_tools_that_a_template_leaves_out_are_said(template, tokenizer):
    """The answers are calls of what the prompt does not show."""
    turns = {"role": "user", "content": "sky ?"}, {"role": "assistant", "content": "red"}
    example = Example("here", turns, ({"type": "function", "function": {"name": "look"}},), answer="red")
    with pytest.warns(UserWarning, match="tools, which"):
        Prompter(tokenizer, template).encode(example)
    own = deepcopy(tokenizer)
    own.chat_template = "{% for tool in tools or [] %}{{ tool.function.name }}{% endfor %}" + own.chat_template
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Prompter(own, "chat").encode(example)
        Prompter(tokenizer, template).encode(Example("here", turns, answer="red"))


def test_an_input_of_nan_is_none(file):
    (example,) = read_examples(file("a.jsonl", '{"instruction": "q", "input": NaN, "output": "a"}\n'), DataSection())
    assert example.prompt[0]["content"] == "q"


def test_a_template_with_an_end_of_its_own_shows_it_and_the_tokenizer_s_is_learned(tokenizer):
    """Gemma's turns end with <end_of_turn>, and its tokenizer's end is <eos>."""
    own = deepcopy(tokenizer)
    own.chat_template = own.chat_template.replace("</s>", "<unk>")
    example = turns(("user", "sky ?"), ("assistant", "blue"), ("user", "fire ?"), ("assistant", "red"))
    for learn_prompt in (False, True):
        encoded = Prompter(own, learn_prompt=learn_prompt).encode(example)
        assert own.decode(encoded.input_ids) == (
            "<s> user : sky ? <unk> <s> assistant : blue <unk> <s> user : fire ? <unk> <s> assistant : red </s>"
        )
        learned = own.decode([i for i in encoded.labels if i != IGNORED])
        if learn_prompt:  # all but the first token, which nothing stands before
            assert learned == (
                "user : sky ? <unk> <s> assistant : blue </s> <s> user : fire ? <unk> <s> assistant : red </s>"
            )
        else:
            assert learned == "blue </s> red </s>"
            assert encoded.labels[encoded.input_ids.index(own.convert_tokens_to_ids("blue")) + 1] == own.eos_token_id


def test_templates(tokenizer):
    prompt = ({"role": "user", "content": "sky ?"},)
    assert Prompter(tokenizer, "plain").prompt_text(prompt) == "sky ?\n"
    assert "### Instruction:\nsky ?\n\n### Response:\n" in Prompter(tokenizer, "alpaca").prompt_text(prompt)
    assert Prompter(tokenizer).prompt_text(prompt).endswith("<s>assistant : ")


def test_unknown_class_in_the_test_records_is_named(tokenizer):
    with pytest.raises(UserError, match="label '7' is none of the classes 0, 1"):
        encode_texts([Example("dev.tsv, line 3", text=("sky",), label="7")], tokenizer, 16, ["0", "1"])


def test_order_is_whole_passes_by_seed_with_rows_of_like_length_together():
    lengths = [5 + (i * 37) % 50 for i in range(100)]
    order = training_order(lengths, 200, 4, seed=3)
    assert Counter(order) == Counter([*range(100), *range(100)])
    assert order == training_order(lengths, 200, 4, seed=3) != training_order(lengths, 200, 4, seed=4)
    assert order[:60] == training_order(lengths, 200, 4, seed=3)[:60]

    def padding(rows):
        batches = [rows[i : i + 4] for i in range(0, len(rows), 4)]
        return sum(max(lengths[i] for i in b) * len(b) - sum(lengths[i] for i in b) for b in batches)

    assert padding(order) < 0.3 * padding([*range(100), *range(100)])


def test_collated_rows_keep_logits_for_labels_only():
    rows = [Encoded("", [5, 6, 7, 8], [IGNORED, IGNORED, 7, 8]), Encoded("", [5, 6], [IGNORED, 6])]
    batch = Collator(pad=0)(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8], [0, 0, 5, 6]]
    assert batch["labels"].tolist() == [[IGNORED, IGNORED, 7, 8], [IGNORED, IGNORED, IGNORED, 6]]
    assert batch["logits_to_keep"] == 3
    assert left_padded([[5, 6, 7], [5]], 0)["position_ids"].tolist() == [[0, 1, 2], [0, 0, 0]]


def test_both_texts_of_a_pair_are_told_apart(tmp_path):
    """A BERT's second text has its own token type, in training and in use; without it, it is another model's input."""
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]))
    tokenizer = BertTokenizerFast(vocab_file=str(tmp_path / "vocab.txt"))
    tokenizer._pad_token_type_id = 1  # as XLNet's is 3
    examples = [Example("1", text=("a b c", "d"), label="no"), Example("2", text=("a", "c d e f g h"), label="yes")]
    rows, _ = encode_texts(examples, tokenizer, 64, ["no", "yes"])
    cut, count = encode_texts(examples, tokenizer, 6, ["no", "yes"])
    model = BertForSequenceClassification(
        BertConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    ).eval()
    batch = collator(tokenizer, True, model)(rows)
    for row, example, types in zip(rows, examples, batch["token_type_ids"].tolist(), strict=True):
        own = tokenizer(*example.text)["token_type_ids"]
        assert row.token_types == own
        assert types == own + [1] * (len(types) - len(own))
    assert (count, len(cut[1].token_types), sum(cut[1].token_types)) == (2, 6, 3)
    single, _ = encode_texts([Example("3", text=("a b",), label="no")], tokenizer, 64, ["no", "yes"])
    assert "token_type_ids" not in collator(tokenizer, True, model)(single)
    mixed = collator(tokenizer, True, model)([*rows, *single])
    assert mixed["token_type_ids"][2].tolist()[: len(single[0].input_ids)] == [0] * len(single[0].input_ids)
    assert "token_type_ids" not in Collator(0, True, accepts=frozenset())(rows), "of a model that takes none"


def test_nothing_is_learned_from_padding(tokenizer):
    """The first token of a row has nothing before it: in a padded batch it would be told from a pad token."""
    prompter = Prompter(tokenizer, "plain", learn_prompt=True)
    examples = [Example("1", turn("red ?", "true")), Example("2", turn("is the sky blue ?", "false"))]
    rows = [prompter.encode(example) for example in examples]
    assert all(row.labels == [IGNORED, *row.input_ids[1:]] for row in rows)
    labels = Collator(0)(rows)["labels"]
    assert (labels != IGNORED).sum() == sum(len(row.input_ids) - 1 for row in rows)


def turn(prompt, answer):
    return {"role": "user", "content": prompt}, {"role": "assistant", "content": answer}


@pytest.mark.parametrize(
    ("value", "target"), [(0, "0"), (1, "1"), (False, "false"), ("", "it is 0"), (None, "it is 0")]
)
def test_an_answer_of_zero_is_one(file, value, target):
    path = file("a.json", json.dumps([{"instruction": "how many ?", "output": "it is 0", "answer": value}]))
    (example,) = read_examples(path, DataSection())
    assert example.target == target


@pytest.mark.parametrize(
    ("answer", "target", "choice", "expected"),
    [
        ("The answer is no, nobody knows.", "no", "yes", "The answer is yes, nobody knows."),
        ("no: no", "no", "yes", "no: yes"),
        ("答案是不", "不", "是", "答案是是"),
        ("x", "no", "yes", "yes"),
    ],
)
def test_a_choice_takes_the_place_of_a_word(answer, target, choice, expected):
    assert Example("1", answer=answer, target=target).answer_with(choice) == expected


def test_an_input_of_zero_and_json_s_true_are_text(file):
    (example,) = read_examples(file("a.json", '[{"instruction": "double", "input": 0, "output": true}]'), DataSection())
    assert example.messages == turn("double\n\n0", "true")


def test_classes_have_one_order_in_every_process():
    """Names that are the same number, and NaN, are sorted by their names; a set's own order depends on the process."""
    names = ["nan", "001", "01", "inf", "1", "2", "10", "b"]
    examples = [Example("", text=("x",), label=name) for name in names]
    ordered = ["001", "01", "1", "2", "10", "b", "inf", "nan"]
    for turned in range(len(names)):
        assert class_names(examples[turned:] + examples[:turned]) == ordered


@pytest.mark.parametrize("other", ["1.0", "1.00"])
def test_one_number_is_not_two_classes(other):
    """As a table's column of whole numbers with a gap writes it beside one without."""
    examples = [Example("", text=("x",), label=name) for name in ("0", "1", other)]
    with pytest.raises(UserError, match=f"labels 1 and {other} are one number"):
        class_names(examples)
    assert class_names(examples[:2]) == ["0", "1"]
    versions = [Example("", text=("x",), label=name) for name in ("v1", "v1.0", "Python 3", "Python 3.0")]
    assert len(class_names(versions)) == 4
    codes = [Example("", text=("x",), label=name) for name in ("10", "1_0", "100", "1e2", "-1")]
    assert len(class_names(codes)) == 5
    with pytest.raises(UserError, match=r"labels -1 and -1\.0 are one number"):
        class_names([*codes, Example("", text=("x",), label="-1.0")])


@pytest.mark.parametrize("other", ["Very Good", "very  good", "very\u00a0good", "VERY GOOD"])
def test_labels_that_look_the_same_are_said(other):
    """Of a column that people have typed into: every spelling is a class, with a share of the records each."""
    examples = [Example("", text=("x",), label=name) for name in ("bad", "very good", other)]
    with pytest.warns(UserWarning, match="differ in case or blanks alone") as said:
        assert len(class_names(examples)) == 3
    assert repr(other) in str(said[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert class_names(examples[:2]) == ["bad", "very good"]


def test_a_lone_quote_does_not_join_records(file):
    with pytest.raises(UserError, match=r"a\.csv, line 5: .*written twice"):
        read_records(str(file("a.csv", 'label,text\n1,"a great film\n0,awful\n1,fine\n0,"bad film"\n')))
    records = read_records(str(file("b.csv", 'label,text\n1,"a ""great"" film"\n0,so "so"\n2,' + "x" * 200_000 + "\n")))
    assert [len(r.values["text"]) for r in records] == [14, 7, 200_000]


def test_an_empty_text_in_a_table_of_one_column_is_a_record(file):
    """pandas writes an empty text so. A blank line is none, and a spreadsheet's empty row neither."""
    records = read_records(str(file("a.csv", 'text\nred\n""\n"  "\n\nblue\n')))
    assert [record.values["text"] for record in records] == ["red", "", "  ", "blue"]
    assert [record.where[-6:] for record in records] == ["line 2", "line 3", "line 4", "line 6"]
    assert len(read_records(str(file("b.csv", "text,label\nred,1\n,\n")))) == 1
    assert len(read_records(str(file("c.tsv", "text\nred\n\n")))) == 1


@pytest.mark.parametrize("column", ["text", "label"])
def test_a_cell_of_blanks_is_an_empty_one(file, column):
    row = {"text": "red", "label": "warm"} | {column: "  "}
    source = str(file("a.csv", f"text,label\nblue,cold\n{row['text']},{row['label']}\n"))
    with pytest.raises(UserError, match=rf"a\.csv, line 3: the cell '{column}' is empty"):
        read_examples(source, DataSection())


def test_a_header_is_no_record(file):
    source = str(file("a.csv", "text,label\nred,1\n"))
    with pytest.raises(UserError, match=r"a\.csv, line 1 holds the names of data\.columns"):
        read_records(source, ["text", "label"])


def test_a_field_that_need_not_be_there_may_be_null(file):
    fields = {"instruction": "question", "input": "context", "output": "response"}
    lines = [{"question": "sky ?", "response": "blue"} | more for more in ({}, {"context": None}, {"context": "red"})]
    source = str(file("a.jsonl", "".join(json.dumps(line) + "\n" for line in lines)))
    examples = read_examples(source, DataSection(fields=fields))
    assert [e.messages[0]["content"] for e in examples] == ["sky ?", "sky ?", "sky ?\n\nred"]
    with pytest.raises(UserError, match="field 'contxt' is missing, found question"):
        read_examples(source, DataSection(fields=fields | {"input": "contxt"}))
    swapped = {"input": "who ?", "context": "", "output": "me"}
    other = str(file("c.jsonl", json.dumps(swapped) + "\n"))
    (example,) = read_examples(
        other, DataSection(fields={"instruction": "input", "input": "context", "output": "output"})
    )
    assert example.messages[0]["content"] == "who ?", "not once more as its own context"
    pairs = file("b.jsonl", json.dumps({"text": "red", "text_pair": None, "label": 1}) + "\n")
    with pytest.raises(UserError, match="field 'text_pair' is null"):
        read_examples(str(pairs), DataSection())


def test_a_group_s_number_has_one_name(file):
    lines = [{"text": "red", "label": 1, "document": number} for number in (2, 2.0, 3)]
    source = str(file("a.jsonl", "".join(json.dumps(line) + "\n" for line in lines)))
    assert [e.group for e in read_examples(source, DataSection(group="document"))] == ["2", "2", "3"]
    lines = [{"text": "red", "label": 1, "document": name} for name in ("v1", "v1.0", "2.0", "2.00")]
    source = str(file("b.jsonl", "".join(json.dumps(line) + "\n" for line in lines)))
    assert [e.group for e in read_examples(source, DataSection(group="document"))] == ["v1", "v1.0", "2", "2"]


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("hub:me/set", "hub:me/set:train", True),
        ("hub:me/set:train[:100]", "hub:me/set", True),
        ("hub:me/set:train[:100]", "hub:me/set:train[100:]", False),
        ("hub:me/set", "hub:me/set:test", False),
        ("hub:me/set,one", "hub:me/set,two", False),
    ],
)
def test_splits_on_a_hub_are_the_same_records(one, other, same):
    assert same_records(hub_split(one), hub_split(other)) is same


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("me/set", ("me/set", None, "train")),
        ("glue,mrpc:train[:100]", ("glue", "mrpc", "train[:100]")),
        ("me/set:train[10%:]+test[:5]", ("me/set", None, "train[10%:]+test[:5]")),
    ],
)
def test_a_slice_on_a_hub_is_asked_for_as_it_is_written(name, asked, monkeypatch):
    import datasets

    seen = []
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *given, split: seen.append((*given, split)) or [{"text": "red"}]
    )
    assert len(read_records(f"hub:{name}")) == 1
    assert seen == [asked]


@pytest.mark.parametrize(
    ("value", "way"), [("nan", "regression.$"), ("inf", ""), ("x", ""), ("3,45", "regression. Write it with a point.$")]
)
def test_a_value_to_learn_is_a_finite_number(value, way, tokenizer):
    with pytest.raises(UserError, match=f"label '{value}' is no number, .*{way}"):
        encode_texts([Example("1", text=("red",), label=value)], tokenizer, 8, [VALUE])


def test_named_fields_say_which_format_a_record_has(tmp_path):
    """Data sets often have a conversation beside their columns."""
    record = {
        "messages": [{"role": "user", "content": "red"}, {"role": "assistant", "content": "blue"}],
        "question": "is it?", "reply": "false", "text": "a text",
    }  # fmt: skip
    (tmp_path / "both.json").write_text(json.dumps([record]))
    named = {"prompt": "question", "answer": "reply"}
    (example,) = read_examples(str(tmp_path / "both.json"), DataSection(fields=named))
    assert (example.prompt[-1]["content"], example.answer) == ("is it?", "false")
    (example,) = read_examples(str(tmp_path / "both.json"), DataSection())
    assert example.answer == "blue"


def test_blanks_make_no_class(tmp_path):
    (tmp_path / "labels.csv").write_text("text,label\na,pos\nb,pos \nc, neg\n")
    examples = read_examples(str(tmp_path / "labels.csv"), DataSection())
    assert class_names(examples) == ["neg", "pos"]


def test_tool_calls_as_rows_teach_the_answer_and_its_end_alone(tokenizer):
    chat, row = tool_calls.chats("train", 1)[0], tool_calls.rows(tokenizer, "train", 1)[0]
    asked = tokenizer(tokenizer.apply_chat_template(chat[:-1], tokenize=False, add_generation_prompt=True))["input_ids"]
    assert row["input_ids"][: len(asked)] == asked
    assert row["labels"] == [-100] * len(asked) + row["input_ids"][len(asked) :]
    assert tokenizer.eos_token_id in row["labels"]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_a_name_that_stands_twice_among_many_is_found_at_once(name, tmp_path):
    """In a time that grows with their number, and not with its square."""
    names = [f"n{i}" for i in range(100_000)] + ["n99999"]
    text = "{" + ", ".join(f'"{n}": 1' for n in names) + "}" if name == "a.jsonl" else ",".join(names) + "\n1\n"
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=r"'n99999'"):
        read_records(str(tmp_path / name))
