"""``python -m atdiag``."""

import subprocess
import sys
from pathlib import Path

import pytest

import atdiag


@pytest.mark.parametrize("option", [[], ["-P"]])
def test_packages_in_the_working_folder_do_not_replace_ours(folder, option):
    for name in ("ablations", "figures"):
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text("raise RuntimeError('not ours')")
    done = subprocess.run([sys.executable, *option, "-m", "atdiag", "--help"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "reinit" in done.stdout


def test_a_checkout_need_not_be_installed(monkeypatch):
    monkeypatch.chdir(Path(atdiag.__file__).parents[1])
    code = "import runpy, sys; sys.argv = ['atdiag', '--version']; runpy.run_module('atdiag', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
