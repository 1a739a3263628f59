"""A score is of the model and the records that it is said to be of, whatever the batch, the base or the padding."""

import json
import re
import shutil
import warnings
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from dual_lora.lab.analysis.analyze import analyze
from dual_lora.lab.data.batches import collator, kind_of_unmasked, mean_loss
from dual_lora.lab.data.encode import Encoded, Prompter
from dual_lora.lab.data.examples import load_split
from dual_lora.lab.errors import UserError
from dual_lora.lab.export.export import export_lora
from dual_lora.lab.model import opened, weights
from dual_lora.lab.model.generate import generate
from dual_lora.lab.model.load import load_model
from dual_lora.lab.model.opened import open_tuned
from dual_lora.lab.recipe.read import build_recipe
from dual_lora.lab.recipe.schema import EvaluateSection, ModelSection
from dual_lora.lab.run import scoring
from dual_lora.lab.run.choice import score_choice
from dual_lora.lab.run.evaluate import evaluate
from dual_lora.lab.run.resume import recipe_of_run
from dual_lora.lab.run.scoring import Asked, generate_all, score_exact_match, score_loss
from dual_lora.lab.run.train import run
from dual_lora.lab.verify import logprobs
from dual_lora.lab.verify.prompts import _with_continuations
from dual_lora.lab.verify.verify import verify


@pytest.fixture
def loaded(lm_values):
    recipe = build_recipe(lm_values)
    base = load_model(recipe.model)
    return base.model, base.tokenizer, load_split(recipe.data, "test"), Prompter(base.tokenizer)


def longer(example, words):
    """The example with an answer of so many more words."""
    said = {"role": "assistant", "content": example.answer + " sky" * words}
    return replace(example, messages=(*example.messages[:-1], said), answer=said["content"])


PROMPT_LEARNING = {
    "prompt": lambda: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "p": lambda: PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8),
    "prefix": lambda: PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}


@pytest.mark.parametrize("method", PROMPT_LEARNING)
def test_virtual_tokens_stand_next_to_the_prompt(method, loaded):
    """Padding on the left would stand between the two, and PEFT drops position ids."""
    base, tokenizer, examples, prompter = loaded
    torch.manual_seed(0)
    model = get_peft_model(base, PROMPT_LEARNING[method]()).eval()
    for p in model.parameters():
        if p.requires_grad:
            p.data.normal_(std=0.5)
    examples = [longer(e, i % 3) for i, e in enumerate(examples[:6])]
    encoded = [prompter.encode(e) for e in examples]
    assert len({len(one.input_ids) for one in encoded}) > 1
    rows = score_loss(Asked(model, examples, prompter, EvaluateSection(batch_size=6)))
    for row, one in zip(rows, encoded, strict=True):
        ids = torch.tensor([one.input_ids])
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -len(one.labels) :]
        logs = logits[:-1].log_softmax(-1)
        expected = -sum(float(logs[i, t]) for i, t in enumerate(one.labels[1:]) if t >= 0)
        assert row["nats"] == pytest.approx(expected, rel=1e-4)
    batch = collator(tokenizer, False, model)(encoded)
    labels = batch.pop("labels")
    with torch.no_grad():
        loss = float(mean_loss(model(**batch), labels))
    assert loss == pytest.approx(sum(r["nats"] for r in rows) / sum(r["tokens"] for r in rows), rel=1e-4)

    asked = [replace(e, answer=e.target, choices=("true", "false sky is", "cold ice")) for e in examples]
    asked = [e for e in asked if e.target == "true"]
    for example, row in zip(asked, score_choice(Asked(model, asked, prompter, EvaluateSection())), strict=True):
        prompt = prompter.prompt_ids(example.prompt)
        for choice, score in zip(example.choices, row["scores"], strict=True):
            answer = prompter.answer_ids(choice, end=False)
            ids = torch.tensor([prompt + answer])
            with torch.no_grad():
                logs = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].log_softmax(-1)
            own = sum(float(logs[len(logs) - len(answer) - 1 + i, t]) for i, t in enumerate(answer))
            assert score == pytest.approx(own, rel=1e-4)
    with pytest.raises(UserError, match="Measure loss or choice"):
        generate_all(model, tokenizer, [encoded[0].input_ids], 1, 3)


