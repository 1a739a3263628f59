"""A first recipe for somebody's own records, with a comment where a choice was made."""

import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from shlex import quote

from dual_lora.lab import yaml_text
from dual_lora.lab.data.examples import prompts_together, read_examples
from dual_lora.lab.data.formats import Example
from dual_lora.lab.data.guess import Guess
from dual_lora.lab.data.records import Record, joined, whole_text
from dual_lora.lab.errors import UserError
from dual_lora.lab.read import parse_yaml
from dual_lora.lab.recipe.read import build_recipe
from dual_lora.lab.recipe.schema import DataSection, Recipe

HELD_OUT = 0.1  # of the records, where there is no test set
MOST_HELD = 500
LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096)
TEMPLATE = 240  # characters that a chat template may write around a record
ROW = 512  # tokens, of a text that is learned as a whole
EXAMPLES = 8  # of an optimizer step
TOKENS = 2048  # of a language model at a time, at the most: with 1,024 SmolLM2-135M takes 2.6 GB, with 4,096 8.6 GB
MOST_RIVALS = 5  # columns that are named in a comment
CHARACTERS = 3  # a token, at the least: of English four or five
RATES = (
    "1.0e-3  # try 3e-4 and 3e-3 too; 1e-5 to 1e-4 for method full",
    "1.0e-4  # try 3e-5 and 3e-4 too",
)
DPO = "objective:", "  name: dpo  # makes chosen answers likelier than rejected ones; sft: learn the chosen"
ABOUT = {
    "classification": "to predict classes",
    "regression": "to predict a number",
    "causal": "to learn answers",
}


def as_trained(records: list[Record], data: str, found: Guess) -> list[Record]:
    """The records that a run makes of the same files: a text file that is no list of facts is one."""
    files = joined(data)
    texts = found.format == "document" and all(file.endswith(".txt") for file in files)
    return [record for file in files for record in whole_text(file)] if texts else records


def starter(
    file: Path,
    name: str,
    base: str,
    data: str,
    test: str | None,
    found: Guess,
    records: list[Record],
    columns: list[str] | None = None,
    whole: float = 1.0,
) -> str:
    """The text of a recipe for `file`. name: the run's. records: as a run reads them (`as_trained`). columns: of a file
    without a header line. whole: the share of the records that `max_length` is to cut nothing of."""
    count, longest = len(records), _longest(records, whole)
    held = max(0, min(MOST_HELD, max(1, round(HELD_OUT * count)), count - 1))
    around = TEMPLATE if found.head == "causal" else 0
    longest_row = LENGTHS[-1] if held else ROW  # one record is a text, which is learned in rows
    length = next(n for n in LENGTHS if n * CHARACTERS >= longest + around or n == longest_row)
    preferred, rows = found.format == "preference", _at_a_time(found, length)
    lines = [
        f"# A first recipe for {_value(data)}: {_counted(count, found)}, {_task(found)}. Change what you like.",
        *_next_commands(file),
        f"name: {_value(name)}",
        "model:",
        f"  path: {_value(base)}  # a folder, a name on the hub, a GGUF file or package:NAME",
        f"  head: {found.head}  # {_heads(found)}",
        "  # quantize: nf4  # loads the base in 4 bits, which takes less memory",
        "method:",
        "  name: dual_lora  # or lora, dora, hira, full, … : `dual-lora advise` compares them on your data",
        "  r: 16",
        "data:",
        *_sources(data, test, held),
        *_grouped(records, found),
        f"  format: {found.format}",
    ]
    if columns:
        lines.append(f"  columns: {_flow(columns)}  # the file has no header line")
    if found.fields:
        pairs = ", ".join(f"{ours}: {_value(theirs)}" for ours, theirs in found.fields.items())
        lines.append(f"  fields: {{{pairs}}}  # field of the format: column of the file")
    lines += [
        *_other_labels(found),
        f"  max_length: {length}  # tokens; `dual-lora check-data` counts the longer records",
        *(DPO if preferred else ()),
        "train:",
        "  epochs: 3",
        *_batch(rows),
        *(["  # gradient_checkpointing: true  # takes less memory, and a third more time"] * (found.head == "causal")),
        f"  learning_rate: {RATES[preferred]}",
        *(_validation(count) if held else ()),
        "evaluate:",
        f"  tasks: [{_tasks(found)}",
        *([f"  batch_size: {2 * rows}  # records at a time"] * (rows < EXAMPLES)),
        *([] if test or not held else ["  split: validation  # there is no test set yet"]),
    ]
    return "\n".join(lines) + "\n"


def _sources(data: str, test: str | None, held: int) -> list[str]:
    """The lines of where the records are. held: how many are taken out for validation."""
    asked = f"  # test: {_another(data, 'test')}  # for the last score, not to choose by"
    other = f"  # validation: {_another(data, 'validation')}  # needs train.validate_every too"
    return [
        f"  train: {_value(data)}",
        f"  test: {_value(test)}" if test else asked,
        f"  holdout: {held}  # taken out of the training records, always the same, for validation" if held else other,
    ]


