"""The pytest plugin that puts DualLoraConfig where PEFT's tests have LoraConfig.

Three groups are kept apart, and each is counted:
* rows and tests of other methods are not selected (they do not mention the method at all);
* tests of something that only LoRA has (its variants and initialisations) are not applicable, each with its reason;
* everything else runs, and passes, fails or is skipped by PEFT itself or by an entry of `skips.toml`.
"""

from __future__ import annotations

import fnmatch
import functools
import inspect
import os
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import models
import peft
import pytest

METHOD = os.environ.get("CONFORMANCE_METHOD", "dual_lora")
LISTS = tomllib.loads((Path(__file__).parent / "skips.toml").read_text(encoding="utf-8"))
NOT_APPLICABLE = "not applicable: "


class _Everything(dict[str, int]):
    """All hub names count as already fetched: the models are in the local cache, the tests stay offline."""

    def __contains__(self, key: object) -> bool:
        return True

    def __missing__(self, key: str) -> int:
        return 0


_conventions: set[str] = set()  # of LoRA, that the running test goes by


_running: list[pytest.Item] = []  # the test that runs; none while they are collected


def pytest_runtest_setup(item: pytest.Item) -> None:
    _running[:] = [item]
    _conventions.clear()
    _conventions.update(name for name, entry in LISTS["conventions"].items() if _is_listed(item, entry["tests"]))


def _name(item: pytest.Item) -> str:
    return item.nodeid.replace("tests/", "", 1)


def _is_listed(item: pytest.Item, patterns: list[str]) -> bool:
    return any(fnmatch.fnmatchcase(_name(item), pattern.replace("[", "[[]")) for pattern in patterns)


def _of_lora_alone(options: dict[str, Any]) -> str | None:
    """Why these options of LoraConfig have no counterpart, or None."""
    for name, reason in LISTS["options"].items():
        if options.get(name):
            return f"{name}: {reason}"
    start = options.get("init_lora_weights")
    if isinstance(start, str) and start != "gaussian":
        return f"init_lora_weights={start!r}: {LISTS['values']['init_lora_weights']}"
    return None


