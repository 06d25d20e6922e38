"""Every notebook runs, and each that exports a module checks something."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
CHECK = re.compile(r"\b(assert|test_eq|test_close|expect_fail)\b")


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_runs(notebook: Path, tmp_path: Path) -> None:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MLKIT_", "PYTEST"))}
    command = [Path(sys.executable).with_name("nbdev-test"), notebook, "--n-workers", "0"]
    done = subprocess.run(command, cwd=ROOT, env=clean, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_checks_something(notebook: Path) -> None:
    text = notebook.read_text(encoding="utf-8")
    if "default_exp" in text:
        code = "".join(
            c
            for c in re.findall(r'"cell_type": "code".*?\]\n  \}', text, re.S)
            if "#| export" not in c
        )
        assert CHECK.search(code), "no check outside of the exported cells"
