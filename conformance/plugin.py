"""The pytest plugin that puts DualLoraConfig where PEFT's tests have LoraConfig.

Three groups are kept apart, and each is counted:
* rows and tests of other methods are not selected (they do not mention the method at all);
* tests of something that only LoRA has (its variants and initialisations) are not applicable, each with its reason;
* everything else runs, and passes, fails or is skipped by PEFT itself or by an entry of `skips.toml`.
"""

from __future__ import annotations

import fnmatch
import inspect
import os
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

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


_scale_as_lora = False


def pytest_runtest_setup(item: pytest.Item) -> None:
    global _scale_as_lora
    _scale_as_lora = any(fnmatch.fnmatchcase(_name(item), pattern) for pattern in LISTS["scale_as_lora"]["tests"])


def _name(item: pytest.Item) -> str:
    return item.nodeid.replace("tests/", "", 1)


def _of_lora_alone(options: dict[str, Any]) -> str | None:
    """Why these options of LoraConfig have no counterpart, or None."""
    for name, reason in LISTS["options"].items():
        if options.get(name):
            return f"{name}: {reason}"
    start = options.get("init_lora_weights")
    if isinstance(start, str) and start != "gaussian":
        return f"init_lora_weights={start!r}: {LISTS['values']['init_lora_weights']}"
    return None


def _accept_loras_habits(config_cls: type) -> None:
    """Let the configuration take what the tests write for LoRA; only here, not in the product."""
    original = config_cls.__init__

    def __init__(self: Any, *args: Any, **options: Any) -> None:
        reason = _of_lora_alone(options)
        if reason is not None:
            pytest.skip(NOT_APPLICABLE + reason)
        for name in LISTS["options"]:
            options.pop(name, None)
        if "init_lora_weights" in options:
            start = options.pop("init_lora_weights")
            options["init_weights"] = True if start == "gaussian" else start
        # The tests train for a few steps: the adapter is without effect at the start, and at full strength after one.
        options.setdefault("warmup_steps", 1)
        if _scale_as_lora:  # α/√(r1 r2) is to be LoRA's α/r, which is 8/8 by default
            options["lora_alpha"] = options.get("lora_alpha", 8) / 2
            options["alpha_pattern"] = {key: alpha / 2 for key, alpha in options.get("alpha_pattern", {}).items()}
        rank = options.get("r")
        if isinstance(rank, int) and rank > 0 and rank % 2:  # an odd rank has to be split by hand
            options.update(r=None, r1=rank // 2 + 1, r2=max(rank // 2, 1))
        if options.get("rank_pattern"):
            options["rank_pattern"] = {
                key: [rank // 2 + 1, rank // 2] if rank % 2 else rank for key, rank in options["rank_pattern"].items()
            }
        original(self, *args, **options)

    config_cls.__init__ = __init__  # type: ignore[misc]


# transformers may ask for a later PEFT than the installed one; its `add_adapter` is tested all the same.
import transformers.integrations.peft  # noqa: E402

transformers.integrations.peft.check_peft_version = lambda *args, **options: None

if METHOD == "dual_lora":
    import dual_lora
    from dual_lora.method import attention, conv, embedding, experts, layer

    _accept_loras_habits(dual_lora.DualLoraConfig)
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


def _reason_in_list(item: pytest.Item, group: str) -> str | None:
    name = _name(item)
    for entry in LISTS.get(group, []):
        if any(fnmatch.fnmatchcase(name, pattern.replace("[", "[[]")) for pattern in entry["tests"]):
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
        reason = _reason_in_list(item, "not_applicable")
        for value in item.callspec.params.values() if hasattr(item, "callspec") else ():
            if isinstance(value, dict) and reason is None:
                reason = _of_lora_alone(value)
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=NOT_APPLICABLE + reason))
            continue
        reason = _reason_in_list(item, "no_hub")
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
