"""The command without the laboratory's packages says what to install."""

import subprocess
import sys

WITHOUT = """
import sys
sys.modules[{name!r}] = None
from dual_lora.lab.entry import main
sys.argv = ["dual-lora", "--help"]
main()
"""


def run(name):
    return subprocess.run([sys.executable, "-c", WITHOUT.format(name=name)], capture_output=True, text=True)


def test_a_missing_package_is_one_sentence():
    done = run("cyclopts")
    assert done.returncode == 1
    assert done.stderr.startswith("dual-lora: the command line needs the package cyclopts")
    assert "[lab]" in done.stderr
    assert "Traceback" not in done.stderr


def test_with_all_packages_the_command_answers():
    done = run("no_such_package")
    assert done.returncode == 0
    assert "Usage: dual-lora" in done.stdout
