"""The benchmark's logic on tiny sizes. Nothing here depends on how long anything takes."""

import json
import math
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import pytest
import torch
from benchmarks import __main__ as command
from benchmarks import (
    child,
    curves,
    figures,
    flops,
    gates,
    inference,
    judge,
    layers,
    ledger,
    linear,
    measure,
    plot,
    verdict,
    works,
)
from benchmarks import step as step_work
from benchmarks.measure import Measured
from benchmarks.verdict import Mark

from dual_lora.lab.model import precision


def timed(dual, against, threads=1, share=1.0, name="lora"):
    return Measured({"dual": dual, name: against}, "s", threads, share)


def test_a_ratio_is_paired_by_round():
    # A machine that gets slower and slower: the ratio inside every round is 2.
    slow = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0]
    ratio = measure.median_ratio([2 * s for s in slow], slow)
    assert (ratio.median, ratio.low, ratio.high, ratio.rounds) == (2.0, 2.0, 2.0, 7)
    assert ratio.uncertainty == 0


def test_the_interval_is_that_of_order_statistics():
    ratio = measure.median_ratio([float(k) for k in range(1, 26)], [1.0] * 25)
    assert ratio.median == 13.0
    assert (ratio.low, ratio.high) == (8.0, 18.0)  # ranks of a 95 % interval at n = 25
    assert measure.median_ratio([1.0, 3.0, 2.0], [1.0] * 3)[1:3] == (1.0, 3.0)  # few rounds: their range


@pytest.mark.parametrize("rounds", [6, 8, 11, 16, 21, 40, 60])
def test_the_interval_of_a_median_is_no_shorter_than_it_says(rounds):
    """By a rule without the binomial it held the median in 92 % at 16 and 21 rounds."""
    ratio = measure.median_ratio([float(k) for k in range(rounds)], [1.0] * rounds)
    below = int(ratio.low)
    assert ratio.high == rounds - 1 - below

    def fewer(ranks):
        return sum(math.comb(rounds, k) for k in range(ranks + 1)) / 2**rounds

    assert fewer(below) <= 0.025 < fewer(below + 1), "as short as it may be"


def test_nothing_against_nothing_is_one_and_unpaired_rounds_are_refused():
    assert measure.median_ratio([0.0], [0.0]).median == 1.0
    assert measure.median_ratio([5.0], [0.0]).median == math.inf
    with pytest.raises(ValueError, match="2 and 1"):
        measure.median_ratio([1.0, 2.0], [1.0])


@pytest.fixture
def clock(monkeypatch):
    """A clock that only the variants move."""
    now = [0.0]
    for name in ("process_time", "perf_counter"):
        monkeypatch.setattr(measure.time, name, lambda: now[0])

    def variant(seconds):
        def run():
            now[0] += seconds

        return run

    return variant


def test_variants_are_interleaved_and_end_when_narrow(clock):
    order = []
    variants = {
        name: partial(lambda n, run: (order.append(n), run()), name, clock(s)) for name, s in [("a", 1), ("b", 3)]
    }
    measured = measure.interleave(variants, [("b", "a")], threads=1, seconds=1e9)
    assert measured.ratio("b", "a").median == pytest.approx(3)
    assert len(measured.costs["a"]) == 5  # the fewest rounds: nothing varies
    assert order[-10:] == list("abbaabbaab")  # turned order, after the warm-up
    assert measured.spread("a") == pytest.approx(0)


def test_the_share_of_the_cores_is_of_those_that_were_asked_for(clock):
    variants = {"a": clock(1), "b": clock(3)}
    assert measure.interleave(variants, [], threads=2, seconds=1, rounds=(2, 2)).share == pytest.approx(1 / 2)
    alone = {"a": 1}
    assert measure.interleave(variants, [], 2, 1, rounds=(2, 2), threads_of=alone).share == pytest.approx(4 / 7)


def test_short_variants_are_repeated_inside_a_sample(clock):
    calls = []
    run = clock(measure.SAMPLE_SECONDS / 10)
    measured = measure.interleave({"a": lambda: (calls.append(1), run())}, [], 1, 1, rounds=(2, 2))
    assert len(calls) == 2 + 2 * 10
    assert measured.costs["a"][0] == pytest.approx(measure.SAMPLE_SECONDS / 10)