@pytest.fixture(params=["rwkv", "xlstm"])
def reads_padding(request, loaded):
    """A model that has no use for an attention mask."""
    from transformers import RwkvConfig, RwkvForCausalLM, xLSTMConfig, xLSTMForCausalLM

    common = {"vocab_size": len(loaded[1]), "num_hidden_layers": 2}
    if request.param == "rwkv":
        return RwkvForCausalLM(RwkvConfig(**common, hidden_size=16, attention_hidden_size=16)).eval()
    config = xLSTMConfig(**common, hidden_size=128, num_heads=4, num_blocks=2, qk_dim_factor=1.0, v_dim_factor=1.0)
    return xLSTMForCausalLM(config).eval()


def test_a_model_that_reads_padding_gets_none(reads_padding, loaded):
    _, tokenizer, examples, prompter = loaded
    model, kind = reads_padding, reads_padding.config.model_type
    examples = [longer(e, i % 3) for i, e in enumerate(examples[:3])]
    with pytest.raises(UserError, match=rf"type {kind} reads padding.*batch_size: 1"):
        score_loss(Asked(model, examples, prompter, EvaluateSection(batch_size=3)))
    assert len(score_loss(Asked(model, examples, prompter, EvaluateSection(batch_size=1)))) == 3
    one = replace(examples[0], answer="red", target="red", choices=("red", "cold ice is"))
    assert len(score_choice(Asked(model, [one], prompter, EvaluateSection(batch_size=1)))) == 1
    prompts = [prompter.prompt_ids(e.prompt) for e in examples]
    with pytest.raises(UserError, match=f"type {kind} reads padding"):
        generate_all(model, tokenizer, [prompts[0], prompts[0][1:]], 2, 2)


def classifier(kind, size):
    from transformers import FNetConfig, FNetForSequenceClassification, XLNetConfig, XLNetForSequenceClassification

    if kind == "fnet":
        return FNetForSequenceClassification(
            FNetConfig(vocab_size=size, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
        ).eval()
    return XLNetForSequenceClassification(
        XLNetConfig(vocab_size=size, d_model=32, n_layer=2, n_head=2, d_inner=48)
    ).eval()


def test_a_classifier_s_row_counts_what_it_counts_alone(loaded):
    """XLNet's head reads the last position; FNet mixes all, padding among them."""
    tokenizer = loaded[1]
    rows = [Encoded("", list(range(5, 5 + n)), [n % 2]) for n in (4, 9, 6)]
    model = classifier("xlnet", len(tokenizer))
    collate = collator(tokenizer, True, model)
    with torch.no_grad():
        alone = torch.cat([model(**collate([row])).logits for row in rows])
        torch.testing.assert_close(model(**collate(rows)).logits, alone, atol=1e-5, rtol=1e-4)
    fnet = classifier("fnet", len(tokenizer))
    with pytest.raises(UserError, match="type fnet reads padding"):
        collator(tokenizer, True, fnet)(rows)
    assert collator(tokenizer, True, fnet)(rows[:1])["labels"].tolist() == [0]


def test_a_decoder_that_counts_padding_gets_none(loaded):
    from transformers import BartConfig, BartForCausalLM, BartForSequenceClassification

    config = BartConfig(
        vocab_size=len(loaded[1]), d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=32,
    )  # fmt: skip
    assert kind_of_unmasked(BartForCausalLM(config)) == "bart"
    assert kind_of_unmasked(BartForSequenceClassification(config)) == "", "padded on the right"


def test_an_encoder_that_reads_some_padding_is_said(loaded):
    from transformers import ConvBertConfig, ConvBertForSequenceClassification

    size = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, embedding_size=32)
    model = ConvBertForSequenceClassification(ConvBertConfig(vocab_size=len(loaded[1]), head_ratio=1, **size))
    with pytest.warns(UserWarning, match="type convbert reads padding behind a row"):
        collator(loaded[1], True, model)


