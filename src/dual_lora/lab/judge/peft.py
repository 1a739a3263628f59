"""PEFT's method comparison: its results read as scores, its experiments as a study's methods; our runs in its form.

results/METHOD--NAME.json                          one a run: run_info, train_info, meta_info
experiments/METHOD/NAME/adapter_config.json        what a run is, with training_params.json next to it
https://github.com/huggingface/peft/tree/main/method_comparison

In what is written NAME ends with the seed. What PEFT's suite measures and a run of ours does not is null; memory is the
peak, also where PEFT has a mean.
"""

import dataclasses
import json
import platform
import re
import statistics
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dual_lora.lab.data.encode import ALPACA, LLM_ADAPTERS
from dual_lora.lab.errors import UserError
from dual_lora.lab.files.folder import RunFolder
from dual_lora.lab.files.write import make_folder, text_of_json, write_output
from dual_lora.lab.judge.scores import WHOLE, Scenario, Score, Scores, number, seed_number
from dual_lora.lab.read import read_json, read_object, regular, unlinked
from dual_lora.lab.recipe.schema import Recipe
from dual_lora.lab.run.resume import recipe_of_run
from dual_lora.lab.study.job import run_folder

# What a method may be trained with by itself; all else in a run's train_config should be the same for all.
OWN = {"seed", "model_id", "optimizer_type", "optimizer_kwargs", "lr_scheduler"}
MOST = 1e18  # of seconds, bytes or parameters
FORGOTTEN = ("forgetting", "drift")  # less of them is better
PACKAGES = ("transformers", "peft", "datasets", "bitsandbytes", "torch")
TEMPLATES = {"alpaca": ALPACA, "llm-adapters": LLM_ADAPTERS, "plain": "{prompt}\n"}
SCORES = {name: "test accuracy" for name in ("accuracy", "choice", "exact_match")}
_SEED = re.compile(r"[-_]+seed[-_]?(\d+)$")


def result_files(folder: Path) -> list[Path]:
    """The results in a task's folder (MetaMathQA), or in its folder of results."""
    inside = folder / "results" if (folder / "results").is_dir() else folder
    return [file for file in sorted(inside.glob("*.json")) if _is_result(file)]


def _is_result(file: Path) -> bool:
    try:
        with regular(file).open("rb") as text:
            if b'"run_info"' not in text.read(200):
                return False
    except (OSError, ValueError):  # a pipe, a broken link
        return False
    try:
        unlinked(file)
    except ValueError as error:
        raise UserError(f"{file}: {error}.") from None
    return True


def read_peft(folder: Path) -> Scores:
    """One score a run and metric; unfinished runs are named in the notes. Raises UserError for a damaged file."""
    scores = Scores([], better={("", name): "less" for name in FORGOTTEN})
    task = folder.resolve().parent.name if folder.resolve().name == "results" else folder.resolve().name
    costs: dict[tuple[Scenario, str], list[dict[str, Any]]] = {}
    stopped, finished = [], set()
    configs: dict[str, dict[str, Any]] = {}
    for file in result_files(folder):
        try:
            result = read_json(file)
            run, train = result["run_info"], result["train_info"]
            config, last = dict(run["train_config"]), dict(train["metrics"][-1]) if train["metrics"] else {}
            name, status = str(run["experiment_name"]), train["status"]
            scenario, seed = (str(config["model_id"]), task), seed_number(config["seed"], str(file))
            cost = _cost(train)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{file} is no result of PEFT's method comparison: {error!r}.") from None
        if status != "success":
            stopped.append(name)
            continue
        finished.add(name)
        configs[name] = config
        method = _without_seed(name, seed)
        for metric, value in last.items():
            if metric.startswith("test ") or metric in FORGOTTEN:
                figure = number(value, str(file), metric)
                scores.rows.append(Score(scenario, method, seed, WHOLE, metric, figure, str(file)))
        costs.setdefault((scenario, method), []).append(cost)
    scores.costs = {key: _medians(own) for key, own in costs.items()}
    if stopped:
        scores.notes.append(f"Not compared, as they did not end well: {', '.join(stopped)}.")
    if len(models := {scenario[0] for scenario, _ in scores.costs}) == 1:  # named once, not in every row
        scores.notes.append(f"All runs are of {models.pop()}.")
        scores.rows = [row._replace(scenario=("", task)) for row in scores.rows]
        scores.costs = {(("", task), method): cost for (_, method), cost in scores.costs.items()}
    scores.notes += _differing_settings(configs)
    if left := [name for name in experiments(folder) if name not in {*finished, *stopped}]:
        scores.notes.append(f"Experiments without a result: {', '.join(left)}.")
    return scores


