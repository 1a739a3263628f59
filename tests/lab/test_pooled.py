"""One question asked by several studies, and several tasks at once."""

from __future__ import annotations

import gzip
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from scipy import stats as scipy_stats

pytest.importorskip("pydantic")

from tiny_study import made

from dual_lora.lab.errors import UserError
from dual_lora.lab.read import parse_yaml, read_json
from dual_lora.lab.study import aggregates
from dual_lora.lab.study.pooled import Pooled, across, answered, pooled

RESULTS = Path(__file__).parents[2] / "results"


def study(folder, name, skill, seeds_from=0, **more):
    results = json.loads(json.dumps(made(folder, skill, tasks=("t",), margin=0.02, **more)))
    results["study"]["name"] = name
    for m in results["methods"]:
        for s in m["seeds"]:
            s["seed"] += seeds_from
            s["key"] = f"{m['method']} {s['seed']}"
    return results


def test_one_study_alone_is_its_own_comparison(tmp_path):
    one = study(tmp_path, "one", {"a": 0.5, "b": 0.7})
    (c,), answer = one["comparisons"], pooled("q", [(one, "b", "a")])
    assert (answer.difference, answer.low, answer.high) == pytest.approx(
        (c["difference"], c["low"], c["high"]), rel=1e-6
    )
    assert answer.seeds == 4
    assert not answer.bounded
    turned = pooled("q", [(one, "a", "b")])
    assert (turned.difference, turned.low) == pytest.approx((-answer.difference, -answer.high))


def test_runs_of_other_seeds_are_no_pairs(tmp_path):
    one = study(tmp_path, "one", {"a": 0.5, "b": 0.7})
    other = json.loads(json.dumps(one))
    other["methods"][1]["seeds"].pop()
    with pytest.raises(UserError, match="no run has its pair"):
        pooled("q", [(other, "b", "a")])
    one["methods"][0]["seeds"].reverse()  # the same seeds, out of order: they were paired by their place
    with pytest.raises(UserError, match="one: b and a have other seeds"):
        pooled("q", [(one, "b", "a")])


def test_a_run_that_two_studies_share_counts_once(tmp_path):
    one, other = (study(tmp_path, name, {"a": 0.5, "b": 0.7}) for name in ("one", "other"))
    alone, twice = pooled("q", [(one, "b", "a")]), pooled("q", [(one, "b", "a"), (other, "b", "a")])
    assert (twice.seeds, [n for *_, n in twice.asked]) == (4, [4, 0])
    assert (twice.difference, twice.low) == pytest.approx((alone.difference, alone.low))
    for row in (m["seeds"] for m in other["methods"]):  # in another precision: other runs from the same start and order
        for run in row:
            run |= {"key": run["key"][::-1], "score": run["score"] + 0.01 * (run["seed"] % 2)}
    again = pooled("q", [(one, "b", "a"), (other, "b", "a")])
    assert again.seeds == 4
    assert again.high - again.low > 0.7 * (alone.high - alone.low)
    more = study(tmp_path, "more", {"a": 0.5, "b": 0.7}, seeds_from=100)
    both = pooled("q", [(one, "b", "a"), (more, "b", "a")])
    assert (both.seeds, [n for *_, n in both.asked]) == (8, [4, 4])
    assert both.high - both.low < (a := pooled("q", [(one, "b", "a")])).high - a.low


def test_studies_that_disagree_are_told(tmp_path, capsys):
    """By the seeds of each, as Alexander and Govern's paper has it; studies that share seeds are one."""
    one = study(tmp_path, "one", {"a": 0.5, "b": 0.7})
    far = study(tmp_path, "far", {"a": 0.5, "b": 0.9}, seeds_from=100)
    near = study(tmp_path, "near", {"a": 0.5, "b": 0.7}, seeds_from=200)
    asked = {results["study"]["name"]: (results, "b", "a") for results in (one, far, near)}
    assert pooled("q", [asked["one"]]).disagree_p is None
    assert pooled("q", [asked["one"], asked["near"]]).disagree_p > 0.05
    found = pooled("q", [asked["one"], asked["far"]]).disagree_p
    groups = [_differences(results) for results in (one, far)]
    assert found == pytest.approx(_alexander_govern(groups), rel=1e-6)
    assert found < 0.05
    # The same seeds in a second study: each counts once there, with the mean of both.
    again = json.loads(json.dumps(far))
    again["study"]["name"] = "again"
    assert pooled("q", [asked["one"], asked["far"], (again, "b", "a")]).disagree_p == pytest.approx(found)


def _differences(results):
    by = {m["method"]: [s["score"] for s in m["seeds"]] for m in results["methods"]}
    return np.array(by["b"]) - np.array(by["a"])


