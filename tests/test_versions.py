"""What pyproject.toml promises can be installed: the resolver is asked for every Python that it names, with every extra."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
VERSIONS = [c.rpartition(" ")[2] for c in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", c)]


def resolved(python: str, folder: Path) -> subprocess.CompletedProcess:
    "What can be had for all extras together can be had for each."
    command = [Path(sys.executable).with_name("uv"), "pip", "compile", ROOT / "pyproject.toml"]
    command += ["--quiet", "--only-binary", ":all:", "--python-version", python, "--all-extras"]
    command += ["--output-file", folder / "resolved.txt"]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder)


@pytest.mark.parametrize("python", VERSIONS)
def test_what_is_promised_can_be_installed(python: str, tmp_path: Path) -> None:
    done = resolved(python, tmp_path)
    assert done.returncode == 0, done.stderr
    there = (tmp_path / "resolved.txt").read_text()
    for name in ("pydantic", "kaggle", "ray", "openvino", "optuna", "universal-pathlib", "wandb"):
        assert f"\n{name}==" in f"\n{there}".lower(), name


def test_no_older_one_is_promised(tmp_path: Path) -> None:
    lowest = min(VERSIONS, key=lambda v: int(v.partition(".")[2]))
    assert PROJECT["requires-python"] == f">={lowest}"
    older = f"3.{int(lowest.partition('.')[2]) - 1}"
    assert resolved(older, tmp_path).returncode != 0, "it could be promised too"
    for file in ("README.md", "Makefile"):
        assert f"Python {lowest} or newer" in (ROOT / file).read_text(), file