def test_threads_are_put_back():
    before = torch.get_num_threads()
    with measure.torch_threads(1):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


# Gates.


def test_every_gate_names_a_work_that_is_run():
    named = {name for work in works.WORKS for name in work.names}
    assert {gate.work for gate in gates.GATES} == named


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("dual", "share", "mark", "code"),
    [
        ([1.4] * 6, 1.0, Mark.HELD, 0),
        ([1.404] * 6, 1.0, Mark.HELD, 0),  # 1.40 as it is stated
        ([1.41] * 6, 1.0, Mark.MISSED, 1),
        ([1.2, 1.3, 1.5, 1.7], 0.4, Mark.NOISY, 2),
        ([1.2, 1.3, 1.5, 1.7], 0.99, Mark.HELD, 0),  # quiet: the median counts
        ([1.3, 1.5, 1.6, 1.7], 0.99, Mark.NOISY, 2),  # quiet: a miss that was not shown
        ([1.9, 2.0, 2.1, 2.2], 0.4, Mark.MISSED, 1),  # noise cannot explain that
    ],
)
def test_marks_and_exit_codes(dual, share, mark, code, threads):
    gate = gates.Gate("w", (gates.Limit("lora", 1.40),))
    found = verdict.judge(gate, threads, timed(dual, [1.0] * len(dual), threads, share))
    assert found.mark is mark
    assert verdict.exit_code([found]) == code


def test_one_limit_of_several_is_enough():
    gate = gates.Gate("w", (gates.Limit("lora", 1.75), gates.Limit("floor", 1.15)))
    costs = Measured({"dual": [2.0], "lora": [1.0], "floor": [1.9]}, "s", 1)
    assert verdict.judge(gate, 1, costs).mark is Mark.HELD
    assert verdict.judge(gate, 1, costs._replace(costs={**costs.costs, "floor": [1.0]})).mark is Mark.MISSED


def test_bf16_without_units_is_judged_by_the_floor_alone(capsys):
    gate = gates.Gate("linear bf16", (gates.Limit("lora", 1.95), gates.Limit("floor", 1.30)))
    below_lora = Measured({"dual": [1.5], "lora": [1.0], "floor": [1.0]}, "s", 1)
    assert verdict.judge(gate, 1, below_lora).mark is Mark.HELD
    found = verdict.judge(gate, 1, below_lora, bf16_units=False)
    assert found.mark is Mark.MISSED  # LoRA's limit holds, and says nothing there
    assert [mark for _, _, mark in found.lines] == [Mark.ABSENT, Mark.MISSED]
    verdict.show([found], "quiet")
    assert "no units for bf16" in capsys.readouterr().out
    above_lora = Measured({"dual": [2.5], "lora": [1.0], "floor": [2.4]}, "s", 1)
    assert verdict.judge(gate, 1, above_lora, bf16_units=False).mark is Mark.HELD
    plain = gates.Gate("linear fp32", gate.any_of)
    assert verdict.judge(plain, 1, below_lora, bf16_units=False).mark is Mark.HELD  # not in bf16
    alone = gates.Gate("decode bf16", (gates.Limit("base", 1.1),))
    costs = Measured({"dual": [1.5], "base": [1.0]}, "s", 1)
    assert verdict.judge(alone, 1, costs, bf16_units=False).mark is Mark.MISSED  # a gate without a floor stays


def test_every_kind_of_machine_has_a_table_of_its_own():
    rows = list(ledger.read())
    before = figures.tables(rows)
    slow = [
        {**row, "bf16_units": False, "fp32_products": "torch.mm", "device": "plain CPU", "ratio": 1.39}
        for row in rows
        if row["kind"] == "gate" and row["work"] == gates.STEP
    ]
    first, second = figures.tables(rows + slow).split("On plain CPU:")
    assert first.strip() == before.strip()  # the newest row is not another machine's
    assert all(word in second for word in ("1.39", "torch.mm", "no units for bf16"))
    assert "linear" not in second  # not measured there


def test_what_cannot_run_is_neither_held_nor_missed(capsys):
    found = verdict.judge(gates.GATES[0], 1, "no such library")
    assert found.mark is Mark.ABSENT
    verdict.show([found, verdict.judge(gates.GATES[0], 1, timed([1.0], [1.0]))], "quiet")
    out = capsys.readouterr().out
    assert all(word in out for word in ("no such", "✓", "quiet"))


