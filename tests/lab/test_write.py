"""The one writer: whole or not at all, through nobody's link, over nobody's file, nothing left behind."""

import json
import os
import threading

import pytest

from dual_lora.lab.run.write import write_atomically, write_folder_atomically, write_json


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


def test_a_folder_of_the_user_s_beside_the_target_stays(tmp_path):
    (tmp_path / "merged.part").mkdir()
    (tmp_path / "merged.part" / "thesis.txt").write_text("years")
    write_folder_atomically(tmp_path / "merged", lambda folder: (folder / "a").write_text("1") and None)
    assert names(tmp_path) == ["merged", "merged.part"]
    assert (tmp_path / "merged.part" / "thesis.txt").read_text() == "years"
    assert (tmp_path / "merged" / "a").read_text() == "1"


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
