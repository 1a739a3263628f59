"""What people read, whole: a card, a results.json, the report's text and charts. `--update-golden` writes them anew."""

import json
import re

import report_material
import yaml
from tiny_study import made

from dual_lora.lab.files.folder import RunFolder
from dual_lora.lab.files.write import json_text, write_json
from dual_lora.lab.recipe.read import build_recipe
from dual_lora.lab.report.report import report
from dual_lora.lab.run import hub_card

FIXED = {"at": "2026-01-01 at 00:00:00", "versions": {"python": "3.12", "torch": "2.13"}}

BUTTONS = "CSV Markdown LaTeX", "Values as a table"


def finished_run(folder):
    """The folder of a run that nobody made: what a card is written from."""
    values = {
        "name": "warm-or-cold",
        "about": "Is fire warm? <script>alert(1)</script> | [click](javascript:x)\n# Title",
        "model": {"path": "/home/me/models/tiny", "dtype": "float32"},
        "method": {"name": "dual_lora", "r": 4},
        "data": {"train": "/home/me/train.json", "test": "/home/me/test.json"},
        "train": {"steps": 3, "batch_size": 4, "learning_rate": 0.01},
        "evaluate": {"tasks": ["choice", "loss"]},
    }
    result = {"loss": 0.51234, "validation_loss": None, "steps": 3, "examples": 1048, "left_out": 2, "seconds": 75.0}
    result |= {"trainable_parameters": 2048, "all_parameters": 100_000, "adapter_bytes": 9000}
    result |= {"tokens_per_second": 1234.5, "peak_memory": 3_000_000_000}
    record = {"rows_at_once": 4, "processes": 1, "device": "a CPU", "versions": FIXED["versions"], "result": result}
    (folder / "adapter").mkdir(parents=True)
    write_json(folder / "record.json", record | {"classes": []})
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    return RunFolder(folder), build_recipe(values)


def test_a_card(golden, tmp_path):
    folder, recipe = finished_run(tmp_path / "run")
    card = hub_card.write_card(folder, recipe).read_text()
    golden("card.md", card)
    metrics = {"base": {"choice": 0.5, "loss": 2.0}, "tuned": {"choice": 0.75, "loss": 1.25}}
    measured = {"metrics": metrics, "split": "test", "examples": 16, "tasks": ["choice", "loss"]}
    (tmp_path / "run" / "evaluation" / "test-choice-loss").mkdir(parents=True)
    write_json(tmp_path / "run" / "evaluation" / "test-choice-loss" / "result.json", measured)
    card = hub_card.write_card(folder, recipe, base_model="org/tiny", licence="apache-2.0").read_text()
    golden("card-with-scores.md", card)


def test_a_results_json(golden, tmp_path):
    results = made(tmp_path, {"lora": 0.7, "dual_lora": 0.85}, diverged=[("lora", 3)], reference="lora", margin=0.02)
    lines = []
    for part, value in rounded(results).items():
        rows = value if isinstance(value, list) else [value]
        lines += [f"{part}: {json_text(row)}" for row in rows] or [f"{part}: none"]
    golden("results.txt", "\n".join(lines) + "\n")


def rounded(value):
    """To eight digits: the order of a sum is each processor's own."""
    if isinstance(value, dict):
        return {name: rounded(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(inner) for inner in value]
    return float(f"{value:.8g}") if isinstance(value, float) else value


def test_a_report(golden, tmp_path):
    folder = report_material.write(tmp_path / "work")
    report([folder], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8").replace(f"{folder}/", "")
    golden("report.txt", re.sub(r"Made on \S+ at \S+", f"Made on {FIXED['at']}", words(page)))
    charts = report_material.data_of(page)["charts"].items()
    golden("report-charts.json", "".join(json.dumps({name: list(map(view, chart))}) + "\n" for name, chart in charts))


def words(page):
    """The page's text, a line each for a paragraph or a row; of ten rows or more the first and the last."""
    page = re.sub(r"<(script|style|select|nav)\b.*?</\1>|<svg\b.*?</svg>", "", page, flags=re.S)
    page = re.sub(r"<tbody>(.*?)</tbody>", lambda body: few(body[1]), page, flags=re.S)
    page = re.sub(r"<th\b.*?</th>", lambda head: re.sub(r"<[^>]+>", " ", head[0]) + " | ", page, flags=re.S)
    page = re.sub(r"</td>", " | ", re.sub(r"\s+", " ", page))
    page = re.sub(r"<(/(p|h[1-6]|tr|li|figcaption|summary|caption|div|section)|br)\b[^>]*>", "\n", page)
    lines = [line.strip() for line in re.sub(r"<[^>]+>", "", page).split("\n")]
    return "\n".join(line for line in lines if line not in ("", *BUTTONS)) + "\n"


def few(body):
    rows = re.findall(r"<tr\b.*?</tr>", body, flags=re.S)
    return body if len(rows) < 10 else f"{rows[0]}{rows[-1]}<tr><td>{len(rows)} rows</td></tr>"


def view(chart):
    """A view without its drawing: the rows of its table are the first and the last."""
    rows = chart.get("rows", [])
    kept = {name: chart[name] for name in ("form", "head", "legend") if name in chart}
    return kept | {"rows": len(rows), "first": rows[:1], "last": rows[-1:]}
