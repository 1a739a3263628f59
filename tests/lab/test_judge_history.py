"""What PEFT's public table can tell apart, from the reruns in its history."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("pydantic")

from dual_lora.lab.errors import UserError
from dual_lora.lab.judge.history import RESULTS, Run, read_history, standing

EXTRACT = Path(__file__).parents[2] / "results" / "peft" / "metamathqa.csv"


def made(noise, experiments=30, campaigns=4, shift=0.02, seed=0):
    random = np.random.default_rng(seed)
    runs = []
    for c in range(campaigns):
        for e in range(experiments):
            score = 0.3 + 0.01 * e + shift * c + noise * random.standard_normal()
            runs.append(Run(f"m{e}/x", f"{2024 + c}-01-0{1 + e % 5}", score, "s"))
    return sorted(runs)


def test_the_noise_of_a_rerun_is_found_apart_from_that_of_campaigns():
    found = [standing(made(0.008, seed=seed)) for seed in range(20)]
    assert np.mean([s.sd**2 for s in found]) ** 0.5 == pytest.approx(0.008, rel=0.05)
    assert found[0].raw > 2 * found[0].sd
    assert found[0].df == 120 - 30 - 3
    assert list(found[0].shifts.values()) == pytest.approx([-0.06, -0.04, -0.02, 0.0], abs=0.006)


def test_no_two_alike_are_told_apart_in_most_tables():
    """Tukey's distance holds for all pairs together, so 5 % of such tables have any."""
    wrong = 0
    for seed in range(150):
        runs = [r._replace(accuracy=r.accuracy - 0.01 * int(r.experiment[1:-2])) for r in made(0.008, 12, 3, seed=seed)]
        s = standing(runs)
        wrong += any((p.first, p.last) != (1, len(s.places)) for p in s.places)
    assert wrong / 150 < 0.05 + 3 * np.sqrt(0.05 * 0.95 / 150)


def test_groups_and_places_say_the_same():
    s = standing(made(0.004))
    for i, p in enumerate(s.places):
        for q in s.places:
            near = abs(p.accuracy - q.accuracy) <= s.apart_all
            assert bool(set(p.groups) & set(q.groups)) == near
        assert p.first <= i + 1 <= p.last
    assert s.places[0].first == 1
    assert s.places[-1].last == len(s.places)


def test_the_published_history_says_what_its_page_says(tmp_path, call):
    text = (EXTRACT.parent / "README.md").read_text()
    code, shown, _ = call("judge", "--peft", EXTRACT, "--out", tmp_path, "--json")
    assert code == 0
    s = json.loads(shown)
    runs = read_history(EXTRACT)
    said = (
        f"{len(runs)} results of {len({r.experiment for r in runs})} experiments; {s['runs']} of them, of "
        f"{s['experiments']} experiments"
    )
    flat = " ".join(text.split())
    assert said in flat
    tied = sum(p["first"] == 1 for p in s["places"])
    for figure in (
        f"{100 * s['sd']:.2f} points within a campaign ({s['df']} degrees", f"{100 * s['raw']:.2f} with what campaigns",
        f"from {100 * s['apart']:.1f} points on, any two of the {len(s['places'])} in the last table from "
        f"{100 * s['apart_all']:.1f}", f"first {tied} places",
    ):  # fmt: skip
        assert figure in flat
    page = (tmp_path / "index.html").read_text()
    assert "not told apart from the first" in page
    assert not re.search(r'(?:src|href)="https?:', page), "it loads nothing"
    assert read_history(tmp_path / "results.csv") == runs


def test_a_git_history_is_read(tmp_path):
    folder = tmp_path / RESULTS
    folder.mkdir(parents=True)

    def git(*words):
        subprocess.run(["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b", *words], check=True)

    git("init", "-q")
    for day, accuracy in ((1, 0.4), (2, 0.41), (3, 0.39)):
        for name in ("lora", "hira"):
            config = {"model_id": "m", "seed": 0, "max_steps": 5}
            run = {"experiment_name": f"{name}/x", "created_at": f"2026-01-0{day}T00:00:00", "train_config": config}
            train = {"status": "success", "metrics": [{"test accuracy": accuracy}]}
            (folder / f"{name}.json").write_text(json.dumps({"run_info": run, "train_info": train}))
        (folder / "broken.json").write_text("{")
        git("add", "-A")
        git("commit", "-qm", "results")
    runs = read_history(tmp_path)
    assert len(runs) == 6
    assert {r.accuracy for r in runs} == {0.4, 0.41, 0.39}
    assert standing(runs).sd == pytest.approx(0.01)
    for source, words in ((tmp_path / RESULTS / "no", "holds no git history"), (folder / "lora.json", "expected")):
        with pytest.raises(UserError, match=words):
            read_history(source)
