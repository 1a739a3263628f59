"""The cost of a trained adapter in use: merging it, and running the model with it unmerged."""

import statistics
import time
from collections.abc import Callable
from typing import Any

from dual_lora.lab.errors import described

REPEATS = 5
ROWS = 4
NEW_TOKENS = 8


def use_cost(tuned: Any, examples: list[Any], recipe: Any) -> tuple[dict[str, float | None], dict[str, str]]:
    """Seconds to merge, and slow-down of the unmerged model against its base (1.0: none), medians of interleaved runs.

    forward: one pass over a few test rows; decode: generating a few tokens (language models). A value is None where
    there is nothing to measure, or where the method fails in it: the second mapping says by which error. What was
    trained and scored is not lost by that. The model is left as it was found, as far as its method unmerges.
    """
    from dual_lora.lab.model.load import quiet

    cost: dict[str, float | None] = {"merge_seconds": None, "forward_slowdown": None, "decode_slowdown": None}
    if not tuned.adapted:
        return cost | {"forward_slowdown": 1.0, "decode_slowdown": 1.0}, {}
    problems: dict[str, str] = {}
    with quiet():
        batch = _batch(tuned, examples, recipe)
        measured: dict[str, Callable[[], float]] = {
            "forward_slowdown": lambda: _ratio(tuned, lambda model: model(**batch)),
            "decode_slowdown": lambda: _ratio(tuned, lambda model: _decode(model, batch, tuned.tokenizer)),
            "merge_seconds": lambda: _merge_seconds(tuned.model),
        }
        if recipe.model.head != "causal":
            del measured["decode_slowdown"]
        for name, measure in measured.items():
            try:
                cost[name] = measure()
            except Exception as error:  # whatever a foreign method raises: it is recorded, and the run stays finished
                problems[name] = described(error)
    return cost, problems


def _batch(tuned: Any, examples: list[Any], recipe: Any) -> dict[str, Any]:
    from dual_lora.lab.data.encode import Prompter

    if examples[0].text:
        texts: Any = [list(e.text) if len(e.text) > 1 else e.text[0] for e in examples[:ROWS]]
    else:
        prompter = Prompter(tuned.tokenizer, recipe.data.template)
        texts = [prompter.prompt_text(e.prompt, e.tools) for e in examples[:ROWS]]
    batch = tuned.tokenizer(
        texts, return_tensors="pt", padding=True, truncation=True, max_length=recipe.data.max_length
    )
    return {k: v.to(tuned.model.device) for k, v in batch.items() if k in ("input_ids", "attention_mask")}


def _decode(model: Any, batch: dict[str, Any], tokenizer: Any) -> Any:
    from dual_lora.lab.model.generate import plain_search

    with plain_search(model):
        return model.generate(
            **batch,
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )


def _ratio(tuned: Any, use: Callable[[Any], Any]) -> float:
    import torch

    seconds: dict[str, list[float]] = {"base": [], "tuned": []}
    with torch.inference_mode():
        for _ in range(REPEATS + 1):  # the first round warms up
            for variant, times in seconds.items():
                with tuned.as_variant(variant) as model:
                    times.append(_seconds(lambda: use(model)))
    return round(statistics.median(seconds["tuned"][1:]) / statistics.median(seconds["base"][1:]), 4)


def _merge_seconds(model: Any) -> float:
    seconds = _seconds(model.merge_adapter)
    model.unmerge_adapter()
    return round(seconds, 4)


def _seconds(work: Callable[[], Any]) -> float:
    import torch

    def settle() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    settle()
    start = time.perf_counter()
    work()
    settle()
    return time.perf_counter() - start
