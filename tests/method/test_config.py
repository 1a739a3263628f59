"""What a configuration accepts, what it makes of it, and what it says about everything else."""

import copy
import dataclasses
import json
import re
import warnings

import pytest
import torch
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_config,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from tiny import Mlp, adapted, layer, layers, llama, points, train, trainable
from torch import nn

from dual_lora import DualLoraConfig, DualLoraWarning
from dual_lora.core.reference import Form
from dual_lora.method.layer import layers_of
from dual_lora.method.patterns import layer_options


def test_help_describes_every_field():
    own = set(DualLoraConfig.__annotations__)
    for name in own:
        assert re.search(rf"^    {name} \(`.+`, default .+\): \S+", DualLoraConfig.__doc__, flags=re.MULTILINE), name
    assert "warmup_steps (`int | float | None`, default None): For the paper's start only" in DualLoraConfig.__doc__
    assert "lora_alpha" in DualLoraConfig.__doc__


@pytest.mark.parametrize(
    ("given", "ranks"),
    [
        ({}, (4, 4)),
        (dict(r=16), (8, 8)),
        (dict(r=2), (1, 1)),
        (dict(r1=3, r2=5), (3, 5)),
        (dict(r=16, r1=12), (12, 4)),
        (dict(r=16, r2=12), (4, 12)),
        (dict(r=7, r1=3), (3, 4)),
        (dict(r=7), (4, 3)),
        (dict(r=3), (2, 1)),
        (dict(r=8, r1=3, r2=5), (3, 5)),
    ],
    ids=str,
)
def test_ranks(given, ranks):
    config = DualLoraConfig(**given)
    assert (config.r1, config.r2) == ranks
    assert config.r == sum(ranks)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (dict(r=0), ["positive integer", "is 0"]),
        (dict(r=-4), ["positive integer", "is -4"]),
        (dict(r=8.0), ["whole number", "8.0"]),
        (dict(r="8"), ["whole number", "'8'"]),
        (dict(r=True), ["whole number", "True"]),
        (dict(target_modules="all_linear"), ["target_modules is 'all_linear'", "target_modules='all-linear'"]),
        (dict(target_modules=["all-linear"]), ["target_modules is ['all-linear']", "target_modules='all-linear'"]),
        (dict(r1=4), ["r1=4, r2=None", "give both"]),
        (dict(r2=4), ["r1=None, r2=4", "give both"]),
        (dict(r1=0, r2=4), ["at least 1", "r1=0"]),
        (dict(r1=4, r2=-1), ["at least 1", "r2=-1"]),
        (dict(r=4, r1=4), ["at least 1", "r2=0"]),
        (dict(r=16, r1=4, r2=4), ["r = 16 is the total", "4 + 4 = 8", "Leave `r` out"]),
        (dict(alpha=0), ["alpha must be a positive number", "got 0"]),
        (dict(alpha=-1.0), ["alpha must be a positive number", "-1.0"]),
        (dict(alpha=float("nan")), ["alpha must be a positive number", "nan"]),
        (dict(alpha=float("inf")), ["alpha must be a positive number", "inf"]),
        (dict(alpha="16"), ["alpha must be a positive number", "'16'"]),
        (dict(alpha=8, lora_alpha=16), ["alpha=8", "lora_alpha=16", "alpha=32", "keep `alpha`"]),
        (dict(lora_alpha="16"), ["lora_alpha must be a positive number", "'16'"]),
        (dict(dropout=0.1, lora_dropout=0.2), ["dropout=0.1", "lora_dropout=0.2"]),
        (dict(init_std=0), ["init_std must be a positive number or None (the default)", "0"]),
        (dict(init_std=-0.1), ["init_std must be a positive number", "-0.1"]),
        (dict(warmup_steps=50), ["warmup_steps=50", "paper's start", "DualLoraConfig.paper(warmup_steps=50"]),
        (dict(init_weights="paper", warmup_steps=-1), ["warmup_steps", "0 or more", "-1"]),
        (dict(init_weights="paper", warmup_steps=1.5), ["warmup_steps", "whole number", "1.5"]),
        (dict(init_weights="paper", warmup_steps=True), ["warmup_steps", "whole number", "True"]),
        (dict(dropout=1.0), ["dropout (lora_dropout) must be at least 0 and below 1", "1.0"]),
        (dict(lora_alpha=0), ["lora_alpha must be a positive number", "got 0."]),
        (dict(lora_dropout="0.1"), ["dropout (lora_dropout) must be at least 0 and below 1", "'0.1'"]),
        (dict(dropout=-0.1), ["dropout (lora_dropout) must be at least 0 and below 1", "-0.1"]),
        (dict(ste="clamp"), ["Unknown ste 'clamp'", "'clip', 'identity', 'hardtanh', 'surrogate'"]),
        (dict(magnitude_activation="gelu"), ["Unknown magnitude", "'gelu'", "'relu', 'identity'"]),
        (dict(direction_activation="tanh"), ["Unknown direction", "'tanh'", "'sign', 'identity'"]),
        (dict(init_weights="pissa"), ["Unknown init_weights 'pissa'", "'zero'"]),
        (dict(bias="some"), ["Unknown bias 'some'", "'dual_lora_only'"]),
        (dict(rank_pattern={"q": [4]}), ["rank_pattern['q']", "pair [r1, r2]"]),
        (dict(rank_pattern={"q": [4, 0]}), ["rank_pattern['q']", "at least 1"]),
        (dict(rank_pattern={"q": "8"}), ["rank_pattern['q']", "whole number"]),
        (dict(alpha=4, alpha_pattern={"q": 0}), ["alpha_pattern['q']", "positive number"]),
        (dict(target_modules=".*q", layers_to_transform=[0]), ["layers_to_transform", "`target_modules` is a str"]),
        (dict(target_modules=".*q", layers_pattern="h"), ["layers_pattern", "`target_modules` is a str"]),
        (dict(layers_pattern="h"), ["`layers_pattern` is specified, `layers_to_transform` must also"]),
    ],
    ids=str,
)
def test_one_clear_error(given, words):
    with pytest.raises(ValueError, match=re.escape(words[0])) as caught:
        DualLoraConfig(**given)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("rank", "Did you mean 'r'?"),
        ("lora_alfa", "Did you mean 'lora_alpha'?"),
        ("target_module", "Did you mean 'target_modules'?"),
        ("warmup", "Did you mean 'warmup_steps'?"),
        ("quite_another", "config.md lists all fields"),
    ],
)
def test_a_field_that_is_none_is_answered_with_the_nearest_one(name, meant):
    with pytest.raises(TypeError, match=re.escape(f"unexpected keyword argument {name!r}.")) as caught:
        DualLoraConfig(**{name: 8})
    assert meant in str(caught.value)


