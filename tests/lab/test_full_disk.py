"""The disk fills up in the middle: one sentence, what was there stays, and nothing half-written is left."""

import contextlib
import json
import resource
import shutil

import pytest
import report_material
import tiny_study

from dual_lora.lab.recipe.read import build_recipe
from dual_lora.lab.report.report import report
from dual_lora.lab.run.train import run


@contextlib.contextmanager
def room_for(size):
    """No file can grow beyond `size` bytes: the write fails as on a full disk, in Python's, torch's and Rust's code."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def trained(tiny_values, tmp_path_factory):
    values = tiny_values | {"method": {"name": "dual_lora", "r": 4}, "train": {"steps": 2, "batch_size": 4}}
    folder = tmp_path_factory.mktemp("trained") / "run"
    run(build_recipe(values), folder, progress=False)
    return folder


@pytest.fixture
def source(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


@pytest.mark.parametrize("size", [0, 500, 3000, 8000])
@pytest.mark.parametrize(
    "command", [["merge", "RUN", "OUT"], ["export", "RUN", "OUT", "--to", "lora", "--rank", "2", "--limit", "2"]]
)
def test_merge_and_export(command, size, source, tmp_path, call):
    before = files(tmp_path)
    places = {"RUN": source, "OUT": tmp_path / "out"}
    with room_for(size):
        code, _, err = call(*(str(places.get(word, word)) for word in command))
    assert code == 1
    assert "The disk is full" in err
    assert err.count("error: ") == 1
    assert files(tmp_path) == before


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """Folder with material and a page of it."""
    folder = tmp_path_factory.mktemp("reported")
    report([report_material.write(folder / "material")], folder / "report.html", "old")
    return folder


@pytest.mark.parametrize("size", [0, 2000, 50_000, 300_000])
def test_report(size, reported, tmp_path, call):
    shutil.copytree(reported, tmp_path, dirs_exist_ok=True)
    material, page = tmp_path / "material", tmp_path / "report.html"
    before = files(tmp_path)
    with room_for(size):
        code, _, err = call("report", material, "--out", page, "--title", "new")
    assert code == 1
    assert "The disk is full" in err
    assert files(tmp_path) == before


@pytest.mark.parametrize("size", [0, 3000, *(pytest.param(n, marks=pytest.mark.long) for n in (100, 20_000, 60_000))])
def test_train_goes_on_when_there_is_room_again(size, lm_values, tmp_path, write_recipe, call):
    lm_values["method"] = {"name": "dual_lora", "r": 4}
    recipe, out = write_recipe(lm_values), tmp_path / "run"
    with room_for(size):
        code, _, err = call("train", recipe, "--out", out)
    assert code == 1
    assert "The disk is full" in err
    assert not (out / "adapter").exists()
    assert not list(out.rglob(".*.part"))
    if (out / "record.json").exists():
        json.loads((out / "record.json").read_text())
    code, _, err = call("train", recipe, "--out", out, *(["--resume"] if out.exists() else []))
    assert code == 0, err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "ended"), [(8000, 1), pytest.param(60_000, 2, marks=pytest.mark.long)]
)  # before a first checkpoint, and in a later run
def test_compare_repeats_nothing_when_there_is_room_again(size, ended, tmp_path, call):
    study = tiny_study.write_study(tmp_path / "study", **tiny_study.SHORT)
    with room_for(size):
        code, _, err = call("compare", study, "--out", tmp_path / "out")
    assert code == 1
    assert "disk is full" in err
    done = tiny_study.outcomes(tmp_path / "out")
    assert len(done) == ended
    code, out, err = call("compare", study, "--out", tmp_path / "out")
    assert code == 0, err
    assert f"dual-lora report {tmp_path / 'out'}" in " ".join(out.split())
    again = tiny_study.outcomes(tmp_path / "out")
    assert len(again) == 3
    assert done.items() <= again.items()
    assert not list(tmp_path.glob("out/runs/*.error.json"))
