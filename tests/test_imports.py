"""Imports point inwards, `import dual_lora` is light, and every module imports on its own, without the extras.

Tests import no other tests: what they share lies in modules beside them.
"""

import ast
import graphlib
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import dual_lora
from dual_lora._warning import warn
from forked import before_peft

ROOT = Path(dual_lora.__file__).parent
MODULES = sorted(ROOT.rglob("*.py"))
RINGS = ["core", "verify", "method", "serving", "lab"]  # from the inside out

# What each ring may import beyond the standard library and the rings inside it.
ALLOWED = {
    "core": {"torch", "triton"},
    # The last ones are imported where a user's model or loop has brought them.
    "method": {
        "torch",
        "peft",
        "transformers",
        "safetensors",
        "huggingface_hub",
        "deepspeed",
        "bitsandbytes",
        "torchao",
        "hqq",
        "diffusers",
    },
    "verify": {"torch", "peft", "transformers", "safetensors"},
    # vLLM brings the last two, and runs what imports them.
    "serving": {"torch", "peft", "transformers", "safetensors", "huggingface_hub", "vllm", "fastapi"},
    "": set(),
}
EXTRAS = [  # without accelerate and yaml, which PEFT itself needs
    "bitsandbytes",
    "cyclopts",
    "datasets",
    "deepspeed",
    "gguf",
    "hqq",
    "pydantic",
    "rich",
    "scipy",
    "sklearn",
    "torchao",
    "triton",
    "trl",
]


