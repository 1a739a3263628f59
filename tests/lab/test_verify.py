"""Each planted fault gets its own verdict, and what is right gets none."""

import json
import shutil

import faulty
import pytest
import torch
from safetensors.torch import load_file, save_file

from dual_lora.lab.cli import main
from dual_lora.lab.errors import UserError
from dual_lora.lab.model.opened import open_tuned
from dual_lora.lab.verify import fingerprint
from dual_lora.lab.verify.diagnose import judge
from dual_lora.lab.verify.guesses import ModelGuesses
from dual_lora.lab.verify.logprobs import score
from dual_lora.lab.verify.prompts import built_in_probes
from dual_lora.lab.verify.verify import verify

METHODS = ["lora", "dual_lora"]
FAULTS = [
    (faulty.right, "on"),
    (faulty.in_bf16, "on"),
    (faulty.off, "off"),
    (faulty.half, "layers dropped"),
    (faulty.alpha, "other scale"),
    (faulty.in_warmup, "λ below 1"),
    (faulty.twice, "merged twice"),
    (faulty.template, "wrong chat template"),
    (faulty.tokenizer, "other tokenizer"),
    (faulty.four_bits, "rounded"),
]


@pytest.fixture(scope="module")
def runs(tiny_values, tmp_path_factory):
    """{method: a finished run}."""
    folder = tmp_path_factory.mktemp("runs")
    return {method: faulty.trained(folder / method, tiny_values, method) for method in METHODS}


@pytest.fixture(scope="module")
def noted(runs):
    """{method: the fingerprint of its run}."""
    return {method: fingerprint.make(open_tuned(folder)) for method, folder in runs.items()}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("plant", "word"), FAULTS, ids=[fault.__name__ for fault, _ in FAULTS])
def test_every_fault_has_its_own_verdict(plant, word, method, runs, tiny_lm, tmp_path):
    if plant is faulty.in_warmup and method == "lora":
        pytest.skip("LoRA has no warm-up")
    report = verify(runs[method], **{k: str(v) for k, v in plant(runs[method], tmp_path / "made", tiny_lm).items()})
    assert report.finding.word == word, report.summary()
    assert report.good == (word in ("on", "rounded"))


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_of_another_training_is_another_one(method, runs, tiny_values, questions, tmp_path):
    records = json.loads((questions / "train.json").read_text())
    for record in records:
        record["output"] = record["answer"] = "good" if record["answer"] == "true" else "bad"
    (tmp_path / "other.json").write_text(json.dumps(records))
    other = faulty.trained(tmp_path / "other", tiny_values, method, seed=1, train=str(tmp_path / "other.json"))
    report = verify(runs[method], adapter=str(other))
    assert report.finding.word == "another adapter", report.summary()


@pytest.mark.parametrize("part", ["0.mlp.up_proj", "0.mlp.down_proj", "0.mlp.gate_proj"])
def test_an_altered_adapter_is_not_taken_for_a_rounded_one(part, runs, tmp_path):
    """Four bits would explain it, but an adapter in fp32 on the very base has not been rounded to four bits."""
    altered = tmp_path / "altered"
    shutil.copytree(runs["dual_lora"] / "adapter", altered)
    tensors = load_file(altered / "adapter_model.safetensors")
    (name,) = [name for name in tensors if f"{part}.dual_lora_B" in name]
    tensors[name] = -2 * tensors[name]
    save_file(tensors, altered / "adapter_model.safetensors", {"format": "pt"})
    for report in (verify(runs["dual_lora"], adapter=str(altered)), verify(altered)):
        assert not report.good, report.summary()


@pytest.mark.parametrize("method", METHODS)
def test_the_guess_of_a_merged_file_in_four_bits_is_that_file(method, runs, tiny_lm, tmp_path):
    """int4(W + ΔW), whose errors are others than those of int4(W) + ΔW; and the model is what it was afterwards."""
    tuned = open_tuned(runs[method])
    probes = built_in_probes(tuned)
    before = {name: p.clone() for name, p in tuned.model.named_parameters()}
    with torch.no_grad():
        own = score(tuned.model, probes)
        found = ModelGuesses(tuned.model, probes).coarse()
        assert torch.equal(score(tuned.model, probes), own)
    assert all(torch.equal(p, before[name]) for name, p in tuned.model.named_parameters())
    file = open_tuned(faulty.four_bits(runs[method], tmp_path / "made", tiny_lm)["against"])
    merged = score(file.model, probes)
    torch.testing.assert_close(found["four bits, merged"], merged, atol=1e-3, rtol=1e-3)
    assert (found["four bits"] - merged).abs().max() > 0.01


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("apart", [True, False], ids=["base and adapter", "merged"])
@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1"])
def test_a_server_in_four_bits_is_rounded_either_way(kind, apart, method, runs, noted, tiny_lm, tmp_path):
    """llama.cpp's own formats: Q(W) + ΔW, where it loads base and adapter, and Q(W + ΔW) of a merged file. Some
    processors do the one, some the other; the second format has a least value for each block, as the K formats have."""
    from gguf import GGMLQuantizationType, quants

    made = GGMLQuantizationType[kind]
    base = load_file(tiny_lm / "model.safetensors")

    def rounded(x):
        rows = quants.dequantize(quants.quantize(x.float().reshape(-1, 32).numpy(), made), made)
        return torch.from_numpy(rows).reshape(x.shape).to(x.dtype)

    def change(name, x):
        if any(spared in name for spared in ("embed_tokens", "lm_head", "norm")):
            return x
        return rounded(base[name]) + (x - base[name]) if apart else rounded(x)

    faulty.merge(runs[method], tmp_path / "served")
    faulty.with_tensors(tmp_path / "served", change)
    report = verify(runs[method], against=str(tmp_path / "served"))
    assert report.finding.word == "rounded", report.summary()
    its = noted[method]
    assert {"four bits", "four bits, merged"} <= its.columns.keys()
    found = score(open_tuned(tmp_path / "served").model, its.probes)
    finding = judge(found, its.known(), fingerprint.StoredGuesses(its))
    assert finding.word == "rounded", finding


