"""`dual-lora export`: every target from a run, honest figures, and a sentence for what cannot be."""

import json
import os
import stat
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dual_lora.lab.errors import UserError
from dual_lora.lab.export import gguf as export_gguf
from dual_lora.lab.export.export import REPORT, export_lora, in_words, write_mlx
from dual_lora.lab.model.opened import open_tuned
from dual_lora.lab.recipe.read import build_recipe
from dual_lora.lab.run.evaluate import evaluate
from dual_lora.lab.run.train import run


@pytest.fixture
def trained(lm_values, tmp_path):
    """Function: method -> folder of a short run of the language model."""

    def train(name, **method):
        lm_values["method"] = {"name": name, "r": 4, **method}
        lm_values["train"]["steps"] = 25
        folder = tmp_path / f"run-{name}"
        run(build_recipe(lm_values), folder, progress=False)
        return folder

    return train


def test_lora_of_full_energy_keeps_everything_and_evaluates_like_a_run(trained, tmp_path):
    source = trained("dual_lora")
    result = export_lora(source, tmp_path / "lora", 1.0, progress=False)
    assert result.verdict.startswith("good")
    assert result.loss["converted"] == pytest.approx(result.loss["adapter"], abs=1e-4)
    assert result.loss["adapter"] < result.loss["base"]
    assert result.examples == 16
    assert "merged" in result.advice  # at full rank the LoRA is larger than the weights
    assert result.parameters > result.weights
    report = json.loads((tmp_path / "lora" / REPORT).read_text())
    assert len(report["layers"]) == 14
    assert report["loss"] == result.loss
    again = evaluate(tmp_path / "lora", variants=["tuned"], progress=False)
    assert again.metrics["tuned"]["loss"] == pytest.approx(result.loss["converted"], abs=1e-6)
    assert not (source / "evaluation").exists()


def test_lora_of_rank_one_loses_too_much_and_says_what_to_do(trained, tmp_path):
    source = trained("dual_lora")
    result = export_lora(source, tmp_path / "lora", 1, limit=0, progress=False)
    assert result.loss == {}
    assert all(layer["rank"] == 1 and layer["error"] > 0.3 for layer in result.layers)
    assert result.verdict.startswith("may lose too much")
    assert "ΔW is of high rank" in result.advice
    assert "--data" in result.verdict
    assert "--to merged" in result.advice


def test_a_file_of_the_users_own_records(trained, tmp_path, questions):
    source = trained("dual_lora")
    few = tmp_path / "mine.json"
    few.write_text(json.dumps(json.loads((questions / "test.json").read_text())[:3]))
    result = export_lora(source, tmp_path / "lora", 8, data=str(few), progress=False)
    assert result.examples == 3
    assert export_lora(source, tmp_path / "two", 8, data=str(few), limit=2, progress=False).examples == 2


def test_missing_records_are_told_before_the_work(trained, tmp_path):
    source = trained("dual_lora")
    with pytest.raises(UserError, match=r"no data file.*--data FILE, or --limit 0"):
        export_lora(source, tmp_path / "lora", 8, data=str(tmp_path / "none.json"), progress=False)
    assert not (tmp_path / "lora").exists()


def test_several_test_sets_are_measured_together_or_a_file_in_their_place(lm_values, questions, tmp_path):
    data = lm_values["data"]
    data["tests"] = {"one": data.pop("test"), "two": data["train"]}
    run(build_recipe(lm_values | {"method": {"name": "dual_lora", "r": 4}}), tmp_path / "run", progress=False)
    both = export_lora(tmp_path / "run", tmp_path / "lora", 2, progress=False)
    one = export_lora(tmp_path / "run", tmp_path / "two", 2, data=str(questions / "test.json"), progress=False)
    assert both.examples > one.examples > 0


def test_a_regression_is_measured_by_its_squared_error(encoder_values, tmp_path):
    encoder_values["model"]["head"] = "regression"
    run(build_recipe(encoder_values | {"method": {"name": "dual_lora", "r": 4}}), tmp_path / "run", progress=False)
    result = export_lora(tmp_path / "run", tmp_path / "lora", 1.0, progress=False)
    assert result.loss["adapter"] == evaluate(tmp_path / "run", progress=False).metrics["tuned"]["mse"]
    assert result.loss["converted"] == pytest.approx(result.loss["adapter"], abs=1e-3)