def test_a_name_in_place_of_a_list_is_refused():
    """PEFT would take each letter of it for a name, and so train most of the model."""
    with pytest.raises(TypeError, match=r"`modules_to_save` must be a list of strings or None.*write \['lm_head'\]"):
        DualLoraConfig(modules_to_save="lm_head")


def test_names_of_lora_are_understood():
    config = DualLoraConfig(r=8, lora_alpha=16, lora_dropout=0.1)
    assert (config.alpha, config.dropout) == (32, 0.1)
    assert DualLoraConfig(alpha=32, lora_alpha=16).alpha == 32
    assert DualLoraConfig(lora_alpha=16, alpha_pattern={"q": 4}).alpha_pattern == {"q": 8}
    config = DualLoraConfig(alpha=16, alpha_pattern={"q": 4})
    assert config.alpha_pattern == dataclasses.replace(config, dropout=0.1).alpha_pattern == {"q": 4}


def test_a_pattern_without_alpha_has_loras_numbers_however_it_comes(tmp_path):
    pattern = {"q": 4}
    given = DualLoraConfig(alpha_pattern=pattern)
    assigned, entered, set_later, taken_back = (DualLoraConfig() for _ in range(4))
    assigned.alpha_pattern = pattern
    entered.alpha_pattern["q"] = 4
    set_later.alpha_pattern = taken_back.alpha_pattern = pattern
    set_later.lora_alpha = 16
    taken_back.alpha, taken_back.alpha = 40, None
    given.save_pretrained(tmp_path)
    configs = [
        *(given, assigned, entered, set_later, taken_back, copy.deepcopy(given)),
        get_peft_config({"peft_type": "DUAL_LORA", "alpha_pattern": pattern}),
        DualLoraConfig(**given.to_dict()),
        DualLoraConfig(**given.to_dict() | {"lora_alpha": 16}),
        DualLoraConfig(**LoraConfig(alpha_pattern=pattern).to_dict()),
        dataclasses.replace(given, dropout=0.1),
        dataclasses.replace(given, lora_alpha=16),
        dataclasses.replace(DualLoraConfig(), alpha_pattern=pattern),
        DualLoraConfig.from_pretrained(tmp_path),
    ]
    assert [layer_options(config, "q") for config in configs] == [(4, 4, 8)] * len(configs)
    both = DualLoraConfig(lora_alpha=16, alpha_pattern=pattern)
    assert DualLoraConfig(**both.to_dict() | {"lora_alpha": 16}) == both
    with pytest.warns(UserWarning, match=r"next to alpha=32 \(lora_alpha=16\): its numbers count as `alpha`, 2 times"):
        both.alpha_pattern = pattern
    assert layer_options(both, "q") == (4, 4, 4)


