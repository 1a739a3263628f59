"""Evaluation: batched scores equal those of one row at a time, base and adapter side by side, saved and read back."""

import inspect
import json
import unicodedata
import warnings
from dataclasses import replace

import pytest
import torch
from transformers import AddedToken

from dual_lora.lab.data.encode import Prompter
from dual_lora.lab.data.examples import load_split
from dual_lora.lab.data.formats import Example, turn
from dual_lora.lab.errors import UserError
from dual_lora.lab.files.write import hold
from dual_lora.lab.model.generate import ends_of, generate, texts_of
from dual_lora.lab.model.load import load_model
from dual_lora.lab.model.opened import open_tuned
from dual_lora.lab.recipe.read import build_recipe
from dual_lora.lab.recipe.schema import DataSection, EvaluateSection
from dual_lora.lab.run import scoring
from dual_lora.lab.run.choice import score_choice
from dual_lora.lab.run.evaluate import evaluate
from dual_lora.lab.run.figures import figures, summary
from dual_lora.lab.run.scoring import Asked, generate_all, same_answer, score_loss, search_of
from dual_lora.lab.run.train import run


@pytest.fixture
def loaded(lm_values):
    recipe = build_recipe(lm_values)
    base = load_model(recipe.model)
    return base.model, base.tokenizer, load_split(recipe.data, "test"), Prompter(base.tokenizer)


def test_loss_equals_that_of_the_model_row_by_row(loaded):
    model, _, examples, prompter = loaded
    rows = score_loss(Asked(model, examples, prompter, EvaluateSection(batch_size=5)))
    for example, row in zip(examples, rows, strict=True):
        encoded = prompter.encode(example)
        out = model(input_ids=torch.tensor([encoded.input_ids]), labels=torch.tensor([encoded.labels]))
        assert row["nats"] / row["tokens"] == pytest.approx(float(out.loss.detach()), rel=1e-5)
    figures = summary("loss", rows, examples)
    assert figures["loss"] == pytest.approx(sum(r["nats"] for r in rows) / sum(r["tokens"] for r in rows))


@pytest.mark.parametrize(("count", "answer"), [(2001, "c0"), (1500, "c0" + " red" * 1000)])
def test_choices_without_an_end_are_refused(count, answer):
    """Each is read in the answer's place, all of one question at once: of 300 kB came 900 MB of text."""
    choices = tuple(f"c{i}" for i in range(count))
    example = Example("data.json, record 1", turn("is ?", answer), answer=answer, target="c0", choices=choices)
    with pytest.raises(UserError, match=rf"record 1: {count:,} choices are .* characters, each written"):
        score_choice(Asked(None, [example], None, EvaluateSection()))


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("longer", [False, True])
def test_choice_scores_equal_a_row_for_every_choice(longer, cached, loaded, monkeypatch):
    """Also for choices that differ in more than their last token, and for a model that has no cache to share."""
    from dataclasses import replace

    model, _, examples, prompter = loaded
    if not cached:
        forward = model.forward
        signature = inspect.signature(forward)
        monkeypatch.setattr(model, "forward", lambda *a, **k: forward(*a, **{**k, "use_cache": False}))
        model.forward.__signature__ = signature
    if longer:
        examples = [
            replace(e, answer=f"is {e.target}", choices=("true", "false sky is", "cold ice"))
            for e in examples
            if e.target == "true"
        ]
    rows = score_choice(Asked(model, examples, prompter, EvaluateSection(batch_size=3)))
    for example, row in zip(examples, rows, strict=True):
        prompt = prompter.prompt_ids(example.prompt)
        for choice, score in zip(example.choices, row["scores"], strict=True):
            answer = prompter.answer_ids(example.answer_with(choice), end=False)
            with torch.no_grad():
                logs = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
            expected = sum(float(logs[len(prompt) + i - 1, t]) for i, t in enumerate(answer))
            assert score == pytest.approx(expected, rel=1e-5)