def test_a_classifier(encoder_values, tmp_path):
    encoder_values["method"] = {"name": "dual_lora", "r": 4}
    run(build_recipe(encoder_values), tmp_path / "run", progress=False)
    result = export_lora(tmp_path / "run", tmp_path / "lora", 1.0, progress=False)
    assert result.loss["converted"] == pytest.approx(result.loss["adapter"], abs=1e-3)
    assert open_tuned(tmp_path / "lora").classes == ["0", "1"]


@pytest.mark.parametrize(
    ("converted", "word"),
    [(1.0, "good: 100.0%"), (1.04, "good: 96.0%"), (1.1, "some: 90.0%"), (1.5, "much: 50.0%"), (2.1, "much: 0.0%")],
)
def test_verdicts_by_loss(converted, word):
    verdict, advice = in_words({"base": 2.0, "adapter": 1.0, "converted": converted}, lost=0.9)
    assert word in verdict
    assert bool(advice) == (not verdict.startswith("good"))


def test_verdicts_without_records_and_without_an_improvement():
    assert in_words({}, lost=0.4)[0].startswith("may lose too much")
    assert in_words({}, lost=0.1)[0].startswith("good by the weights")
    verdict, advice = in_words({"base": 1.0, "adapter": 1.2, "converted": 1.2}, lost=0.1)
    assert "cannot be told" in verdict
    assert "--data" in advice


def test_the_wrong_kind_and_a_filled_folder(trained, tmp_path, tiny_lm):
    source = trained("lora")
    with pytest.raises(UserError, match=r"holds a LORA adapter, expected a Dual LoRA adapter"):
        export_lora(source, tmp_path / "out", 4)
    with pytest.raises(UserError, match="holds no adapter"):
        export_lora(tiny_lm, tmp_path / "out", 4)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("kept")
    with pytest.raises(UserError, match="is not empty"):
        export_lora(source, tmp_path / "full", 4)
    assert not (tmp_path / "out").exists()


# GGUF, with a program in the place of llama.cpp's converter.

STAND_IN = """#!{python}
import json, pathlib, struct, sys
folder, *options = sys.argv[1:]
if "{name}" == "convert_lora_to_gguf.py":
    config = json.loads((pathlib.Path(folder) / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["r"] == 2, config
    folder = options[options.index("--base") + 1]
    assert json.loads((pathlib.Path(folder) / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
else:
    assert (pathlib.Path(folder) / "model.safetensors").is_file() and (pathlib.Path(folder) / "config.json").is_file()
given = dict(zip(options[::2], options[1::2]))
if given["--outtype"] == "broken":
    sys.exit("no such type")
header = b"GGUF" if given["--outtype"] != "wrong" else b"abcd"
pathlib.Path(given["--outfile"]).write_bytes(header + struct.pack("<IQ", 3, 7) + given["--outtype"].encode())
"""


@pytest.fixture
def converter(tmp_path, monkeypatch):
    """A folder like llama.cpp's, and none of the real converter elsewhere."""
    monkeypatch.delenv(export_gguf.VARIABLE, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    folder = tmp_path / "llama.cpp"
    folder.mkdir()
    for name in (export_gguf.SCRIPT, export_gguf.LORA_SCRIPT):
        script = folder / name
        script.write_text(STAND_IN.format(python=sys.executable, name=name))
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return folder / export_gguf.SCRIPT


def test_gguf(call, trained, tmp_path, converter):
    source, out = trained("dual_lora"), tmp_path / "model.gguf"
    code, text, _ = call(
        "export", source, out, "--to", "gguf", "--converter", converter.parent, "--outtype", "f16", "--json"
    )
    assert code == 0
    assert json.loads(text)["tensors"] == 7
    assert out.read_bytes().endswith(b"f16")
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".model")] == []
    for outtype, message in (("broken", "failed (exit code 1): no such type"), ("wrong", "wrote no GGUF file")):
        with pytest.raises(UserError, match=message.replace("(", r"\(").replace(")", r"\)")):
            export_gguf.export_gguf(source, tmp_path / "other.gguf", outtype=outtype, converter=str(converter))
    assert not (tmp_path / "other.gguf").exists()
    with pytest.raises(UserError, match="exists already"):
        export_gguf.export_gguf(source, out, converter=str(converter))
    with pytest.raises(UserError, match=r"ends in \.gguf"):
        export_gguf.export_gguf(source, tmp_path / "folder", converter=str(converter))


