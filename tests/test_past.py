"""What mlkit wrote on an earlier day is opened, verified, served and gone on with: bundles, runs, a kernel notebook.

`past.tar.xz` is never made anew: it holds a bundle of each kind, a run of `kernels/train`, a fit that was stopped, the
notebook itself, and what the server of that day answered (models small, weights rounded to fifteen steps so that
they compress). What a later version writes differently is added beside it.
"""

import base64
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import warm
from changed import MODULES, named
from conftest import Server, running

import mlkit
from mlkit.bundle.manifest import verify_bundle
from mlkit.bundle.registry import Registry
from mlkit.config import load_settings
from mlkit.inference.predictor import Predictor
from mlkit.kaggle.wheels import build_wheel
from mlkit.runs.execute import run_key
from mlkit.runs.record import read_run

KINDS = (
    "image-label",
    "image-labels",
    "image-mask",
    "image-numbers",
    "table-label",
    "table-numbers",
    "text-label",
)
# a process that has mlkit writes what each Learner says of the golden inputs of its bundle
LEARNERS = """
import json, sys
from pathlib import Path
import fastai.callback.all
import numpy as np
import pandas as pd
from fastai.learner import load_learner
from fastai.tabular.core import add_datepart
from mlkit.tasks.task import task_of
for folder in map(Path, sys.argv[1:]):
    learn, files = load_learner(folder / "learner.pkl"), sorted(folder.glob("golden/*"))
    if files[0].suffix == ".json":
        rows = pd.DataFrame([json.loads(f.read_text()) for f in files])
        rows["sold"] = pd.to_datetime(rows["sold"]).astype("datetime64[ns]")
        with learn.no_bar():
            out = learn.get_preds(dl=learn.dls.test_dl(add_datepart(rows, "sold", "sold_")))[0].numpy()
    else:
        items = files if files[0].suffix == ".png" else [f.read_text("utf-8-sig") for f in files]
        out = task_of(learn).data.answers(learn, items)
    np.save(folder.parent.name, out)
"""