def _differing_settings(configs: dict[str, dict[str, Any]]) -> list[str]:
    """Return the settings of training that not all runs have the same of. A field that came later is none of them."""
    found = []
    for field in dict.fromkeys(name for config in configs.values() for name in config if name not in OWN):
        values: dict[str, list[str]] = {}
        for name, config in configs.items():
            if field in config:
                values.setdefault(json.dumps(config[field]), []).append(name)
        usual = max(values, key=lambda value: len(values[value]), default="")
        for value in (value for value in values if value != usual):
            found.append(f"{field} {value[:40]} in {', '.join(values[value])} ({usual[:40]} elsewhere)")
    return (
        [f"Not all runs were trained alike, so a difference may be no method's: {'; '.join(found)}."] if found else []
    )


def _without_seed(name: str, seed: int) -> str:
    """An experiment's name without the seed at its end: lora/rank32-seed1 and lora/rank32-seed2 are one method."""
    found = _SEED.search(name)
    return name[: found.start()] if found and int(found[1]) == seed else name


def _cost(train: dict[str, Any]) -> dict[str, float | None]:
    """Return the known costs; None for a value that is no plausible number."""
    names = {
        "train_seconds": "train_time",
        "peak_memory": "accelerator_memory_max" if "accelerator_memory_max" in train else "cuda_memory_max",  # in 2025
        "trainable_parameters": "num_trainable_params",
        "all_parameters": "num_total_params",
        "adapter_bytes": "file_size",
    }
    numbers = {name: train.get(theirs) for name, theirs in names.items()}
    return {n: v if isinstance(v, int | float) and 0 <= v < MOST else None for n, v in numbers.items()}


def _medians(costs: list[dict[str, Any]]) -> dict[str, Any]:
    known = {name: [c[name] for c in costs if c[name] is not None] for name in costs[0]}
    return {name: statistics.median(values) if values else None for name, values in known.items()}


def experiments(folder: Path) -> dict[str, Path]:
    """Name -> folder of the experiments of a task's folder."""
    inside = (folder.parent if folder.name == "results" else folder) / "experiments"
    return {
        f"{f.parent.parent.name}/{f.parent.name}": f.parent
        for f in sorted([*inside.glob("*/*/adapter_config.json"), *inside.glob("*/*/training_params.json")])
    }


def method_entry(folder: Path) -> dict[str, Any]:
    """An experiment folder as a study's method: the name and fields of its adapter, its rate and weight decay.

    Fields that hold PEFT's own default are left out. Raises UserError for a folder that holds no experiment.
    """
    adapter, training = folder / "adapter_config.json", folder / "training_params.json"
    if not adapter.is_file() and not training.is_file():
        raise UserError(f"{folder} is no experiment: it holds neither {adapter.name} nor {training.name}.")
    entry: dict[str, Any] = {"name": "full"}
    if adapter.is_file():
        from dual_lora.lab.model.methods import method_fields

        values = _settings(adapter)
        name = str(values.get("peft_type", "")).lower()
        usual = _defaults(name)
        own = {key: values[key] for key in method_fields(name) if key in values and values[key] != usual.get(key)}
        if "target_modules" in values:  # a recipe's own default is another one than PEFT's
            own["target_modules"] = values["target_modules"]
        entry = {"name": name, **own}
    kwargs = (_settings(training) if training.is_file() else {}).get("optimizer_kwargs", {})
    if not isinstance(kwargs, dict):
        raise UserError(f"{training}: optimizer_kwargs is {kwargs!r:.100}, expected settings by name.")
    rates = {"learning_rate": kwargs.get("lr"), "weight_decay": kwargs.get("weight_decay")}
    given = {key: value for key, value in rates.items() if value is not None}
    return entry | ({"train": given} if given else {})