def test_batched_generation_equals_one_prompt_at_a_time(loaded):
    model, tokenizer, examples, prompter = loaded
    prompts = [prompter.prompt_ids(e.prompt)[: 3 + i] for i, e in enumerate(examples)]
    together = generate_all(model, tokenizer, prompts, 7, 6)
    assert together == [generate_all(model, tokenizer, [p], 1, 6)[0] for p in prompts]


@pytest.mark.parametrize("method", ["dual_lora", "lora", "full"])
def test_base_and_adapter_side_by_side_and_from_the_folder(method, lm_values, tmp_path):
    lm_values["method"] = {"name": method} if method == "full" else {"name": method, "r": 8}
    lm_values["train"] |= {"steps": 60, "batch_size": 8}
    lm_values["evaluate"]["tasks"] = ["choice", "exact_match", "loss"]
    trained = run(build_recipe(lm_values), tmp_path / "run", progress=False)
    fresh = evaluate(tmp_path / "run", progress=False)
    assert fresh.metrics["tuned"]["loss"] < 0.5 * fresh.metrics["base"]["loss"]
    assert fresh.metrics["tuned"]["exact_match"] > fresh.metrics["base"]["exact_match"]
    if method != "full":
        adapter = evaluate(tmp_path / "run/adapter", progress=False)
        in_memory = evaluate(trained.tuned, progress=False)
        assert fresh.metrics == adapter.metrics == in_memory.metrics
    written = tmp_path / "run/evaluation/test-choice-exact_match-loss"
    assert json.loads((written / "result.json").read_text())["metrics"] == fresh.metrics
    items = [json.loads(line) for line in (written / "items.jsonl").read_text().splitlines()]
    assert len(items) == 2 * 3 * fresh.examples
    tuned = [i for i in items if i["variant"] == "tuned" and i["task"] == "choice"]
    assert sum(i["correct"] for i in tuned) / len(tuned) == fresh.metrics["tuned"]["choice"]
    assert fresh.scores("tuned", "choice") == [float(i["correct"]) for i in tuned]


@pytest.mark.parametrize("method", ["dual_lora", "lora"])
def test_classifier_learns_and_its_head_is_in_the_adapter(method, encoder_values, tmp_path):
    encoder_values["method"]["name"] = method
    trained = run(build_recipe(encoder_values), tmp_path / "run", progress=False)
    result = evaluate(tmp_path / "run/adapter", progress=False)
    assert result.metrics["tuned"]["accuracy"] > 0.9 > result.metrics["base"]["accuracy"]
    assert set(result.metrics["tuned"]) == {"accuracy", "f1", "matthews", "loss"}
    assert evaluate(trained.tuned, progress=False).metrics == result.metrics


def test_bleu_counts_all_references_of_a_prompt(loaded):
    rows = [{"predicted": "the cat sat on the mat", "references": ["the cat sat on the mat", "a cat sat"]}] * 2
    assert summary("bleu", rows, [])["bleu"] == pytest.approx(100)
    rows = [{"predicted": "the cat sat on the mat", "references": ["dogs bark at night outside now"]}] * 2
    assert summary("bleu", rows, [])["bleu"] < 10


def test_extraction_and_json_comparison(lm_values, loaded, monkeypatch):
    from dataclasses import replace

    from dual_lora.lab.run import scoring

    model, _, examples, prompter = loaded
    texts = [f"well, it is {e.target} of course" for e in examples]
    monkeypatch.setattr(scoring, "generate_all", lambda *_: texts)
    spec = EvaluateSection(extract="true|false")
    rows = scoring.score_exact_match(Asked(model, examples, prompter, spec))
    assert all(r["correct"] for r in rows)
    texts = ['{"b": 1, "a": 2}'] * len(examples)
    examples = [replace(e, answer='{"a": 2, "b": 1}') for e in examples]
    for compare, right in (("json", True), ("text", False)):
        rows = scoring.score_exact_match(Asked(model, examples, prompter, EvaluateSection(compare=compare)))
        assert all(r["correct"] is right for r in rows)


def test_plain_model_is_evaluated_as_base(tiny_lm, lm_values):
    recipe = build_recipe(lm_values)
    result = evaluate(str(tiny_lm), recipe.data, recipe.evaluate, progress=False)
    assert list(result.metrics) == ["base"]
    with pytest.raises(UserError, match="give the data to evaluate it on by --recipe"):
        evaluate(str(tiny_lm), progress=False)