@pytest.mark.parametrize("work", ["linear 4096 T512 bf16", works.BF16_STEP])
def test_bf16_is_not_measured_where_its_products_take_many_times_as_long(work, monkeypatch):
    """On a processor with AVX2 alone one pass of LoRA takes minutes."""
    slow = precision.faster_precision({"fp32": 2.0, "bf16": 30.0})
    monkeypatch.setattr(precision, "fast_precision", lambda _: slow)
    (run,) = (one.run for one in works.WORKS if work in one.names)
    with pytest.raises(measure.Unavailable, match="takes 15 times as long as in fp32 on this processor"):
        run(1, 0.1)


def test_a_run_prints_writes_and_exits_by_its_gates(monkeypatch, tmp_path, capsys):
    path = tmp_path / "ledger.jsonl"
    monkeypatch.setattr(gates, "GATES", (gates.Gate("w", (gates.Limit("lora", 1.5),)),))
    work = works.Work(("w",), lambda n, s: {"w": timed([2.0], [1.0], n)}, None, {"O": 8})
    monkeypatch.setattr(works, "WORKS", (work,))
    assert command.run_gates([], [1, 2], 1.0, write=True, ledger_path=path) == 1
    first, second = ledger.read(path)
    assert (first["threads"], second["threads"], first["ratio"], first["mark"]) == (1, 2, 2.0, "✗")
    assert first["shape"] == {"O": 8}
    assert {"date", "commit", "versions", "device"} <= first.keys()
    assert command.run_gates(["other"], [1], 1.0, write=True, ledger_path=path) == 0  # nothing was named
    assert len(path.read_text().splitlines()) == 2
    assert "✗" in capsys.readouterr().out


def test_a_noisy_measurement_is_repeated(monkeypatch, tmp_path):
    noisy, quiet = timed([1.0, 2.0], [1.0, 1.0], 2, share=0.3), timed([1.0, 1.0], [1.0, 1.0], 2)
    results = iter([noisy, quiet])
    monkeypatch.setattr(gates, "GATES", (gates.Gate("w", (gates.Limit("lora", 1.5),)),))
    monkeypatch.setattr(works, "WORKS", (works.Work(("w",), lambda n, s: {"w": next(results)}),))
    assert command.run_gates([], [2], 1.0, write=False) == 0


def test_the_ledger_is_appended_to_and_names_a_broken_line(tmp_path):
    path = tmp_path / "ledger.jsonl"
    ledger.append([{"a": 1}], path)
    ledger.append([{"a": 2}], path)
    assert [row["a"] for row in ledger.read(path)] == [1, 2]
    path.write_text(path.read_text() + "{broken\n")
    with pytest.raises(ValueError, match=r"ledger\.jsonl:3"):
        list(ledger.read(path))


# Works, judged at tiny sizes.


@pytest.mark.slow
def test_a_grpo_step_generates_and_trains():
    pytest.importorskip("trl")
    from benchmarks import grpo

    tiny = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "vocab_size": 64}  # fmt: skip
    measured = grpo.measure(1, 0.0, grpo.COMPLETIONS["short"], (1, 1), **tiny)
    assert {name: len(costs) for name, costs in measured.costs.items()} == {"dual": 1, "lora": 1}
    assert all(cost > 0 for costs in measured.costs.values() for cost in costs)
    with tempfile.TemporaryDirectory() as folder:
        run = grpo.Run("dual", folder, grpo.COMPLETIONS["short"], **tiny)
        before = {name: p.clone() for name, p in run.trainer.model.named_parameters() if p.requires_grad}
        run.step()
        moved = {
            name for name, p in run.trainer.model.named_parameters() if p.requires_grad and not p.equal(before[name])
        }
    assert moved == before.keys()


