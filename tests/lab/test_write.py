"""The one writer: whole or not at all, through nobody's link, over nobody's file, nothing left behind."""

import json
import os
import shutil
import threading
import time
from pathlib import Path

import pytest

from dual_lora.lab.errors import UserError
from dual_lora.lab.files.folder import RunFolder
from dual_lora.lab.files.write import (
    free_file,
    free_folder,
    held,
    hold,
    write_atomically,
    write_folder_atomically,
    write_json,
    write_output,
)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_links_are_replaced_and_never_followed(tmp_path):
    """A folder from somebody else may hold links under any name that a writer could use."""
    start_up = tmp_path / "profile"
    start_up.write_text("mine")
    run = tmp_path / "run"
    run.mkdir()
    for name in ("record.json", "record.json.part", ".record.json.part"):
        (run / name).symlink_to(start_up)
    write_atomically(run / "record.json", "theirs")
    assert start_up.read_text() == "mine"
    assert (run / "record.json").read_text() == "theirs"
    assert not (run / "record.json").is_symlink()


def test_nor_a_link_with_the_name_that_was_drawn(tmp_path, monkeypatch):
    """Somebody may guess it: the file is made, and never one that is there."""
    (tmp_path / "mine").write_text("mine")
    monkeypatch.setattr("secrets.token_hex", lambda _: "0f" * 8)
    (tmp_path / f".record.json.{'0f' * 8}.part").symlink_to(tmp_path / "mine")
    with pytest.raises(FileExistsError):
        write_atomically(tmp_path / "record.json", "theirs")
    assert (tmp_path / "mine").read_text() == "mine"
    monkeypatch.undo()
    drawn: list[str] = []
    replaced = Path.replace
    monkeypatch.setattr(Path, "replace", lambda part, to: (drawn.append(part.name), replaced(part, to))[1])
    for _ in range(2):
        write_atomically(tmp_path / "record.json", "theirs")
    assert len({*drawn}) == 2


@pytest.mark.parametrize("second", ["symlink_to", "hardlink_to"])
def test_a_lock_is_no_other_file(second, tmp_path):
    """Some versions of the library empty the file that they lock."""
    (tmp_path / "mine").write_text("mine")
    getattr(tmp_path / ".out.lock", second)(tmp_path / "mine")
    with pytest.raises(UserError, match=r"\.out\.lock is a link or no file"):
        free_folder(tmp_path / "out").__enter__()
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_folder_of_the_user_s_beside_the_target_stays(tmp_path):
    (tmp_path / "merged.part").mkdir()
    (tmp_path / "merged.part" / "thesis.txt").write_text("years")
    write_folder_atomically(tmp_path / "merged", lambda folder: (folder / "a").write_text("1") and None)
    assert names(tmp_path) == ["merged", "merged.part"]
    assert (tmp_path / "merged.part" / "thesis.txt").read_text() == "years"
    assert (tmp_path / "merged" / "a").read_text() == "1"


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_who_may_read_a_folder_may_read_its_weights(mask, mode, tmp_path):
    """safetensors writes weights for their owner alone."""

    def write(folder):
        (folder / "part").mkdir()
        for file in (folder / "model.safetensors", folder / "part" / "tool"):
            file.write_text("1")
            file.chmod(0o600)
        (folder / "part" / "tool").chmod(0o700)

    before = os.umask(mask)
    try:
        write_folder_atomically(tmp_path / "merged", write)
    finally:
        os.umask(before)
    assert (tmp_path / "merged" / "model.safetensors").stat().st_mode & 0o777 == mode
    assert (tmp_path / "merged" / "part" / "tool").stat().st_mode & 0o777 == mode | 0o100


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "ctrl-c"])
def test_what_fails_leaves_the_old_and_nothing_else(error, tmp_path, monkeypatch):
    def fails(*_):
        raise error

    (tmp_path / "file").write_text("old")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a").write_text("old")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fails)
        with pytest.raises(type(error)):
            write_atomically(tmp_path / "file", "new")
    with pytest.raises(type(error)):
        write_folder_atomically(tmp_path / "folder", fails)
    assert names(tmp_path) == ["file", "folder"]
    assert (tmp_path / "file").read_text() == (tmp_path / "folder" / "a").read_text() == "old"