def test_weights_that_are_loaded_act_and_train_the_same_where_the_start_was_left_out():
    source, target = (adapted(init_weights=start) for start in (True, False))
    train(source, 3, loss=lambda: source.base_model.model.second(points(6) @ torch.ones(12, 16)).square().mean())
    assert not layer(source).dual_lora_B["default"].any(), "one layer's B is zero, as that of an expert without tokens"
    set_peft_model_state_dict(target, get_peft_model_state_dict(source))
    for model in (source, target):
        model(points()).square().mean().backward()
    assert torch.equal(target(points()), source(points()))
    for own, theirs in zip(trainable(target), trainable(source), strict=True):
        assert torch.equal(own.grad, theirs.grad)
    assert layer(target).dual_lora_B["default"].grad.any()


def test_a_start_that_is_written_later_brings_its_sigma_and_its_warm_up():
    config, given = DualLoraConfig(), DualLoraConfig(init_std=0.3)
    config.init_weights = given.init_weights = "paper"
    assert config == DualLoraConfig.paper()
    assert (given.init_std, given.warmup_steps) == (0.3, 50)
    config.warmup_steps = 7
    for name, value in (("init_std", -1), ("warmup_steps", -1), ("init_weights", "pissa")):
        with pytest.raises(ValueError, match=name):
            setattr(config, name, value)
    assert config == DualLoraConfig.paper(warmup_steps=7)
    config.init_weights = True
    assert config == DualLoraConfig()
    with pytest.raises(ValueError, match="works only with the paper's start"):
        config.warmup_steps = 5


def test_a_rank_of_one_takes_one_for_each_group_and_says_so():
    with pytest.warns(UserWarning, match="`r` is 1.*r1 = r2 = 1, as many parameters as LoRA of rank 2") as caught:
        config = DualLoraConfig(r=1)
    assert (config.r1, config.r2, config.r) == (1, 1, 2)
    assert caught[0].filename == __file__


PLAIN = {
    "use_dora": False, "use_rslora": False, "lora_bias": False, "loftq_config": {}, "init_lora_weights": True,
    "bias": "lora_only", "eva_config": None, "megatron_core": "megatron.core", "qalora_group_size": 16,
}  # fmt: skip