def study_methods(folder: Path) -> dict[str, dict[str, Any]]:
    """All experiments of a task's folder as a study's methods. Raises UserError where there is none."""
    found = experiments(folder.resolve())
    if not found:
        raise UserError(f"{folder} holds no experiments: expected experiments/METHOD/NAME/adapter_config.json.")
    return {name: method_entry(scenario) for name, scenario in found.items()}


def _defaults(name: str) -> dict[str, Any]:
    """Return the default values of PEFT's configuration of a method, as JSON has them."""
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING

    kinds = {str(kind.value).lower(): config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    found = {}
    for field in dataclasses.fields(kinds[name]):
        if field.default is not dataclasses.MISSING:
            found[field.name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            found[field.name] = field.default_factory()
    return dict(json.loads(json.dumps(found, default=str)))


def _settings(file: Path) -> dict[str, Any]:
    try:
        return read_object(unlinked(file))
    except ValueError as error:
        raise UserError(f"{file} holds no settings by name: {error}.") from None


def write_peft(study: Path, out: Path) -> dict[str, int]:
    """Write the study's runs into `out`; returns how many results and experiments there are.

    Raises UserError for a folder that is no study's, or whose runs have gone: results.json alone holds too little.
    """
    try:
        methods = read_json(unlinked(study / "results.json"))["methods"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{study} is no study's folder: expected one that `dual-lora compare` has made.") from None
    tasks = {(method["model"], method["task"]) for method in methods}
    written: set[Path] = set()
    for method in methods:
        for run in method["seeds"]:
            if run["status"] != "done":
                continue
            try:
                folder = RunFolder(run_folder(study / "runs", run["key"]))
            except ValueError as error:
                raise UserError(f"{study / 'results.json'}: {error}.") from None
            if not folder.is_run or not folder.record.is_file():
                raise UserError(
                    f"{folder.path} is not there: PEFT's results hold each run's loss, tokens and memory, which lie in "
                    "the runs of the study, not in its results.json."
                )
            recipe, record = recipe_of_run(folder.path), read_json(folder.record)
            family = _name(str(record["method"].get("peft_type", "full-finetuning")).lower())
            task = _name(f"{method['task']}-{method['model']}")
            name = _name(f"{task}-{method['method']}-seed{run['seed']}")
            root = out / task if len(tasks) > 1 else out  # all in one folder is one task to whoever reads it
            experiment = root / "experiments" / family / name
            if experiment in written:
                raise UserError(
                    f"Two methods of {study} would be {family}/{name} in PEFT's form, one of them "
                    f"{method['method']!r}: give them names that differ in letters or digits."
                )
            made = _result(f"{family}/{name}", recipe, record, method, run)
            ended = datetime.fromtimestamp(folder.record.stat().st_mtime, UTC).isoformat(timespec="seconds")
            made["run_info"] = {"created_at": ended} | made["run_info"]
            make_folder(experiment)
            if made["run_info"]["peft_config"] is not None:
                write_output(experiment / "adapter_config.json", text_of_json(made["run_info"]["peft_config"]))
            write_output(experiment / "training_params.json", text_of_json(made["run_info"]["train_config"]))
            file = root / "results" / f"{family}--{name}.json"
            make_folder(file.parent)
            write_output(file, text_of_json(made))
            written.add(experiment)
    if not written:
        raise UserError(f"{study} holds no run that ended well.")
    return {"results": len(written), "experiments": len(written)}


def _name(text: str) -> str:
    """The text as a name of a file: it leads nowhere else, and is no hidden one."""
    return re.sub(r"-{2,}", "-", re.sub(r"[^\w.]+", "-", text)).strip("-.") or "nameless"


def _result(name: str, recipe: Recipe, record: dict[str, Any], method: dict[str, Any], run: dict[str, Any]) -> Any:
    train, ended = recipe.train, record["result"]
    config = None if recipe.method["name"] == "full" else record["method"]
    last = {
        "step": ended["steps"],
        SCORES.get(method["metric"], f"test {method['metric']}"): run["score"],
        "train loss": ended["loss"],
        "train samples": int(ended["steps"]) * int(record.get("processes", 1)) * train.batch_size * train.accumulate,
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
    """Return the recipe's settings in the words of PEFT's TrainConfig."""
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
