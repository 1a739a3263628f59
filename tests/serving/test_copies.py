"""Composed weights of several adapters within a memory limit: the same bits as composed anew, the oldest one leaves."""

import pytest
import torch
from adapters import METHODS, trained
from safetensors.torch import load_file

from dual_lora.serving.compose import ComposedWeights
from dual_lora.serving.files import AdapterError
from dual_lora.serving.vllm import ComposedCopies


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("several")
    for name in ("dual-lora", "loha", "modules to save"):
        trained(METHODS[name](), folder / name)
    return folder


class Server:
    """Loads as a server does, and counts compositions."""

    def __init__(self, folder, limit_bytes):
        self.folder, self.copies, self.opened = folder, ComposedCopies(limit_bytes), []
        self.base = load_file(folder / "loha" / "base" / "model.safetensors")  # that of all

    def load(self, name, weights=None):
        def opened():
            self.opened.append(name)
            return ComposedWeights(self.folder / name / "base", self.folder / name / "adapter")

        loaded = dict(self.copies.stream(name, (weights or self.base).items(), opened))
        assert self.copies.bytes_held <= self.copies.limit_bytes
        return loaded


def size(server, name):
    composed = ComposedWeights(server.folder / name / "base", server.folder / name / "adapter")
    return sum(server.base[weight].nbytes for weight in composed.names)


def test_a_switch_composes_nothing_and_changes_no_bit(folder):
    server = Server(folder, 1 << 30)
    for name in ("dual-lora", "loha", "modules to save"):
        first = server.load(name)
        for weight in first.values():
            weight.zero_()  # a server may do with its weights what it likes
        server.base = load_file(folder / "loha" / "base" / "model.safetensors")
        fresh = dict(ComposedWeights(folder / name / "base", folder / name / "adapter").stream(server.base.items()))
        again = server.load(name)
        assert again.keys() == fresh.keys()
        assert all(torch.equal(again[key], fresh[key]) for key in fresh)
        assert any(not torch.equal(again[key], server.base[key]) for key in fresh)
    assert server.opened == ["dual-lora", "loha", "modules to save"]


def test_the_least_recently_used_leaves(folder):
    server = Server(folder, 0)
    server.copies.limit_bytes = size(server, "dual-lora") + size(server, "loha")
    for name in ("dual-lora", "loha", "dual-lora", "modules to save", "dual-lora", "loha"):
        server.load(name)
    # The third is too large to stand beside another; it was composed where the others had to go for it.
    assert server.opened == ["dual-lora", "loha", "modules to save", "dual-lora", "loha"]
    server.copies.limit_bytes = size(server, "loha")
    server.opened.clear()
    server.load("loha")
    server.load("dual-lora")
    assert server.opened == ["dual-lora"], "a lower limit keeps what was used last"


def test_what_does_not_fit_is_composed_each_time(folder):
    server = Server(folder, 1000)
    assert [server.load("loha").keys() for _ in range(2)] == [server.base.keys()] * 2
    assert server.opened == ["loha", "loha"]
    assert server.copies.bytes_held == 0


def test_a_load_that_breaks_off_leaves_nothing_half(folder):
    server = Server(folder, 1 << 30)
    composed = ComposedWeights(folder / "loha" / "base", folder / "loha" / "adapter")
    stream = server.copies.stream("loha", server.base.items(), lambda: composed)
    for _ in range(4):
        next(stream)
    stream.close()
    assert server.copies.bytes_held == 0


def test_a_base_that_has_lost_a_weight_is_an_error(folder):
    server = Server(folder, 1 << 30)
    server.load("loha")
    lost = {key: weight for key, weight in server.base.items() if "layers.1.mlp.down_proj" not in key}
    with pytest.raises(AdapterError, match=r"layers\.1\.mlp\.down_proj"):
        server.load("loha", lost)