def test_writers_at_once_never_mix(tmp_path):
    texts = [letter * 100_000 for letter in "abcdefgh"]
    threads = [threading.Thread(target=write_atomically, args=(tmp_path / "file", text)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "file").read_text() in texts
    assert names(tmp_path) == ["file"]


def test_files_and_folders_have_the_usual_rights(tmp_path):
    (tmp_path / "plain").write_text("")
    write_json(tmp_path / "written", {"a": [float("nan"), 1.5]})
    assert (tmp_path / "written").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert json.loads((tmp_path / "written").read_text()) == {"a": [None, 1.5]}


def test_what_is_written_is_json_for_everybody(tmp_path):
    write_json(tmp_path / "x.json", {"a": [float("nan"), 1.5, (float("inf"), "NaN")], "b": -float("inf")})
    text = (tmp_path / "x.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"a": [None, 1.5, [None, "NaN"]], "b": None}


def one_file(folder):
    (folder / "a").write_text("1")


def test_what_came_into_an_output_meanwhile_stays(tmp_path):
    def late(folder):
        one_file(folder)
        (tmp_path / "out").mkdir()
        (tmp_path / "out/thesis.txt").write_text("years")

    with pytest.raises(UserError, match=r"thesis\.txt was put into the output folder meanwhile"):
        write_folder_atomically(tmp_path / "out", late)
    assert (tmp_path / "out/thesis.txt").read_text() == "years"
    assert names(tmp_path) == ["out"]


def test_an_empty_folder_and_our_own_are_replaced(tmp_path):
    (tmp_path / "out/empty").mkdir(parents=True)
    for _ in range(2):
        write_folder_atomically(tmp_path / "out", one_file, listed=True, anew=True)
        assert names(tmp_path / "out") == ["a", "complete.json"]
    (tmp_path / "out/a").write_text("edited")
    with pytest.raises(UserError, match="meanwhile, or changed"):
        write_folder_atomically(tmp_path / "out", one_file, listed=True, anew=True)
    assert (tmp_path / "out/a").read_text() == "edited"


def test_a_run_s_weights_that_came_into_an_output_meanwhile_stay(tmp_path):
    """They have a list too, by which a longer run replaces its own: here nobody asked for it."""
    (tmp_path / "run").mkdir()
    write_folder_atomically(tmp_path / "run/adapter", one_file, listed=True)

    def late(folder):
        (folder / "b").write_text("2")
        shutil.copytree(tmp_path / "run/adapter", tmp_path / "out")

    with pytest.raises(UserError, match="was put into the output folder meanwhile"):
        write_folder_atomically(tmp_path / "out", late)
    assert names(tmp_path / "out") == ["a", "complete.json"]


def test_an_output_that_another_command_has_just_filled_is_not_empty(tmp_path, monkeypatch):
    """It was empty when this one looked, and free when this one took it."""

    def filled(file, busy):
        (tmp_path / "out").mkdir(exist_ok=True)
        one_file(tmp_path / "out")
        return hold(file, busy)

    monkeypatch.setattr("dual_lora.lab.files.write.hold", filled)
    with pytest.raises(UserError, match="is not empty"):
        free_folder(tmp_path / "out").__enter__()
    shutil.rmtree(tmp_path / "out")
    monkeypatch.setattr("dual_lora.lab.files.folder.hold", filled)
    with pytest.raises(UserError, match="is not empty"):
        RunFolder(tmp_path / "out").open(resume=False, overwrite=False)
    assert (tmp_path / "out/a").read_text() == "1"
    monkeypatch.undo()
    hold(tmp_path / "out/.lock", "it is still held").release()


@pytest.mark.parametrize("output", [free_folder, held, RunFolder])
def test_a_folder_that_cannot_be_made_is_said(output, tmp_path):
    (tmp_path / "file").write_text("")
    out = output(tmp_path / "file/below/out")
    with pytest.raises(UserError, match=r"The folder .*file.* cannot be made \(.*give another one"):
        out.open(False, False) if isinstance(out, RunFolder) else out.__enter__()


@pytest.mark.parametrize("free", [free_folder, free_file])
def test_an_output_has_one_writer_at_a_time(free, tmp_path):
    out = tmp_path / "new/out.gguf"

    def stopped():
        with free(out):
            with pytest.raises(UserError, match=r"out\.gguf is being written by another command"):
                free(out).__enter__()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert names(tmp_path) == [], "nothing came of it, so nothing is left"


def test_a_file_that_came_meanwhile_stays(tmp_path):
    out = tmp_path / "out.gguf"

    def written():
        with free_file(out) as (target, space):
            (space / target.name).write_text("new")
            out.write_text("mine")

    with pytest.raises(UserError, match="exists already"):
        written()
    assert out.read_text() == "mine"
    assert names(tmp_path) == ["out.gguf"]


def test_what_killed_writers_left_is_removed(tmp_path):
    """It may have a model's size, and its name is hidden."""
    left, other, mine = (f".out.{'0f' * 8}.part", f".other.{'0f' * 8}.part", ".out.part")
    for name in (left, other, mine):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text("half")
    os.utime(tmp_path / left, (ahead := time.time() + 1e6, ahead))  # the time of day was set back since
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / f".out.{'aa' * 8}.part").symlink_to(tmp_path / "elsewhere")
    with held(tmp_path / "out"):
        assert not (tmp_path / left).exists()
    assert names(tmp_path) == sorted([other, mine, f".out.{'aa' * 8}.part", "elsewhere"])


def test_what_a_killed_writer_of_one_file_left_is_removed(call, tmp_path):
    """By the same command, once it is old: no lock says whether somebody writes a page, a recipe or a card."""
    table, out = tmp_path / "scores.csv", tmp_path / "judged"
    table.write_text("method,seed,score\n" + "".join(f"{m},{s},0.{s}\n" for m in "ab" for s in range(3)))
    out.mkdir()
    left = [f".{name}.{'0a' * 8}.part" for name in ("results.json", "report.html", "other.json")]
    fresh = f".report.html.{'0b' * 8}.part"
    for name in (*left, fresh):
        (out / name).write_text("half")
        ahead = time.time() + 1e6
        os.utime(out / name, None if name == fresh else (0, 0) if name == left[0] else (ahead, ahead))
    call("judge", table, "--out", out)
    assert names(out) == sorted([left[2], fresh, "report.html", "results.json"])


def test_what_a_killed_writer_left_in_a_study_is_removed(tmp_path):
    """A file among its runs when it is old: another study may be writing there."""
    from dual_lora.lab.study.folder import StudyFolder

    part = f".study.json.{'0a' * 8}.part"
    (tmp_path / "runs").mkdir()
    left, old, fresh = tmp_path / part, tmp_path / "runs" / part, tmp_path / "runs" / part.replace("study", "x")
    mine = [tmp_path / ".mine.part", tmp_path / "runs/x.part"]
    for file in (left, old, fresh, *mine):
        file.write_text("half")
    os.utime(old, (0, 0))
    (tmp_path / f".link.{'0a' * 8}.part").symlink_to(mine[0])
    other = tmp_path / "other"
    other.mkdir()
    (other / "runs").symlink_to(tmp_path / "runs")
    with StudyFolder(other):
        assert old.exists()  # outside of that study
    with StudyFolder(tmp_path):
        assert [file.exists() for file in (left, old, fresh, *mine)] == [False, False, True, True, True]
    assert os.path.lexists(tmp_path / f".link.{'0a' * 8}.part")


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match=r"There is no folder .*nowhere to write x\.yaml into"):
        write_output(tmp_path / "nowhere/x.yaml", "a: 1")
