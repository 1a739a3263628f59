"""What holds for any value: what is written is read back, corrections are monotone, a swap of methods turns signs."""

import math
import tempfile
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from dual_lora.lab import yaml_text
from dual_lora.lab.files.folder import RunFolder
from dual_lora.lab.files.write import write_json
from dual_lora.lab.read import read_json
from dual_lora.lab.recipe.read import build_recipe
from dual_lora.lab.run.record import Record
from dual_lora.lab.study import statistics as stats
from dual_lora.lab.study import verdicts
from dual_lora.lab.study.job import Outcome, Training, read_outcome, read_scores, run_file, write_outcome

any_of_few = settings(derandomize=True, max_examples=40, deadline=None, database=None)

# Words that YAML reads as something else when they are not quoted, among any others.
TRICKY = ["1e5", "1_000", "0x1f", "010", "on", "~", "null", ".inf", "2026-01-01", "1:30", "-", "#", "{a:", "[b", "a:"]
TRICKY += ["'x'", '"y"', "a\x85b", "\u2028", " ", "\ufeff", "a\n b\n"]
words = st.sampled_from(TRICKY) | st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
numbers = st.floats(allow_nan=False, allow_infinity=False)
plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | numbers | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=8,
)
named = st.dictionaries(words, plain, max_size=4)


# Written and read.


@any_of_few
@given(
    about=words,
    path=words.filter(bool),
    method=st.dictionaries(st.from_regex(r"[a-z_]{1,8}", fullmatch=True).filter(lambda n: n != "name"), plain),
    train=st.fixed_dictionaries(
        {}, optional={"learning_rate": st.floats(1e-9, 1.0), "steps": st.integers(1, 10**6), "seed": st.integers(0, 99)}
    ),
    data=st.fixed_dictionaries({}, optional={"train": words, "choices": st.lists(words), "columns": st.lists(words)}),
)
def test_a_recipe_is_read_as_it_was_written(about, path, method, train, data):
    values = {"about": about, "model": {"path": path}, "method": {"name": "lora", **method}, "train": train}
    recipe = build_recipe(values | {"data": data})
    text = recipe.to_yaml()
    for load in (yaml_text.load, yaml.safe_load):  # the second is what other programs read YAML with
        assert build_recipe(load(text)) == recipe
    assert build_recipe(yaml_text.load(text)).to_yaml() == text


@any_of_few
@given(
    method=st.none() | named,
    classes=st.lists(words),
    extended=st.lists(st.integers(0, 99), max_size=2),
    result=st.none() | named,
    problems=st.none() | st.lists(words, min_size=1),
    origin=st.none() | named,
    number=st.integers(0, 2**53),
)
def test_a_record_is_read_as_it_was_written(method, classes, extended, result, problems, origin, number):
    values = dict.fromkeys(("seed", "processes", "rows_at_once", "total_steps", "examples", "left_out"), number)
    values |= {"trainable_parameters": number, "all_parameters": number, "made_of": {}, "precision": {}}
    values |= {"method": method, "classes": classes, "extended": extended, "result": result, "problems": problems}
    record = Record(**values, origin=origin, surroundings={"device": "a CPU"})
    with tempfile.TemporaryDirectory() as place:
        folder = RunFolder(Path(place))
        write_json(folder.record, record.written())
        read = folder.recorded()
    assert read.pop("device") == "a CPU"
    left_out = {"surroundings": None, "extended": [], "origin": None, "result": None, "problems": None}
    for field in fields(Record):
        value = getattr(record, field.name)
        if field.name in read:
            assert read.pop(field.name) == value
        else:
            assert field.name == "surroundings" or value == left_out[field.name]
    assert not read


@any_of_few
@given(results=named)
def test_results_are_read_as_they_were_written(results):
    with tempfile.TemporaryDirectory() as place:
        file = Path(place, "results.json")
        write_json(file, results)
        assert read_json(file) == results


