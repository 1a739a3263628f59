"""Stopped at any file event, or without power: train, merge, export, report and compare leave the old or the new.

One run of a command is recorded event by event (see `crash_disk`); every state that a kill or a loss of power may leave
is put back and looked at, and from some of them (`make crash`: from all) the command is given again and has to end as
if nothing had happened. A few processes are killed in earnest, to see that the recorded states are the real ones.
"""

import json
import os
import re
import shutil
import signal
from functools import cache

import pytest
import report_material
import tiny_study
import yaml
from crash_disk import Disk
from transformers import TrainerCallback

from dual_lora.lab.export.export import export_lora, merge
from dual_lora.lab.files.folder import OWN, RunFolder, files_in
from dual_lora.lab.recipe.read import build_recipe
from dual_lora.lab.report.report import report
from dual_lora.lab.run.train import run
from dual_lora.lab.study.compare import compare
from dual_lora.lab.study.perform import perform

ALL = os.environ.get("DUAL_LORA_CRASH") == "all"
CARD = "README.md"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200 if ALL else 600)]


def tried(states, few):
    """The states from which a command is given again: all of them, or a few of each kind, evenly apart."""
    states = list(states.items())
    if ALL:
        return states
    chosen = []
    for kind in ("kill", "torn", "unsynced", "forgotten"):
        own = [each for each in states if each[1][0] == kind]
        chosen += [own[(2 * i + 1) * len(own) // (2 * few)] for i in range(few)] if len(own) > few else own
    return chosen


def counted(name, disk, again):
    kinds = [kind for kind, _, _ in disk.states.values()]
    counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
    print(f"\n{name}: {len(disk.events)} file events, {len(kinds)} states ({counts}), again from {again}")


@cache
def parsed(content, suffix):
    """What a file holds; the same one lies in many states."""
    return json.loads(content) if suffix == ".json" else yaml.safe_load(content)


def visible(folder):
    """Names and contents, without what is hidden: a kill may leave a `.name.part`, and a lock."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    }


def weights(adapter):
    """All but the card, which names times, and its size in the list of files."""
    found = visible(adapter)
    found["complete.json"] = {name: size for name, size in json.loads(found["complete.json"]).items() if name != CARD}
    return {name: content for name, content in found.items() if name != CARD}


@pytest.fixture(scope="module")
def recipe(tiny_values):
    train = {"steps": 4, "batch_size": 4, "checkpoint_every": 2, "log_every": 1, "learning_rate": 0.01}
    return build_recipe(tiny_values | {"method": {"name": "dual_lora", "r": 4}, "train": train})


@pytest.fixture(scope="module")
def recording(recipe, tmp_path_factory):
    """(Disk that has seen a training into `run`, [(event, step): from here on this checkpoint must survive])."""
    disk, saved = Disk(tmp_path_factory.mktemp("recording") / "place"), []
    disk.root.mkdir()

    class Note(TrainerCallback):
        def on_save(self, args, state, control, **_):
            saved.append((len(disk.events), state.global_step))

    with disk.recorded():
        run(recipe, disk.root / "run", progress=False, callbacks=[Note()])
    return disk, saved


@pytest.fixture(scope="module")
def trained(recording, tmp_path_factory):
    """What the recorded training left."""
    (disk, _), folder = recording, tmp_path_factory.mktemp("trained") / "run"
    return shutil.copytree(disk.root / "run", folder)


def check_run(folder, whole):
    """What lies in a run's folder is whole, or not declared whole."""
    if folder.adapter.is_dir():
        assert weights(folder.adapter) == whole
    # Only a half-written checkpoint keeps `--overwrite` from starting anew: it might be another program's.
    others = [file for file in files_in(folder.path, OWN)[1] if "checkpoints" not in file.parts]
    assert not others, f"--overwrite takes {others} for somebody else's"
    for file in (folder.recipe, folder.record):
        if file.exists():
            assert parsed(file.read_bytes(), file.suffix), f"{file.name} is cut off"
    return folder.last_checkpoint()[0]


def test_train(recipe, recording, trained):
    (disk, saved), whole = recording, weights(trained / "adapter")
    folder = RunFolder(disk.root / "run")
    for state, (kind, event, what) in disk.states.items():
        disk.restore(state)
        promised = max((step for after, step in saved if event > after), default=0)
        assert check_run(folder, whole) >= promised or folder.adapter.is_dir(), f"{kind} at {event}: {what}"
    again = tried(disk.states, 1)
    for state, (kind, event, what) in again:
        disk.restore(state)
        result = run(recipe, disk.root / "run", resume=True, progress=False)
        assert result.state == "finished", f"{kind} at {event}: {what}"
        assert weights(folder.adapter) == whole, f"{kind} at {event}: {what}"
        assert json.loads(folder.record.read_text())["state"] == "finished"
    counted("train", disk, len(again))


def test_overwrite(recipe, trained, tmp_path):
    """What is killed while it removes a run, or begins the next one, can be given again."""
    disk = Disk(tmp_path / "place")
    shutil.copytree(trained, disk.root / "run")
    with disk.recorded():
        folder = RunFolder(disk.root / "run")
        folder.open(resume=False, overwrite=True)
        folder.close()
        with pytest.raises(KeyboardInterrupt):
            run(recipe, folder.path, progress=False, callbacks=[Interrupted()])
    for state, (kind, event, what) in disk.states.items():
        disk.restore(state)
        assert visible(disk.root).keys() <= {f"run/{name}" for name in visible(trained)}
        folder = RunFolder(disk.root / "run")
        folder.open(resume=False, overwrite=True)
        folder.close()
        assert not visible(disk.root), f"{kind} at {event}: {what}"
    counted("overwrite", disk, len(disk.states))


class Interrupted(TrainerCallback):
    def on_step_begin(self, args, state, control, **_):
        raise KeyboardInterrupt


WRITES = {
    "merge": lambda source, out: merge(source, out),
    "export": lambda source, out: export_lora(source, out, 2, limit=4, progress=False),
}


@pytest.mark.parametrize("command", WRITES)
def test_a_folder_is_there_whole_or_not_at_all(command, trained, tmp_path):
    write = WRITES[command]
    disk = Disk(tmp_path / "place")
    out = disk.root / "new"
    disk.root.mkdir()
    write(trained, out)
    whole = visible(out)
    shutil.rmtree(out)
    with disk.recorded():
        write(trained, out)
    for state, (kind, event, what) in disk.states.items():
        disk.restore(state)
        assert visible(disk.root) in ({}, {f"new/{name}": content for name, content in whole.items()}), (
            f"{kind} at {event}: {what}"
        )
    again = tried(disk.states, 1)
    for state, (kind, event, what) in again:
        disk.restore(state)
        if not out.exists() or not any(out.iterdir()):
            write(trained, out)
        assert visible(out) == whole, f"{kind} at {event}: {what}"
    counted(command, disk, len(again))


def test_report(tmp_path):
    material = report_material.write(tmp_path / "material")
    disk = Disk(tmp_path / "place")
    disk.root.mkdir()
    page = disk.root / "report.html"
    report([material], page, "the old one")
    old = page.read_bytes()
    with disk.recorded():
        report([material], page, "the new one", tables=disk.root / "tables")
    new = visible(disk.root)
    assert new["report.html"] != old
    for state, (kind, event, what) in disk.states.items():
        disk.restore(state)
        there = visible(disk.root)
        assert there.pop("report.html") in (old, new["report.html"]), f"{kind} at {event}: {what}"
        assert there.items() <= new.items(), f"{kind} at {event}: {what}"
    counted("report", disk, 0)


def outcome(results):
    """What a study says, without times."""
    return [
        {key: c[key] for key in ("candidate", "reference", "task", "verdict", "difference", "spread")}
        for c in results["comparisons"]
    ]


def different(disk, kinds):
    """Of a study's states the first of each kind: a run is stopped as another one of its kind is.

    kinds: key of each run -> trial, final or base.
    """
    first = {}
    for state, (kind, event, what) in disk.states.items():
        same = re.sub("[0-9a-f]{16}", lambda found: kinds.get(found[0], ""), what)
        done = "" if same != what and "/runs/" in what else sum(name.count(".") == 1 for name, _ in state)
        first.setdefault((kind, same, done), (state, (kind, event, what)))
    return dict(first.values())


def test_compare(tmp_path, monkeypatch):
    small = {"seeds": 1, "search": {"space": {"learning_rate": [1e-2]}}}
    study = tiny_study.write_study(tmp_path / "study", **small)
    disk = Disk(tmp_path / "place")
    disk.root.mkdir()
    with disk.recorded():
        expected = compare(study, disk.root / "out", progress=False)
    assert outcome(expected)
    kept = shutil.copytree(disk.root / "out", tmp_path / "kept")
    kinds = {key: job["kind"] for key, job in json.loads((kept / "study.json").read_text())["jobs"].items()}
    for state, (kind, event, what) in disk.states.items():
        for name, content in dict(state).items():
            if name.endswith((".json", ".yaml")) and content is not None and "/checkpoints/" not in name:
                hidden = any(part.startswith(".") for part in name.split("/"))
                assert hidden or "/adapter/" in name or parsed(content, name[-5:]), f"{name}, {kind} at {event}: {what}"

    def perform_or_copy(job, runs, *rest):
        """A run of which nothing is there would only be done as it was recorded."""
        if not list(runs.glob(f"{job.key}*")):
            runs.mkdir(exist_ok=True)
            for path in (kept / "runs").glob(f"{job.key}*"):
                (shutil.copytree if path.is_dir() else shutil.copy)(path, runs / path.name)
        return perform(job, runs, *rest)

    monkeypatch.setattr("dual_lora.lab.study.execute.perform", perform_or_copy)
    again = tried(different(disk, kinds), 1)
    counted("compare", disk, len(again))
    for state, (kind, event, what) in again:
        disk.restore(state)
        results = compare(study, disk.root / "out", progress=False)
        assert results["complete"], f"{kind} at {event}: {what}"
        assert outcome(results) == outcome(expected), f"{kind} at {event}: {what}"


def killed_at(number, command, disk):
    """Fork a process that gives the command and is killed at its event of this number."""
    child = os.fork()
    if child == 0:
        disk.at = lambda count: count == number and os.kill(os.getpid(), signal.SIGKILL)
        with disk.recorded():
            command()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("share", [*(pytest.param(share, marks=pytest.mark.long) for share in (0.2, 0.8)), 0.5, 0.97])
def test_a_true_kill_leaves_a_recorded_state(share, recipe, recording, trained):
    (disk, _), whole = recording, weights(trained / "adapter")
    number = int(share * len(disk.events))
    known = {frozenset(name for name, _ in state) for state in disk.states}
    disk.restore({})
    assert killed_at(number, lambda: run(recipe, disk.root / "run", progress=False), Disk(disk.root)) == -signal.SIGKILL

    def named(names):  # random parts of names aside
        return {"/".join(part.split(".")[1] if part.startswith(".") else part for part in n.split("/")) for n in names}

    assert named(disk.state()) in [named(names) for names in known]
    assert run(recipe, disk.root / "run", resume=True, progress=False).state == "finished"
    assert weights(disk.root / "run" / "adapter") == whole