def test_verify_pads_no_row_of_a_model_that_reads_padding(reads_padding, loaded):
    _, tokenizer, _, prompter = loaded
    probes = [logprobs.Probe((5, 9, 7), (2,)), logprobs.Probe(tuple(range(3, 15)), (4, 11))]
    together = logprobs.score(reads_padding, probes)
    torch.testing.assert_close(together, torch.cat([logprobs.score(reads_padding, [probe]) for probe in probes]))

    @contextmanager
    def as_variant(name):
        yield reads_padding

    tuned = SimpleNamespace(model=reads_padding, tokenizer=tokenizer, variants=["base", "tuned"], as_variant=as_variant)
    questions = ["red", "cold ice is red"]
    alone = [_with_continuations(tuned, prompter, [question])[0].ids for question in questions]
    assert [probe.ids for probe in _with_continuations(tuned, prompter, questions)] == alone


def test_the_answer_in_a_whole_reference_is_what_is_compared(loaded, monkeypatch):
    """GSM8K's form: the answer's number stands at the end of its reasoning, and in no field of its own."""
    model, _, examples, prompter = loaded
    spec = EvaluateSection(extract=r"#### (-?[0-9.,]+)")
    whole = "two and three make five, and one more makes six #### 6"
    for text, right in ((whole, True), ("#### 6", True), ("#### 5", False), ("6", False)):
        monkeypatch.setattr(scoring, "generate_all", lambda *_, text=text: [text])
        for target in (whole, "6"):
            example = replace(examples[0], answer=whole, target=target)
            (row,) = score_exact_match(Asked(model, [example], prompter, spec))
            assert row["correct"] is right


@pytest.mark.parametrize(
    ("reference", "extract", "text", "right"),
    [
        ("The answer is 42.", r"\d+", "The answer is 42.", True),
        ("B) Paris", r"\b[A-D]\b", "(B), of course", True),
        ("Yes, it is!", "(?i)yes|no", "yes", False),
        ("Yes, it is!", "(?i)yes|no", "Yes", True),
        ("So x = -7", r"-?\d+", "-7", True),
        ("It costs **$5**.", r"(\d+)\D*$", "5 dollars", True),
        ("forty-two", r"(\w+-\w+)", "forty-two !", True),
        ("red", "#### (.*)", "#### red", True),
        ("#### 18", r"(?<=####)\s*-?\d+", "#### 18", True),
        ("Rating: 8", r"Rating: (\d+)", "Rating: 8", True),
        ("1. Paris", r"^\d+\.\s*(\w+)", "1. Paris", True),
    ],
)
def test_what_the_pattern_takes_of_a_reference_is_compared(reference, extract, text, right, loaded, monkeypatch):
    monkeypatch.setattr(scoring, "generate_all", lambda *_: [text])
    model, _, examples, prompter = loaded
    example = replace(examples[0], answer=reference, target=reference)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (row,) = score_exact_match(Asked(model, [example], prompter, EvaluateSection(extract=extract)))
    assert row["correct"] is right


@pytest.mark.parametrize(
    ("reference", "extract", "part"),
    [
        ("3/4", r"(\d+)\D*$", "4"),
        ("so it is 3/4.", r"(\d+)\D*$", "4"),
        ("It is 3/4", r"(?s).*?(\d+)", "3"),
        ("#### 3/4", r"(?<=####)\s*\d+", "3"),
        ("3/4 of it", r"\d+\s", "4"),
        (r"$10,\!080$", r"-?\d+", "10"),
        (r"$\frac{3}{4}$", r"-?\d+", "3"),
        ("1,250", r"\d+", "1"),
        ("about 3.50", r"^\D*(\d+)", "3"),
        ("-5", r"\d+", "5"),
        ("−5", r"-?\d+", "5"),
        (".5", r"-?\d+", "5"),
        ("√2", r"\d+", "2"),
        ("B+", "[A-F]", "B"),
        ("C++", r"\w+", "C"),
        ("A,B", "[A-D]", "A"),
        ("U.S.", r"^(.*?)(?:[.\n]|$)", "U"),
        ("Rating: 8/10", r"Rating: (\d+)/10", "8"),
        ("the correct answer is answer2", r"answer(\d)", "2"),
        (r"so it is $\boxed{42}$.", r"(?<=\\boxed\{)[^}]+", "42"),
        ("and so x=72", r"-?\d+(?:\.\d+)?(?=\D*$)", "72"),
        ("Therefore Answer:B", r"[A-D](?=\W*$)", "B"),
        ("it is 72cm", r"\d+(?=\D*$)", "72"),
        ("答案是42。", r"\d+", "42"),
    ],
)
def test_a_part_of_a_word_or_a_number_is_compared_and_said(reference, extract, part, loaded, monkeypatch):
    monkeypatch.setattr(scoring, "generate_all", lambda *_: [reference, "red"])
    model, _, examples, prompter = loaded
    asked = [replace(examples[0], answer=answer, target=answer) for answer in (reference, "red")]
    words = re.escape(
        f"In 1 of 2 expected answers evaluate.extract takes a part of a word or a number, such as {part!r}"
    )
    with pytest.warns(UserWarning, match=words):
        row, _ = score_exact_match(Asked(model, asked, prompter, EvaluateSection(extract=extract)))
    assert row["correct"]
    assert row["predicted"] == part


