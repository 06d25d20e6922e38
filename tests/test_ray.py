"""`mlkit predict --on ray` on three nodes: the local command's rows, and a node that is lost."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet as parquet
import pytest
import warm
from conftest import picture

COLORS = ("red", "lime", "blue")


@pytest.fixture
def seen(tmp_path: Path) -> Path:
    "A hundred pictures, one of them none, each named six times by a table, half of them by an address."
    for i in range(100):
        (tmp_path / f"{i:03d}.png").write_bytes(picture(fill=COLORS[i % 3], size=(9 + i, 7)))
    (tmp_path / "007.png").write_bytes(b"I am no picture")
    table = tmp_path / "seen.csv"
    names = [f"{i % 100:03d}.png" for i in range(600)]
    names[1::2] = [f"file://{tmp_path}/{name}" for name in names[1::2]]  # by its address
    rows = [f"{name},{i}" for i, name in enumerate(names)]
    table.write_text("\n".join(["path,number", *rows]))
    return table


def command(models: Path, seen: Path, *words: str) -> list[str]:
    start = [sys.executable, "-m", "mlkit", "predict", "color", str(seen)]
    return [*start, *words, "--set", f"paths.models={models}"]


def predict(models: Path, seen: Path, *words: str) -> subprocess.CompletedProcess:
    return warm.run(
        command(models, seen, *words), cwd=seen.parent, capture_output=True, text=True, timeout=120
    )


def on(cluster: Any, *words: str) -> list[str]:
    return ["--on", "ray", "--address", cluster.address, "--set", "ray.batch_inputs=8", *words]


def parts(out: Path) -> list[Path]:
    return sorted(out.glob("part-*.parquet"))


def whole(out: Path) -> pyarrow.Table:
    return pyarrow.concat_tables(parquet.read_table(path) for path in parts(out))


# 30 s: 75 shards, and the death of a node is noticed after seconds
def test_the_rows_are_those_of_the_local_command_though_a_node_is_lost(
    cluster: Any, models: Path, seen: Path
) -> None:
    local = predict(models, seen, "--out", "local.parquet")
    assert local.returncode == 0, local.stderr
    out, lost = seen.parent / "out", cluster.add_node(num_cpus=1)
    told = command(models, seen, *on(cluster, "--out", "out"))
    begun = warm.Popen(told, cwd=seen.parent, stderr=subprocess.PIPE, text=True)
    while not parts(out):
        assert begun.poll() is None, begun.stderr.read()
        time.sleep(0.02)
    cluster.remove_node(lost, allow_graceful=False)
    assert len(parts(out)) < 75, "the node was lost too late"
    assert begun.wait(100) == 0, begun.stderr.read()
    begun.stderr.close()
    assert whole(out).equals(parquet.read_table(seen.parent / "local.parquet"))
    manifest = json.loads((out / "manifest.json").read_text())
    assert (manifest["rows"], len(manifest["shards"])) == (600, 75)
    assert sum(shard["bad"] for shard in manifest["shards"]) == 6
    again = predict(models, seen, *on(cluster, "--out", "out"))
    assert again.returncode == 1 and "is complete" in again.stderr


def test_masks_are_those_of_the_local_command(cluster: Any, kinds: Path, seen: Path) -> None:
    def words(*more: str) -> list[str]:
        head = [sys.executable, "-m", "mlkit", "predict", "image-mask", "000.png", "001.png"]
        return [*head, "--set", f"paths.models={kinds}", *more]

    for more in (["--out", "local.parquet"], on(cluster, "--out", "out")):
        done = warm.run(words(*more), cwd=seen.parent, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    here, there = parquet.read_table(seen.parent / "local.parquet"), whole(seen.parent / "out")
    masks = [
        [(beside / name).read_bytes() for name in table["mask"].to_pylist()]
        for table, beside in ((here, seen.parent), (there, seen.parent / "out"))
    ]
    assert masks[0] == masks[1] and len(masks[0]) == 2
    assert here.drop_columns("mask").equals(there.drop_columns("mask"))


# 25 s: 75 shards, in two commands, each of which brings workers to life
def test_what_is_interrupted_goes_on(cluster: Any, models: Path, seen: Path) -> None:
    out, words = seen.parent / "out", on(cluster, "--out", "out")
    begun = warm.Popen(
        command(models, seen, *words), cwd=seen.parent, stderr=subprocess.PIPE, text=True
    )
    while len(parts(out)) < 3:
        assert begun.poll() is None, begun.stderr.read()
        time.sleep(0.02)
    begun.send_signal(signal.SIGINT)
    said = begun.communicate(timeout=60)[1]
    assert "the same command goes on there" in said
    kept = {path: path.stat().st_mtime_ns for path in parts(out)}
    state = (out / "state.jsonl").read_text().splitlines()[1:]
    written = [out / f"part-{json.loads(line)['shard']:05d}.parquet" for line in state]
    done = predict(models, seen, *words, "--json")
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)
    assert (counts["rows"], counts["resumed"]) == (600, 8 * len(written)) and written
    assert all(path.stat().st_mtime_ns == kept[path] for path in written)


def test_what_cannot_be_is_said_before_anything_begins(models: Path, seen: Path) -> None:
    (seen.parent / "file").write_text("mine")
    for words, said in (
        (["--on", "ray"], "give --out a folder"),
        (["--on", "ray", "--out", "x.parquet"], "give --out a folder"),
        (["--on", "ray", "--out", "x", "--address", "127.0.0.1:1"], "no cluster can be joined"),
        (["--on", "ray", "--out", "file"], "file is a file; on Ray --out is a folder"),
    ):
        refused = predict(models, seen, *words)
        assert refused.returncode == 1 and said in refused.stderr, refused.stderr


def test_again_deletes_nothing_for_a_cluster_that_is_not_there(models: Path, seen: Path) -> None:
    out = seen.parent / "out"
    out.mkdir()
    for name in ("manifest.json", "part-00000.parquet"):
        (out / name).write_text("{}")
    words = "--on", "ray", "--out", "out", "--again", "--address", "127.0.0.1:1"
    refused = predict(models, seen, *words)
    assert refused.returncode == 1 and "no cluster can be joined" in refused.stderr, refused.stderr
    assert len(list(out.iterdir())) == 2
