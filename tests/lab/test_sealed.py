"""A checkpoint that is read by unpickling is read only if this user's own run wrote it."""

import os
import pickle
import shutil
from types import SimpleNamespace

import processes
import pytest
import torch
from processes import launched

from dual_lora.lab.errors import UserError
from dual_lora.lab.files.write import mark_whole
from dual_lora.lab.run import sealed
from dual_lora.lab.run.resume import check_same_sharding


def trainer(fsdp="", deepspeed=False):
    plugin = SimpleNamespace(state_dict_type=SimpleNamespace(name=fsdp))
    state = SimpleNamespace(fsdp_plugin=plugin)
    return SimpleNamespace(
        is_fsdp_enabled=bool(fsdp), is_deepspeed_enabled=deepspeed, accelerator=SimpleNamespace(state=state)
    )


DEEPSPEED = trainer(deepspeed=True)


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    """A checkpoint of DeepSpeed, which also has a file of FSDP."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    part = tmp_path / "checkpoint-2/global_step2/mp_rank_00_model_states.pt"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"one")
    (tmp_path / "checkpoint-2/pytorch_model_fsdp.bin").write_bytes(b"whole")
    return tmp_path / "checkpoint-2"


def test_a_strangers_checkpoint_is_not_read(checkpoint):
    with pytest.raises(UserError, match=r"can run code.*Nothing was read"):
        check_same_sharding(checkpoint, DEEPSPEED)
    (checkpoint / sealed.SEAL).write_text('{"seal": "0"}')
    with pytest.raises(UserError, match="no valid seal"):
        check_same_sharding(checkpoint, DEEPSPEED)


def test_our_own_is_read_until_it_changes(checkpoint):
    sealed.seal(checkpoint)
    assert os.name == "nt" or sealed.key_file().stat().st_mode & 0o077 == 0
    check_same_sharding(checkpoint, DEEPSPEED)
    shutil.copytree(checkpoint, moved := checkpoint.with_name("moved"))
    check_same_sharding(moved, DEEPSPEED)
    (checkpoint / "global_step2/mp_rank_00_model_states.pt").write_bytes(b"two")  # as long as before
    with pytest.raises(UserError, match="no valid seal"):
        check_same_sharding(checkpoint, DEEPSPEED)
    sealed.key_file().unlink()
    with pytest.raises(UserError, match="no valid seal"):
        check_same_sharding(moved, DEEPSPEED)
    sealed.seal(moved)
    check_same_sharding(moved, DEEPSPEED)


def test_another_launch_is_told_how_it_was_written(checkpoint, tmp_path):
    (tmp_path / "plain").mkdir()
    with pytest.raises(UserError, match="was written without FSDP, and this run is with DeepSpeed"):
        check_same_sharding(tmp_path / "plain", DEEPSPEED)
    with pytest.raises(UserError, match=r"with DeepSpeed, and this run is with FSDP\. .*with DeepSpeed again"):
        check_same_sharding(checkpoint, trainer("FULL_STATE_DICT"))
    check_same_sharding(tmp_path / "plain", trainer())
    check_same_sharding(None, DEEPSPEED)


@pytest.mark.parametrize("kind", ["SHARDED_STATE_DICT", "LOCAL_STATE_DICT"])
@pytest.mark.parametrize("goes_on", [True, False])
def test_fsdp_in_parts_is_refused(kind, goes_on, tmp_path):
    """torch unpickles `.metadata`, however whole the file next to it is; and at the end no adapter would be saved."""
    (tmp_path / "pytorch_model_fsdp_0").mkdir()
    (tmp_path / "pytorch_model_fsdp.bin").write_bytes(b"whole")
    with pytest.raises(UserError, match=f"state_dict_type is {kind}, expected FULL_STATE_DICT"):
        check_same_sharding(tmp_path if goes_on else None, trainer(kind))


def test_a_key_that_cannot_be_kept_stops_no_training(checkpoint):
    (checkpoint.parent / "cache").write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="cannot be sealed, so it cannot be resumed"):
        sealed.seal(checkpoint)
    with pytest.raises(UserError, match="no valid seal"):
        check_same_sharding(checkpoint, DEEPSPEED)


class Runs:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


@pytest.mark.long
@pytest.mark.slow
def test_a_strangers_code_does_not_run_under_fsdp(lm_values, write_recipe, tmp_path):
    lm_values["method"] = {"name": "dual_lora", "r": 4}
    lm_values["train"] |= {"steps": 4, "batch_size": 2, "checkpoint_every": 2, "keep_checkpoints": 2}
    recipe, out, ran = write_recipe(lm_values), tmp_path / "run", tmp_path / "ran"
    process = launched("fsdp2", 2, recipe, out)
    printed = process.communicate(timeout=300)[0]
    assert process.returncode == 0, printed
    shutil.rmtree(out / "adapter")
    _check_that_settings_are_the_recipes(recipe, out, tmp_path / "other")
    (checkpoint := out / "checkpoints/checkpoint-4/pytorch_model_fsdp_0").mkdir()
    (checkpoint / ".metadata").write_bytes(pickle.dumps(Runs(ran)))
    process = launched("fsdp2-in-parts", 2, recipe, out, "--resume")
    printed = process.communicate(timeout=300)[0]
    assert not ran.exists()
    assert process.returncode != 0
    assert "expected FULL_STATE_DICT" in printed


def _check_that_settings_are_the_recipes(recipe, out, other):
    """A checkpoint with others is refused; ours, of which the last step is left out, is gone on from."""
    shutil.rmtree(out / "checkpoints/checkpoint-4")
    shutil.copytree(out, other)
    file = other / "checkpoints/checkpoint-2/optimizer.bin"
    held = torch.load(file, weights_only=True)
    held["param_groups"][0]["weight_decay"] = 0.9
    torch.save(held, file)
    mark_whole(file.parent)
    process = launched("fsdp2", 2, recipe, other, "--resume")
    assert "has weight_decay of group 0 0.9, and the recipe 0.0" in process.communicate(timeout=300)[0]
    assert process.returncode != 0
    printed = (process := launched("fsdp2", 2, recipe, out, "--resume")).communicate(timeout=300)[0]
    assert process.returncode == 0, printed
    shutil.rmtree(out / "adapter")


@pytest.mark.long
@pytest.mark.slow
def test_a_strangers_code_does_not_run_under_deepspeed(lm_values, write_recipe, tmp_path, monkeypatch):
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    monkeypatch.setitem(processes.ENVIRONMENT, "XDG_CACHE_HOME", str(tmp_path / "cache"))
    lm_values["train"] |= {"steps": 4, "checkpoint_every": 2, "keep_checkpoints": 2, "autocast": "none"}
    recipe, out, ran = write_recipe(lm_values), tmp_path / "run", tmp_path / "ran"
    printed = (process := launched("zero2", 1, recipe, out)).communicate(timeout=300)[0]
    assert process.returncode == 0, printed
    shutil.rmtree(out / "adapter")
    shutil.rmtree(out / "checkpoints/checkpoint-4")
    shutil.copytree(out, theirs := tmp_path / "theirs")
    printed = (process := launched("zero2", 1, recipe, out, "--resume")).communicate(timeout=300)[0]
    assert process.returncode == 0, f"our own is read: {printed}"
    states = next((theirs / "checkpoints/checkpoint-2").glob("global_step2/mp_rank_00_model_states.pt"))
    size = states.stat().st_size
    code = pickle.dumps(Runs(ran))
    states.write_bytes(code + b"\0" * (size - len(code)))  # as long as before, as the list has it
    printed = (process := launched("zero2", 1, recipe, theirs, "--resume")).communicate(timeout=300)[0]
    assert not ran.exists()
    assert process.returncode != 0
    assert "no valid seal of your own runs" in printed