def test_answers_that_cannot_be_written_in_full_are_said(loaded):
    model, _, examples, prompter = loaded
    long = [replace(examples[0], answer="red blue red blue"), examples[1]]
    with pytest.warns(UserWarning, match=r"1 of 2 expected answers are longer than evaluate.max_new_tokens = 3"):
        score_exact_match(Asked(model, long, prompter, EvaluateSection(max_new_tokens=3)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        score_exact_match(Asked(model, long, prompter, EvaluateSection(max_new_tokens=4)))


def test_choices_that_nothing_tells_apart_are_said(loaded):
    model, _, examples, prompter = loaded
    same = replace(examples[0], choices=("unheard", "unseen", "red"), answer="unseen", target="unseen")
    with pytest.warns(UserWarning, match="the choices 'unseen' and 'unheard' are the same tokens"):
        score_choice(Asked(model, [same], prompter, EvaluateSection()))
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
    with pytest.warns(UserWarning, match=r"In 2 of 2 questions the two best choices are equally likely.*counts\.$"):
        score_choice(Asked(model, examples[:2], prompter, EvaluateSection()))
    with pytest.warns(UserWarning, match="--dtype float32 tells them apart"):
        score_choice(Asked(model.bfloat16(), examples[:2], prompter, EvaluateSection()))


def test_all_tokens_may_be_drawn(tiny_lm, monkeypatch):
    """transformers would draw from the fifty likeliest alone."""
    tuned, seen = open_tuned(tiny_lm), {}
    own = tuned.model.generate
    monkeypatch.setattr(tuned.model, "generate", lambda **given: seen.update(given) or own(**given))
    "".join(generate(tuned, "is the fire red ?", temperature=1.0, max_new_tokens=2))
    assert (seen["do_sample"], seen["top_k"], seen["top_p"]) == (True, 0, 1.0)


@pytest.fixture
def trained(lm_values, tmp_path):
    """A run on a base of its own, with a fingerprint."""
    base = shutil.copytree(lm_values["model"]["path"], tmp_path / "base")
    values = lm_values | {"model": {"path": str(base)}, "evaluate": {"tasks": ["loss"]}}
    folder = tmp_path / "run"
    run(build_recipe(values), folder, progress=False)
    return folder, base


def other_weights(file):
    tensors = load_file(file)
    save_file({name: value * 3 for name, value in tensors.items()}, file, metadata={"format": "pt"})


def test_a_base_that_has_changed_is_not_taken_for_the_one_that_was_trained_on(trained, tmp_path):
    folder, base = trained
    before = evaluate(folder, progress=False)
    kept = shutil.copytree(base, tmp_path / "kept")
    other_weights(base / "model.safetensors")
    for ask in (
        lambda: evaluate(folder, progress=False),
        lambda: open_tuned(folder / "adapter"),
        lambda: verify(folder),
        lambda: export_lora(folder, tmp_path / "lora", rank=2, progress=False),
    ):
        with pytest.raises(UserError, match=r"base are not those that .* was trained on.*--base"):
            ask()
    with pytest.warns(UserWarning, match="not those that"):
        of_other = evaluate(open_tuned(folder, base=str(base)), progress=False)
    assert set(of_other.other) == {"base_weights"}  # so it does not come into the card
    assert json.loads(Path(before.file).read_text())["metrics"] == before.metrics
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        same = evaluate(open_tuned(folder, base=str(kept)), progress=False)
    assert same.metrics == before.metrics
    assert not same.other  # which comes into the card
    note = json.loads((folder / "adapter" / "lab.json").read_text())
    assert {"model.norm.weight", "config hidden_size"} <= set(note["base"])
    for unknown in ({"commit": "a" * 40}, None, "x"):  # of the hub, where it was trained
        (folder / "adapter" / "lab.json").write_text(json.dumps(note | {"base": unknown}))
        open_tuned(folder)
    (folder / "adapter" / "lab.json").write_text(json.dumps(note))
    shutil.copy(kept / "model.safetensors", base)
    values = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(values | {"rms_norm_eps": 0.5}))
    with pytest.warns(UserWarning, match=r"configuration is not the one that .*: rms_norm_eps was .* and is 0\.5"):
        open_tuned(folder)


def saved_again(base, factor, **how):
    """The base written by today's transformers, in shards, in its own place."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(factor)
    shutil.rmtree(base)
    model.save_pretrained(base, **how)
    tokenizer.save_pretrained(base)


def test_a_base_is_known_by_its_tensors_whatever_files_hold_them(trained):
    folder, base = trained
    config = json.loads((base / "config.json").read_text())
    written = config | {"transformers_version": "4.42.0", "torch_dtype": "float32", "use_cache": False}
    (base / "config.json").write_text(json.dumps(written))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        before = evaluate(folder, progress=False)
        saved_again(base, 1, max_shard_size="20KB")
        assert len([*base.glob("*.safetensors")]) > 1
        again = evaluate(folder, progress=False)
    assert (again.metrics, again.other) == (before.metrics, {})
    saved_again(base, 3, max_shard_size="20KB")
    with pytest.raises(UserError, match="base are not those that"):
        evaluate(folder, progress=False)


@pytest.mark.parametrize(
    ("change", "another"),
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 4.0}}, "rope_theta was 10000.0 and is 4.0"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 8.0}}, 'is "linear"'),
        ({"rope_theta": 10000.0, "rope_parameters": None}, None),  # as earlier versions write it
        ({"pad_token_id": 3, "attention_dropout": 0.5, "initializer_range": 1.0, "pretraining_tp": 2}, None),
        ({"eos_token_id": [1, 2], "id2label": {"0": "good"}, "architectures": ["LlamaModel"]}, None),
        ({"layer_types": ["sliding_attention", "full_attention"]}, None),  # which was not there: nothing to compare
        ({"max_position_embeddings": 1 << 10}, None),
    ],
)
def test_of_a_configuration_counts_what_the_model_computes(change, another, trained):
    folder, base = trained
    values = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(values | change))
    if another:
        with pytest.warns(UserWarning, match=f"configuration is not the one that .* was trained on: .*{another}"):
            assert open_tuned(folder).given.keys() == {"base_weights"}  # so it does not come into the card
        with pytest.warns(UserWarning, match=f"the one that the run .* was started with: .*{another}"):
            analyze([folder], progress=False)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            assert open_tuned(folder).given == {}


def test_what_transformers_does_not_read_is_not_looked_at(trained):
    folder, base = trained
    shutil.copy(base / "model.safetensors", base / "model_old.safetensors")
    other_weights(base / "model_old.safetensors")
    assert open_tuned(folder).given == {}
    (base / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UserError, match="base"):
        analyze([folder], progress=False)


def test_files_of_another_kind_tell_nothing_and_that_is_said(trained):
    folder, base = trained
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    with pytest.warns(
        UserWarning, match="It cannot be checked whether the base model's weights are those that .*adapter"
    ):
        open_tuned(folder)
    with pytest.warns(UserWarning, match="It cannot be checked whether .* those that the run .* was started with"):
        analyze([folder], progress=False)


@pytest.mark.parametrize(
    "header",
    ["[]", "null", '{"a": 1}', '{"a": {"dtype": "F32", "shape": [1]}}', "[" * 100_000]
    + [f'{{"a": {{"dtype": "F32", "shape": [1], "data_offsets": {at}}}}}' for at in ("[0]", "[-900, 4]", "[0, 9e9]")],
)
def test_a_damaged_base_is_its_loader_s_to_say(header, trained):
    folder, base = trained
    told = header.encode()
    (base / "model.safetensors").write_bytes(len(told).to_bytes(8, "little") + told + b"0" * 16)
    assert not any(not name.startswith("config ") for name in weights.weights_digest(recipe_of_run(folder).model))


def test_a_damaged_note_of_what_a_run_is_made_of_says_nothing(trained):
    folder, _ = trained
    record = json.loads((folder / "record.json").read_text())
    for noted in ([1], {"weights": [1], "rows": record["made_of"]["rows"]}):
        (folder / "record.json").write_text(json.dumps(record | {"made_of": noted}))
        assert analyze([folder], progress=False)


def test_a_hub_s_commit_that_changes_no_weights_is_no_other_base(trained, monkeypatch, tmp_path):
    folder, base = trained
    cached = [shutil.copytree(base, tmp_path / "snapshots" / commit) for commit in ("a", "b")]
    part = open_tuned(folder).recipe.model.model_copy(update={"path": "me/tiny"})
    for snapshot in cached:
        monkeypatch.setattr(weights, "folder_here", lambda *_, snapshot=snapshot: snapshot)
        assert opened._other_base(folder / "adapter", part, None) == {}
    other_weights(cached[1] / "model.safetensors")
    with pytest.raises(UserError, match="are not those that"):
        opened._other_base(folder / "adapter", part, None)


def test_a_conversation_is_evaluated_whatever_its_earlier_turns_hold(lm_values, tmp_path):
    """They are part of the prompt, and only learning needs them as answers."""
    said = [{"role": ("user", "assistant")[i % 2], "content": "is the fire red ?"} for i in range(4)]
    said[1] |= {"weight": 0, "reasoning_content": "red", "content": ""}
    said[3] |= {"weight": 0}
    (tmp_path / "test.jsonl").write_text(json.dumps({"messages": said}) + "\n")
    recipe = build_recipe(lm_values)
    data = recipe.data.model_copy(update={"test": str(tmp_path / "test.jsonl")})
    spec = EvaluateSection(tasks=["exact_match"], max_new_tokens=8)
    assert evaluate(lm_values["model"]["path"], data, spec, progress=False).examples == 1


def test_a_fingerprint_of_other_weights_is_not_asked(trained, tmp_path):
    folder, _ = trained
    assert verify(folder).good
    save_file({"x": torch.zeros(1)}, folder / "adapter" / "optimizer.safetensors")  # no part of the adapter
    assert verify(folder, adapter=str(folder)).good
    stale = shutil.copytree(folder, tmp_path / "stale")
    other_weights(stale / "adapter" / "adapter_model.safetensors")
    assert not verify(stale).good
    for asked in (
        {"adapter": str(folder)},
        {"endpoint": "http://127.0.0.1:9/v1", "model": "x"},
        {"endpoint": "http://127.0.0.1:9/v1", "model": "x", "prompts": "built-in"},
    ):
        with pytest.raises(UserError, match="is the fingerprint of other weights than the folder holds now"):
            verify(stale, **asked)
    (stale / "adapter" / "fingerprint.json").unlink()
    assert not verify(stale, adapter=str(folder)).good


def test_a_decoder_whose_positions_begin_elsewhere_is_refused(loaded, tmp_path):
    """RoBERTa's begin behind the padding token's: position 0, ours and that of `generate`, would be that one's."""
    from transformers import RobertaConfig, RobertaForCausalLM

    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    RobertaForCausalLM(RobertaConfig(vocab_size=99, is_decoder=True, **size)).save_pretrained(tmp_path)
    loaded[1].save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"Models of type roberta cannot be trained as language models"):
        load_model(ModelSection(path=str(tmp_path)))