def _split_odd_ranks(options: dict[str, Any]) -> None:
    """An odd total cannot be halved; a user would give both ranks."""
    rank, pattern = options.get("r"), options.get("rank_pattern")
    if isinstance(rank, int) and rank > 0 and rank % 2:
        options.update(r=None, r1=rank // 2 + 1, r2=max(rank // 2, 1))
    if pattern:
        options["rank_pattern"] = {key: [r // 2 + 1, r // 2] if r % 2 else r for key, r in pattern.items()}


def _accept_loras_conventions(config_cls: type) -> None:
    """Let the configuration take what the tests write for LoRA; only here, not in the product."""
    original = config_cls.__init__

    @functools.wraps(original)  # PEFT reads the signature, to pass over what it does not know in a later version's file
    def __init__(self: Any, *args: Any, **options: Any) -> None:
        reason = _of_lora_alone(options)
        if reason is not None and _running:
            pytest.skip(NOT_APPLICABLE + reason)
        self.of_lora_alone = reason  # of a row: its tests are not applicable
        for name in LISTS["options"]:
            options.pop(name, None)
        if "init_lora_weights" in options:
            start = options.pop("init_lora_weights")
            options["init_weights"] = True if start == "gaussian" else start
        rank = options.get("r", 8)
        if "r_of_each_group" in _conventions:  # α/√(r r) is LoRA's α/r
            alpha = options.pop("lora_alpha", 8)
            options.update(r=None, r1=rank, r2=rank, alpha=alpha)
            options["rank_pattern"] = {key: [r, r] for key, r in options.get("rank_pattern", {}).items()}
        else:
            _split_odd_ranks(options)
        if "default_alpha" in _conventions:
            options.setdefault("lora_alpha", 8)
        original(self, *args, **options)
        if "r_of_each_group" in _conventions:
            vars(self).update(r=rank, lora_alpha=alpha)  # what the test wrote; the layers go by r1, r2 and alpha

    config_cls.__init__ = __init__  # type: ignore[misc]


# transformers may ask for a later PEFT than the installed one; its `add_adapter` is tested all the same.
import transformers.integrations.peft  # noqa: E402

transformers.integrations.peft.check_peft_version = lambda *args, **options: None


def _draw_the_data() -> None:
    """Quotes for torch.compile's tests and one picture for those of vision: any will do."""
    import datasets
    from PIL import Image

    load = datasets.load_dataset
    picture = Image.radial_gradient("L").convert("RGB")
    quotes = [" ".join(f"w{3 + 31 * (line + word) % 900}" for word in range(12)) for line in range(40)]
    columns = {"quote": quotes, "author": quotes, "tags": quotes}
    drawn: dict[str, Any] = {
        "huggingface/cats-image": {"test": {"image": [picture]}},
        "ybelkada/english_quotes_copy": datasets.DatasetDict({"train": datasets.Dataset.from_dict(columns)}),
    }
    datasets.load_dataset = lambda path, *args, **options: (  # type: ignore[assignment]
        drawn[path] if path in drawn else load(path, *args, **options)
    )


_draw_the_data()


def _ask_the_cache() -> None:
    """PEFT does not ask an offline hub whether a file is there; here the cache stands for the hub."""
    from huggingface_hub import try_to_load_from_cache
    from peft.utils import save_and_load

    check = save_and_load.check_file_exists_on_hf_hub

    def cached(repo_id: str, filename: str, **options: Any) -> bool | None:
        listed = repo_id in models.MODELS and isinstance(try_to_load_from_cache(repo_id, filename), str)
        return listed or check(repo_id, filename, **options)

    save_and_load.check_file_exists_on_hf_hub = cached


_ask_the_cache()


def _pad_each_group() -> None:
    """`prepare_model_for_compiled_hotswap(target_rank=r)` by LoRA's convention: r for each group, 2 r in all."""
    from peft.utils import hotswap

    prepare = hotswap.prepare_model_for_compiled_hotswap

    def by_convention(model: Any, *, target_rank: Any = None, **options: Any) -> None:
        if target_rank is not None and "r_of_each_group" in _conventions:
            target_rank *= 2
        prepare(model, target_rank=target_rank, **options)

    hotswap.prepare_model_for_compiled_hotswap = by_convention


if METHOD == "dual_lora":
    import dual_lora
    from dual_lora.method import layer
    from dual_lora.method.layers import attention, conv, embedding, experts

    _accept_loras_conventions(dual_lora.DualLoraConfig)
    _pad_each_group()
    peft.DualLoraConfig = dual_lora.DualLoraConfig  # type: ignore[attr-defined]
    peft.DualLoraModel = dual_lora.DualLoraModel  # type: ignore[attr-defined]
    layers = ModuleType("peft.tuners.dual_lora")
    for home in (layer, embedding, conv, attention, experts):
        own = {k: v for k, v in vars(home).items() if isinstance(v, type) and v.__module__ == home.__name__}
        vars(layers).update(own)
    layers.DualLoraConfig = dual_lora.DualLoraConfig  # type: ignore[attr-defined]
    layers.DualLoraModel = dual_lora.DualLoraModel  # type: ignore[attr-defined]
    sys.modules[layers.__name__] = peft.tuners.dual_lora = layers  # type: ignore[attr-defined]
    CONFIG = dual_lora.DualLoraConfig
else:
    CONFIG = peft.LoraConfig
NAME = CONFIG.__name__


def _configs_in(value: Any) -> set[type]:
    if isinstance(value, type) and issubclass(value, peft.PeftConfig):
        return {value}
    if isinstance(value, peft.PeftConfig):
        return {type(value)}
    if isinstance(value, list | tuple):
        return set().union(*map(_configs_in, value))
    return set()


def _concerns_method(item: pytest.Item) -> bool:
    """Whether a test is about LoRA's place: by its row, else by its text."""
    values = list(item.callspec.params.values()) if hasattr(item, "callspec") else []
    if any(value in ("lora", NAME) for value in values if isinstance(value, str)):
        return True
    configs = _configs_in(values)
    if configs:
        return CONFIG in configs
    function = item.function  # type: ignore[attr-defined]
    text = inspect.getsource(inspect.unwrap(function))
    if NAME in text:
        return True
    others = [name for name in dir(peft) if name.endswith("Config") and name not in (NAME, "PeftConfig")]
    if any(name in text for name in others) or item.cls is None:
        return False
    helpers = [v for k, v in vars(item.cls).items() if inspect.isfunction(v) and not k.startswith("test")]
    return any(NAME in inspect.getsource(inspect.unwrap(helper)) for helper in helpers)


def _reason_in_row(value: Any) -> str | None:
    """Why a parameter of a test has no counterpart: options of LoRA alone, as a dictionary or in a configuration."""
    if isinstance(value, dict):
        return _of_lora_alone(value)
    if isinstance(value, list | tuple):
        return next((reason for reason in map(_reason_in_row, value) if reason), None)
    return getattr(value, "of_lora_alone", None) if isinstance(value, peft.PeftConfig) else None


def _reason_in_list(item: pytest.Item, group: str) -> str | None:
    for entry in LISTS.get(group, []):
        if _is_listed(item, entry["tests"]):
            return entry["reason"]
    return None


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    testing_utils = sys.modules.get("tests.testing_utils")
    if testing_utils is not None:
        testing_utils._HUB_MODEL_ACCESSES = _Everything()
    kept, dropped = [], []
    for item in items:
        (kept if _concerns_method(item) else dropped).append(item)
    for item in kept:
        if _name(item).startswith("test_torch_compile.py") and hasattr(item.cls, "model_id"):
            item.cls.model_id = models.WIDE_OPT
        reason = _reason_in_list(item, "not_applicable")
        for value in item.callspec.params.values() if hasattr(item, "callspec") else ():
            reason = reason or _reason_in_row(value)
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=NOT_APPLICABLE + reason))
            continue
        reason = _reason_in_list(item, "no_hub") or _reason_in_list(item, "no_gpu")
        if reason is None and METHOD == "dual_lora":
            reason = _reason_in_list(item, "skip")
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=reason))
    config.hook.pytest_deselected(items=dropped)
    items[:] = kept


def pytest_terminal_summary(terminalreporter: Any) -> None:
    stats = terminalreporter.stats
    skipped = [report.longrepr[2].removeprefix("Skipped: ") for report in stats.get("skipped", [])]
    inapplicable = [reason for reason in skipped if reason.startswith(NOT_APPLICABLE)]
    terminalreporter.section(f"PEFT's own tests with {NAME}")
    failed = len(stats.get("failed", [])) + len(stats.get("error", []))
    terminalreporter.write_line(
        f"passed {len(stats.get('passed', []))}   failed {failed}   "
        f"skipped {len(skipped) - len(inapplicable)}   not applicable {len(inapplicable)}"
    )
