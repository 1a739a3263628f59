"""A checkpoint that is not what the run wrote is not gone on from: Trainer would read whatever it finds there."""

import json
import os
import re
import shutil
import zipfile

import pytest
import torch
from peft import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback, TrainingArguments

from dual_lora.lab.errors import UserError
from dual_lora.lab.files.write import mark_whole
from dual_lora.lab.model.load import load_model
from dual_lora.lab.model.methods import apply_method, method_config
from dual_lora.lab.model.opened import open_tuned
from dual_lora.lab.recipe.read import build_recipe
from dual_lora.lab.run.checkpoint import check_checkpoint
from dual_lora.lab.run.train import run

pytestmark = pytest.mark.timeout(120)  # what hangs is the failure


@pytest.fixture(scope="module", params=["lora", "full"])
def stopped(request, tiny_lm, questions, tmp_path_factory):
    """A run of four steps that has ended after two, and its recipe."""
    method = {"name": "full"} if request.param == "full" else {"name": "lora", "r": 4}
    train = {"steps": 4, "batch_size": 4, "checkpoint_every": 2, "log_every": 1}
    values = {
        "model": {"path": str(tiny_lm), "dtype": "float32"}, "method": method, "train": train,
        "data": {"train": str(questions / "train.json"), "overlap": "all"},
    }  # fmt: skip

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == 3:
                raise KeyboardInterrupt

    folder = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.raises(KeyboardInterrupt):
        run(build_recipe(values), folder, progress=False, callbacks=[Stop()])
    return folder, build_recipe(values), request.param


def state(checkpoint, **values):
    file = checkpoint / "trainer_state.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def an_adapter_inside(checkpoint):
    """Which PEFT would build, with a pattern that has no end."""
    inside = checkpoint / "more"
    inside.mkdir()
    save_file({"a": torch.zeros(1)}, inside / "adapter_model.safetensors")
    asked = {"peft_type": "LORA", "r": 4, "target_modules": "(.*)*(.*)*(.*)*(.*)*X"}
    (inside / "adapter_config.json").write_text(json.dumps(asked))


def weights_left_out(checkpoint):
    (file,) = checkpoint.glob("*model.safetensors")
    kept = sorted(load_file(file).items())
    save_file(dict(kept[: len(kept) // 2]), file)


def a_view(checkpoint):
    held = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    for moments in held["state"].values():
        moments["exp_avg"] = torch.zeros(1, dtype=torch.bfloat16).expand(10**10)
    torch.save(held, checkpoint / "optimizer.pt")


def groups(checkpoint, **values):
    held = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    held["param_groups"] = [group | values for group in held["param_groups"]]
    torch.save(held, checkpoint / "optimizer.pt")


def schedule(checkpoint, **values):
    torch.save(torch.load(checkpoint / "scheduler.pt", weights_only=True) | values, checkpoint / "scheduler.pt")


def packed(file):
    """The entries of a file of PyTorch's in an archive that takes less room."""
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (an_adapter_inside, "holds more/adapter_model.safetensors, which this run does not write"),
        (weights_left_out, r"does not hold .*\d+ more of the weights"),
        (a_view, r"optimizer\.pt holds a tensor of 10,000,000,000 numbers, of which it has fewer"),
        (lambda c: packed(c / "optimizer.pt"), "holds a packed entry"),
        (lambda c: packed(c / "rng_state.pth"), "holds a packed entry"),
        (lambda c: (c / "optimizer.pt").unlink(), r"has no optimizer\.pt"),
        (lambda c: state(c, global_step=4), r"has global_step 4 in its trainer_state\.json, expected 2"),
        (lambda c: state(c, save_steps=10**9), "has save_steps 1000000000"),
        (lambda c: groups(c, maximize=True), "has maximize of group 0 True, and the recipe False"),
        (lambda c: groups(c, weight_decay=0.9), "has weight_decay of group 0 0.9"),
        (lambda c: schedule(c, base_lrs=[7.0, 7.0]), r"has base_lrs \[7.0, 7.0\], and the recipe"),
        (lambda c: schedule(c, last_epoch=0), "has a schedule of 0 steps, expected 2"),
        (lambda c: (c / "trainer_state.json").write_text("[]"), r"has a damaged trainer_state\.json"),
    ],
)
def test_what_the_run_did_not_write_is_refused(change, said, stopped, tmp_path):
    folder = shutil.copytree(stopped[0], tmp_path / "run")
    change(folder / "checkpoints/checkpoint-2")
    mark_whole(folder / "checkpoints/checkpoint-2")
    with pytest.raises(UserError, match=said):
        run(stopped[1], folder, resume=True, progress=False)


@pytest.mark.parametrize("stopped", ["lora"], indirect=True)
def test_the_rate_is_the_schedule_s(stopped, tmp_path):
    weights = []
    for name, change in (("a", lambda _: None), ("b", lambda c: groups(c, lr=5.0))):
        folder = shutil.copytree(stopped[0], tmp_path / name)
        change(folder / "checkpoints/checkpoint-2")
        mark_whole(folder / "checkpoints/checkpoint-2")
        run(stopped[1], folder, resume=True, progress=False)
        weights.append(load_file(folder / "adapter/adapter_model.safetensors"))
    assert all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())