def _alexander_govern(groups):
    """From the paper's formulas: t of each mean to the weighted one, made normal, squared and added."""
    n = np.array([len(g) for g in groups])
    mean = np.array([g.mean() for g in groups])
    error = np.array([g.std(ddof=1) for g in groups]) / np.sqrt(n)
    weight = error**-2 / (error**-2).sum()
    t, v = (mean - (weight * mean).sum()) / error, n - 1
    a = v - 0.5
    b, c = 48 * a**2, np.sqrt(a * np.log(1 + t**2 / v))
    z = c + (c**3 + 3 * c) / b - (4 * c**7 + 33 * c**5 + 240 * c**3 + 855 * c) / (10 * b**2 + 8 * b * c**4 + 1000 * b)
    return scipy_stats.chi2.sf((z**2).sum(), len(groups) - 1)


def test_two_candidates_are_compared_by_a_bound(tmp_path):
    """Without the items' scores their difference varies no more than both differences from the reference together."""
    three = study(tmp_path, "three", {"a": 0.5, "b": 0.7, "c": 0.6})
    pairs = study(tmp_path, "pairs", {"a": 0.5, "b": 0.7, "c": 0.6}, pairs="all")
    bound, exact = (pooled("q", [(results, "b", "c")]) for results in (three, pairs))
    assert bound.difference == pytest.approx(exact.difference)
    assert bound.bounded
    assert not exact.bounded
    assert bound.error >= exact.error


def test_packed_scores_are_judged_as_the_study_was(tmp_path):
    """What each item added is published with a study; all of the error follows from it."""
    from dual_lora.lab.files.write import write_json
    from dual_lora.lab.judge import packed
    from dual_lora.lab.judge.judge import judge

    runs, out = tmp_path / "study" / "runs", tmp_path / "out"
    runs.mkdir(parents=True)
    results = made(runs, {"a": 0.5, "b": 0.7, "c": 0.6}, tasks=("t",), margin=0.02, pairs="all")
    write_json(tmp_path / "study" / "results.json", results)
    assert packed.pack(tmp_path / "study", out) == 12
    again = judge(out, reference="c", margin=0.02)
    (c,) = [c for c in results["comparisons"] if {c["candidate"], c["reference"]} == {"b", "c"}]
    (new,) = [c for c in again["comparisons"] if c["candidate"] == "b"]
    sign = 1 if c["candidate"] == "b" else -1
    assert new["difference"] == pytest.approx(sign * c["difference"])
    assert new["spread"]["error"] == pytest.approx(c["spread"]["error"])
    for better in ("less", "banana", []):  # of this metric more is better, whatever a file says
        write_json(out / "results.json", results | {"methods": [m | {"better": better} for m in results["methods"]]})
        assert judge(out, reference="c", margin=0.02)["comparisons"] == again["comparisons"]
    write_json(out / "results.json", results | {"methods": [m | {"model": 7} for m in results["methods"]]})
    with pytest.raises(UserError, match="that is no text"):
        judge(out)
    write_json(out / "results.json", results)
    for wrong in ("[[1], [NaN]]", "[[1], 2]", "[]", "{}", '"x"', f"[[1{400 * '0'}]]"):
        text = json.dumps({s["key"]: "WRONG" for m in results["methods"] for s in m["seeds"]})
        (out / packed.PACKED).write_bytes(gzip.compress(text.replace('"WRONG"', wrong).encode()))
        with pytest.raises(UserError):
            judge(out)
    broken = bytearray(gzip.compress(b"[]" * 1000))
    broken[12] ^= 255
    for content in (b"no gzip", bytes(broken), bytes(broken[:14])):
        (out / packed.PACKED).write_bytes(content)
        with pytest.raises(UserError, match="damaged"):
            judge(out)
    (runs / f"{results['methods'][0]['seeds'][0]['key']}.scores.json").unlink()
    with pytest.raises(UserError, match="lacks the scores of a run"):
        packed.pack(tmp_path / "study", out)


def test_packing_follows_no_link_and_no_key_out_of_the_runs(tmp_path):
    from dual_lora.lab.files.write import write_json
    from dual_lora.lab.judge import packed
    from dual_lora.lab.judge.judge import judge

    runs, out = tmp_path / "study" / "runs", tmp_path / "out"
    runs.mkdir(parents=True)
    results = made(runs, {"a": 0.5, "b": 0.7, "c": 0.6}, tasks=("t",), margin=0.02, pairs="all")
    write_json(tmp_path / "study" / "results.json", results)
    out.mkdir()
    (tmp_path / "mine").write_text("mine")
    (out / packed.PACKED).symlink_to(tmp_path / "mine")
    packed.pack(tmp_path / "study", out)
    assert (tmp_path / "mine").read_text() == "mine"
    for name in (packed.PACKED, "results.json"):
        (out / name).rename(tmp_path / name)
        (out / name).symlink_to(tmp_path / name)
        with pytest.raises(UserError, match="it is a link"):
            judge(out)
        (out / name).unlink()
        (tmp_path / name).rename(out / name)
    seed = results["methods"][0]["seeds"][0]
    (runs / f"{seed['key']}.scores.json").rename(tmp_path / "mine.scores.json")
    seed["key"] = "../../mine"
    write_json(tmp_path / "study" / "results.json", results)
    with pytest.raises(UserError, match="no key of a run"):
        packed.pack(tmp_path / "study", out)