def dotted(path):
    return ".".join(("dual_lora", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")


def ring(name):
    """core, method, verify, serving or lab; "" for the package's own files."""
    parts = name.split(".")
    if len(parts) < 2:
        return ""
    return parts[1] if parts[1] in RINGS else ""


def imports(path):
    """Absolute names of everything that a file imports, wherever in the file it stands."""
    package = dotted(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{stem}.{alias.name}" for alias in node.names)


def test_the_walk_sees_the_imports():
    seen = set(imports(ROOT / "method" / "layer.py"))
    assert {"torch", "dual_lora.core.dispatch", "dual_lora.core.op.dual_lora_linear"} <= seen
    assert {ring(dotted(path)) for path in MODULES} == {*RINGS, ""}


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_imports_point_inwards(path):
    own = ring(dotted(path))
    for name in imports(path):
        if name.split(".")[0] == "dual_lora":
            other = ring(name)
            # The package's own file lists names of the rings inside lab, and no ring looks at it but lab. All may
            # warn, and try what might never end.
            if own == "":
                assert other != "lab", f"{dotted(path)} imports {name}"
            elif own != "lab" and not name.startswith(("dual_lora._warning.", "dual_lora._trial.")):
                assert other in RINGS[: RINGS.index(own) + 1], f"{dotted(path)} imports {name}: outwards"
        elif own != "lab":
            top = name.split(".")[0]
            known = top in sys.stdlib_module_names or top in ALLOWED[own]
            assert known, f"{dotted(path)} imports {name}, which its ring may not"


def module_of(name):
    """The module that an import of `name` takes something from: itself, or what holds it; None outside the package."""
    while name and name not in FILES:
        name = name.rpartition(".")[0]
    return name


FILES = {dotted(path): path for path in MODULES}
READ_OF = {name: {module_of(other) for other in imports(path)} - {"", name} for name, path in FILES.items()}


def test_no_module_reads_itself_in_a_circle():
    """Wherever the import stands, for types alone as well. (A package's own file hands on what its modules make.)"""
    assert "dual_lora.core.reference" in READ_OF["dual_lora.core.blocked"]
    modules = {name: other for name, other in READ_OF.items() if FILES[name].name != "__init__.py"}
    assert list(graphlib.TopologicalSorter(modules).static_order())


def test_no_folder_of_the_laboratory_reads_itself_in_a_circle():
    """Of two folders one lies below the other, so that a reader who goes down never meets the first one again."""
    folders = {path.name: set() for path in (ROOT / "lab").iterdir() if path.is_dir()}
    for name, read in READ_OF.items():
        if (one := lab_folder(name)) in folders:
            folders[one] |= {other for other in map(lab_folder, read) if other in folders} - {one}
    assert "files" in folders["run"]
    assert list(graphlib.TopologicalSorter(folders).static_order())


def lab_folder(name):
    """run, study, …: the folder of the laboratory that a module lies in."""
    parts = (name or "").split(".")
    return parts[2] if parts[:2] == ["dual_lora", "lab"] and len(parts) > 2 else ""


def test_the_list_of_long_tests_names_tests_that_exist():
    tests = Path(__file__).parent
    for line in (tests / "long.txt").read_text(encoding="utf-8").splitlines():
        file, _, name = line.partition("::")
        function = name.partition("[")[0].rpartition("::")[2]
        assert f"def {function}(" in (tests.parent / file).read_text(encoding="utf-8"), line


def test_no_file_is_long():
    assert not [dotted(path) for path in MODULES if len(path.read_text().splitlines()) > 350]


# Functions that have more than 60 lines, and why.
LONG = {
    "core.kernels.gradient.factor_gradients": "half of it says what is passed to one kernel",
    "core.kernels.gradient.gradient_kernel": "a kernel, which Triton compiles as a whole",
    "lab.judge.judge.judge": "a results.json, field by field",
    "lab.verify.diagnose.judge": "one decision, read from the top to the bottom",
}


def test_no_function_is_long_without_a_reason():
    """A command's parameters are its help: of those the body alone counts."""
    long = set()
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                begin = node.body[0].end_lineno if "commands" in path.parts else node.lineno
                if node.end_lineno - begin >= 60:
                    long.add(f"{dotted(path).removeprefix('dual_lora.')}.{node.name}")
    assert long == set(LONG)


def test_what_studies_are_made_of_knows_no_study():
    for folder in ("files", "data", "recipe", "model", "cost"):
        for path in (ROOT / "lab" / folder).rglob("*.py"):
            studies = [name for name in imports(path) if name.startswith("dual_lora.lab.study")]
            assert not studies, f"{dotted(path)} imports {studies[0]}"


def test_what_verifies_any_method_knows_none():
    for path in (ROOT / "verify").rglob("*.py"):
        others = [name for name in imports(path) if ring(name) not in ("", "verify")]
        assert not others, f"{dotted(path)} imports {others[0]}"


def test_tests_import_no_other_tests():
    files = sorted(Path(__file__).parent.rglob("*.py"))
    tests = {path.stem for path in files if path.name.startswith("test_")}
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
                others = tests.intersection(part for name in names for part in name.split("."))
                assert not others, f"{path.name} imports {others}"


def test_all_warnings_are_of_one_kind():
    """So the command line shows them, and studies keep them, wherever they point and whatever they say."""
    warning = [path for path in MODULES if "warnings.warn" in calls(path)]
    assert warning == [ROOT / "_warning.py"]
    with pytest.warns(dual_lora.DualLoraWarning) as caught:
        warn("Something.", stacklevel=1)
    assert caught[0].filename == __file__


def calls(path):
    """The functions that a file calls, as it writes them."""
    return (ast.unparse(node.func) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))


def test_one_file_builds_models_without_weights():
    built = [path for path in MODULES if "AutoModel" in (text := path.read_text()) and 'device("meta")' in text]
    assert built == [ROOT / "lab" / "model" / "empty.py"]


def test_import_is_light():
    command = [sys.executable, "-c", "import sys, dual_lora; print(*sys.modules)"]
    loaded = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert "dual_lora" in loaded
    heavy = {"torch", "peft", "transformers", "numpy", "triton", "accelerate", "safetensors", "dual_lora.method"}
    assert not heavy & set(loaded)


@pytest.mark.slow
@pytest.mark.parametrize(
    "code",
    [
        "import dual_lora, peft",
        "import peft, dual_lora",
        "import dual_lora; from peft import get_peft_model; import peft",
        "from dual_lora import DualLoraConfig; import peft",
        "import dual_lora.method.layer, peft",
        "import transformers, dual_lora; from peft import PeftConfig; import peft",
    ],
)
def test_the_method_is_registered_in_whatever_order(code):
    before_peft(
        f"{code}\n"
        "kind = peft.utils.PeftType.DUAL_LORA\n"
        "from peft import mapping\n"
        "import dual_lora\n"
        "assert mapping.PEFT_TYPE_TO_CONFIG_MAPPING[kind] is dual_lora.DualLoraConfig\n"
        "assert mapping.PEFT_TYPE_TO_TUNER_MAPPING[kind] is dual_lora.DualLoraModel\n"
        "assert mapping.PEFT_TYPE_TO_PREFIX_MAPPING[kind] == 'dual_lora_'\n"
        "assert peft.get_peft_config({'peft_type': 'DUAL_LORA', 'r': 4}).r1 == 2\n"
    )


@pytest.mark.slow
def test_every_module_can_be_the_first_one():
    """Whoever imports PEFT first has the method registered there and then, in the middle of that module's own import.

    That asks again only for what `method` reads, whose own modules import PEFT first: one of them stands for all, and
    two that a server begins with for `serving`, which `method` does not read (`test_imports_point_inwards`).
    """
    read, names = {"dual_lora.method.registration"}, set()
    while read - names:
        names |= read
        read = {other for name in names for other in READ_OF[name] if other}
    names = {name for name in names if ring(name) in ("", "verify")}
    assert {"dual_lora._warning", "dual_lora.verify.numbers"} <= names
    for name in sorted(
        names | {f"dual_lora.{name}" for name in ("method.layer", "serving.vllm", "serving.vllm_endpoint")}
    ):
        before_peft(f"import {name}, peft\npeft.PeftType.DUAL_LORA")


def test_registering_twice_is_harmless():
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from peft.utils import PeftType

    from dual_lora.method.registration import register

    before, members = dict(PEFT_TYPE_TO_CONFIG_MAPPING), list(PeftType)
    register()
    assert before == PEFT_TYPE_TO_CONFIG_MAPPING
    assert members == list(PeftType)


@pytest.mark.slow
def test_a_method_of_that_name_in_peft_itself_is_left_alone():
    before_peft(
        "import warnings\n"
        "from peft.utils import PeftType\n"
        "from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING\n"
        "import peft\n"
        "from dual_lora.method import registration\n"
        "kind = PeftType.DUAL_LORA\n"
        "theirs = PEFT_TYPE_TO_TUNER_MAPPING[kind] = peft.LoraModel\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    registration.register()\n"
        "assert 'PEFT has its own method DUAL_LORA' in str(caught[0].message), caught\n"
        "assert PEFT_TYPE_TO_TUNER_MAPPING[kind] is theirs\n"
    )


def test_public_names():
    """Adding, renaming or removing a public name is a decision: it is made here and in `__init__`."""
    assert sorted(dual_lora.__all__) == [
        "Adapter",
        "DualLoraCallback",
        "DualLoraConfig",
        "DualLoraLayer",
        "DualLoraModel",
        "DualLoraWarning",
        "Factors",
        "Form",
        "VerifyAdapter",
        "__version__",
        "composed_weights",
        "convert_to_lora",
        "count_step",
        "decompositions",
        "delta_weight",
        "dual_lora_linear",
        "fuse",
        "grad_scaler",
        "save_as_lora",
        "unfuse",
    ]
    assert dir(dual_lora) == sorted(dual_lora.__all__)
    for name in dual_lora.__all__:
        assert getattr(dual_lora, name) is not None
        assert name == "__version__" or getattr(dual_lora, name).__doc__, f"{name} has no docstring"
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = dual_lora.nothing


def test_version_is_the_installed_one():
    from importlib.metadata import version

    assert dual_lora.__version__ == version("dual_lora")


@pytest.mark.slow
def test_core_and_method_import_without_the_extras():
    names = [dotted(p) for p in MODULES if ring(dotted(p)) != "lab" and "kernels" not in p.parts]
    before_peft(
        "import sys\n"
        f"sys.modules.update(dict.fromkeys({EXTRAS!r}))\n"  # None: it cannot be imported
        f"for name in {names!r}:\n"
        "    __import__(name)\n"
        f"assert not any(sys.modules[name] for name in {EXTRAS!r})"
    )


@pytest.mark.slow
def test_a_question_for_peft_before_it_is_imported_does_not_lose_the_method():
    ask = "import dual_lora; from importlib.util import find_spec; find_spec('peft'); import peft; "
    assert before_peft(ask + "print('DUAL_LORA' in peft.PeftType.__members__)").split()[-1] == "True"


@pytest.mark.parametrize(
    ("version", "says"),
    [
        ("0.21.2", []),
        ("0.20.0", ["PEFT 0.20.0 is installed, and this version of dual-lora needs 0.21"]),  # by --no-deps
        ("0.22.0.dev0", ["PEFT 0.22.0.dev0 is newer"]),
        ("1.0.0", ["PEFT 1.0.0 is newer"]),
        ("?", []),
    ],
)
def test_a_peft_that_is_too_old_or_that_no_test_has_seen_is_warned_of_once(version, says, monkeypatch):
    import peft

    from dual_lora._tested import check_peft

    monkeypatch.setattr(peft, "__version__", version)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_peft()
    assert len(caught) == len(says)
    assert all(str(each.message).startswith(begin) for each, begin in zip(caught, says, strict=True))


@pytest.mark.slow
def test_the_warning_comes_with_peft_and_before_the_method_is_registered():
    code = (
        "import warnings; warnings.simplefilter('always'); import dual_lora._tested as tested, sys\n"
        "tested.NEWEST_PEFT = (0, 1)\n"
        "from dual_lora.method import registration\n"
    )
    assert before_peft(code).count("is newer than the newest one") == 1


def test_what_is_installed_here_was_tested():
    """Raise `NEWEST_PEFT` with the first PEFT of a new minor version that passes, and name it in the README."""
    from importlib.metadata import version

    from dual_lora._tested import NEWEST_PEFT

    newest = ".".join(map(str, NEWEST_PEFT))
    assert f"peft {newest}" in (ROOT.parents[1] / "README.md").read_text(encoding="utf-8")
    assert tuple(map(int, version("peft").split(".")[:2])) <= NEWEST_PEFT