@pytest.mark.parametrize(
    "name",  # all but the first are read as such where case does not count, or invisible letters
    ["model-00001-of-00001.safetensors", "Model.SAFETENSORS", "model.\u017fafetensors", "mod\u200cel.safetensors"],
)
def test_a_whole_model_takes_no_base_s_place(name, stopped, tmp_path):
    folder, _, method = stopped
    folder = shutil.copytree(folder, tmp_path / "run")
    weights = {name: torch.zeros(2) for name in ("a", "b")}
    save_file(weights, folder / "checkpoints/checkpoint-2" / name)
    mark_whole(folder / "checkpoints/checkpoint-2")
    if method == "full":  # nobody reads it there
        assert run(stopped[1], folder, resume=True, progress=False).steps == 4
    else:
        with pytest.raises(UserError, match=rf"{re.escape(name)}, which this run does not write"):
            run(stopped[1], folder, resume=True, progress=False)


@pytest.mark.parametrize("stopped", ["lora"], indirect=True)
def test_packed_weights_of_an_adapter_are_not_read(stopped, tmp_path):
    folder = shutil.copytree(stopped[0], tmp_path / "run")
    run(stopped[1], folder, resume=True, progress=False)
    held = load_file(folder / "adapter/adapter_model.safetensors")
    (folder / "adapter/adapter_model.safetensors").unlink()
    torch.save(held, folder / "adapter/adapter_model.bin")
    open_tuned(folder / "adapter")
    for name in ("adapter_model.bin", "other.BIN"):  # in capital letters it is read where case does not count
        (folder / "adapter/adapter_model.bin").rename(folder / "adapter" / name)
        packed(folder / "adapter" / name)
        if name != "adapter_model.bin":
            torch.save(held, folder / "adapter/adapter_model.bin")
        with pytest.raises(UserError, match="holds a packed entry"):
            open_tuned(folder / "adapter")
        torch.save(held, folder / "adapter/adapter_model.bin")


class Runs:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("stopped", ["lora"], indirect=True)
@pytest.mark.parametrize("packed_as_zip", [True, False])
@pytest.mark.parametrize("file", ["checkpoint/optimizer.pt", "adapter/adapter_model.bin", "base/pytorch_model.bin"])
def test_no_file_of_pytorch_runs_code(file, packed_as_zip, stopped, tmp_path, tiny_lm):
    folder, mark = shutil.copytree(stopped[0], tmp_path / "run"), tmp_path / "ran"
    checkpoint = (folder / "checkpoints/checkpoint-2").rename(tmp_path / "checkpoint")
    shutil.copytree(checkpoint, tmp_path / "adapter")
    shutil.copytree(tiny_lm, tmp_path / "base")
    for whole in (tmp_path / "adapter/adapter_model.safetensors", tmp_path / "base/model.safetensors"):
        whole.unlink()
    torch.save({"state": Runs(mark)}, tmp_path / file, _use_new_zipfile_serialization=packed_as_zip)
    if file.startswith("checkpoint"):
        mark_whole(checkpoint)
        checkpoint.rename(folder / "checkpoints/checkpoint-2")
    of_run = file.startswith("checkpoint")
    with pytest.raises(UserError, match=r"could not be (read|loaded)|does not fit"):
        run(stopped[1], folder, resume=True, progress=False) if of_run else open_tuned((tmp_path / file).parent)
    assert not mark.exists()