def test_the_interval_over_tasks_holds_its_level():
    random, off = np.random.default_rng(0), 0
    for _ in range(400):
        errors = random.uniform(0.2, 1.0, 6)
        true = 0.3 + 0.4 * random.standard_normal(6)
        seen = true + errors * random.standard_normal(6)
        each = [Pooled("q", "accuracy", d, 0, 0, e, 0.5, 5, [], 1.0) for d, e in zip(seen, errors, strict=True)]
        _, low, high = across(each)
        off += not low <= 0.3 <= high
    assert off / 400 < 0.05 + 3 * np.sqrt(0.05 * 0.95 / 400)


def test_what_cannot_be_pooled_is_named(tmp_path):
    one = study(tmp_path, "one", {"a": 0.5, "b": 0.7, "c": 0.6}, diverged={("b", 1)})
    for pair, words in ((("b", "a"), "diverged"), (("x", "a"), "0 methods called x")):
        with pytest.raises(UserError, match=words):
            pooled("q", [(one, *pair)])
    with pytest.raises(UserError, match="two at least"):
        across([])


def flat(tree, path=""):
    """Every value of nested dicts and lists by its path: the last digits of a number depend on the processor."""
    if isinstance(tree, dict | list):
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        return {k: v for name, below in items for k, v in flat(below, f"{path}/{name}").items()}
    return {path: tree}


def test_the_published_answers_follow_from_the_studies():
    file = RESULTS / "pooled" / "questions.yaml"
    found = answered(parse_yaml(file.read_text(), str(file)), RESULTS / "studies")
    now, published = flat(json.loads(json.dumps(found))), flat(read_json(file.with_name("pooled.json")))
    assert now.keys() == published.keys()
    for path, value in published.items():
        assert now[path] == (pytest.approx(value, rel=1e-9) if isinstance(value, float) else value), path
    at = {q["question"]: q for q in found["questions"]}
    assert at["SST-2"]["seeds"] == 21 + 8
    assert at["SST-2"]["low"] < 0 < at["SST-2"]["high"] < at["SST-2"]["margin"]
    assert all(at[q]["bounded"] for q in at if q.startswith("Against"))
    old = read_json(RESULTS / "studies" / "longer-cola-first" / "results.json")
    assert {c["verdict"] for c in old["comparisons"]} == {"inconclusive", "significantly worse"}


def scores(better=0.0, tasks=3, seeds=5, seed=0):
    random = np.random.default_rng(seed)
    return {
        f"t{i}": {m: random.standard_normal(seeds) + i + better * (m == "a") for m in ("a", "b", "c", "d")}
        for i in range(tasks)
    }


def test_the_chance_of_improvement_is_mann_and_whitney_s():
    own = scores(0.8)
    found = aggregates.improvement(own, "a", "b")
    by_hand = np.mean([scipy_stats.mannwhitneyu(t["a"], t["b"]).statistic / 25 for t in own.values()])
    assert found.value == pytest.approx(by_hand)
    assert found.low < found.value < found.high
    assert aggregates.improvement(own, "b", "a").value == pytest.approx(1 - by_hand)
    assert aggregates.improvement({"t": {"a": [1, 1], "b": [1, 1]}}, "a", "b") == (0.5, 0.5, 0.5)
    with pytest.raises(UserError, match="no scores of x"):
        aggregates.improvement(own, "x", "b")


def test_a_profile_falls_from_one_to_none():
    own = scores()
    shares = aggregates.profile(own, "a", [-9.0, 1.0, 9.0])
    assert (shares[0].value, shares[2].value) == (1.0, 0.0)
    assert shares[1].value == pytest.approx(np.mean([np.mean(t["a"] > 1) for t in own.values()]))
    assert shares[1].low <= shares[1].value <= shares[1].high


def test_ranks_are_demsar_s():
    same, clear = aggregates.ranks(scores(tasks=10)), aggregates.ranks(scores(5.0, tasks=10))
    assert same.groups == [list(same.mean)]
    assert clear.mean["a"] == 1.0
    assert "a" not in clear.groups[-1]
    assert clear.p < 0.01
    assert clear.critical == pytest.approx(2.569 * np.sqrt(4 * 5 / (6 * 10)), rel=1e-3)  # his table 5a, k = 4
    with pytest.raises(UserError, match="two tasks and three methods"):
        aggregates.ranks({"t": {"a": [1], "b": [2], "c": [3]}})
    assert asdict(Pooled("q", "m", 0, 0, 0, 0, 1, 2, [], 1))["bounded"] is False
