"""Merge an adapter into its base and write a plain model folder."""

from dataclasses import dataclass
from pathlib import Path

from dual_lora.lab.errors import UserError
from dual_lora.lab.model.load import quiet
from dual_lora.lab.model.opened import open_tuned
from dual_lora.lab.run.write import free_folder, write_folder_atomically


@dataclass
class MergeResult:
    """Where the merged model lies, its size in bytes, its precision, and the class of transformers that loads it."""

    folder: str
    bytes: int
    dtype: str
    loads: str


def merge(
    source: str | Path, out: str | Path, *, base: str | None = None, dtype: str | None = None, listed: bool = False
) -> MergeResult:
    """Write the merged model of a run or adapter folder to ``out``, with its tokenizer.

    The folder is a plain transformers model: it loads without this package. listed: with a list of its files (see
    `mark_whole`). Raises UserError if ``out`` holds anything, ``source`` holds no adapter, or its base cannot be saved.
    """
    target = free_folder(out)
    tuned = open_tuned(source, base, dtype)
    if not tuned.adapted and tuned.run is None:
        raise UserError(f"{source} holds no adapter to merge.")
    with quiet():
        model = tuned.model.merge_and_unload(safe_merge=True) if tuned.adapted else tuned.model
        if tuned.classes:
            model.config.id2label = dict(enumerate(tuned.classes))
            model.config.label2id = {name: i for i, name in enumerate(tuned.classes)}

        def write(folder: Path) -> None:
            try:
                model.save_pretrained(str(folder))
            except NotImplementedError as error:  # bitsandbytes' 4 bits, of transformers 5.24
                raise UserError(
                    "The base is stored quantised, and transformers cannot save what was merged into it. Give --base "
                    "with the model that it was quantised from, and quantise the result."
                ) from error
            tuned.tokenizer.save_pretrained(str(folder))

        target.parent.mkdir(parents=True, exist_ok=True)
        write_folder_atomically(target, write, listed)
    size = sum(file.stat().st_size for file in target.glob("*.safetensors"))
    classifies = "SequenceClassification" in type(model).__name__
    loads = "AutoModelForSequenceClassification" if classifies else "AutoModelForCausalLM"
    return MergeResult(str(out), size, str(model.dtype).removeprefix("torch."), loads)
