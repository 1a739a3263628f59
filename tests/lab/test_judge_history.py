"""What PEFT's public table can tell apart, from the reruns in its history."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

pytest.importorskip("pydantic")

from dual_lora.lab.errors import UserError
from dual_lora.lab.judge.history import RESULTS, Run, _range_quantile, read_history, standing

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


@pytest.mark.parametrize("law", ["normal", "t6", "unequal"])
def test_no_two_alike_are_told_apart_in_most_tables(law):
    """The distance holds for all pairs together, so about 5 % of such tables have any; also where some experiments vary
    more than others, or single runs lie far off (Tukey's: 18 to 33 %)."""
    random, history, wrong = np.random.default_rng(1), read_history(EXTRACT), 0
    names = sorted({r.experiment for r in history})
    for _ in range(100):
        noise = random.standard_t(6, len(history)) if law == "t6" else random.standard_normal(len(history))
        spread = dict(zip(names, np.exp(0.3 * random.standard_normal(len(names))), strict=True))
        scale = [spread[r.experiment] if law == "unequal" else 1.0 for r in history]
        alike = [0.5 + 0.005 * float(x) for x in np.clip(noise * scale, -50, 50)]
        s = standing([r._replace(accuracy=a) for r, a in zip(history, alike, strict=True)])
        wrong += any((p.first, p.last) != (1, len(s.places)) for p in s.places)
    assert wrong / 100 < 0.05 + 3 * np.sqrt(0.05 * 0.95 / 100)


def test_the_distance_of_normal_noise_is_tukeys_and_grows_with_the_kurtosis():
    many, df = 64, 99
    tukey = stats.studentized_range.ppf(0.95, many, df)
    assert _range_quantile(many, df, 0.05, 0.0) == pytest.approx(tukey)
    assert _range_quantile(many, df, 0.05, 0.001) == pytest.approx(tukey, rel=0.01)
    drawn = np.random.default_rng(0).standard_t(6, (20_000, many)) / np.sqrt(6 / 4)  # of kurtosis 3 and deviation 1
    ratio = np.quantile(np.ptp(drawn, axis=1), 0.95) / stats.studentized_range.ppf(0.95, many, 1e6)
    assert _range_quantile(many, df, 0.05, 3.0) == pytest.approx(tukey * ratio, rel=0.02)


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


def written_history(folder, results):
    """A clone with one commit of these results: name of a file -> text."""
    inside = folder / RESULTS
    inside.mkdir(parents=True)
    for name, text in results.items():
        (inside / name).write_text(text)
    git(folder, "init", "-q")
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "results")
    return folder


def git(folder, *words, **more):
    return subprocess.run(
        ["git", "-C", folder, "-c", "user.name=a", "-c", "user.email=a@b", *words], check=True, **more
    )


def result_of(name="lora/x", day="2026-01-01", accuracy=0.4):
    run = {"experiment_name": name, "created_at": f"{day}T00:00:00", "train_config": {"model_id": "m"}}
    return json.dumps({"run_info": run, "train_info": {"status": "success", "metrics": [{"test accuracy": accuracy}]}})


def program_in(folder):
    """A program of the repository's author, and the file that shows that it ran."""
    ran, program = folder / "ran", folder / "program.sh"
    program.write_text(f"#!/bin/sh\ntouch '{ran}'\nexit 1\n")
    program.chmod(0o755)
    return program, ran


def signed(folder):
    """HEAD with a signature, which git shows by `gpg.program`."""
    commit = git(folder, "cat-file", "commit", "HEAD", capture_output=True, text=True).stdout
    head, _, rest = commit.partition("\n\n")
    text = f"{head}\ngpgsig -----BEGIN PGP SIGNATURE-----\n \n x\n -----END PGP SIGNATURE-----\n\n{rest}"
    made = git(folder, "hash-object", "-t", "commit", "-w", "--stdin", capture_output=True, text=True, input=text)
    git(folder, "update-ref", "HEAD", made.stdout.strip())


def test_a_repository_that_names_a_program_does_not_have_it_run(tmp_path):
    folder = written_history(tmp_path / "signed", {"a.json": result_of()})
    program, ran = program_in(tmp_path)
    signed(folder)
    git(folder, "config", "log.showSignature", "true")
    git(folder, "config", "gpg.program", program)
    assert len(read_history(folder)) == 1
    assert not ran.exists()


