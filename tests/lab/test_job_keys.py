"""Keys of runs, pinned: a finished run is known by its key, and a key that changes for no reason repeats the run."""

import yaml
from tiny_study import write_study

from dual_lora.lab.study import plan
from dual_lora.lab.study.cell import base_jobs, final_jobs, trial_jobs
from dual_lora.lab.study.read import read_study

METHODS = {
    "lora": {"r": 4, "lora_alpha": "2r"},
    "dual_lora": {},
    "frozen": {"name": "dual_lora", "freeze": {"dual_lora_C": 0.5}},
    "rounded": {"name": "dual_lora", "round": {"dual_lora_D": "int8"}},
    "full": {"search": {"learning_rate": [1e-4, 1e-3]}},
}
PINNED = {
    "base letters": "a8dc5658c74a11ad",
    "lora trial 0": "6775eccf6e4cc899",
    "lora trial 1": "bfb920d9c6f9992f",
    "lora final 2": "4df890b4c2facf21",
    "lora final 3": "684f2b539db292fc",
    "dual_lora trial 0": "c031d0c1346a3a0d",
    "dual_lora trial 1": "a8a19d7a69723eef",
    "dual_lora final 2": "8c87ee10d870513e",
    "dual_lora final 3": "d51b5a5f51732322",
    "frozen trial 0": "f29c401f1c26c552",
    "frozen trial 1": "95ce3f8965b99efc",
    "frozen final 2": "ebe583cdbfde3b14",
    "frozen final 3": "78ffd7583403d39a",
    "rounded trial 0": "5254f2116df5a486",
    "rounded trial 1": "16a3b247201b843d",
    "rounded final 2": "05006906968a2107",
    "rounded final 3": "bed3818cf3207aa9",
    "full trial 0": "a8a76bda11d2b156",
    "full trial 1": "208f56d81b186f7a",
    "full final 2": "1d604b895c03e60a",
    "full final 3": "f43b866c21887e28",
}


def keys(tmp_path, monkeypatch):
    """(method, kind, number) -> key, of a study whose files have relative names."""
    monkeypatch.chdir(tmp_path)
    study_file = write_study(tmp_path, methods=METHODS, budget=None, seeds=2)
    recipe = yaml.safe_load((tmp_path / "letters.yaml").read_text())
    recipe["model"] = {"path": "model", "dtype": "float32"}
    recipe["data"] |= {"train": "train.jsonl", "test": "test.jsonl"}
    (tmp_path / "letters.yaml").write_text(yaml.safe_dump(recipe))
    study = read_study(study_file)
    cells = plan.lay_out(plan.Plan.read(study))
    found = {f"base {job.task}": job.key for job in base_jobs(cells)}
    for cell in cells:
        jobs = [*trial_jobs(study, cell), *final_jobs(study, cell, {"learning_rate": 1e-3})]
        found |= {f"{cell.method} {job.kind} {n}": job.key for n, job in enumerate(jobs)}
    return found


def test_keys_are_what_they_were(tmp_path, monkeypatch):
    assert keys(tmp_path, monkeypatch) == PINNED


def test_every_run_has_a_key_of_its_own():
    assert len(set(PINNED.values())) == len(PINNED) == 21
