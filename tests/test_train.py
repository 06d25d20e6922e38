"""Training across processes: a killed fit goes on, an exported Learner loads where there is no mlkit."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import warm

from mlkit.runs.record import list_runs, read_history

FIT = """
import os, signal, sys
import numpy as np
from fastai.callback.core import Callback
from mlkit.config import load_settings
from mlkit.model.vision import learner
from mlkit.preprocess.image_audit import audit
from mlkit.preprocess.split import split
from mlkit.preprocess.vision import dataloaders
from mlkit.runs.record import Run
from mlkit.train.fit import fit

class Kill(Callback):
    def before_batch(self):
        if self.training and (self.learn.n_epoch, self.learn.epoch, self.learn.iter) == (3, 1, 5):
            os.kill(os.getpid(), signal.SIGKILL)  # the head's epoch was the first, so this is the third

moment, *assignments = sys.argv[1:]
settings = load_settings(*assignments)
with Run.start(settings) as run:
    parts = split(audit(settings.data.source, settings), settings)
    learn = learner(dataloaders(parts, settings), settings, path=run.folder)
    if moment == "kill":
        learn.add_cb(Kill())
    fit(learn, settings, run)
learn.export(moment + ".pkl")
with learn.no_bar():
    np.save("answers.npy", learn.get_preds()[0].numpy())
    print(*(item[0] for item in learn.dls.valid_ds.items), sep="\\n")
"""
PLAIN = """
import sys
for name in ("mlkit", "mlkit.model.vision", "mlkit.train.fit", "mlkit.preprocess.cache"):
    sys.modules[name] = None
import numpy as np
from fastai.learner import load_learner
learn = load_learner(sys.argv[1])
answers = learn.get_preds(dl=learn.dls.test_dl(sys.stdin.read().split()))[0].numpy()
print(np.abs(answers - np.load("answers.npy")).max())
"""


def python(folder: Path, *words: object, **how: object) -> subprocess.CompletedProcess:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("MLKIT_")}
    command = [sys.executable, *map(str, words)]
    return warm.run(
        command, cwd=folder, env=clean, capture_output=True, text=True, timeout=300, **how
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "Where a body's weights lie, and runs and pictures go."
    folder = tmp_path_factory.mktemp("train")
    torch.manual_seed(0)
    body = timm.create_model("test_resnet", num_classes=0).state_dict()
    torch.save(body, folder / "body.pth")
    return folder


@pytest.fixture(scope="module")
def assignments(folder: Path) -> list[str]:
    given = {
        "data.source": "sklearn:digits",
        "data.size": 32,
        "data.flip": "false",
        "data.exif": "ignore",  # so that fastai opens the images, as they are
        "data.decode": "full",
        "model.name": "digits",
        "model.arch": "test_resnet",
        "model.weights": folder / "body.pth",
        "train.epochs": 4,
        "train.head_epochs": 5,
        "train.calibration": 0,
        "paths.cache": folder / "cache",
    }
    return [f"{k}={v}" for k, v in given.items()]


@pytest.fixture(scope="module")
def whole(folder: Path, assignments: list[str]) -> tuple[Path, str]:
    "The run of a fit that nothing stopped, and the names of its validation pictures."
    done = python(folder, "-c", FIT, folder / "whole", *assignments)
    assert done.returncode == 0, done.stderr
    return list_runs(folder / "runs")[0].folder, done.stdout


def test_exported_learner_loads_without_mlkit(folder: Path, whole: tuple[Path, str]) -> None:
    done = python(folder, "-c", PLAIN, folder / "whole.pkl", input=whole[1])
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1e-6


def test_a_killed_fit_goes_on_to_the_last_digit(
    folder: Path, assignments: list[str], whole: tuple[Path, str]
) -> None:
    killed = python(folder, "-c", FIT, "kill", *assignments)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    stopped = list_runs(folder / "runs")[0]
    assert stopped.status == "died" and len(read_history(stopped.folder)) == 2
    where = f"paths.cache={folder / 'cache'}"
    done = python(folder, "-m", "mlkit", "train", "--resume", stopped.id, "--set", where)
    assert done.returncode == 0, done.stderr
    resumed = list_runs(folder / "runs")[0].folder
    assert resumed != stopped.folder
    histories = [[{**r, "seconds": 0} for r in read_history(f)] for f in (whole[0], resumed)]
    assert len(histories[0]) == 4 and histories[0] == histories[1]
    states = [
        torch.load(f / "checkpoints/best.pth", weights_only=True) for f in (whole[0], resumed)
    ]
    assert all(torch.equal(v, states[1][k]) for k, v in states[0].items())
    assert "train.resume" not in (resumed / "report/card.md").read_text()


def test_nothing_to_resume(folder: Path, whole: tuple[Path, str]) -> None:
    for word, said in (("absent", "there is no run 'absent'"), (whole[0].name, "has ended")):
        done = python(folder, "-m", "mlkit", "train", "--resume", word)
        assert done.returncode == 1 and said in done.stderr
        assert not re.search("Traceback", done.stderr)