def test_a_missing_object_is_fetched_from_nowhere(tmp_path):
    folder = written_history(tmp_path / "partial", {"a.json": result_of()})
    program, ran = program_in(tmp_path)
    hash_of = git(folder, "rev-parse", f"HEAD:{RESULTS}/a.json", capture_output=True, text=True).stdout.strip()
    (folder / ".git/objects" / hash_of[:2] / hash_of[2:]).unlink()
    for name, value in {
        "core.repositoryformatversion": "1",
        "extensions.partialClone": "o",
        "remote.o.promisor": "true",
        "remote.o.url": f"ext::{program}",
        "protocol.ext.allow": "always",
    }.items():
        git(folder, "config", name, value)
    with pytest.raises(UserError, match="whole of its history"):
        read_history(folder)
    assert not ran.exists()


@pytest.mark.parametrize("head", ["ref: refs/../../outside", "ref: /etc/passwd", "x" * 40, "", "ref: refs/heads/no"])
def test_a_head_that_names_no_branch_of_the_repository_is_an_error(tmp_path, head):
    folder = written_history(tmp_path / "clone", {"a.json": result_of()})
    (tmp_path / "outside").write_text((folder / ".git/refs/heads").glob("*").__next__().read_text())
    (folder / ".git/packed-refs").write_text("")
    (folder / ".git/HEAD").write_text(head)
    with pytest.raises(UserError, match="holds no git history"):
        read_history(folder)


def test_packed_refs_and_a_bare_directory_are_read(tmp_path):
    folder = written_history(tmp_path / "clone", {"a.json": result_of()})
    git(folder, "pack-refs", "--all")
    git(folder, "gc", "-q")
    assert read_history(folder) == read_history(folder / ".git") != []


@pytest.mark.parametrize("name", ["info/alternates", "info/commit-graph", "pack/pack-1.idx"])
def test_no_object_is_waited_for(name, tmp_path):
    folder = written_history(tmp_path / "clone", {"a.json": result_of()})
    (folder / ".git/objects" / name).parent.mkdir(exist_ok=True)
    os.mkfifo(folder / ".git/objects" / name)
    with pytest.raises(UserError, match=r"objects elsewhere|neither a file nor a folder"):
        read_history(folder)


def test_pipes_and_endless_answers_end(tmp_path, monkeypatch):
    from dual_lora.lab.judge import objects

    folder = written_history(tmp_path / "clone", {"a.json": result_of()})
    monkeypatch.setattr(objects, "LARGEST", 60)
    with pytest.raises(UserError, match="more than 60 bytes"):
        read_history(folder)
    monkeypatch.undo()
    monkeypatch.setattr(objects, "SECONDS", 0)
    with pytest.raises(UserError, match="within 0 seconds"):
        read_history(folder)


@pytest.mark.parametrize(
    "result",
    [
        result_of("=HYPERLINK(1)/x"),
        result_of("lora/\x1b[2J"),
        result_of("lora/x,2026-01-01,1,0"),
        result_of(day="2026-13-45"),
        result_of(accuracy=float("nan")),
        result_of(accuracy=10**400),
        result_of(accuracy=[[]]),
        json.dumps({"run_info": {"train_config": []}, "train_info": {"status": "success"}}),
        "[" * 100_000,
    ],
    ids=range(9),
)
def test_what_cannot_be_a_result_is_left_out(tmp_path, result):
    folder = written_history(tmp_path / "clone", {"bad.json": result, "good.json": result_of()})
    assert [run.experiment for run in read_history(folder)] == ["lora/x"]


@pytest.mark.parametrize(
    "row", ["=1+1,2026-01-01,0.5,00000000", "a/b,x,0.5,00000000", "a/b,2026-01-01,nan,00000000", "a"]
)
def test_a_row_of_a_table_that_is_no_result_is_an_error(tmp_path, row):
    file = tmp_path / "results.csv"
    file.write_text(f"experiment,date,accuracy,settings\n{row}\n")
    with pytest.raises(UserError, match="line 2"):
        read_history(file)