@pytest.fixture(scope="module")
def server(past: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(past / "models", tmp_path_factory.mktemp("server")) as one:
        yield one


def sent(file: Path) -> dict[str, Any]:
    "Return a golden input as JSON takes it."
    data = file.read_bytes()
    if file.suffix == ".png":
        return {"b64": base64.b64encode(data).decode()}
    return json.loads(data) if file.suffix == ".json" else {"text": data.decode()}  # with its mark


def command(folder: Path, *words: object) -> subprocess.CompletedProcess:
    how = {"cwd": folder, "capture_output": True, "text": True, "timeout": 300}
    done = warm.run([sys.executable, "-m", "mlkit", *map(str, words)], **how)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_there_is_one_of_each_kind(past: Path) -> None:
    assert tuple(sorted(p.name for p in (past / "models").iterdir())) == KINDS
    assert all(v.production for v in Registry(past / "models").list())


@pytest.mark.parametrize("kind", KINDS)
def test_a_bundle_is_whole_and_answers(past: Path, kind: str) -> None:
    verify_bundle(past / "models" / kind / "1")
    predictor = Predictor(past / "models" / kind / "1")
    for golden in predictor.manifest.golden:
        asked = predictor.reader.from_file((predictor.folder / golden.file).read_bytes())
        row = np.asarray(next(iter(predictor.rows([asked])))[0])
        if kind != "image-mask":  # whose golden says what share of the pixels is each class's
            assert row == pytest.approx(np.array(golden.probabilities), rel=1e-6, abs=1e-6)
    predictor.check_golden()


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_answered_over_http_as_then(past: Path, server: Server, kind: str) -> None:
    then = json.loads((past / "answers.json").read_text())[kind]
    files = [past / "models" / kind / "1/golden" / name for name in then]
    where, body = f"{server.url}/v1/models/{kind}/predict", {"instances": list(map(sent, files))}
    now = httpx.post(where, json=body, timeout=30).raise_for_status().json()["predictions"]
    for said, answer in zip(then.values(), now, strict=True):
        assert [*flat(answer)] == [*flat(said)]
        for leaf, value in flat(said).items():
            number = isinstance(value, float)
            assert flat(answer)[leaf] == (pytest.approx(value, rel=1e-6) if number else value), leaf


def flat(document: Any, key: str = "") -> dict[str, Any]:
    "Return the leaves of a document by their path."
    if not isinstance(document, dict | list):
        return {key: document}
    pairs = document.items() if isinstance(document, dict) else enumerate(document)
    return {k: v for name, one in pairs for k, v in flat(one, f"{key}.{name}").items()}


def test_the_learners_load_where_there_is_mlkit(past: Path, tmp_path: Path) -> None:
    folders = [past / "models" / kind / "1" for kind in KINDS]
    how = {"cwd": tmp_path, "capture_output": True, "text": True, "timeout": 300}
    done = warm.run([sys.executable, "-W", "ignore", "-c", LEARNERS, *folders], **how)
    assert done.returncode == 0, done.stderr
    for kind in KINDS:
        predictor = Predictor(past / "models" / kind / "1")
        asked = [(predictor.folder / g.file).read_bytes() for g in predictor.manifest.golden]
        rows = predictor.rows([predictor.reader.from_file(data) for data in asked])
        expected = np.array([row for row, _ in rows])
        assert np.allclose(np.load(tmp_path / f"{kind}.npy"), expected, rtol=1e-5, atol=1e-5), kind


def test_its_runs_are_read(past: Path) -> None:
    told = json.loads(command(past, "runs", "--json").stdout)
    assert [r["status"] for r in told] == ["done", "done"]
    assert all(0 < r["metrics"]["accuracy"] <= 1 for r in told)
    (kernel,) = (r for r in told if r["kind"] == "kept")
    assert read_run(past / "runs" / kernel["id"]).parameters["target"] == "bright"


def test_a_stopped_fit_goes_on(past: Path, tmp_path: Path) -> None:
    (stopped,) = (past / "runs").glob("*/checkpoints/last.pth")
    shutil.copy(past / "gems.csv", tmp_path / "gems.csv")
    same = ("--set", "data.ignore=price", "--set", "train.minutes=0", "--set", "train.epochs=40")
    first = ("train", "gems.csv", "--name", "kept", "--set", "data.target=bright", *same)
    done = command(tmp_path, *first, "--set", "train.lr=0.01", "--set", f"train.resume={stopped}")
    before = [json.loads(s) for s in (stopped.parents[1] / "events.jsonl").read_text().splitlines()]
    epochs = sum(e["event"] == "epoch" for e in before)
    shown = re.findall(r"^epoch (\d+)/40", done.stdout + done.stderr, re.M)
    assert 0 < epochs < 40 and int(shown[0]) == epochs + 1


def test_a_kept_kernel_notebook_runs(past: Path, tmp_path: Path) -> None:
    for name in ("gems.csv", "kept.ipynb"):
        shutil.copy(past / name, tmp_path / name)
    pairs = {"source": "gems.csv", "target": "bright", "name": "kept", "epochs": 1, "lr": 0.01}
    words = [w for name, value in pairs.items() for w in ("-p", name, value)]
    done = command(tmp_path, "run", "kept.ipynb", *words, "--set", "data.ignore=price", "--json")
    (record,) = json.loads(done.stdout)
    assert record["status"] == "done" and Registry(tmp_path / "models").versions("kept")


# 20 s: every module of the package is imported once
def test_the_wheel_for_kaggle_holds_every_wing(tmp_path: Path) -> None:
    wheel = build_wheel(tmp_path)
    how = {"capture_output": True, "text": True, "cwd": tmp_path}
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "-q"]
    subprocess.run([*install, "--target", tmp_path / "aside", wheel], check=True, **how)
    names = sorted(f"mlkit.{named(m)}" for m in MODULES if m.name != "__main__.py")
    code = (
        "import importlib, sys, mlkit\n"
        "for name in sys.argv[1:]: print(importlib.import_module(name).__file__)"
    )
    clean = dict(os.environ) | {"PYTHONPATH": str(tmp_path / "aside")}
    done = warm.run([sys.executable, "-W", "ignore", "-c", code, *names], env=clean, **how)
    assert done.returncode == 0, done.stderr
    files = done.stdout.split()
    assert len(files) == len(names) and all(f.startswith(str(tmp_path / "aside")) for f in files)


def test_a_change_in_a_wing_changes_the_key_of_a_run(
    tmp_path: Path, past: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(Path(mlkit.__file__).parent, tmp_path / "mlkit")
    monkeypatch.setattr(mlkit, "__file__", str(tmp_path / "mlkit/__init__.py"))

    def key() -> str:
        return run_key(past / "kept.ipynb", {}, load_settings())

    first = key()
    assert key() == first
    with open(tmp_path / "mlkit/inference/masks.py", "a") as module:
        module.write("\n")
    assert key() != first
