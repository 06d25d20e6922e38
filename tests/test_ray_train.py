"""A fit shared by processes, of this machine and of a cluster: two do what one does with the whole batch."""

import csv
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import warm

from mlkit.runs.record import list_runs, read_history

ROOT = Path(__file__).parents[1]
TOPICS = {"cooking": "oven butter flour onion", "sailing": "harbour mast anchor keel"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "Texts of two topics, and mlkit without dropout, whose masks would differ from process to process."
    folder, rng = tmp_path_factory.mktemp("several"), random.Random(0)
    with open(folder / "texts.csv", "w", newline="") as f:
        table = csv.writer(f)
        table.writerow(["text", "label"])
        for i in range(300):
            words = [*TOPICS[list(TOPICS)[i % 2]].split(), *"the a of and it was".split()]
            table.writerow([" ".join(rng.choices(words, k=12)), list(TOPICS)[i % 2]])
    shutil.copytree(ROOT / "mlkit", folder / "mlkit", ignore=shutil.ignore_patterns("__pycache__"))
    module = folder / "mlkit/model/text.py"
    text = module.read_text()
    assert "_DROPOUT = 100, 0.5" in text
    module.write_text(text.replace("_DROPOUT = 100, 0.5", "_DROPOUT = 100, 0.0"))
    return folder


def train(folder: Path, *words: str, **settings: object) -> subprocess.CompletedProcess:
    given = {
        "data.batch_size": 32,
        "train.epochs": 3,
        "train.calibration": 0,
        "paths.cache": folder / "cache",
    } | {k.replace("__", "."): v for k, v in settings.items()}
    sets = [w for k, v in given.items() for w in ("--set", f"{k}={v}")]
    clean = {k: v for k, v in os.environ.items() if not k.startswith("MLKIT_")}
    return warm.run(
        [sys.executable, "-m", "mlkit", "train", "texts.csv", "--name", "topics", *words, *sets],
        cwd=folder,
        env=clean | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def losses(folder: Path, done: subprocess.CompletedProcess) -> list[float]:
    "Training and validation losses of the newest run."
    assert done.returncode == 0, done.stderr + done.stdout
    rows = read_history(list_runs(folder / "runs")[0].folder)
    return [row[name] for row in rows for name in ("train_loss", "valid_loss")]


@pytest.fixture(scope="module")
def alone(folder: Path) -> list[float]:
    return losses(folder, train(folder, train__world_size=1))


def test_two_processes_do_what_one_does(folder: Path, alone: list[float]) -> None:
    # Sums are taken in another order, which is 1e-7 of a step, and Adam divides by what may be small.
    # Without averaged gradients the losses differ in the third digit.
    found = losses(folder, train(folder, train__world_size=2))
    assert found == pytest.approx(alone, rel=1e-5)


# 50 s: two workers import fastai, and wait for one another at each step
def test_two_workers_of_a_cluster_do_what_one_does(
    folder: Path, alone: list[float], cluster: Any
) -> None:
    words = "--on", "ray", "--address", cluster.address
    found = losses(folder, train(folder, *words, train__world_size=2))
    assert found == pytest.approx(alone, rel=1e-5)


def test_what_fails_in_a_process_is_told(folder: Path) -> None:
    done = train(folder, train__world_size=2, data__batch_size=1)
    said = done.stderr.splitlines()[-1]
    assert done.returncode == 1
    assert said.startswith("error: a batch of 1 cannot be shared by 2 processes"), done.stderr
    assert "data.batch_size" in said