@pytest.fixture
def single(monkeypatch):
    """One sample of each variant: what is tested is that it runs and is judged."""
    monkeypatch.setattr(measure, "SAMPLE_SECONDS", 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_linear_layers_of_every_method(single, dtype):
    measured = linear.measure(40, 48, 8, dtype, 1, 0, (*layers.METHODS, "floor"), rank=8)
    assert set(measured.costs) == {*layers.METHODS, "floor"}


def tiny_layer(O=40, I=48, T=8):
    g = torch.Generator().manual_seed(0)
    W, x, dy = (torch.randn(s, generator=g) for s in ((O, I), (T, I), (T, O)))
    return layers.linear("dual", W, 8), x, W, 30 * dy


def test_a_right_kernel_is_timed_and_a_wrong_one_refused():
    layer, x, W, dy = tiny_layer()
    linear.check(layer, x, W, dy)
    with pytest.raises(judge.WrongResult, match="y is wrong"):
        linear.check(layer, x, W * 1.001, dy)


def test_a_wrong_estimator_is_refused():
    layer, x, W, dy = tiny_layer()
    layer.states["default"].form = layer.states["default"].form._replace(ste="identity")
    with pytest.raises(judge.WrongResult, match=r"d[CD] is wrong"):
        linear.check(layer, x, W, dy)


def test_factors_of_the_judge_have_exact_products():
    A, B, _, _ = judge.exact_factors(30, 40, 8, 8)
    assert torch.equal((B @ A).double(), B.double() @ A.double())
    assert 0.02 < A.std() < 0.05


def test_nothing_is_kept_for_backward_beyond_the_inputs():
    assert linear.kept_for_backward(40, 48, 8, torch.float32).ratio("dual", "inputs").median <= 1


def test_decoding_and_merging(single):
    cached, decoded = inference.decode(40, 48, 1, torch.float32, 1, 0)
    assert (set(cached.costs), set(decoded.costs)) == ({"dual", "base"}, {"merged", "base"})
    merged, unmerged = inference.merge(40, 48, torch.bfloat16, 0)
    assert len(merged.costs["dual"]) == len(unmerged.costs["lora"]) >= 7


def test_the_step_of_a_small_llama(single, monkeypatch):
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 64}  # fmt: skip
    tokens = {name: ids % 64 for name, ids in step_work.tokens(2, 8).items()}
    made = step_work.trainings(("dual", "lora", "naive"), tokens, **small)
    assert len(made["dual"].adapted()) == 14
    step_work.check(made["dual"], made["naive"])
    assert set(step_work.measure(made, 1, 0, (1, 1)).costs) == set(made)
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)  # two real threads on a busy machine take minutes
    scaling = step_work.measure_scaling(made["dual"], made["lora"], 2, 0)
    assert set(scaling.costs) == {limit.against for limit in gates.GATES[-1].any_of} | {"two threads"}
    assert (asked[0], set(asked[1:-1]), asked[-1]) == (2, {1, 2}, torch.get_num_threads())
    for layer in made["dual"].adapted().values():
        layer.states["default"].form = layer.states["default"].form._replace(magnitude="identity")
    with pytest.raises(judge.WrongResult, match="differs from naive"):
        step_work.check(made["dual"], made["naive"])