def test_gguf_lora(call, trained, tmp_path, converter):
    source, out = trained("dual_lora"), tmp_path / "adapter.gguf"
    options = ("--to", "gguf-lora", "--rank", 2, "--converter", converter)
    code, text, _ = call("export", source, out, *options, "--json")
    assert code == 0
    result = json.loads(text)
    assert (result["folder"], result["method"], len(result["layers"])) == (str(out), "lora", 14)
    assert out.read_bytes().endswith(b"f32")
    (converter.parent / export_gguf.LORA_SCRIPT).unlink()
    code, _, error = call("export", source, tmp_path / "other.gguf", *options)
    assert code != 0
    assert "convert_lora_to_gguf.py, which llama.cpp has next to" in " ".join(error.split())


def test_mlx_lora_says_what_the_lora_says(call, trained, tmp_path):
    source = trained("dual_lora")
    code, _, _ = call("export", source, tmp_path / "mlx", "--to", "mlx-lora", "--rank", 2, "--limit", 0)
    assert code == 0
    export_lora(source, tmp_path / "lora", 2, limit=0, progress=False)
    ours = load_file(tmp_path / "mlx" / "adapters.safetensors")
    theirs = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    parameters = json.loads((tmp_path / "mlx" / "adapter_config.json").read_text())["lora_parameters"]
    assert parameters["rank"] == 2
    assert "self_attn.q_proj" in parameters["keys"]
    assert len(ours) == len(theirs) == 28
    for name in {name.rpartition(".")[0] for name in ours}:
        a, b = ours[f"{name}.lora_a"], ours[f"{name}.lora_b"]
        A, B = (theirs[f"base_model.model.{name}.lora_{letter}.weight"] for letter in "AB")
        torch.testing.assert_close(parameters["scale"] * (a @ b).T, B @ A)


def test_mlx_has_no_place_for_a_head(tmp_path):
    (tmp_path / "lora").mkdir()
    save_file({"base_model.model.lm_head.lora_A.weight": torch.ones(2, 4)}, tmp_path / "lora/adapter_model.safetensors")
    (tmp_path / "lora/adapter_config.json").write_text('{"r": 2, "lora_alpha": 2}')
    with pytest.raises(UserError, match=r"no place for base_model\.model\.lm_head.*--to merged"):
        write_mlx(tmp_path / "lora", tmp_path)