def test_a_call_that_means_plain_lora_is_taken():
    LoraConfig(r=8, **PLAIN)
    config = DualLoraConfig(r=8, **PLAIN)
    assert (config.bias, config.init_weights) == ("dual_lora_only", True)
    assert DualLoraConfig(init_lora_weights="gaussian").init_weights is True
    assert DualLoraConfig(init_lora_weights=False).init_weights is False
    lora = dataclasses.asdict(LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj"]))
    del lora["peft_type"]
    assert DualLoraConfig(**lora).alpha == 32


@pytest.mark.parametrize(
    ("option", "meaning"),
    [
        (dict(use_dora=True), "DoRA"),
        (dict(use_rslora=True), "rsLoRA"),
        (dict(lora_bias=True), "a bias in LoRA's B"),
        (dict(init_lora_weights="pissa"), "'pissa'"),
        (dict(init_lora_weights="eva"), "'eva'"),
        (dict(loftq_config={"loftq_bits": 4}), "LoftQ"),
        (dict(use_qalora=True), "QALoRA"),
        (dict(alora_invocation_tokens=[1]), "activated LoRA"),
    ],
    ids=str,
)
@pytest.mark.parametrize("source", ["call", "file", "later"])
def test_a_value_that_means_another_method_raises_a_clear_error(option, meaning, source):
    (name,) = option
    saved = dataclasses.asdict(LoraConfig(r=8)) | {"peft_type": "DUAL_LORA"} | option  # LoRA's, with its type changed
    ways = {
        "call": lambda: DualLoraConfig(**option),
        "file": lambda: DualLoraConfig(**saved),
        "later": lambda: setattr(DualLoraConfig(r=8), name, option[name]),
    }
    with pytest.raises(ValueError, match=rf"{name}=.*{re.escape(meaning)}.*Dual LoRA does not have it"):
        ways[source]()


def test_ranks_written_later_count(tmp_path):
    """`config.r = …` before the adapter is made, as for LoRA: it was shown and saved, the old ranks trained."""
    config = DualLoraConfig(target_modules=["first", "second"])
    config.r = 12
    assert (config.r, config.r1, config.r2) == (12, 6, 6)
    config.r1 = 2
    config.r2 = 4
    assert (config.r, config.r1, config.r2) == (6, 2, 4)
    config.r = 6
    assert (config.r1, config.r2) == (2, 4)  # the same total is no new one
    copied = copy.deepcopy(config)
    copied.r = 8
    assert (copied.r1, copied.r2, config.r) == (4, 4, 6)
    model = get_peft_model(Mlp(), config)
    assert layer(model).factors("default").A.shape[0] == 2
    assert layer(model).factors("default").C.shape[0] == 4
    config.save_pretrained(tmp_path)
    assert DualLoraConfig.from_pretrained(tmp_path).r == 6
    for name, value, words in (
        ("r", 0, "positive integer"),
        ("r1", 0, "at least 1"),
        ("r2", "4", "must be a whole number"),
    ):
        with pytest.raises(ValueError, match=words):
            setattr(config, name, value)
    assert (config.r, config.r1, config.r2) == (6, 2, 4)


def test_patterns_written_later_mean_what_they_mean_when_they_are_loaded(tmp_path):
    config = DualLoraConfig(target_modules=["first"], r=8)
    config.rank_pattern = {"first": 4, ".*t": 6}
    with pytest.warns(UserWarning, match="several values for one layer"):
        model = get_peft_model(Mlp(), config)
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="several values for one layer"):
        again = PeftModel.from_pretrained(Mlp(), tmp_path)
    assert layer(again).r == layer(model).r == {"default": 6}


@pytest.mark.parametrize(("start", "share"), [(True, 4), ("paper", 2), ("zero", 2), (False, 4)])
def test_alpha_defaults_to_a_share_of_the_ranks_of_each_layer(start, share):
    model = adapted(r=8, rank_pattern={"second": 4}, init_weights=start)
    first, second = layers(model).values()
    assert (first.states["default"].alpha, second.states["default"].alpha) == (8 * share, 4 * share)
    assert (first.strength("default"), second.strength("default")) == (2 * share, 2 * share)


def test_patterns():
    model = adapted(r=8, alpha=6, rank_pattern={"first": [1, 4], r".*second": 2}, alpha_pattern={"^second$": 9.0})
    first, second = layers(model).values()
    assert (first.states["default"].r1, first.states["default"].r2, first.states["default"].alpha) == (1, 4, 6)
    assert (second.states["default"].r1, second.states["default"].r2, second.states["default"].alpha) == (1, 1, 9)
    assert first.strength("default") == 6 / 2
    A, B, C, D = first.factors("default")
    assert [tuple(f.shape) for f in (A, B, C, D)] == [(1, 12), (16, 1), (4, 12), (16, 4)]


