"""From a recipe or a model to a card: settings, proposals that fit, calibration, errors that name the way out."""

import json
from dataclasses import replace

import pytest
from transformers import AutoConfig, LlamaConfig

from dual_lora.lab.cost import calibrate
from dual_lora.lab.cost.memory import memory_of
from dual_lora.lab.cost.options import StepOptions, from_model, from_recipe
from dual_lora.lab.cost.side_by_side import _last, counts, largest, parse_size
from dual_lora.lab.cost.simulate import Step, simulate
from dual_lora.lab.errors import UserError
from dual_lora.lab.recipe.published import published_config
from dual_lora.lab.recipe.read import read_recipe

SIZES = dict(hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, vocab_size=200)


@pytest.fixture
def folder(tmp_path):
    """A model folder that holds a configuration and nothing else."""
    LlamaConfig(
        num_hidden_layers=2, max_position_embeddings=128, architectures=["LlamaForCausalLM"], **SIZES
    ).save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def call(call, monkeypatch, tmp_path):
    """Function: arguments of `estimate` → (exit code, standard output, error in one line), with an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def run(*arguments):
        code, out, error = call("estimate", *arguments)
        return code, out, " ".join(error.split())

    return run


def test_json_of_a_folder(call, folder):
    options = ["--rank", 8, "--batch", 2, "--length", 16, "--dtype", "float32", "--devices", 3, "--strategy", "zero2"]
    code, out, _ = call(folder, *options, "--on", "cpu", "--json")
    assert code == 0
    found = json.loads(out)
    assert list(found["methods"]) == ["dual_lora", "lora", "dora", "full"]
    assert found["refused"] == {}
    dual, lora, dora, full = found["methods"].values()
    factors = 2 * 8 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 96))
    assert dual["trainable_parameters"] == lora["trainable_parameters"] == factors < dora["trainable_parameters"]
    assert dual["saved_bytes"] == 4 * factors
    assert full["trainable_parameters"] == full["base_parameters"] == dual["base_parameters"]
    assert list(dual["memory"]) == ["1", "2", "3"]
    for method in found["methods"].values():
        assert all(m["peak"] == max(m["phases"].values()) for m in method["memory"].values())
        assert method["seconds_a_step"] is None


def test_card_of_a_folder(call, folder):
    code, out, _ = call(folder, "--methods", "lora", "full", "--batch", 2, "--length", 16, "--quantisation", "nf4")
    assert code == 0
    for words in ("weights, frozen", "activations", "trainable parameters", "GFLOP a token", "--calibrate"):
        assert words in out
    assert "full: Full fine-tuning needs a base that is not quantised" in " ".join(out.split())


def test_a_full_recipe_s_others_have_the_rank_and_the_modules_that_were_asked_for(call, folder):
    values = {"name": "x", "model": {"path": str(folder)}, "method": {"name": "full"}, "data": {"train": "x.jsonl"}}
    (folder / "full.yaml").write_text(json.dumps(values))
    shape = ["--batch", 1, "--length", 8, "--rank", 4, "--target-modules", "q_proj", "--methods", "lora", "full"]
    code, out, _ = call(folder / "full.yaml", *shape, "--on", "gpu", "--json")
    assert code == 0
    found = json.loads(out)
    assert found["refused"] == {}
    assert found["methods"]["lora"]["method"] == {"name": "lora", "r": 4, "target_modules": ["q_proj"]}
    assert found["methods"]["full"]["method"] == {"name": "full"}
    assert found["dtype"] == "float32"  # what trains itself is not in bf16 where the recipe leaves it open
    code, out, _ = call(folder / "full.yaml", *shape)
    assert "rank 4" in " ".join(out.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Say what to estimate"),
        (["llama-3-9b"], "Did you mean 'llama-3-8b'?"),
        (["bolq-smollm2"], "Did you mean 'boolq-smollm2'?"),
        (["gpt2", "--methods", "lorra"], "Did you mean 'lora'?"),
        (["gpt2", "--length", 4096], "length is 4096, but gpt2 takes at most 1024 tokens"),
        (["gpt2", "--batch", 0], "batch is 0, expected at least 1"),
        (["gpt2", "--logits", 0], "logits is 0, expected at least 1"),
        (["gpt2", "--logits", -5], "logits is -5, expected at least 1"),
        (["gpt2", "--rank", 0], "--rank is 0"),
        (["gpt2", "--target-modules", "qq", "--length", 8, "--batch", 1], "Target modules {'qq'} not found"),
        (["gpt2", "--fits", "much", "--methods", "lora", "--length", 8, "--batch", 1], "expected a size such as 24GB"),
        (["gpt2", "--fits", "24", "--methods", "lora", "--length", 8], "24 bytes: write the unit, as in --fits 24GB"),
    ],
)
def test_wrong_input_is_one_sentence(call, arguments, message):
    code, _, err = call(*arguments)
    assert code == 1
    assert message in err


def test_models_are_listed(call):
    code, out, _ = call("--models", "--json")
    assert code == 0
    assert json.loads(out)["llama-7b"] == "6.7B"


def test_a_regression_s_head_gives_one_number():
    options = from_recipe(read_recipe("glue-roberta-base-stsb"), on="gpu", classes=2)
    assert (options.head, options.classes) == ("classification", 1)


def test_options_of_a_recipe():
    options = from_recipe(read_recipe("llama-3-70b-eight-cards"), on="gpu")
    assert (options.batch, options.length, options.accumulate, options.dtype) == (1, 4096, 4, "bfloat16")
    assert options.checkpointing
    assert options.rank == 32
    assert options.config.to_dict() == published_config("llama-3-70b").to_dict()
    assert options.with_method("lora").method == {"name": "lora", "r": 32, "target_modules": "all-linear"}


def test_a_model_of_several_parts_is_refused_in_words(call, tmp_path):
    """Of text and pictures: its blocks stand in parts of the configuration."""
    from transformers import Gemma3Config

    Gemma3Config(architectures=["Gemma3ForConditionalGeneration"]).save_pretrained(tmp_path)
    code, _, err = call(tmp_path)
    assert code == 1
    assert "several parts" in err


def test_options_of_a_model_know_its_head(folder):
    assert from_model("deberta-v3-base").head == "classification"
    assert from_model(str(folder)).head == "causal"
    assert from_model(str(folder)).length == 128  # all that it takes
    assert isinstance(from_model(str(folder / "config.json")).config, type(AutoConfig.for_model("llama")))


class TestFits:
    options = StepOptions(
        "tiny",
        LlamaConfig(num_hidden_layers=2, max_position_embeddings=512, **SIZES),
        method={"name": "dual_lora", "r": 8},
        dtype="float32",
        batch=2,
        length=64,
    )

    def peak(self, **changes):
        changed = replace(self.options, **changes)
        return memory_of(changed, simulate(changed)).peak

    def test_proposal_fits_and_the_next_one_does_not(self):
        limit = self.peak(batch=5) + 1
        found = largest(self.options, limit)
        assert found["batch"] == 5
        assert self.peak(length=found["length"]) <= limit < self.peak(length=found["length"] + 64)
        ranks = [self.peak(method={"name": "dual_lora", "r": r}) for r in (found["rank"], 2 * found["rank"])]
        assert ranks[0] <= limit < ranks[1]

    def test_nothing_fits(self):
        assert largest(self.options, 1000.0) == {"batch": None, "length": None, "rank": None}

    @pytest.mark.parametrize("answer", [0, 1, 2, 3, 7, 8, 100])
    def test_bisection(self, answer):
        assert _last(lambda k: k <= answer, 100) == answer

    @pytest.mark.parametrize(
        ("text", "size"), [("24GB", 24e9), ("80 GiB", 80 * 2**30), ("1.5tb", 1.5e12), ("7000000", 7e6)]
    )
    def test_sizes(self, text, size):
        assert parse_size(text) == size


def test_calibration_is_kept_and_used(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(calibrate, "WIDTHS", {"cpu": (64, 128), "gpu": (64, 128)})
    monkeypatch.setattr(calibrate, "TOKENS", {"cpu": (128, 256), "gpu": (128, 256)})
    monkeypatch.setattr(calibrate, "METHODS", ("dual_lora",))
    monkeypatch.setattr(calibrate, "DTYPES", ("float32",))
    assert calibrate.known_rates() is None
    entry = calibrate.calibrate(seconds=0.1)
    assert calibrate.known_rates() == entry
    options = replace(TestFits.options, on=entry["on"])
    step = simulate(options)
    (narrow, rate, weight), _ = entry["costs"]["float32"]["dual_lora"]
    assert calibrate.seconds_of(options, step, entry) == step.flops / rate + step.worked * weight
    assert narrow == options.config.hidden_size
    assert calibrate.seconds_of(options.with_method("lora"), step, entry) is None
    assert calibrate.seconds_of(replace(options, quantisation="nf4"), step, entry) is None, "unpacking was not measured"


def test_rates_of_an_older_kind_are_measured_again(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    calibrate._keep({"on": "cpu", "date": "2026-01-01", "rates": {}})
    assert calibrate.known_rates() is None


def test_calibration_on_the_command_line(call, monkeypatch):
    costs = {
        "float32": {"dual_lora": [[384, 2e11, 5e-9], [1024, 3e11, 4e-9]], "lora": [[384, 1e11, 0], [1024, 2e11, 0]]}
    }
    monkeypatch.setattr(calibrate, "calibrate", lambda say: {"on": "cpu", "date": "2026-01-01", "costs": costs})
    code, out, _ = call("--calibrate")
    assert code == 0
    for words in ("float32, width 1024", "300 GFLOP/s + 4.0 ns", "100 GFLOP/s + 0.0 ns"):
        assert words in out


def test_costs_between_the_measured_widths():
    points = [calibrate.Cost(256, 10.0, 4.0), calibrate.Cost(1024, 30.0, 2.0)]
    found = [calibrate._at(points, w)[1:] for w in (64, 256, 512, 1024, 4096)]
    assert found == [(10.0, 4.0), (10.0, 4.0), (20.0, 3.0), (30.0, 2.0), (30.0, 2.0)]


def test_two_steps_tell_what_tokens_and_what_weights_cost():
    few, many = (simulate(replace(TestFits.options, batch=batch)) for batch in (1, 4))
    assert few.worked == many.worked > 0
    times = [step.flops / 1e9 + step.worked * 1e-6 for step in (few, many)]
    assert calibrate.line([few, many], times, 64) == pytest.approx(calibrate.Cost(64, 1e9, 1e-6))
    # Noise: four times the work in five times the time.
    assert calibrate.line([few, many], [1.0, 5.0], 64) == calibrate.Cost(64, many.flops / 5.0, 0.0)


def test_every_weight_that_a_step_goes_over_is_counted_once():
    adapted, whole = (simulate(TestFits.options.with_method(name)) for name in ("dual_lora", "full"))
    block = 2 * (64 * 64 + 64 * 32) + 3 * 64 * 96
    assert adapted.worked == 2 * block + adapted.trained_parameters
    assert whole.worked == whole.trained_parameters == whole.base_parameters


def test_numbers_of_devices():
    assert [counts(n) for n in (1, 2, 6, 8)] == [[1], [1, 2], [1, 2, 4, 6], [1, 2, 4, 8]]


class TestSeventyBillion:
    """The shipped recipe against the real configuration, on the meta device."""

    options = from_recipe(read_recipe("llama-3-70b-eight-cards"), on="gpu")

    @pytest.fixture(scope="class")
    def step(self) -> Step:
        return simulate(self.options)

    def test_parameters(self, step):
        assert step.base_parameters == 70_553_706_496
        shapes = [(8192, 8192), (1024, 8192), (1024, 8192), (8192, 8192), (28672, 8192), (28672, 8192), (8192, 28672)]
        assert step.trained_parameters == 80 * 32 * sum(o + i for o, i in shapes)

    def test_every_linear_layer_of_a_block_is_adapted(self):
        from dual_lora.lab.cost.simulate import empty_model

        model = empty_model(self.options, 1)
        adapted = {name.split(".")[-2] for name, _ in model.named_modules() if name.endswith(".base_layer")}
        assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}

    @pytest.mark.parametrize("strategy", ["fsdp2", "zero3"])
    def test_fits_on_eight_cards(self, step, strategy):
        assert memory_of(self.options, step, 8, strategy).peak < 80e9
        assert memory_of(self.options, step, 1, strategy).peak > 141e9

    def test_does_not_fit_without_sharding_the_weights(self, step):
        assert memory_of(self.options, step, 8, "zero2").peak > 80e9


def test_unknown_strategy_names_the_nearest():
    with pytest.raises(UserError, match="Did you mean 'zero3'"):
        memory_of(TestFits.options, simulate(TestFits.options), 2, "zero-3")


def test_adalora_s_rank_is_the_one_it_begins_with():
    config = LlamaConfig(num_hidden_layers=2, max_position_embeddings=512, **SIZES)
    options = StepOptions("tiny", config, method={"name": "lora", "r": 32}, dtype="float32", batch=1, length=8)
    ada = options.with_method("adalora")
    assert ada.method == {"name": "adalora", "init_r": 32}
    assert (ada.rank, ada.with_rank(64).rank, ada.with_method("lora").rank) == (32, 64, 32)
    assert simulate(ada).trained > simulate(options.with_rank(8)).trained
    assert replace(options, method={"name": "adalora"}).rank == 12, "PEFT's own"
