"""Reports to W&B, MLflow, TensorBoard and trackio: for who asks on the command line, and for no recipe."""

from __future__ import annotations

import json
import os
import sys
import types

import pytest

pytest.importorskip("pydantic")

from tiny_study import write_study

from dual_lora.lab.cli import main
from dual_lora.lab.errors import UserError
from dual_lora.lab.recipe.read import build_recipe
from dual_lora.lab.run import reporting
from dual_lora.lab.run.reporting import check_reports, reported
from dual_lora.lab.run.train import run


@pytest.fixture
def board(monkeypatch):
    """A TensorBoard that writes down what it is told, in place of the package."""
    told = []

    class Writer:
        def __init__(self, log_dir=None):
            self.log_dir = log_dir
            told.append(("opened", log_dir))

        def add_scalar(self, name, value, step):
            told.append((name, step))

        def add_text(self, name, text, step=None):
            told.append((name, text))

        def flush(self):
            pass

        def close(self):
            told.append(("closed", self.log_dir))

    package = types.ModuleType("torch.utils.tensorboard")
    package.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", package)
    integrations = "transformers.integrations.integration_utils.is_tensorboard_available"
    monkeypatch.setattr(integrations, lambda: True)
    found = reporting.importlib.util.find_spec
    monkeypatch.setattr(reporting.importlib.util, "find_spec", lambda n, *a: n == "tensorboard" or found(n, *a))
    return told


def test_a_run_reports_where_it_is_told_to(board, lm_values, tmp_path):
    run(build_recipe(lm_values), tmp_path / "run", progress=False, report_to=("tensorboard",))
    assert board[0] == ("opened", str(tmp_path / "run" / "tensorboard"))
    assert ("train/loss", 6) in board
    arguments = json.loads(next(text for name, text in board if name == "args"))
    assert arguments["run_name"] == "tiny/lora/seed-0"
    assert "TENSORBOARD_LOGGING_DIR" not in os.environ


def test_a_run_reports_nowhere_else(board, lm_values, tmp_path):
    run(build_recipe(lm_values), tmp_path / "run", progress=False)
    assert board == []


@pytest.mark.parametrize("field", ["report_to", "run_name", "project", "trackio_space_id", "hub_token", "push_to_hub"])
def test_no_recipe_can_ask_for_a_report(field, board, lm_values, tmp_path):
    lm_values["train"]["arguments"] = {field: "tensorboard"}
    with pytest.raises(UserError, match=f"may not set '{field}'"):
        run(build_recipe(lm_values), tmp_path / "run", progress=False)
    assert board == []


def test_the_flag_is_the_way(board, lm_values, write_recipe, tmp_path):
    with pytest.raises(SystemExit) as ended:
        main(["train", str(write_recipe(lm_values)), "--out", str(tmp_path / "run"), "--report-to", "tensorboard"])
    assert ended.value.code == 0
    assert ("train/loss", 6) in board


def test_what_is_not_known_or_not_installed_is_named(monkeypatch):
    with pytest.raises(UserError, match=r"--report-to 'tensorbord' is not known. Did you mean 'tensorboard'"):
        check_reports(["tensorbord"])
    monkeypatch.setattr(reporting.importlib.util, "find_spec", lambda *a: None)
    with pytest.raises(UserError, match=r"--report-to wandb needs the package wandb: `pip install wandb`"):
        check_reports(["wandb"])


@pytest.mark.parametrize("folder", ["wandb", ".wandb"])
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[default]\nbase_url = https://evil.example\n", "sets base_url"),
        ("[default]\nIdentity_Token_File: /home/you/.ssh/id\n", "sets identity_token_file"),
        ("[other]\nentity = evil\n", "sets entity"),
        ("[DEFAULT]\nx_extra_http_headers = {}\n", "sets x_extra_http_headers"),
        ("no settings", "cannot be read"),
        ("[default]\nmode = offline\nproject = mine\nbase_url = https://api.wandb.ai\n", ""),
    ],
)
def test_settings_of_wandb_in_the_working_folder_say_not_where_it_sends(folder, text, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: object())
    (tmp_path / folder).mkdir()
    (tmp_path / folder / "settings").write_text(text)
    if not said:
        assert check_reports(["wandb"]) == ("wandb",)
        return
    assert check_reports(["mlflow"]) == ("mlflow",)
    with pytest.raises(UserError, match=said):
        check_reports(["wandb"])


def test_names_are_stable_and_leave_with_the_run(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    for name in ("WANDB_RUN_ID", "WANDB_RUN_GROUP", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    ended = []
    wandb = types.SimpleNamespace(run=object(), finish=lambda: ended.append(True))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    seen = []
    for place, seed in (("a", 1), ("a", 1), ("a", 2), ("b", 1)):
        with reported(("wandb",), "sst2", f"lora/seed-{seed}", tmp_path / place) as fields:
            assert fields["report_to"] == ["wandb"]
            assert fields["run_name"] == f"sst2/lora/seed-{seed}"
            assert os.environ["WANDB_PROJECT"] == "mine", "what the user has set stays"
            assert os.environ["WANDB_RUN_GROUP"] == "sst2"
            assert os.environ["MLFLOW_EXPERIMENT_NAME"] == "dual-lora/sst2"
            seen.append(os.environ["WANDB_RUN_ID"])
    assert seen[0] == seen[1], "a resumed run goes on as itself"
    assert len(set(seen)) == 3
    assert len(ended) == 4, "the next run of this process is one of its own"
    assert "WANDB_RUN_ID" not in os.environ
    assert os.environ["WANDB_PROJECT"] == "mine"


def test_a_resumed_run_is_found_again_in_mlflow_and_two_folders_are_two_runs_in_trackio(tmp_path, monkeypatch):
    for name in ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_TAGS"):
        monkeypatch.delenv(name, raising=False)
    runs = {}  # what a server knows: by experiment and filter

    def search_runs(experiment_names, filter_string, **_):
        return runs.get((*experiment_names, filter_string), [])

    monkeypatch.setitem(sys.modules, "mlflow", types.SimpleNamespace(search_runs=search_runs))
    report = ("mlflow", "trackio"), "sst2", "lora/seed-1"
    with reported(*report, tmp_path / "a") as first:
        assert "MLFLOW_RUN_ID" not in os.environ
        tag = json.loads(os.environ["MLFLOW_TAGS"])["run"]
        found = types.SimpleNamespace(info=types.SimpleNamespace(run_id="its-own"))
        runs["dual-lora/sst2", f"tags.run = '{tag}'"] = [found]
    with reported(*report, tmp_path / "a") as again:
        assert os.environ["MLFLOW_RUN_ID"] == "its-own"
    with reported(*report, tmp_path / "b") as other:
        assert "MLFLOW_RUN_ID" not in os.environ, "another folder is another run"
    assert "MLFLOW_RUN_ID" not in os.environ
    assert first["run_name"] == again["run_name"] != other["run_name"]


@pytest.mark.slow
def test_a_study_reports_its_final_runs_by_their_task_and_method(board, tmp_path):
    from dual_lora.lab.study.compare import compare

    study = write_study(tmp_path, search={"space": {"learning_rate": [1e-2]}})
    compare(study, tmp_path / "out", progress=False, report_to=("tensorboard",))
    names = [json.loads(text)["run_name"] for name, text in board if name == "args"]
    assert sorted(names) == [f"letters/{m}/seed-{s}" for m in ("dual_lora", "lora") for s in (1, 2)]
