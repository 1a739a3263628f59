"""Every fault that `verify` names, planted in a real vLLM server."""

import shutil

import pytest
import served_faults
from served_faults import VERDICTS
from vllm_server import ask, folder, needs_vllm, served, verdict  # noqa: F401

from dual_lora.lab.model.merge import merge

pytestmark = [*needs_vllm[:-1], pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def made(folder):  # noqa: F811
    return served_faults.adapters(folder)


def test_faults_of_an_adapter(folder, made, tmp_path):  # noqa: F811
    found = {}
    with served(folder, made["right"], tmp_path / "log") as url:
        for name, adapter in [*made.items(), ("off", None)]:
            assert ask(f"{url}/dual_lora/adapter", "POST", {"adapter": adapter and str(adapter)})[0] == 200
            found[name] = verdict(folder, made["right"], url)
    assert found == {name: VERDICTS[name] for name in found}


@pytest.mark.parametrize("fault", ["merged twice", "four bits", "another template", "another tokenizer"])
def test_faults_of_a_server(fault, folder, made, tmp_path):  # noqa: F811
    whole, options, adapter = tmp_path / "base", [], made["right"]
    if fault in ("merged twice", "four bits"):
        merge(made["right"], whole, dtype="float32")
    else:
        shutil.copytree(folder / "base", whole)
    if fault == "four bits":
        adapter = served_faults.rounded(whole) and None
    elif fault == "another template":
        (tmp_path / "template").write_text(served_faults.TEMPLATE)
        options = ["--chat-template", tmp_path / "template"]
    elif fault == "another tokenizer":
        served_faults.with_other_words(whole)
    with served(tmp_path, adapter, tmp_path / "log", *options) as url:
        assert verdict(folder, made["right"], url) == VERDICTS[fault]
