"""A grid and a search, here and on a cluster of three nodes, one of which dies."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import nbformat
import pytest
import warm

HILL = [
    "x = 0.0\npace = 0.0\nside = 'left'",
    """
import os, time
from mlkit.config import load_settings
from mlkit.runs.record import Run
with Run.start(load_settings()) as run:
    if x == 9:
        raise ValueError("too far")
    run.file("kept/place.txt").write_text(os.environ["MLKIT_RUN"])
    for epoch in range(4):
        run.log("epoch", epoch=epoch, accuracy=1 - abs(x - 2) / 10)
        time.sleep(pace)
    run.log("metrics", accuracy=1 - abs(x - 2) / 10)
""",
]


@pytest.fixture
def hill(tmp_path: Path) -> Path:
    "The folder of hill.ipynb, whose accuracy is greatest at x = 2."
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in HILL])
    notebook.cells[0].metadata["tags"] = ["parameters"]
    notebook.metadata["kernelspec"] = {
        "name": "python3",
        "language": "python",
        "display_name": "Python 3",
    }
    nbformat.write(notebook, tmp_path / "hill.ipynb")
    return tmp_path


def begin(folder: Path, *words: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "mlkit", "run", "hill.ipynb", *words]
    env = {k: v for k, v in os.environ.items() if not k.startswith("MLKIT_")}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return warm.Popen(command, cwd=folder, env=env, text=True, **pipes)


def run(folder: Path, *words: str) -> tuple[int, str, str]:
    process = begin(folder, *words)
    out, err = process.communicate(timeout=200)
    return process.returncode, out, err


# 30 s: each command brings workers of its own to life
def test_grid_on_a_cluster(hill: Path, cluster: Any) -> None:
    "Records and outputs are as they are locally; what is done is not done again."
    words = "--grid", "x=2,9,4", "--json", "--on", "ray", "--address", cluster.address
    code, out, err = run(hill, *words)
    first = json.loads(out)
    assert code == 1, err
    assert [r["status"] for r in first] == ["done", "failed", "done"], err
    assert [r["metrics"].get("accuracy") for r in first] == [1.0, None, 0.8]
    assert first[1]["failed_cell"] == 2 and "cell 2 failed with ValueError" in first[1]["error"]
    kept = Path(first[0]["folder"])
    assert kept.parent == hill / "runs"
    there = (kept / "kept/place.txt").read_text()
    assert Path(there).name == kept.name and not Path(there).exists(), "it was done elsewhere"
    assert "Executing" in (kept / "log.txt").read_text()
    cells = nbformat.read(kept / "notebook.ipynb", 4).cells
    assert all(c.metadata.papermill["status"] == "completed" for c in cells)
    lines = (kept / "events.jsonl").read_text().splitlines()
    events = [json.loads(line)["event"] for line in lines]
    assert events[0] == "start" and events[-1] == "end" and events.count("epoch") == 4

    again = json.loads(run(hill, *words)[1])
    assert [a["id"] == b["id"] for a, b in zip(first, again, strict=True)] == [True, False, True]


# 30 s: the death of a node is noticed after seconds, and its run begun again
def test_a_node_dies(hill: Path, cluster: Any) -> None:
    "The grid is complete all the same; the run of the dead node was begun again, elsewhere."
    node = cluster.add_node(num_cpus=1, resources={"doomed": 1})
    words = "--grid", "x=1,2,3,4", "-p", "pace=1", "--json", "--jobs", "4"
    process = begin(hill, *words, "--on", "ray", "--address", cluster.address)
    try:
        until = time.monotonic() + 60
        while sum('"epoch"' in p.read_text() for p in hill.glob("runs/*/events.jsonl")) < 4:
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.1)
    finally:
        cluster.remove_node(node, allow_graceful=False)
    out, err = process.communicate(timeout=100)
    records = json.loads(out)
    assert [r["status"] for r in records] == ["done"] * 4, err
    for r in records:
        events = (Path(r["folder"]) / "events.jsonl").read_text()
        assert events.count('"event": "epoch"') == 4, "what the first attempt told is gone"
    assert max(r["seconds"] for r in records) > min(r["seconds"] for r in records) + 2


SEARCH = "--grid", "x=0..8", "--grid", "side=left,right", "--search", "6"


# on Ray 30 s: six runs, of two seconds so that they can be stopped
@pytest.mark.parametrize("on", ["local", "ray"])
def test_search(hill: Path, on: str, request: pytest.FixtureRequest) -> None:
    "The best is first, a poor run is stopped, and the command that repeats the best is told."
    words = [*SEARCH, "-p", "pace=0.5", "--set", "train.seed=1"]
    if on == "ray":
        words += "--on", "ray", "--address", request.getfixturevalue("cluster").address
    code, out, err = run(hill, *words, "--jobs", "2")
    assert code == 0, err
    shown = re.findall(r"│ (done|stopped) +│.*│ (?:left|right) +│ ([01]\.\d{4})? *│", out)
    scores = [float(s) for status, s in shown if status == "done"]
    assert len(shown) == 6 and scores == sorted(scores, reverse=True) and scores[0] > 0.85, out
    assert "stopped" in {status for status, _ in shown}, out
    best = re.search(r"^Best: mlkit run hill.ipynb -p \S+ \S+", out, re.M)
    assert best and "-p x " in out