def test_saved_and_read_again(tmp_path):
    config = DualLoraConfig(
        r1=3,
        r2=5,
        alpha=7.5,
        dropout=0.1,
        target_modules=["q_proj", "v_proj"],
        exclude_modules=["x"],
        bias="dual_lora_only",
        init_weights="paper",
        init_std=0.01,
        warmup_steps=17,
        ste="hardtanh",
        magnitude_activation="identity",
        direction_activation="identity",
        rank_pattern={"a": [1, 2], "b": 4},
        alpha_pattern={"a": 2.0},
        modules_to_save=["head"],
        layers_to_transform=[0, 1],
        layers_pattern=["layers"],
        trainable_token_indices=[1, 2],
        task_type="CAUSAL_LM",
    )
    config.save_pretrained(tmp_path)
    again = PeftConfig.from_pretrained(tmp_path)
    assert type(again) is DualLoraConfig
    # PEFT marks what it saves as meant for inference, and notes its version.
    assert again.to_dict() | {"inference_mode": False} == config.to_dict() | {"peft_version": again.peft_version}
    json.dumps({k: sorted(v) if isinstance(v, set) else v for k, v in config.to_dict().items()})
    assert DualLoraConfig(**{k: v for k, v in config.to_dict().items() if k != "peft_type"}) == config


@pytest.mark.parametrize("options", [{}, {"ste": "surrogate"}], ids=["default", "surrogate"])
def test_a_configuration_survives_the_round_trip(tmp_path, options):
    config = DualLoraConfig(**options)
    config.save_pretrained(tmp_path)
    again = DualLoraConfig.from_pretrained(tmp_path)
    again.inference_mode, again.peft_version = False, config.peft_version
    assert again == config


@pytest.mark.parametrize("saved", [{}, {"ste": "clip"}, {"ste": "hardtanh"}], ids=str)
def test_an_older_configuration_means_what_it_meant(tmp_path, saved):
    values = {
        "peft_type": "DUAL_LORA",
        "r": 8,
        "alpha": None,
        "alpha_pattern": {"q": 3},
        "init_weights": True,
        "init_std": 0.02,
        "warmup_steps": 50,
        **saved,
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(values))
    config = DualLoraConfig.from_pretrained(tmp_path)
    assert (config.form, layer_options(config, "q")) == (Form(saved.get("ste", "clip")), (4, 4, 3))
    assert (config.init_weights, config.warmup_steps, config.default_alpha(4, 4)) == ("paper", 50, 16)
    for start, steps in (("zero", None), (False, 0)):
        (tmp_path / "adapter_config.json").write_text(json.dumps(values | {"init_weights": start}))
        config = DualLoraConfig.from_pretrained(tmp_path)
        assert config.form == Form(saved.get("ste", "clip"), live_zero=start == "zero")
        assert (config.warmup_steps, config.default_alpha(4, 4)) == (steps, 16)


@pytest.mark.parametrize("r", [2, 8, 16])
def test_as_many_parameters_as_lora(r):
    """Swapping the class name keeps the budget."""
    targets = ["q_proj", "v_proj", "down_proj"]
    ours = get_peft_model(llama(), DualLoraConfig(r=r, target_modules=targets))
    lora = get_peft_model(llama(), LoraConfig(r=r, target_modules=targets))
    assert ours.get_nb_trainable_parameters() == lora.get_nb_trainable_parameters()


def test_uneven_ranks_have_the_same_budget():
    targets = ["q_proj"]
    counts = {
        get_peft_model(llama(), DualLoraConfig(r=8, r1=r1, target_modules=targets)).get_nb_trainable_parameters()
        for r1 in (1, 4, 7)
    }
    assert len(counts) == 1


def test_no_matching_module_and_unsupported_layer():
    with pytest.raises(ValueError, match=r"Target modules.*nothing.*not found in the base model"):
        get_peft_model(llama(), DualLoraConfig(target_modules=["nothing"]))
    with pytest.raises(ValueError, match=r"linear layers are called q_proj, k_proj, .*regular expression.*as a list"):
        get_peft_model(llama(), DualLoraConfig(target_modules="q_proj,v_proj"))
    with pytest.raises(ValueError, match=r"(?s)Target module .*is not supported.*torch.nn.Linear.*exclude_modules"):
        get_peft_model(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), DualLoraConfig(target_modules=["1"]))


