"""Decoding with and without merging, and merging itself."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from dual_lora.core import reference
from dual_lora.method.cache import composed_weights

from . import judge, layers
from .measure import Measured, interleave, torch_threads


def decode(O: int, I: int, T: int, dtype: torch.dtype, threads: int, seconds: float) -> tuple[Measured, Measured]:
    """(cached, merged): T tokens through a layer in eval mode against a plain layer on the very same weight in memory.

    With two weights the caches decide: where each lies is worth ± 7 %, and nothing of that is ours.
    """
    W = (torch.randn(O, I) / I**0.5).to(dtype)
    x = torch.randn(1, T, I).to(dtype)
    layer = layers.linear("dual", W).eval()
    layers.fill(layer, judge.exact_factors(O, I, layers.RANK // 2, layers.RANK // 2))
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    found = []
    with torch.no_grad():
        expected = reference.linear(x, W, None, *layer.adapter("default"))
        for subject in ("dual", "merged"):
            if subject == "merged":
                layer.merge()
            judge.check_close({subject: layer(x)}, {subject: expected}, tolerance)
            weight = layer.base_layer.weight.data if layer.merged else composed_weights._entries[layer].weight
            base = layers.linear("base", weight).eval()
            variants: dict[str, Callable[[], object]] = {subject: partial(layer, x), "base": partial(base, x)}
            found.append(interleave(variants, [(subject, "base")], threads, seconds / 2, rounds=(15, 100)))
    return found[0], found[1]


def merge(O: int, I: int, dtype: torch.dtype, seconds: float) -> tuple[Measured, Measured]:
    """(merge, unmerge) of one layer, ours against LoRA's, on one thread; unmerge has to be exact."""
    W = (torch.randn(O, I) / I**0.5).to(dtype)
    modules = {m: layers.linear(m, W.clone()) for m in ("dual", "lora")}
    dual = modules["dual"]
    layers.fill(dual, judge.exact_factors(O, I, layers.RANK // 2, layers.RANK // 2))
    dual.merge()
    expected = (W.float() + dual.get_delta_weight("default")).to(dtype)
    if not torch.equal(dual.get_base_layer().weight, expected):
        raise judge.WrongResult("The merged weight is not the rounding of W + ΔW.")
    dual.unmerge()
    if not torch.equal(dual.get_base_layer().weight, W):
        raise judge.WrongResult("Unmerge did not bring W back bit for bit.")
    with torch_threads(1):
        return _merge_rounds(modules, seconds)


def _merge_rounds(modules: dict[str, Any], seconds: float) -> tuple[Measured, Measured]:
    merges: dict[str, list[float]] = {m: [] for m in modules}
    unmerges: dict[str, list[float]] = {m: [] for m in modules}
    start, start_cpu, names = time.perf_counter(), time.process_time(), list(modules)
    while time.perf_counter() < start + seconds or len(merges["dual"]) < 7:
        for name in names:
            a = time.process_time()
            modules[name].merge()
            b = time.process_time()
            modules[name].unmerge()
            merges[name].append(b - a)
            unmerges[name].append(time.process_time() - b)
        names.reverse()
    share = min((time.process_time() - start_cpu) / (time.perf_counter() - start), 1.0)
    return Measured(merges, "s", 1, share), Measured(unmerges, "s", 1, share)
