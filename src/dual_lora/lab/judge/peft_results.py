"""A study's final runs, written as PEFT's method comparison has them, so that they can be offered there.

OUT/experiments/METHOD/NAME/     adapter_config.json and training_params.json
OUT/results/METHOD--NAME.json    one a final run that ended well; NAME ends with the seed

What PEFT's suite measures and a run of ours does not is null; memory is the peak, also where PEFT has a mean.
"""

import platform
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dual_lora.lab.data.encode import ALPACA, LLM_ADAPTERS
from dual_lora.lab.errors import UserError
from dual_lora.lab.read import read_json
from dual_lora.lab.recipe.schema import Recipe
from dual_lora.lab.run.folder import RunFolder, recipe_of_run
from dual_lora.lab.run.write import write_json

PACKAGES = ("transformers", "peft", "datasets", "bitsandbytes", "torch")
TEMPLATES = {"alpaca": ALPACA, "llm-adapters": LLM_ADAPTERS, "plain": "{prompt}\n"}
SCORES = {name: "test accuracy" for name in ("accuracy", "choice", "exact_match")}


def write_peft(study: Path, out: Path) -> dict[str, int]:
    """Write the study's runs into `out`; returns how many results and experiments there are.

    Raises UserError for a folder that is no study's, or whose runs have gone: results.json alone holds too little.
    """
    results = _results(study)
    tasks = {(method["model"], method["task"]) for method in results["methods"]}
    written: set[Path] = set()
    experiments: set[Path] = set()
    for method in results["methods"]:
        for run in method["seeds"]:
            if run["status"] != "done":
                continue
            folder = RunFolder(study / "runs" / run["key"])
            if not folder.is_run or not folder.record.is_file():
                raise UserError(
                    f"{folder.path} is not there: PEFT's results hold each run's loss, tokens and memory, which lie in "
                    "the runs of the study, not in its results.json."
                )
            recipe, record = recipe_of_run(folder.path), read_json(folder.record)
            family = str(record["method"].get("peft_type", "full-finetuning")).lower()
            task = _name(f"{method['task']}-{method['model']}")
            name = _name(f"{task}-{method['method']}-seed{run['seed']}")
            root = out / task if len(tasks) > 1 else out  # all in one folder is one task to whoever reads it
            experiment = root / "experiments" / family / name
            if experiment in experiments:
                raise UserError(
                    f"Two methods of {study} would be {family}/{name} in PEFT's form, one of them "
                    f"{method['method']!r}: give them names that differ in letters or digits."
                )
            made = _result(f"{family}/{name}", recipe, record, method, run)
            ended = datetime.fromtimestamp(folder.record.stat().st_mtime, UTC).isoformat(timespec="seconds")
            made["run_info"] = {"created_at": ended} | made["run_info"]
            experiment.mkdir(parents=True, exist_ok=True)
            if made["run_info"]["peft_config"] is not None:
                write_json(experiment / "adapter_config.json", made["run_info"]["peft_config"])
            write_json(experiment / "training_params.json", made["run_info"]["train_config"])
            file = root / "results" / f"{family}--{name}.json"
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, made)
            written.add(file)
            experiments.add(experiment)
    if not written:
        raise UserError(f"{study} holds no run that ended well.")
    return {"results": len(written), "experiments": len(experiments)}


def _results(study: Path) -> dict[str, Any]:
    file = study / "results.json"
    try:
        results = read_json(file)
        return {"methods": results["methods"], "study": results["study"]}
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{study} is no study's folder: expected one that `dual-lora compare` has made.") from None


def _name(text: str) -> str:
    return re.sub(r"-{2,}", "-", re.sub(r"[^\w.]+", "-", text)).strip("-")


def _result(name: str, recipe: Recipe, record: dict[str, Any], method: dict[str, Any], run: dict[str, Any]) -> Any:
    train, ended = recipe.train, record["result"]
    config = None if recipe.method["name"] == "full" else record["method"]
    last = {
        "step": ended["steps"],
        SCORES.get(method["metric"], f"test {method['metric']}"): run["score"],
        "train loss": ended["loss"],
        "train samples": ended["steps"] * train.batch_size * train.accumulate * record.get("processes", 1),
        "train total tokens": ended["tokens"],
    }
    if (forgotten := (run["figures"] or {}).get("forgetting")) is not None:
        last["forgetting"] = forgotten
    memory = dict.fromkeys(("reserved_avg", "max", "reserved_99th"), ended["peak_memory"])
    versions = record["versions"]
    return {
        "run_info": {
            "total_time": run["seconds"],
            "experiment_name": name,
            "peft_branch": f"release {versions.get('peft')}",
            "train_config": _train_config(recipe),
            "peft_config": config,
            "error_msg": "",
        },
        "train_info": {
            **{f"accelerator_memory_{key}": value for key, value in memory.items()},
            "train_time": ended["seconds"],
            "file_size": ended["adapter_bytes"],
            "num_trainable_params": ended["trainable_parameters"],
            "num_total_params": ended["all_parameters"],
            "status": "success",
            "metrics": [last],
        },
        "meta_info": {
            "model_info": {"sha": None, "created_at": None},
            "dataset_info": {recipe.data.train: {"sha": None, "created_at": None}},
            "package_info": {
                f"{package}-{what}": versions.get(package) if what == "version" else None
                for package in PACKAGES
                for what in ("version", "commit-hash")
            }
            | {"dual-lora-version": versions.get("dual-lora"), "dual-lora-commit-hash": record.get("commit")},
            "system_info": {"system": platform.system(), "machine": platform.machine()}
            | {"release": record["platform"], "version": "", "processor": "", "accelerator": record["device"]},
            "pytorch_info": "",
        },
    }


def _train_config(recipe: Recipe) -> dict[str, Any]:
    """In the words of PEFT's TrainConfig."""
    train, evaluate = recipe.train, recipe.evaluate
    return {
        "model_id": recipe.model.path,
        "dtype": recipe.model.dtype,
        "max_seq_length": recipe.data.max_length,
        "batch_size": train.batch_size,
        "batch_size_eval": evaluate.batch_size,
        "max_steps": train.steps,
        "eval_steps": train.validate_every,
        "compile": False,
        "use_gc": train.gradient_checkpointing,
        "query_template": TEMPLATES.get(recipe.data.template, "{prompt}").replace("{prompt}", "{query}"),
        "seed": train.seed,
        "grad_norm_clip": train.max_grad_norm,
        "optimizer_type": {"adamw_torch": "AdamW", "loraplus": "lora+"}.get(train.optimizer, train.optimizer),
        "optimizer_kwargs": {"lr": train.learning_rate, "weight_decay": train.weight_decay},
        "lr_scheduler": train.schedule,
        "use_amp": train.autocast != "none",
        "autocast_adapter_dtype": True,
        "generation_kwargs": {"max_new_tokens": evaluate.max_new_tokens},
        "attn_implementation": recipe.model.attention,
        "init_kv_cache_prefix": None,
    }