def test_wrong_tasks_and_folders(lm_values, encoder_values, tmp_path, tiny_lm):
    recipe, texts = build_recipe(lm_values), build_recipe(encoder_values)
    with pytest.raises(UserError, match="task classification does not fit"):
        evaluate(str(tiny_lm), recipe.data, EvaluateSection(tasks=["classification"]), progress=False)
    with pytest.raises(UserError, match="task loss does not fit"):
        evaluate(str(tiny_lm), texts.data, EvaluateSection(tasks=["loss"]), progress=False)
    with pytest.raises(UserError, match="has no classes"):
        evaluate(str(tiny_lm), texts.data, EvaluateSection(), progress=False)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/recipe.yaml").write_text("")
    with pytest.raises(UserError, match="is not finished"):
        open_tuned(tmp_path / "run")
    held = hold(tmp_path / "run/.lock", "")
    with pytest.raises(UserError, match="is still in training"):
        open_tuned(tmp_path / "run")
    held.release()
    with pytest.raises(UserError, match="is not finished"):
        open_tuned(tmp_path / "run")


def test_prompts_written_otherwise_than_in_training_are_said(lm_values, tmp_path):
    """The recipe of other data says nothing of the template, and auto is another one than the run's."""
    lm_values["data"]["template"], lm_values["train"]["steps"] = "alpaca", 1
    tuned = run(build_recipe(lm_values), tmp_path / "run", progress=False).tuned
    own, other = tuned.recipe.data, DataSection(test=lm_values["data"]["test"])
    spec = EvaluateSection(tasks=["loss"], base=False)
    with pytest.warns(UserWarning, match=r"template alpaca.*data\.template"):
        evaluate(tuned, other, spec, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        evaluate(tuned, own, spec, progress=False)


def test_damaged_and_misplaced_adapters(lm_values, encoder_values, tmp_path, tiny_lm):
    lm_values["train"]["steps"] = 1
    run(build_recipe(lm_values), tmp_path / "run", progress=False)
    weights = tmp_path / "run/adapter/adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="adapter"):
        open_tuned(tmp_path / "run")
    weights.write_bytes(b"not a tensor file at all")
    with pytest.raises(UserError, match="adapter"):
        open_tuned(tmp_path / "run")
    weights.write_bytes(whole)
    note = tmp_path / "run/adapter/lab.json"
    text = note.read_text()
    note.write_text(text[:20])
    with pytest.raises(UserError, match=r"lab\.json, the note of the recipe, is damaged"):
        open_tuned(tmp_path / "run")
    note.write_text(text)
    config = tmp_path / "run/adapter/adapter_config.json"
    config.write_text(config.read_text().replace('"LORA"', '"NO_SUCH_METHOD"'))
    with pytest.raises(UserError, match=r"is of the method .NO_SUCH_METHOD., which PEFT .* does not have"):
        open_tuned(tmp_path / "run")


def test_greedy_is_greedy_whatever_the_model_s_makers_set(loaded):
    model, tokenizer, examples, prompter = loaded
    prompts = [prompter.prompt_ids(example.prompt) for example in examples[:3]]
    plain = generate_all(model, tokenizer, prompts, 2, 8)
    own = model.generation_config
    for name, value in (
        ("repetition_penalty", 3.0),
        ("num_beams", 3),
        ("no_repeat_ngram_size", 1),
        ("min_new_tokens", 8),
    ):
        setattr(model.generation_config, name, value)
        assert generate_all(model, tokenizer, prompts, 2, 8) == plain, name
    assert model.generation_config is own, "put back"


@pytest.mark.parametrize("beams", [1, 3])
def test_no_word_twice_in_an_answer_but_a_prompts_may(loaded, beams):
    """As LoRA's own decoder counts; transformers' setting forbids the prompt's words as well."""
    model, tokenizer, _, _ = loaded
    red, blue, end = tokenizer.convert_tokens_to_ids(["red", "blue", "</s>"])
    head = torch.full((len(tokenizer),), -9.0)
    head[[red, blue, end]] = torch.tensor([3.0, 2.0, 1.0])
    bias = lambda module, given, logits: torch.zeros_like(logits) + head  # noqa: E731
    hook = model.get_output_embeddings().register_forward_hook(bias)
    try:
        how = search_of(EvaluateSection(beams=beams, no_repeat_ngram=1, length_penalty=3.0))
        found = generate_all(model, tokenizer, [[red, blue], [blue]], 2, 5, search=how)
        assert [sorted(text.split()) for text in found] == [["blue", "red"]] * 2
    finally:
        hook.remove()


def test_a_model_of_nan_has_no_score(tiny_lm, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_lm)
    model.get_output_embeddings().weight.data.fill_(float("nan"))
    model.save_pretrained(tmp_path / "m")
    AutoTokenizer.from_pretrained(tiny_lm).save_pretrained(tmp_path / "m")
    with pytest.raises(UserError, match="holds NaN or infinity"):
        open_tuned(tmp_path / "m")


def test_an_adapter_from_elsewhere_brings_its_chat_template(tiny_lm, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_lm), AutoTokenizer.from_pretrained(tiny_lm)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    adapted.save_pretrained(tmp_path / "a")
    assert open_tuned(tmp_path / "a").tokenizer.chat_template == tokenizer.chat_template
    tokenizer.chat_template = "{{ messages[0]['content'] }} !"
    tokenizer.save_pretrained(tmp_path / "a")
    assert open_tuned(tmp_path / "a").tokenizer.chat_template == tokenizer.chat_template
    (tmp_path / "a" / "tokenizer.json").write_text("{}")
    (tmp_path / "a" / "tokenizer_config.json").write_text("[]")
    with pytest.warns(UserWarning, match="is not used, but its base's"):
        open_tuned(tmp_path / "a")


@pytest.mark.parametrize("task", ["bleu", "nlg"])
def test_several_test_sets_are_measured_apart_with_several_references_too(task, loaded, monkeypatch):
    model, _, examples, prompter = loaded
    monkeypatch.setattr(scoring, "generate_all", lambda *given: ["red blue green red"] * len(given[2]))
    sets = [("a", "red blue green red"), ("a", "red green"), ("b", "no word of it")]
    three = [replace(examples[0], answer=answer, part=part) for part, answer in sets]
    rows = scoring.score_texts(Asked(model, three, prompter, EvaluateSection()))
    assert [(row["part"], len(row["references"])) for row in rows] == [("a", 2), ("b", 1)]
    found = figures(task, rows, three)
    assert found["bleu/a"] > 10 * found["bleu/b"]
    assert found["bleu"] == pytest.approx((found["bleu/a"] + found["bleu/b"]) / 2)


def test_an_answer_ends_where_the_makers_say_and_keeps_its_blanks(loaded, monkeypatch):
    model, tokenizer, _, _ = loaded
    red, question, user, warm, end = tokenizer.convert_tokens_to_ids(["red", "?", "user", "warm", "</s>"])
    tokenizer.clean_up_tokenization_spaces = True  # as Llama 3's and GPT-2's files say
    monkeypatch.setattr(model.generation_config, "eos_token_id", [end, user])
    assert ends_of(model, tokenizer) == sorted([end, user])
    assert texts_of([[red, question, user, warm, end]], tokenizer, ends_of(model, tokenizer)) == ["red ?"]
    asked = {}
    monkeypatch.setattr(model, "generate", lambda **how: asked.update(how) or how["input_ids"])
    generate_all(model, tokenizer, [[red]], 1, 1)
    assert asked["eos_token_id"] == sorted([end, user])


def test_an_expected_answer_with_special_tokens_or_other_signs_can_be_met(loaded, monkeypatch):
    model, tokenizer, examples, prompter = loaded
    monkeypatch.setattr(scoring, "generate_all", lambda *_: ["café"])
    tokenizer.add_tokens([AddedToken("<|turn|>", special=True)])  # without a role
    example = replace(examples[0], answer=unicodedata.normalize("NFD", "<s> café<|turn|>"))
    (row,) = scoring.score_exact_match(Asked(model, [example], prompter, EvaluateSection()))
    assert row["correct"]


@pytest.mark.parametrize(
    ("reference", "written", "pattern", "right"),
    [
        ("4 * 5 = 20\n#### 20", "It is so.\n#### 20", r"####\s*(\S+)", True),  # as GSM8K's, and short
        ("4 * 5 = 20\n#### 20", "It is so.\n#### 4", r"####\s*(\S+)", False),
        ("The answer is 20", "I see: The answer is 20", r"The answer is (\d+)", True),
        ("3/4", "3", r"(\d+)", True),  # which is said
        ("20", "It is 20", r"(\d+)", True),
    ],
)
def test_what_a_reference_answers(reference, written, pattern, right, loaded, monkeypatch):
    model, _, examples, prompter = loaded
    monkeypatch.setattr(scoring, "generate_all", lambda *_: [written])
    example = replace(examples[0], answer=reference, target=reference)
    (row,) = scoring.score_exact_match(Asked(model, [example], prompter, EvaluateSection(extract=pattern)))
    assert row["correct"] is right


@pytest.mark.parametrize(
    ("found", "expected", "same"),
    [
        ('{"a": true}', '{"a": 1}', False),
        ('{"a": 1.0}', '{"a": 1}', True),
        ("[false]", "[0]", False),
        ("[[1, 2]]", "[[1, 2]]", True),
        ("[1, 2]", "[1]", False),
        ('{"a": 1, "a": 2}', '{"a": 2}', False),
        ("9" * 5000, "9", False),
        ("[" * 100_000, "[]", False),
        ("1,234.0", "1234", True),  # as MetaMathQA's answers are written
        ("-12,345,678", "-12345678", True),
        ("1,23", "123", False),
        ("0,123", "123", False),
        ('"1,234"', "1234", False),
        ('["1,234"]', '["1234"]', False),
    ],
)
def test_json_is_compared_as_json(found, expected, same):
    assert same_answer(found, expected, "json") is same


def test_choices_of_a_model_with_a_state_are_read_one_by_one(loaded):
    """Mamba's cache cannot be taken apart by rows, though it is a cache."""
    from transformers import MambaConfig, MambaForCausalLM

    _, tokenizer, examples, prompter = loaded
    config = MambaConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, state_size=4, initializer_range=0.3
    )
    model = MambaForCausalLM(config).eval()
    alone = score_choice(Asked(model, examples[:4], prompter, EvaluateSection(batch_size=1)))
    both = score_choice(Asked(model, examples[:4], prompter, EvaluateSection(batch_size=8)))
    for example, one, other in zip(examples, alone, both, strict=False):
        assert one["scores"] == pytest.approx(other["scores"], abs=1e-4)
        answer = prompter.answer_ids(example.answer_with(example.choices[0]), end=False)
        ids = prompter.prompt_ids(example.prompt) + answer
        logs = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        own = sum(float(logs[len(ids) - len(answer) - 1 + i, token]) for i, token in enumerate(answer))
        assert one["scores"][0] == pytest.approx(own, abs=1e-4)


def test_one_request_is_answered_as_an_evaluation_would(tiny_lm):
    tuned = open_tuned(tiny_lm)
    plain = "".join(generate(tuned, "is the fire red ?", max_new_tokens=8))
    tuned.model.generation_config.repetition_penalty = 5.0
    tuned.model.generation_config.no_repeat_ngram_size = 1
    assert "".join(generate(tuned, "is the fire red ?", max_new_tokens=8)) == plain


def test_a_choice_that_begins_with_another_is_said(loaded):
    model, _, examples, prompter = loaded
    spec = EvaluateSection()
    example = replace(examples[0], choices=("red", "red blue"), answer="red", target="red")
    with pytest.warns(UserWarning, match=r"'red blue' begins, in tokens, with the choice 'red'.*per_token: true"):
        score_choice(Asked(model, [example], prompter, spec))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        score_choice(Asked(model, [example], prompter, spec.model_copy(update={"per_token": True})))