@pytest.mark.parametrize("stopped", ["lora"], indirect=True)
def test_a_start_that_the_run_has_not_written_is_not_taken_off(stopped, tmp_path):
    """PEFT would build it with whatever its configuration asks for, and the adapter would be another one."""
    ours, planted = shutil.copytree(stopped[0], tmp_path / "a"), shutil.copytree(stopped[0], tmp_path / "b")
    run(stopped[1], ours, resume=True, progress=False)
    shutil.copytree(ours / "adapter", planted / "start")
    config = planted / "start/adapter_config.json"
    config.write_text(
        json.dumps(json.loads(config.read_text()) | {"megatron_config": {"x": 1}, "megatron_core": "this"})
    )
    run(stopped[1], planted, resume=True, progress=False)
    expected, got = (load_file(folder / "adapter/adapter_model.safetensors") for folder in (ours, planted))
    assert expected.keys() == got.keys()
    assert all(torch.equal(weight, got[name]) for name, weight in expected.items())


NORM = "base_model.model.model.norm.weight"


def gathered(checkpoint, change):
    """Change the weights that FSDP has gathered."""
    file = checkpoint / "pytorch_model_fsdp.bin"
    torch.save(change(torch.load(file, weights_only=True)), file)


def a_long_view(checkpoint):
    torch.save({"state": {0: {"exp_avg": torch.zeros(1).expand(10**10)}}}, checkpoint / "optimizer.bin")


@pytest.mark.parametrize("stopped", ["lora"], indirect=True)
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: None, None),
        (lambda c: gathered(c, lambda held: {k.replace(".default", ""): v for k, v in held.items()}), None),  # FSDP1's
        (lambda c: gathered(c, lambda held: held | {"count": torch.ones(3)}), None),
        (lambda c: gathered(c, lambda held: held | {"count": torch.zeros(3)}), "holds count in its pytorch_model_fsdp"),
        (lambda c: gathered(c, lambda held: held | {NORM: torch.ones(32)}), f"holds {NORM} in its pytorch_model_fsdp"),
        (lambda c: gathered(c, lambda held: dict(list(held.items())[2:])), "does not hold .* and 1 more of the"),
        (lambda c: gathered(c, lambda held: [*held]), r"has a damaged pytorch_model_fsdp\.bin"),
        (lambda c: gathered(c, lambda held: held | {"x": 1}), r"has a damaged pytorch_model_fsdp\.bin"),
        (lambda c: (c / "pytorch_model_fsdp.bin").unlink(), r"has no pytorch_model_fsdp\.bin"),
        (lambda c: (c / "pytorch_model_fsdp.bin").rename(c / "pytorch_model.bin"), "has no pytorch_model_fsdp"),
        (lambda c: packed(c / "pytorch_model_fsdp.bin"), "holds a packed entry"),
        (lambda c: packed(c / "optimizer.bin"), "holds a packed entry"),
        (a_long_view, r"optimizer\.bin holds a tensor of 10,000,000,000 numbers"),
        (lambda c: state(c, global_step=4), "has global_step 4"),
        (an_adapter_inside, "holds more/adapter_model"),
    ],
)
def test_under_fsdp_as_well(change, said, stopped, tmp_path):
    """Its file is read into the model by whatever names stand in it."""
    folder, recipe, _ = stopped
    checkpoint = shutil.copytree(folder / "checkpoints/checkpoint-2", tmp_path / "checkpoint-2")
    model = apply_method(load_model(recipe.model), method_config(recipe.method, "causal", 4, []), recipe.model, 0)
    model.register_buffer("count", torch.ones(3))
    trained = {name: weight.detach() for name, weight in model.named_parameters() if weight.requires_grad}
    assert {name.replace(".default", "") for name in trained} == {*get_peft_model_state_dict(model)}
    torch.save(trained, checkpoint / "pytorch_model_fsdp.bin")
    (checkpoint / "optimizer.pt").rename(checkpoint / "optimizer.bin")
    change(checkpoint)
    arguments = TrainingArguments(output_dir=tmp_path, logging_steps=1, save_steps=2, report_to=[])
    if said is None:
        check_checkpoint(checkpoint, 2, model, arguments, sharded=True)
    else:
        with pytest.raises(UserError, match=said):
            check_checkpoint(checkpoint, 2, model, arguments, sharded=True)