@any_of_few
@given(
    scores=st.lists(st.floats(0.0, 1.0), min_size=1, max_size=5),
    seconds=st.floats(0, 1e9),
    figures=st.dictionaries(words.filter(lambda n: n != "forgetting"), st.none() | numbers, max_size=3),
    training=st.none() | st.builds(Training, seconds=st.none() | numbers, steps=st.integers(0, 10**9)),
    warnings=st.lists(words, max_size=2),
)
def test_an_outcome_is_read_as_it_was_written(scores, seconds, figures, training, warnings):
    more = {"figures": figures, "training": training, "warnings": warnings}
    score, items = sum(scores) / len(scores), len(scores)
    outcome = Outcome(key="a1b2", status="done", seconds=seconds, score=score, metric="choice", items=items, **more)
    with tempfile.TemporaryDirectory() as place:
        runs = Path(place)
        write_json(run_file(runs, "a1b2", "scores"), [[value] for value in scores])
        write_outcome(runs, outcome)
        assert read_outcome(runs, "a1b2") == outcome
        assert read_scores(runs, "a1b2")[:, 0].tolist() == scores


# Statistics.


def holm(p):
    """By its definition: the k-th smallest of K times K - k + 1, and no less than those before it."""
    order, adjusted, floor = sorted(range(len(p)), key=p.__getitem__), [0.0] * len(p), 0.0
    for k, i in enumerate(order):
        adjusted[i] = floor = max(floor, min(1.0, (len(p) - k) * p[i]))
    return adjusted


chances = st.lists(st.floats(0.0, 1.0), min_size=1, max_size=8)


@any_of_few
@given(p=chances)
def test_without_equivalence_the_correction_is_holms(p):
    assert stats.corrected(p, math.nan)[0].tolist() == pytest.approx(holm(p))


@any_of_few
@given(pairs=st.lists(st.tuples(st.floats(0.0, 1.0), st.just(math.nan) | st.floats(0.0, 1.0)), min_size=1, max_size=6),
       data=st.data())  # fmt: skip
def test_a_correction_is_monotone(pairs, data):
    """No p gets smaller, none overtakes another, and one that grows makes none smaller; their order plays no part."""
    p, p_same = np.array(pairs).T
    before = np.array(stats.corrected(p, p_same))
    raw = np.array([p, p_same])
    asked = ~np.isnan(raw)
    assert (np.isnan(before) == ~asked).all()
    assert ((before >= raw) & (before <= 1) | ~asked).all()
    by_size = before[asked][np.argsort(raw[asked], kind="stable")]
    assert (np.diff(by_size) >= 0).all()
    turned = data.draw(st.permutations(range(len(pairs))))
    assert np.array(stats.corrected(p[turned], p_same[turned])) == pytest.approx(before[:, turned], nan_ok=True)
    k = data.draw(st.integers(0, len(pairs) - 1))
    grown = p.copy()
    grown[k] = data.draw(st.floats(p[k], 1.0))
    alone = stats.corrected(p, math.nan)[0]
    assert (stats.corrected(grown, math.nan)[0] >= alone - 1e-12).all()


OPPOSITE = {verdicts.Verdict.BETTER: verdicts.Verdict.WORSE, verdicts.Verdict.WORSE: verdicts.Verdict.BETTER}


@any_of_few
@given(
    seeds=st.integers(1, 5),
    items=st.integers(1, 40),
    shift=st.sampled_from([0.0, 0.02, 0.3, -0.5]),
    noise=st.sampled_from([0.01, 0.1, 1.0]),
    margin=st.none() | st.sampled_from([0.01, 0.1]),
    seed=st.integers(0, 99),
)
def test_a_swap_of_methods_turns_the_sign(seeds, items, shift, noise, margin, seed):
    random = np.random.default_rng(seed)
    a = random.random((seeds, items))
    b = a + shift + noise * random.standard_normal((seeds, items))

    def judged(candidate, reference, names):
        pair = verdicts.compare_pair(candidate, reference, names=names, task="cola", metric="accuracy", margin=margin)
        return verdicts.judge([pair])[0]

    there, back = judged(a, b, ("x", "y")), judged(b, a, ("y", "x"))
    assert back.difference == pytest.approx(-there.difference, abs=1e-12)
    for low, high in (("low", "high"), ("same_low", "same_high")):
        assert getattr(back, low) == pytest.approx(-getattr(there, high), abs=1e-9)
    for name in ("p", "p_same", "p_holm"):
        one, other = getattr(there, name), getattr(back, name)
        assert (one is None and other is None) or one == pytest.approx(other, abs=1e-9)
    assert back.verdict is OPPOSITE.get(there.verdict, there.verdict)