def test_the_step_of_an_encoder_and_that_in_bf16(single, monkeypatch):
    monkeypatch.setattr(step_work, "MINILM", {**step_work.MINILM, "hidden_size": 24, "intermediate_size": 48})
    made = step_work.encoder_trainings(("dual", "naive"), 2, 8)
    assert len(made["dual"].adapted()) == 6 * 6 + 1
    step_work.check(made["dual"], made["naive"])
    monkeypatch.setattr(step_work, "SMOLLM2_135M", {**step_work.SMOLLM2_135M, "hidden_size": 72, "vocab_size": 64})
    low = step_work.trainings(("dual",), step_work.tokens(1, 4), num_hidden_layers=1, dtype=torch.bfloat16)["dual"]
    low.step()
    assert {p.dtype for p in low.model.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert {p.dtype for p in low.model.parameters() if p.requires_grad} == {torch.float32}


def test_a_child_measures_in_its_own_process(monkeypatch):
    monkeypatch.setattr(child, "_child", lambda task, method: {"dual": 3.0, "lora": 2.0}[method])
    measured = child.compare("memory", 2)
    assert (measured.unit, measured.ratio("dual", "lora").median) == ("bytes", 1.5)


def test_the_peak_of_resident_memory_is_seen():
    """In a process of its own: another test may have left free memory that takes the 64 MiB without growing."""
    code = (
        "import torch\nfrom benchmarks import child\nchild.reset_peak()\nbefore, _ = child.resident()\n"
        "torch.ones(16 << 20)\nnow, peak = child.resident()\nprint(now - before, peak - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1], check=True
    )
    now, peak = map(int, done.stdout.split())
    assert peak > 60 << 20
    assert now < 30 << 20


# Curves.


def test_flop_limits_are_those_of_the_formula():
    T, O, r = 512, 4096, 32
    assert flops.dual(T, O, O, r) / flops.lora(T, O, O, r) == pytest.approx(1.588, abs=1e-3)
    assert flops.full(T, O, O) / flops.lora(T, O, O, r) < 1.5
    assert [len(c) for c in curves.CURVES.values()] == [10, 5, 7, 8]


@pytest.mark.parametrize("adapters", [1, 3])
def test_a_point_of_a_curve(single, adapters):
    measured = curves.measure(curves.Point("adapters", adapters, 40, 48, 8, 8, adapters), 0)
    assert set(measured.costs) == {"dual", "lora"}


@pytest.mark.parametrize("method", ["dual", "lora"])
def test_every_one_of_several_adapters_is_trained(method):
    _, x, W, dy = tiny_layer()
    layer = curves._several(method, W, curves.Point("adapters", 3, 40, 48, 8, 8, 3))
    layer(x).backward(dy)
    trained = [p for p in layer.parameters() if p.requires_grad]
    assert len(trained) == 3 * (4 if method == "dual" else 2)
    assert all(p.grad is not None for p in trained)


def test_a_wrong_gradient_of_one_of_several_adapters_is_refused():
    _, x, W, dy = tiny_layer()
    layer = curves._several("dual", W, curves.Point("adapters", 3, 40, 48, 8, 8, 3))
    linear.check(layer, x, W, dy)
    layer.states["more1"].form = layer.states["more1"].form._replace(ste="identity")
    with pytest.raises(judge.WrongResult, match=r"d[CD]1 is wrong"):
        linear.check(layer, x, W, dy)


def test_a_curve_is_of_one_measurement_a_quiet_one_if_there_is_one():
    row = {"kind": "curve", "work": "rank", "limit": 1.3, "interval": [1.4, 1.6], "device": "A"}
    busy, quiet, later = (
        [{**row, "date": f"2026-11-0{day}T10", "share_of_cores": share, "at": at, "ratio": ratio} for at in (8, 4)]
        for day, share, ratio in ((1, 0.2, 9.0), (2, 0.99, 1.5), (3, 0.3, 8.0))
    )
    half = [later[0] | {"share_of_cores": 0.99}, later[1]]  # one point of two was disturbed
    for rows in ([*busy, *quiet, *half], [*quiet, *busy]):
        newest = plot.newest([*rows, {"kind": "gate"}])["rank"]
        assert [(r["at"], r["ratio"]) for r in newest] == [(4, 1.5), (8, 1.5)]
    assert {r["ratio"] for r in plot.newest([*busy, *later])["rank"]} == {8.0}
    svg = plot.draw("rank", newest)
    assert svg.startswith("<svg")
    assert "limit by flops" in svg
    assert "A, 2026-11-02</text>" in svg
    assert "busy" in plot.where(busy)


def test_the_committed_ledger_is_readable():
    if ledger.PATH.exists():
        for row in ledger.read():
            assert {"kind", "work", "ratio", "commit", "device"} <= row.keys(), json.dumps(row)


def test_a_published_figure_is_that_of_a_quiet_machine():
    row = {"kind": "gate", "threads": 1, "work": "w", "subject": "dual", "against": "lora"}
    rows = [{**row, "ratio": r, "share_of_cores": share} for r, share in ((1.1, 0.1), (1.2, 0.99), (1.3, 0.1))]
    assert figures.newest(rows, "w", "dual", "lora")["ratio"] == 1.2
    assert figures.newest([rows[0], rows[2]], "w", "dual", "lora")["ratio"] == 1.3
    with pytest.raises(ValueError, match="no row of 'w', dual against base"):
        figures.newest(rows, "w", "dual", "base")


def test_a_figure_that_owes_to_another_library_says_so():
    rows = [{**row, "share_of_cores": 1.0} for row in ledger.read()]
    assert "oneDNN computes our fp32 products" in figures.table([{**row, "fp32_products": "oneDNN"} for row in rows])
    assert "oneDNN computes our fp32 products" not in figures.table(
        [{**row, "fp32_products": "torch.mm"} for row in rows]
    )
