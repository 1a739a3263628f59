"""The data of PEFT's MetaMathQA comparison as records of the laboratory.

`python -m dual_lora.lab.judge.metamath` loads meta-math/MetaMathQA and GSM8K's test set from the hub, or takes them
from files of the same fields, and writes metamathqa/train.json and test.json into $DUAL_LORA_DATA. A record's
`instruction` is the question in PEFT's frame, its `output` the whole answer, its `answer` the number at the end.

Records whose question and answer are longer than 1,300 characters are left out, as PEFT does.
"""

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dual_lora.lab.data.records import Record, data_folder, read_records
from dual_lora.lab.errors import UserError
from dual_lora.lab.files.write import make_folder, write_json
from dual_lora.lab.module_command import run_module

TRAIN, TEST = "hub:meta-math/MetaMathQA", "hub:openai/gsm8k,main:test"
TEMPLATE = "Question: {query} Think step by step.\nAnswer:"
ENDS = ("The answer is: ", "The answer is ", "The final answer is: ", "The final answer is ", "#### ")
LONGEST = 1300  # characters


def number_in(text: str) -> str | None:
    """Return the number that an answer's last sentence gives; None without such a sentence."""
    text = text.strip().rstrip(".!?")
    end = next((end for end in ENDS if end in text), None)
    found = text.rpartition(end)[2].strip().partition("\n")[0] if end else ""
    return found.strip(" .!?$%").replace(",", "") or None


def converted(records: Iterable[Record], query: str, answer: str) -> tuple[list[dict[str, Any]], int]:
    """Records in the form above, and how many were left out: too long, or without a number at their end."""
    made, left = [], 0
    for record in records:
        try:
            asked, solution = str(record.values[query]).strip(), str(record.values[answer]).strip()
        except KeyError as error:
            raise UserError(f"{record.where}: field {error} is missing, found {', '.join(record.values)}.") from None
        number = number_in(solution)
        if number is None or len(f"{asked} {solution}") > LONGEST:
            left += 1
            continue
        made.append({"instruction": TEMPLATE.format(query=asked), "input": "", "output": solution, "answer": number})
    return made, left


def main(arguments: list[str] | None = None) -> int:
    """Write both files; returns 0. Raises UserError for sources that hold something else."""
    parser = argparse.ArgumentParser(
        prog="python -m dual_lora.lab.judge.metamath", description=__doc__.partition("\n")[0] if __doc__ else None
    )
    parser.add_argument("--train", default=TRAIN, help="MetaMathQA: a file with the fields query, response, or hub:…")
    parser.add_argument(
        "--test", default=TEST, help="GSM8K's test set: a file with the fields question, answer, or hub:…"
    )
    parser.add_argument("--out", type=Path, help="Folder. [default: metamathqa in $DUAL_LORA_DATA]")
    given = parser.parse_args(arguments)
    out = given.out or data_folder() / "metamathqa"
    sets = {"train": (given.train, "query", "response"), "test": (given.test, "question", "answer")}
    made = {name: converted(read_records(source), *fields) for name, (source, *fields) in sets.items()}
    make_folder(out)
    for name, (records, left) in made.items():
        if not records:
            raise UserError(f"{sets[name][0]} holds no record that ends with an answer.")
        write_json(out / f"{name}.json", records)
        print(f"{out / f'{name}.json'}: {len(records):,} records, {left:,} left out")
    return 0


if __name__ == "__main__":
    run_module(main)
