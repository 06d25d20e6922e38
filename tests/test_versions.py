"""What pyproject.toml promises can be installed: the resolver is asked for every Python that it names, with every extra."""

import re
import subprocess
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
VERSIONS = [c.rpartition(" ")[2] for c in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", c)]


LOWEST = min(VERSIONS, key=lambda v: int(v.partition(".")[2]))
OLDER = f"3.{int(LOWEST.partition('.')[2]) - 1}"


def resolved(python: str, folder: Path) -> subprocess.CompletedProcess:
    "What can be had for all extras together can be had for each."
    command = [Path(sys.executable).with_name("uv"), "pip", "compile", ROOT / "pyproject.toml"]
    command += ["--quiet", "--only-binary", ":all:", "--python-version", python, "--all-extras"]
    command += ["--output-file", folder / f"{python}.txt"]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder)


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str, str]]:
    "What the resolver says of each Python: its exit code, its errors, the packages. All are asked at once, for it mostly waits."
    folder, asked = tmp_path_factory.mktemp("resolved"), [*VERSIONS, OLDER]
    with ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(partial(resolved, folder=folder), asked))
    files = [folder / f"{python}.txt" for python in asked]
    texts = [file.read_text() if file.exists() else "" for file in files]
    rows = zip(asked, answers, texts, strict=True)
    return {python: (done.returncode, done.stderr, text) for python, done, text in rows}


@pytest.mark.parametrize("python", VERSIONS)
def test_what_is_promised_can_be_installed(python: str, told: dict) -> None:
    code, errors, there = told[python]
    assert code == 0, errors
    for name in ("pydantic", "kaggle", "ray", "openvino", "optuna", "universal-pathlib", "wandb"):
        assert f"\n{name}==" in f"\n{there}".lower(), name


def test_no_older_one_is_promised(told: dict) -> None:
    assert PROJECT["requires-python"] == f">={LOWEST}"
    assert told[OLDER][0] != 0, "it could be promised too"
    for file in ("README.md", "Makefile"):
        assert f"Python {LOWEST} or newer" in (ROOT / file).read_text(), file