def read_starter(text: str, where: Path) -> Recipe:
    """The recipe that was written, checked as a person's own would be."""
    return build_recipe(parse_yaml(text, str(where)), str(where))


def _longest(records: list[Record], share: float) -> int:
    """Characters of the longest record of so many, the shortest first."""
    lengths = sorted(sum(len(str(value)) for value in record.values.values()) for record in records)
    return lengths[round(share * (len(lengths) - 1))]


def _grouped(records: list[Record], found: Guess) -> list[str]:
    """A line where texts or prompts occur twice, and none so often that it would be all of the held-out records."""
    texts = Counter(prompts_together(list(_readable(records, found))))
    if not 1 < max(texts.values(), default=0) <= HELD_OUT * len(records):
        return []
    return ["  group: prompt  # records of the same text stay together, in training or in validation"]


def _readable(records: list[Record], found: Guess) -> Iterator[Example]:
    """The records as a run reads them, without those that it refuses: `check-data` names them."""
    data = DataSection(train="-", format=found.format, fields=found.fields)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for record in records:
            with suppress(UserError):
                yield from read_examples("-", data, [record])


def _other_labels(found: Guess) -> list[str]:
    """A comment with the columns that the label could have been, of which a run says nothing."""
    if not found.rivals:
        return []
    shown = [_value(name) for name in found.rivals[:MOST_RIVALS]] + ["…"] * (len(found.rivals) > MOST_RIVALS)
    return [f"  # The label is guessed. It could also be: {', '.join(shown)} (fields: {{label: COLUMN}})"]


def _at_a_time(found: Guess, length: int) -> int:
    """Records of a forward pass, few enough for a laptop: most memory of a language model is that of its logits."""
    if found.head != "causal":
        return EXAMPLES
    # Rows of a text are all full, and a record of preferences is two.
    return max(1, min(EXAMPLES, TOKENS // length) // (2 if found.format in ("document", "preference") else 1))


def _batch(rows: int) -> list[str]:
    """EXAMPLES a step, `rows` at a time."""
    if rows == EXAMPLES:
        return [f"  batch_size: {EXAMPLES}"]
    return [
        f"  batch_size: {rows}  # records at a time; more are faster and take more memory",
        f"  accumulate: {EXAMPLES // rows}  # times: {EXAMPLES} records a step",
    ]


def _validation(count: int) -> list[str]:
    return [
        f"  validate_every: {max(1, min(50, count // 16 or 1))}  # steps between two validations",
        "  keep_best: true  # save the weights of the lowest validation loss",
        "  # patience: 3  # end the run after this many validations without a lower loss",
    ]


def _next_commands(file: Path) -> list[str]:
    shown = quote(str(file)) if str(file).isprintable() else "RECIPE"  # a comment has one line
    return [
        f"# Look at the data:  dual-lora check-data {shown}",
        f"# Memory and time:   dual-lora estimate {shown}",
        f"# Train:             dual-lora train {shown}",
        "# Every field:       docs/reference/recipe.md, or dual-lora train --help-all",
    ]


def _counted(count: int, found: Guess) -> str:
    what = "text" if found.format == "document" else "record"
    return f"{count:,} {what}{'s' * (count != 1)}"


def _task(found: Guess) -> str:
    short = [c for c in found.classes if len(c) <= 20 and c.isprintable()][:6]  # a comment has one line
    named = f": {', '.join(short)}{', …' if len(found.classes) > len(short) else ''}" if short else ""
    if found.format == "document":
        return "all of which is learned"
    return f"{len(found.classes)} classes{named}" if found.classes else ABOUT[found.head]


def _another(data: str, split: str) -> str:
    """An example of other records, of the same kind as the training records."""
    return f"hub:NAME:{split}" if data.startswith("hub:") else f"my-{split}{Path(data).suffix}"


def _tasks(found: Guess) -> str:
    if found.head != "causal":
        return f"{found.head}]"
    if found.format not in ("prompt", "instruction"):
        return "loss]"
    return "loss]  # [loss, exact_match] also writes answers, and counts those that are right to the letter"


def _heads(found: Guess) -> str:
    if found.format == "document":
        return "a language model"
    return (
        "a language model that answers"
        if found.head == "causal"
        else "a new head on the model; causal is a language model"
    )


def _value(text: str) -> str:
    """A text as YAML writes it in one line, quoted where it has to be; with escapes where it has several lines."""
    if len(text.splitlines()) < 2:
        return _flow([text])[1:-1]
    return yaml_text.dump([text], default_flow_style=True, default_style='"', width=10**6).strip()[1:-1]


def _flow(values: list[str]) -> str:
    return yaml_text.dump(values, default_flow_style=True, allow_unicode=True, width=10**6).strip()