@pytest.fixture
def call(capsys):
    """Function: arguments → (exit status, standard output)."""

    def run(*arguments):
        code = 0
        try:
            main(["verify", *map(str, arguments)])
        except SystemExit as stop:
            code = stop.code or 0
        return code, capsys.readouterr().out

    return run


def test_the_command_ends_with_0_or_1_and_one_line_of_json(call, runs, tiny_lm):
    code, out = call(runs["dual_lora"], "--json")
    told = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert (code, told["verdict"], told["asked"]) == (0, "on", "the fingerprint's")
    code, out = call(runs["dual_lora"], "--against", tiny_lm, "--json")
    told = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert (code, told["verdict"], told["good"]) == (1, "off", False)
    assert told["prompts"] > 1
    assert told["tokens"] > told["prompts"]
    code, out = call(runs["dual_lora"], "--against", tiny_lm)
    assert code == 1
    assert "off: it gives the base's log-probabilities" in " ".join(out.split())


def test_an_adapter_of_peft_alone(call, tiny_lm, tmp_path):
    """Without any of the laboratory's notes: by a method that it has no word of, on built-in prompts and own ones."""
    from peft import LoHaConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = LoHaConfig(r=4, alpha=64, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_lm), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.4)
    model.save_pretrained(tmp_path / "loha")
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(tiny_lm).save_pretrained(tmp_path / "merged")
    (tmp_path / "prompts.txt").write_text("is the fire warm ?\nthe sea is blue\nis ice cold ?\nred sky\n")
    code, out = call(
        tmp_path / "loha", "--against", tmp_path / "merged", "--prompts", tmp_path / "prompts.txt", "--json"
    )
    assert (code, json.loads(out)["verdict"]) == (0, "on")
    code, out = call(tmp_path / "loha", "--against", tiny_lm, "--json")
    assert (code, json.loads(out)["verdict"]) == (1, "off")
    code, out = call(tmp_path / "loha", "--json")
    assert (code, json.loads(out)["verdict"]) == (0, "on")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_head_that_is_trained_whole_on_a_base_in_half_precision(dtype, tiny_lm, tmp_path):
    """Its copy is in the base's precision, and is rounded with it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from dual_lora.lab.export.export import merge

    torch.manual_seed(0)
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_lm), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(tmp_path / "adapter")
    merged = merge(tmp_path / "adapter", tmp_path / "merged", dtype=dtype).folder
    assert verify(tmp_path / "adapter", against=merged, dtype=dtype).finding.word == "on"
    assert verify(tmp_path / "adapter", against=str(tiny_lm), dtype=dtype).finding.word == "off"


def test_an_adapter_that_changes_nothing_is_off(call, tiny_lm, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_lm), LoraConfig(task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "fresh")
    code, out = call(tmp_path / "fresh", "--json")
    assert (code, json.loads(out)["verdict"]) == (1, "off")


def test_wrong_calls_are_one_sentence(runs, tiny_lm, tmp_path, reviews):
    run = str(runs["lora"])
    for options, said in [
        ({"against": run, "adapter": run}, "name several candidates"),
        ({"against": str(tmp_path / "no/such")}, "There is no folder"),
        ({"against": run + "/adapter"}, "is an adapter: give it by --adapter"),
        ({"adapter": str(tiny_lm)}, "holds no adapter"),
        ({"prompts": str(tmp_path / "none.txt")}, "There is no file of prompts"),
        ({"model": "mine"}, "give its --endpoint"),
    ]:
        with pytest.raises(UserError, match=said):
            verify(run, **options)
    with pytest.raises(UserError, match="holds no adapter"):
        verify(str(tiny_lm))


def test_an_altered_adapter_is_found_on_prompts_of_ones_own_too(runs, tmp_path):
    """On prompts an adapter is compared with itself: its fingerprint has to say first that it is the one."""
    (tmp_path / "prompts.txt").write_text("is the fire warm ?\nis the ice cold ?\n")
    given = {"prompts": str(tmp_path / "prompts.txt")}
    assert verify(runs["lora"] / "adapter", **given).good
    altered = shutil.copytree(runs["lora"] / "adapter", tmp_path / "altered")
    tensors = load_file(altered / "adapter_model.safetensors")
    other = {name: torch.randn_like(tensor) for name, tensor in tensors.items()}
    save_file(other, altered / "adapter_model.safetensors", {"format": "pt"})
    assert verify(altered, **given).finding.word == "another adapter"


def test_another_tokenizer_beside_the_adapter_is_found(runs, tmp_path):
    altered = shutil.copytree(runs["lora"] / "adapter", tmp_path / "altered")
    file = altered / "tokenizer.json"
    file.write_text(file.read_text().replace('"fire"', '"fyre"'))
    assert verify(altered).finding.word == "other tokenizer"
