"""The kernel notebook runs in every way that it is meant to, and gives the same numbers for the same seed."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import warm
from PIL import Image

KERNEL = Path(__file__).parents[1] / "kernels" / "train" / "train.ipynb"
BIN = Path(sys.executable).parent
PARAMETERS = {"arch": "test_resnet", "epochs": "2", "seed": "7"}


def run(command: list[str | Path], cwd: Path, **variables: str) -> subprocess.CompletedProcess:
    "Run it; `mlkit` as the first word is the command that has its libraries already."
    clean = {k: v for k, v in os.environ.items() if not k.startswith("MLKIT_")}
    own = {
        "MLKIT_PATHS__CACHE": str(cwd / "cache"),
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
    }
    how = {"cwd": cwd, "env": clean | own | variables, "capture_output": True, "text": True}
    if command[0] == "mlkit":
        return warm.run([sys.executable, "-m", *command], timeout=500, **how)
    return subprocess.run(command, timeout=500, **how)


def accuracy(notebook: Path) -> str:
    "Return the accuracy that the executed notebook shows."
    outputs = (o for c in nbformat.read(notebook, 4).cells for o in c.get("outputs", []))
    shown = "".join(o.get("text", "") for o in outputs)
    return re.search(r"accuracy ([\d.]+) \(.*\) on \d+ examples", shown)[1]


# 25 s: a fit with its learning rate, its plots and its export
@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    "`mlkit run` from a folder that has nothing to do with the repository."
    folder = tmp_path_factory.mktemp("elsewhere")
    pairs = [word for pair in PARAMETERS.items() for word in ("-p", *pair)]
    done = run([BIN / "mlkit", "run", KERNEL, *pairs, "--json"], folder)
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout)[0]


def test_mlkit_run_keeps_everything_in_one_run(executed: tuple[Path, dict]) -> None:
    folder, record = executed
    kept = Path(record["folder"])
    assert record["status"] == "done" and kept.parent == folder / "runs"
    assert [p.name for p in kept.parent.iterdir()] == [kept.name], (
        "the notebook's run is the command's run"
    )
    assert record["metrics"]["accuracy"] == pytest.approx(
        float(accuracy(kept / "notebook.ipynb")), abs=5e-5
    )
    outputs = {f["name"] for f in json.loads((kept / "outputs.json").read_text())["files"]}
    assert {"bundle/manifest.json", "bundle/model.onnx", "report/card.md", "split.csv"} <= outputs
    assert "Executing" in (kept / "log.txt").read_text()
    assert record["parameters"] == {"arch": "test_resnet", "epochs": 2, "seed": 7}


def test_executed_notebook_shows_pictures(executed: tuple[Path, dict]) -> None:
    cells = nbformat.read(Path(executed[1]["folder"]) / "notebook.ipynb", 4).cells
    pictures = [o for c in cells for o in c.get("outputs", []) if "image/png" in o.get("data", {})]
    assert len(pictures) >= 5, "batch, learning rate, history, confusion, top losses"


# 50 s: the same two times more, once in a kernel that imports all by itself
def test_papermill_and_jupyter_execute_agree(executed: tuple[Path, dict], tmp_path: Path) -> None:
    "The same seed gives the same accuracy by plain papermill and by jupyter execute."
    plain = tmp_path / "plain.ipynb"
    pairs = [word for pair in PARAMETERS.items() for word in ("-p", *pair)]
    done = run([BIN / "papermill", KERNEL, plain, *pairs], tmp_path)
    assert done.returncode == 0, done.stderr
    prepared = tmp_path / "prepared.ipynb"
    done = run([BIN / "papermill", "--prepare-only", KERNEL, prepared, *pairs], tmp_path)
    assert done.returncode == 0, done.stderr
    cold = {"JUPYTER_PATH": ""}  # as a person begins it: a kernel that imports all by itself
    done = run([BIN / "jupyter", "execute", "--inplace", prepared], tmp_path, **cold)
    assert done.returncode == 0, done.stderr
    ours = accuracy(Path(executed[1]["folder"]) / "notebook.ipynb")
    assert accuracy(plain) == accuracy(prepared) == ours


def test_wrong_parameters_start_nothing(tmp_path: Path) -> None:
    done = run(["mlkit", "run", KERNEL, "-p", "epoch", "1", "-p", "size", "big"], tmp_path)
    assert done.returncode == 1
    assert "did you mean 'epochs'" in done.stderr and "size = 'big'" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_failing_notebook_is_kept(tmp_path: Path) -> None:
    done = run(["mlkit", "run", KERNEL, "-p", "source", "absent"], tmp_path)
    assert done.returncode == 1
    assert "cell 3 failed with DataError" in done.stderr and "does not exist" in done.stderr
    (kept,) = (tmp_path / "runs").iterdir()
    assert "does not exist" in (kept / "notebook.ipynb").read_text()


GRID = [
    "source = 'pictures'\nlr = 0.1\nseed = 1",
    """
from mlkit.config import load_settings
from mlkit.runs.record import Run
settings = load_settings(source=source)
with Run.start(settings) as run:
    run.log("metrics", accuracy=1 - lr)
    if lr > 0.5:
        raise ValueError("too fast")
    from mlkit.preprocess.image_audit import audit
    run.log("data", fingerprint=audit(source, settings).fingerprint)
""",
]


def test_grid_does_again_only_what_failed_or_changed(tmp_path: Path) -> None:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in GRID])
    notebook.cells[0].metadata["tags"] = ["parameters"]
    notebook.metadata["kernelspec"] = {
        "name": "python3",
        "language": "python",
        "display_name": "Python 3",
    }
    nbformat.write(notebook, tmp_path / "grid.ipynb")
    for i in range(12):
        place = tmp_path / "pictures" / "ab"[i % 2] / f"{i}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), i).save(place)
    command = ["mlkit", "run", "grid.ipynb", "--grid", "lr=0.2,0.9", "--jobs", "2"]

    def ids() -> tuple[list[str], list[str]]:
        done = run([*command, "--json"], tmp_path)
        records = json.loads(done.stdout)
        assert done.returncode == 1 and "too fast" in records[1]["error"], done.stderr
        assert [r["parameters"]["lr"] for r in records] == [0.2, 0.9]
        assert [r["status"] for r in records] == ["done", "failed"]
        assert records[1]["failed_cell"] == 2
        return [records[0]["id"]], [records[1]["id"]]

    done, failed = ids()
    kept, again = ids()
    assert kept == done and again != failed
    (tmp_path / "pictures/a/0.png").write_bytes((tmp_path / "pictures/a/2.png").read_bytes())
    assert not set(ids()[0]) & set(done)

    table = run(["mlkit", "runs", "--plot", "runs.png"], tmp_path)
    assert table.returncode == 1 and "no run has 'accuracy'" in table.stderr  # no epochs were told
    scores = [float(x) for x in re.findall(r"│ (0\.\d{4}) +│$", table.stdout, re.M)]
    assert len(scores) == 5 and scores == sorted(scores, reverse=True)
