"""Every notebook runs, and each that exports a module checks something."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import warm
from changed import NOTEBOOKS, ROOT, chapter_of

TEST = "import sys, nbdev.test; nbdev.test.nbdev_test(sys.argv[1], n_workers=0)"
# under `make coverage` an exported cell runs as the lines of its module that it is
AS_MODULE = """
import re, sys
from pathlib import Path
from execnb.shell import CaptureShell
modules = {}
for module in Path("mlkit").resolve().rglob("*.py"):
    for number, line in enumerate(module.read_text().splitlines(), 1):
        if found := re.match(r"# %% \\S+ #(\\w+)$", line):
            modules[found[1]] = str(module), number
run_cell = CaptureShell.cell
def cell(self, cell, **options):
    source = cell.source
    if cell.get("id") in modules and cell.cell_type == "code":
        module, number = modules[cell.id]
        text = chr(10) * (number - source[: source.index("#| export")].count(chr(10)) - 1) + source
        cell.source = f"exec(compile({text!r}, {module!r}, 'exec'), globals())"
    run_cell(self, cell, **options)
    cell.source = source
CaptureShell.cell = cell
"""
CHECK = re.compile(r"\b(assert|test_eq|test_close|expect_fail)\b")


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=chapter_of)
def test_notebook_runs(notebook: Path, tmp_path: Path) -> None:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MLKIT_", "PYTEST"))}
    program = AS_MODULE + TEST if warm.COUNTED in os.environ else TEST
    command, run = [sys.executable, "-c", program, notebook], warm.run
    if notebook == NOTEBOOKS[0]:  # one as a person does it
        command, run = [Path(sys.executable).with_name("nbdev-test"), notebook], subprocess.run
    done = run(command, cwd=ROOT, env=clean, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=chapter_of)
def test_notebook_checks_something(notebook: Path) -> None:
    text = notebook.read_text(encoding="utf-8")
    if "default_exp" in text:
        code = "".join(
            c
            for c in re.findall(r'"cell_type": "code".*?\]\n  \}', text, re.S)
            if "#| export" not in c
        )
        assert CHECK.search(code), "no check outside of the exported cells"
