"""Every fault that `verify` names, planted in a real vLLM server."""

import shutil

import pytest
import served_faults
from served_faults import VERDICTS, adapters  # noqa: F401
from vllm_server import ask, needs_vllm, served

pytestmark = [*needs_vllm[:-1], pytest.mark.timeout(3600)]


def test_faults_of_an_adapter(adapters, tmp_path):  # noqa: F811
    (tmp_path / "base").symlink_to(adapters["right"].parents[1] / "base")
    words = {}
    with served(tmp_path, adapters["right"], tmp_path / "log") as url:
        for name, adapter in [*adapters.items(), ("off", None), ("right", adapters["right"])]:
            assert ask(f"{url}/dual_lora/adapter", "POST", {"adapter": adapter and str(adapter)})[0] == 200
            words[name] = served_faults.found(adapters["right"], url)
    assert words == {name: VERDICTS[name] for name in words}


@pytest.mark.parametrize("fault", ["merged twice", "four bits", "another template", "another tokenizer"])
def test_faults_of_a_server(fault, adapters, tmp_path):  # noqa: F811
    twice, options = fault == "merged twice", []  # a merged folder, and the adapter beside it
    whole = served_faults.served_whole("right" if twice else fault, adapters, tmp_path)
    if fault == "another template":
        options = ["--chat-template", tmp_path / "base" / "chat_template.jinja"]
    elif fault == "another tokenizer":
        served_faults.with_other_words(whole)
    shutil.move(whole, tmp_path / "base")
    with served(tmp_path, adapters["right"] if twice else None, tmp_path / "log", *options) as url:
        assert served_faults.found(adapters["right"], url) == VERDICTS[fault]