def test_loras_names_can_be_read_written_and_copied():
    """Code that LoRA and this method share reads them: None would stop it, or be taken for a value."""
    config = DualLoraConfig(r=8, lora_alpha=32, lora_dropout=0.1)
    assert (config.lora_alpha, config.alpha, config.lora_dropout, config.dropout) == (32, 64, 0.1, 0.1)
    assert DualLoraConfig(r=8).lora_alpha == 16  # what every layer of rank 8 gets
    assert DualLoraConfig(r=8).alpha is None
    config.lora_alpha, config.lora_dropout = 64, 0.2
    assert (config.alpha, config.dropout) == (128, 0.2)
    config.init_lora_weights, config.bias, config.use_dora = False, "lora_only", False
    assert (config.init_weights, config.bias) == (False, "dual_lora_only")
    assert dataclasses.replace(config, alpha=8.0).lora_alpha == 4
    assert copy.deepcopy(config).lora_alpha == 64
    assert not {"lora_alpha", "lora_dropout"} & set(config.to_dict())


def test_a_saved_configuration_may_have_loras_names(tmp_path):
    DualLoraConfig(r=8).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    saved = json.loads(file.read_text())
    file.write_text(json.dumps(saved | {"lora_alpha": 32}))
    assert DualLoraConfig.from_pretrained(tmp_path).alpha == 64


def test_a_number_that_is_entered_into_a_pattern_next_to_lora_alpha_is_warned_of():
    """As PEFT's own code writes it. It counts as `alpha`, half of what LoRA makes of it."""
    config = DualLoraConfig(r=4, lora_alpha=16, target_modules=["first", "second"], alpha_pattern={"second": 4})
    config.alpha_pattern["first"] = 8
    with pytest.warns(DualLoraWarning, match="count as `alpha`, 2 times LoRA's"):
        get_peft_model(Mlp(), config)
    with warnings.catch_warnings():
        warnings.simplefilter("error", DualLoraWarning)
        get_peft_model(Mlp(), config)  # once is enough
        get_peft_model(Mlp(), DualLoraConfig(r=4, lora_alpha=16, target_modules=["first"], alpha_pattern={"first": 4}))


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (dict(lora_alpha=16, alpha_pattern={"first": 4}), "counts as `alpha`, 2 times LoRA's.*take alpha=32"),
        (dict(rank_pattern={"first": 2}), "was not given, so 16 is for r=8 alone.*leave `lora_alpha` out"),
    ],
)
def test_lora_alpha_that_is_read_next_to_patterns_in_another_unit_is_warned_of(options, why):
    """Scripts copy a configuration by LoRA's names, which gave the patterns' layers 2 or 4 times their strength."""
    config = DualLoraConfig(r=8, target_modules=["first", "second"], **options)
    model = get_peft_model(Mlp(), config)  # reads no `lora_alpha`
    with pytest.warns(DualLoraWarning, match=why):
        assert config.lora_alpha == 16
    with warnings.catch_warnings():
        warnings.simplefilter("error", DualLoraWarning)
        assert config.lora_alpha == 16  # once is enough
        for copied in (copy.deepcopy(config), dataclasses.replace(config, r=8), DualLoraConfig(**config.to_dict())):
            again = get_peft_model(Mlp(), copied)
            for one, other in zip(layers_of(model), layers_of(again), strict=True):
                assert one.scaling["default"] == other.scaling["default"]


@pytest.mark.parametrize(
    "options",
    [{}, dict(lora_alpha=16), dict(lora_alpha=16, rank_pattern={"first": 2}), dict(alpha_pattern={"first": 4})],
)
def test_lora_alpha_that_goes_with_the_patterns_is_read_without_a_warning(options):
    """These copies by LoRA's names have the same strengths."""
    config = DualLoraConfig(r=8, target_modules=["first", "second"], **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error", DualLoraWarning)
        patterns = dict(rank_pattern=config.rank_pattern, alpha_pattern=config.alpha_pattern)
        copied = DualLoraConfig(
            r=config.r, lora_alpha=config.lora_alpha, target_modules=["first", "second"], **patterns
        )
    models = [get_peft_model(Mlp(), one) for one in (config, copied)]
    for one, other in zip(*map(layers_of, models), strict=True):
        assert one.scaling["default"] == other.scaling["default"]
