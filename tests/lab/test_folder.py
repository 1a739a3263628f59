"""A stranger's run leads nothing out of its folder, and only what we wrote ourselves is ever overwritten."""

import json
import os
import shutil

import pytest
import yaml

from dual_lora.lab import demo
from dual_lora.lab.analysis.analyze import analyze
from dual_lora.lab.errors import UserError
from dual_lora.lab.export.export import export_lora, merge
from dual_lora.lab.files.folder import OWN, RunFolder, files_in
from dual_lora.lab.files.write import hold
from dual_lora.lab.model.opened import open_tuned
from dual_lora.lab.recipe.read import build_recipe, read_recipe
from dual_lora.lab.run.evaluate import evaluate
from dual_lora.lab.run.hub_card import write_card
from dual_lora.lab.run.train import run
from dual_lora.lab.study.study import Study

pytestmark = pytest.mark.filterwarnings("ignore:The sets overlap:dual_lora.DualLoraWarning")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_lm, questions):
    """A finished run with two checkpoints and an evaluation."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    run(build_recipe(values(tiny_lm, questions)), folder, progress=False)
    evaluate(folder, progress=False)
    return folder


def values(tiny_lm, questions):
    return {
        "model": {"path": str(tiny_lm)},
        "method": {"name": "dual_lora", "r": 4},
        "data": {"train": str(questions / "train.json"), "test": str(questions / "test.json")},
        "train": {"steps": 4, "batch_size": 4, "checkpoint_every": 2, "keep_checkpoints": 2},
        "evaluate": {"tasks": ["loss"]},
    }


@pytest.fixture
def copied(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture
def mine(tmp_path):
    """A folder of the user's, and what lies in it."""
    folder = tmp_path / "mine"
    for name in ("checkpoint-2/optimizer.pt", "thesis.txt", "adapter_config.json", "0/a.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("years of work")
    return folder


def state(folder):
    return {str(p.relative_to(folder)): p.is_file() and p.read_bytes() for p in sorted(folder.rglob("*"))}


LINKS = ["checkpoints", "checkpoints/checkpoint-2", "checkpoints/checkpoint-4/optimizer.pt", "adapter", "record.json"]
LINKS += [
    "adapter/adapter_model.safetensors",
    "metrics.jsonl",
    "evaluation",
    "evaluation/test-loss",
    "analysis",
    ".lock",
]


@pytest.mark.parametrize("entry", LINKS)
def test_a_link_in_a_run_is_an_error_for_every_command(entry, copied, mine, tmp_path):
    path = copied / entry
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.parent.mkdir(exist_ok=True)
    path.symlink_to(mine / "thesis.txt" if "." in path.name else mine)
    before, theirs = state(mine), sorted(os.walk(copied))
    recipe = build_recipe(yaml.safe_load((copied / "recipe.yaml").read_text()))
    commands = {
        "resume": lambda: run(recipe, copied, resume=True, progress=False),
        "overwrite": lambda: run(recipe, copied, overwrite=True, progress=False),
        "evaluate": lambda: evaluate(copied, progress=False),
        "merge": lambda: merge(copied, tmp_path / "merged"),
        "export": lambda: export_lora(copied, tmp_path / "lora", 4, progress=False),
        "analyze": lambda: analyze([copied], progress=False),
    }
    for name, command in commands.items():
        with pytest.raises(UserError, match=r"is a link to .*plain files and folders inside"):
            command()
        assert state(mine) == before, name
        assert sorted(os.walk(copied)) == theirs, name
    assert not (tmp_path / "merged").exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_neither_may_an_entry_be_a_pipe(copied):
    """Which nobody would ever finish reading."""
    (copied / "record.json").unlink()
    os.mkfifo(copied / "record.json")
    with pytest.raises(UserError, match="neither a file nor a folder"):
        evaluate(copied, progress=False)


def test_a_link_in_a_demo_is_an_error(mine, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/settings.json").write_text(json.dumps({"seed": 0, "examples": 600, "test_examples": 100}))
    for name in ("data", "evaluation", "merged"):
        (tmp_path / "out" / name).symlink_to(mine)
    before = state(mine)
    for overwrite in (False, True):
        with pytest.raises(UserError, match="is a link to"):
            demo.run(tmp_path / "out", overwrite=overwrite, progress=False)
    with pytest.raises(UserError, match="is a link to"):
        demo.ask(tmp_path / "out", "anything")
    assert state(mine) == before


def test_the_run_itself_may_be_reached_by_a_link(copied, tmp_path):
    (tmp_path / "latest").symlink_to(copied)
    assert evaluate(tmp_path / "latest", progress=False).metrics


def test_a_link_to_an_empty_folder_is_an_output_like_any_other(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "real")
    held = RunFolder(tmp_path / "out")
    held.open(resume=False, overwrite=False)
    held.close()
    assert (tmp_path / "out").is_symlink()
    assert list((tmp_path / "real").iterdir()) == []


def test_what_never_began_can_be_overwritten(tiny_lm, questions, tmp_path):
    """An argument that stops a run before its first step, and the next attempt fails before anything is written."""
    out, recipe = tmp_path / "out", values(tiny_lm, questions)
    wrong = {**recipe, "train": {**recipe["train"], "arguments": {"adam_epsilon": "1e-6"}}}
    with pytest.raises(UserError, match="Training could not begin"):
        run(build_recipe(wrong), out, progress=False)
    with pytest.raises(UserError, match="no data file"):
        run(build_recipe({**recipe, "data": {"train": "nowhere.jsonl"}}), out, overwrite=True, progress=False)
    assert not out.exists()
    assert run(build_recipe(recipe), out, overwrite=True, progress=False).state == "finished"


def test_overwrite_removes_what_the_run_wrote(copied, tiny_lm, questions):
    write_card(RunFolder(copied), read_recipe(copied))  # `dual-lora card`: it has the scores of the evaluation now
    assert files_in(copied, OWN)[1] == []
    before = (copied / "record.json").read_bytes()
    run(build_recipe(values(tiny_lm, questions)), copied, overwrite=True, progress=False)
    assert (copied / "record.json").read_bytes() != before
    assert not (copied / "evaluation").exists()


FOREIGN = ["thesis.txt", "adapter/notes.md", "checkpoints/checkpoint-3/optimizer.pt", "evaluation/figure.png"]
FOREIGN += ["model/model.safetensors", "adapter/README.md", "analysis/chapter.tex", ".git/config", "data/.hidden"]


@pytest.mark.parametrize("name", FOREIGN)
def test_overwrite_refuses_a_run_that_holds_anything_else(name, copied, tiny_lm, questions):
    """adapter/README.md is the run's own, and somebody has written into it since."""
    (copied / name).parent.mkdir(parents=True, exist_ok=True)
    (copied / name).write_text("years of work")
    recipe, before = build_recipe(values(tiny_lm, questions)), state(copied)
    with pytest.raises(UserError, match=r"this program has not written(.|\n)*Nothing was removed"):
        run(recipe, copied, overwrite=True, progress=False)
    with pytest.raises(UserError, match=r"is not empty: give --resume to go on, or another --out\."):
        run(recipe, copied, progress=False)
    assert state(copied) == before


def test_overwrite_never_takes_a_project_for_a_run(tiny_lm, questions, tmp_path, monkeypatch, call):
    """`--out .` in a project with a recipe of its own and folders that are named as ours are."""
    project = tmp_path / "project"
    for name in ("model/weights.bin", "evaluation/a/result.json", "analysis/analysis.json", "metrics.jsonl"):
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text("years of work")
    (project / "recipe.yaml").write_text("# mine\n" + yaml.safe_dump(values(tiny_lm, questions)))
    before = state(project)
    monkeypatch.chdir(project)
    for extra in (["--overwrite"], []):
        for out in (".", str(project), "../project"):
            code, _, said = call("train", "recipe.yaml", "--out", out, *extra)
            assert code == 1
            assert "--overwrite to" not in said
            assert state(project) == before
    (project / "record.json").write_text('{"state": "of mind"}')
    assert call("train", "recipe.yaml", "--out", ".", "--overwrite")[0] == 1
    assert (project / "model/weights.bin").is_file()


def test_demo_overwrite_refuses_a_project(tmp_path, call):
    for name in ("settings.json", "demo.json", "data/train.jsonl", "run/recipe.yaml", "merged/model.safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    before = state(tmp_path)
    for extra in (["--overwrite"], [], ["--ask", "anything"]):
        code, _, said = call("demo", "--out", tmp_path, *extra)
        assert code == 1
        assert "holds no demo" in said
        assert "--overwrite" not in said
        assert state(tmp_path) == before


def test_what_a_killed_writer_left_is_ours(copied):
    (copied / f".adapter.{'0a' * 8}.part/sub").mkdir(parents=True)
    (copied / f".adapter.{'0a' * 8}.part/sub/weights").write_text("half")
    (copied / f"evaluation/test-loss/.items.jsonl.{'0a' * 8}.part").write_text("half")
    assert files_in(copied, OWN)[1] == []
    (copied / ".thesis.part").write_text("mine")
    assert files_in(copied, OWN)[1] == [copied / ".thesis.part"]


def test_a_list_reaches_no_file_elsewhere(copied, mine):
    """What a stranger's list names outside of its folder is not removed, and makes no checkpoint look whole."""
    (copied / "adapter/complete.json").write_text(
        json.dumps({"../../mine/thesis.txt": 13, str(mine / "thesis.txt"): 13})
    )
    ours, others = files_in(copied, OWN)
    assert not [p for p in ours if "thesis" in p.name]
    assert copied / "adapter/adapter_model.safetensors" in others
    for wrong in ("[1]", "[" * 100_000, '{"a": "b"}', "{", "null"):
        (copied / "checkpoints/checkpoint-4/complete.json").write_text(wrong)
        assert RunFolder(copied).last_checkpoint() == (2, copied / "checkpoints/checkpoint-2")


def test_resume_leaves_checkpoints_of_another_trainer(copied, tiny_lm, questions):
    """They have no list of ours; the run goes on from its own."""
    other = copied / "checkpoints/checkpoint-500"
    other.mkdir()
    (other / "optimizer.pt").write_text("a week of computing")
    shutil.rmtree(copied / "adapter")
    run(build_recipe(values(tiny_lm, questions)), copied, resume=True, progress=False)
    assert (other / "optimizer.pt").read_text() == "a week of computing"


@pytest.mark.parametrize("name", ["checkpoint-x", "checkpoint-²", "checkpoint-"])
def test_a_checkpoint_of_no_step_is_passed_over(name, copied, tiny_lm, questions):
    """Whole by its list, and named by somebody else."""
    shutil.rmtree(copied / "adapter")
    shutil.rmtree(copied / "checkpoints/checkpoint-2")
    (copied / "checkpoints/checkpoint-4").rename(copied / "checkpoints" / name)
    assert RunFolder(copied).last_checkpoint() == (0, None)
    assert run(build_recipe(values(tiny_lm, questions)), copied, resume=True, progress=False).state == "finished"


@pytest.mark.parametrize("name", [".", "..", "...", "", "a/b", "../x", "/etc"])
def test_names_that_are_folders(name, lm_values):
    with pytest.raises(UserError, match="name is"):
        build_recipe({**lm_values, "name": name})
    with pytest.raises(ValueError, match="name"):
        Study.model_validate({"name": name, "tasks": ["x"], "methods": ["lora", "dual_lora"]})


@pytest.mark.parametrize("name", ["a", ".hidden", "a.b-c_d", "2026", "é"])
def test_names_that_are_names(name, lm_values):
    assert build_recipe({**lm_values, "name": name}).name == name


def test_an_analysis_replaces_no_other_file(copied, tmp_path, call):
    (tmp_path / "thesis.tex").write_text("years of work")
    assert "is no analysis" in call("analyze", copied, "--out", tmp_path / "thesis.tex")[2]
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
    for _ in range(2):
        assert call("analyze", copied, "--ranks", "none", "--held-out", "0", "--no-gradients")[0] == 0
    assert json.loads((copied / "analysis/analysis.json").read_text())["runs"]


@pytest.mark.parametrize(
    "write", [merge, lambda source, out: export_lora(source, out, 2, limit=0)], ids=["merge", "lora"]
)
def test_an_output_is_one_commands_and_keeps_what_came_meanwhile(write, finished, tmp_path, monkeypatch):
    from dual_lora.lab.export import export

    opened, said = export.open_tuned, []

    def meanwhile(*given, **more):
        with pytest.raises(UserError, match="is being written by another command"):
            write(finished, tmp_path / "out")
        (tmp_path / "out").mkdir()
        (tmp_path / "out/thesis.txt").write_text("years of work")
        said.append(given)
        monkeypatch.setattr(export, "open_tuned", opened)
        return opened(*given, **more)

    monkeypatch.setattr(export, "open_tuned", meanwhile)
    with pytest.raises(UserError, match="was put into the output folder meanwhile"):
        write(finished, tmp_path / "out")
    assert said
    assert state(tmp_path) == {"out": False, "out/thesis.txt": b"years of work"}


SECRET = "token-of-the-user-7f3a"


@pytest.mark.parametrize("name", ["chat_template.jinja", "vocab.txt", "additional_chat_templates/tool_use.jinja"])
def test_no_link_leads_out_of_a_base_model(name, tiny_lm, questions, finished, tmp_path):
    """transformers would write what it shows into each run, merged model and upload."""
    (secret := tmp_path / "secret").write_text(SECRET)
    base = shutil.copytree(tiny_lm, tmp_path / "base")
    (base / name).parent.mkdir(exist_ok=True)
    (base / name).unlink(missing_ok=True)
    (base / name).symlink_to(secret)
    given = values(base, questions)
    for command in (
        lambda: run(build_recipe(given), tmp_path / "run", progress=False),
        lambda: merge(finished / "adapter", tmp_path / "merged", base=str(base)),
        lambda: open_tuned(base),
    ):
        with pytest.raises(UserError, match="which lies outside of its folder"):
            command()
    assert not any(SECRET in p.read_text(errors="replace") for p in tmp_path.rglob("*") if p.is_file() and p != secret
                   and not p.is_symlink())  # fmt: skip


def test_no_link_leads_out_of_an_adapter(finished, tmp_path):
    (secret := tmp_path / "secret").write_text(SECRET)
    adapter = shutil.copytree(finished / "adapter", tmp_path / "adapter")
    (adapter / "chat_template.jinja").unlink(missing_ok=True)
    (adapter / "chat_template.jinja").symlink_to(secret)
    with pytest.raises(UserError, match="which lies outside of its folder"):
        merge(adapter, tmp_path / "merged")


def test_links_to_weights_and_within_the_hub_s_cache_are_followed(tiny_lm, tmp_path):
    blobs, snapshot = tmp_path / "models--x/blobs", tmp_path / "models--x/snapshots/1"
    shutil.copytree(tiny_lm, blobs)
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    open_tuned(snapshot)
    linked = shutil.copytree(tiny_lm, tmp_path / "linked")
    (linked / "model.safetensors").unlink()
    (linked / "model.safetensors").symlink_to(blobs / "model.safetensors")
    open_tuned(linked)


def test_training_writes_into_no_second_name(copied, tmp_path):
    """torch and the list of metrics write into the files that are there."""
    (thesis := tmp_path / "thesis").write_text("years of work")
    for name in ("checkpoints/checkpoint-2/optimizer.pt", "metrics.jsonl", ".lock"):
        file = copied / name
        content = file.read_bytes() if file.exists() else b""
        file.unlink(missing_ok=True)
        os.link(thesis, file)
        with pytest.raises(UserError, match=r"has a second name elsewhere"):
            run(read_recipe(copied / "recipe.yaml"), copied, resume=True, progress=False)
        file.unlink()
        file.write_bytes(content)
    os.link(thesis, study := tmp_path / "study.lock")
    with pytest.raises(UserError, match="expected a lock of this program"):
        hold(study, "busy")
    assert thesis.read_text() == "years of work"


@pytest.mark.parametrize("how", ["up", "absolute"])
def test_a_list_in_a_run_names_nothing_outside_of_it(how, copied, mine, tmp_path):
    """What a list names is ours, and goes when the adapter is written anew: not if it is somebody else's file."""
    thesis = mine / "thesis.txt"
    record = json.loads((copied / "record.json").read_text())
    (copied / "record.json").write_text(json.dumps(record | {"state": "interrupted"}))
    for part in ("adapter", "checkpoints/checkpoint-2"):
        listed = json.loads((copied / part / "complete.json").read_text())
        name = str(thesis) if how == "absolute" else os.path.relpath(thesis, copied / part)
        (copied / part / "complete.json").write_text(json.dumps(listed | {name: thesis.stat().st_size}))
    assert set(RunFolder(copied).whole_checkpoints()) == {4}
    run(build_recipe(yaml.safe_load((copied / "recipe.yaml").read_text())), copied, resume=True, progress=False)
    assert thesis.read_text() == "years of work"


@pytest.mark.parametrize("name", ["chat_template.jinja", "vocab.txt"])
def test_a_hard_link_in_a_model_shows_no_file_of_the_user(name, copied, mine, tiny_lm, tmp_path):
    """An archive that is unpacked in the home folder makes one to any file there."""
    base = shutil.copytree(tiny_lm, tmp_path / "base")
    for folder in (base, copied / "adapter"):
        (folder / name).unlink(missing_ok=True)
        os.link(mine / "thesis.txt", folder / name)
        with pytest.raises(UserError, match=r"has a second name elsewhere .*It was not read"):
            open_tuned(folder)
    with pytest.raises(UserError, match="has a second name elsewhere"):
        merge(copied, tmp_path / "merged")
    (linked := shutil.copytree(tiny_lm, tmp_path / "linked")).joinpath("model.safetensors").unlink()
    os.link(tiny_lm / "model.safetensors", linked / "model.safetensors")
    open_tuned(linked)