def test_mlx_repeats_no_blocks(tmp_path):
    """It takes a file's factors as far as it has their layers, and says nothing of the others."""
    name = "base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight"
    save_file({name: torch.ones(2, 4)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"r": 2, "lora_alpha": 2, "layer_replication": [[0, 2], [0, 2]]}')
    with pytest.raises(UserError, match=r"does not repeat .*layer_replication"):
        write_mlx(tmp_path, tmp_path)


def test_smaller_types_are_made_by_llama_cpps_quantiser(trained, tmp_path, converter):
    source, out = trained("dual_lora"), tmp_path / "model.gguf"
    with pytest.raises(UserError, match=r"llama-quantize was not found.*--outtype q8_0"):
        export_gguf.export_gguf(source, out, quantize="Q4_K_M", converter=str(converter))
    assert not out.exists()
    tool = converter.parent / "build" / "bin" / export_gguf.QUANTISER
    tool.parent.mkdir(parents=True)
    tool.write_text(
        f"#!{sys.executable}\nimport pathlib, sys\nsource, target, kind = sys.argv[1:]\n"
        "pathlib.Path(target).write_bytes(pathlib.Path(source).read_bytes() + kind.encode())\n"
    )
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    result = export_gguf.export_gguf(source, out, outtype="f16", quantize="Q4_K_M", converter=str(converter))
    assert out.read_bytes().endswith(b"f16Q4_K_M")
    assert result.tensors == 7


def test_a_modelfile_lies_beside_the_merged_model(trained, tmp_path, converter):
    result = export_gguf.export_gguf(trained("dual_lora"), tmp_path / "model.gguf", converter=str(converter))
    assert result.modelfile is None or Path(result.modelfile).read_text().startswith("FROM ./model.gguf\n")
    assert (result.modelfile is None) == bool(result.remark)


def test_a_tool_may_say_what_is_no_utf8(tmp_path):
    written, tool = tmp_path / "x.gguf", tmp_path / "tool.py"
    tool.write_text("import sys; sys.stdout.buffer.write(b'\\xff'); open(sys.argv[1], 'wb').write(b'GGUF' + bytes(12))")
    assert export_gguf._run([sys.executable, "-IS", str(tool), str(written)], written) == 0
    tool.write_text("import sys; sys.stderr.buffer.write(b'\\xff no'); sys.exit(3)")
    with pytest.raises(UserError, match=r"tool\.py failed \(exit code 3\): . no"):
        export_gguf._run([sys.executable, str(tool), str(written)], written)


def test_a_modelfile_of_the_user_is_left(trained, tmp_path, converter):
    mine = tmp_path / "model.Modelfile"
    mine.write_text("FROM mine\n")
    result = export_gguf.export_gguf(trained("dual_lora"), tmp_path / "model.gguf", converter=str(converter))
    assert mine.read_text() == "FROM mine\n"
    assert result.modelfile is None
    assert "is there already" in result.remark


def test_the_converter_is_found_by_option_variable_and_path_in_this_order(converter, monkeypatch, tmp_path):
    with pytest.raises(UserError, match=r"was not found.*git clone.*--to merged"):
        export_gguf.find_converter()
    installed = tmp_path / "bin" / "convert-hf-to-gguf"
    installed.parent.mkdir()
    os.symlink(converter, installed)
    assert export_gguf.find_converter() == [str(installed)]
    monkeypatch.setenv(export_gguf.VARIABLE, str(converter.parent))
    assert export_gguf.find_converter() == [sys.executable, str(converter)]
    assert export_gguf.find_converter(str(installed)) == [str(installed)]
    monkeypatch.setenv(export_gguf.VARIABLE, str(tmp_path / "gone"))
    with pytest.raises(UserError, match="DUAL_LORA_GGUF_CONVERTER is"):
        export_gguf.find_converter()


# The command.


def test_command(call, trained, tmp_path):
    source = trained("dual_lora")
    code, text, _ = call("export", source, tmp_path / "lora", "--to", "lora", "--rank", 2, "--json")
    assert code == 0
    result = json.loads(text)
    assert (result["method"], result["examples"], len(result["layers"])) == ("lora", 16, 14)
    code, text, _ = call("export", source, tmp_path / "energy", "--to", "lora", "--energy", 1, "--limit", 0)
    assert code == 0
    assert "verdict" in text
    assert "The 10 layers that lose most (--json lists all 14)" in text
    assert sum("_proj" in line for line in text.splitlines()) == 10
    assert "14 of rank " in text
    code, text, _ = call("export", source, tmp_path / "merged", "--to", "merged", "--json")
    assert code == 0
    assert (tmp_path / "merged" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--to", "lora"], "--rank 64 for every layer, or --energy 0.9"),
        (["--to", "lora", "--rank", "2", "--energy", "0.5"], "--rank 2 or --energy 0.5, not both"),
        (["--to", "lora", "--energy", "1.9"], "--energy is 1.9, expected a share above 0 and up to 1"),
        (["--to", "mlx-lora", "--rank", "-3"], "--rank is -3, expected a whole number of at least 1"),
        (["--to", "gguf-lora", "--rank", "2"], "expected a file name that ends in .gguf"),
        (["--to", "merged", "--rank", "2"], "--rank has no meaning for --to merged"),
        (["--to", "lora", "--rank", "2", "--outtype", "f16"], "--outtype has no meaning for --to lora"),
    ],
)
def test_errors_of_the_command(call, options, message, tmp_path):
    code, _, err = call("export", tmp_path / "run", tmp_path / "out", *options)
    assert code == 1
    assert message in " ".join(err.split())
    assert not (tmp_path / "out").exists()
