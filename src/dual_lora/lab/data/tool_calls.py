"""The demo's data: English requests and the JSON tool calls that answer them.

| set | records | sentences | values |
|---|---|---|---|
| `train` | 600 | seen | seen |
| `combinations` | 100 | seen, word by word | seen, but never together in one call |
| `values` | 100 | seen, word by word | every string and number is new |
| `phrasings` | 100 | new | seen |

*Seen* means that it occurs in `train`. `scripts/tool_calls` makes the files.
"""

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).with_name("tool-calls")
TEST_SETS = ("combinations", "values", "phrasings")
SYSTEM_PROMPT = "Reply with one JSON tool call."


def messages_for(request: str) -> list[dict[str, str]]:
    """The prompt of a request: the model is not told the tools, it learns them."""
    return [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": request}]


def chats(name: str, limit: int | None = None) -> list[list[dict[str, str]]]:
    """The first `limit` chats of a set, each system, user, assistant; the order is random."""
    return [json.loads(line)["messages"] for line in _lines(name, limit)]


def rows(tokenizer: Any, name: str, limit: int | None = None) -> list[dict[str, Any]]:
    """The same as input_ids and labels: -100 but for the answer and its end, which alone are learned."""
    from dual_lora.lab.data.encode import Prompter
    from dual_lora.lab.data.examples import read_examples
    from dual_lora.lab.recipe.schema import DataSection

    prompter = Prompter(tokenizer)
    examples = read_examples(str(FOLDER / f"{name}.jsonl"), DataSection())[:limit]
    return [{"input_ids": row.input_ids, "labels": row.labels} for row in map(prompter.encode, examples)]


def copy_to(folder: Path, train: int | None = None, test: int | None = None) -> None:
    """The first `train` examples, and `test` of each test set, as `<folder>/<name>.jsonl`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, limit in (("train", train), *((name, test) for name in TEST_SETS)):
        (folder / f"{name}.jsonl").write_text("".join(_lines(name, limit)), encoding="utf-8")


def _lines(name: str, limit: int | None) -> list[str]:
    return (FOLDER / f"{name}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[:limit]
