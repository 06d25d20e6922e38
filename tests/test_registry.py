"""The registry under several processes, some of which are killed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import warm
from conftest import make_bundle

from mlkit.bundle.manifest import BundleError, write_bundle
from mlkit.bundle.registry import Registry, RegistryError
from mlkit.inference.predictor import Predictor

ADD = """
import sys
from pathlib import Path
import mlkit.bundle.registry as r
{before}
for _ in range(int(sys.argv[3])):
    print(r.Registry(Path(sys.argv[1])).add(Path(sys.argv[2]), name="color").ref, flush=True)
"""


def adding(root: Path, bundle: Path, times: int, before: str = "") -> subprocess.Popen:
    command = [sys.executable, "-c", ADD.format(before=before), str(root), str(bundle), str(times)]
    return warm.Popen(command, kind="light", stdout=subprocess.PIPE, text=True)


STOPS = {
    "copying": "shutil = r.shutil; r.shutil = type('S', (), dict(copyfile=lambda *a, **k: stop(), rmtree=shutil.rmtree))",
    "checking the copy": "r.verify_bundle = lambda f: stop() if '.part' in str(f) else v(f)",
    "before the rename": "r.publish = lambda *a: stop()",
    "after the rename": "p = r.publish; r.publish = lambda *a: (p(*a), stop())",
}


@pytest.mark.parametrize("moment", STOPS)
def test_killed_while_adding(moment: str, color_bundle: Path, tmp_path: Path) -> None:
    stop = (
        "import time; v = r.verify_bundle\ndef stop(): print('here', flush=True); time.sleep(60)\n"
    )
    process = adding(tmp_path, color_bundle, 1, stop + STOPS[moment])
    assert process.stdout.readline() == "here\n"
    process.kill()
    process.wait()
    process.stdout.close()
    registry = Registry(tmp_path)
    whole = [registry.verify(v.ref).version for v in registry.list()]
    assert whole == ([1] if moment == "after the rename" else [])
    assert registry.add(color_bundle, name="color").version == len(whole) + 1
    assert not list(tmp_path.glob("color/.part*"))  # what the dead one left was swept


def test_killed_at_any_moment(color_bundle: Path, tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    for i in range(5):
        process = adding(tmp_path, color_bundle, 1000)
        process.stdout.readline()
        time.sleep(0.013 * i)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    versions = [registry.verify(v.ref).version for v in registry.list()]
    assert versions == list(range(1, len(versions) + 1)) and len(versions) >= 5


def test_racing_processes_get_different_versions(color_bundle: Path, tmp_path: Path) -> None:
    racers = [adding(tmp_path, color_bundle, 10) for _ in range(4)]
    given = [ref for p in racers for ref in p.communicate()[0].split()]
    assert all(p.returncode == 0 for p in racers)
    assert sorted(given) == sorted(f"color@{i}" for i in range(1, 41))
    assert [v.version for v in Registry(tmp_path).list()] == list(range(1, 41))


def test_racing_promotions_keep_each_others_history(color_bundle: Path, tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    for _ in range(9):
        registry.add(color_bundle, name="color")
    program = "import sys; from mlkit.bundle.registry import Registry; r = Registry(sys.argv[1])\n"
    program += "for ref in sys.argv[2:]: r.promote(ref)"
    batches = (["color@1", "color@2", "color@3"], ["color@4", "color@5"], ["color@6", "color@7"])
    racers = [
        warm.Popen([sys.executable, "-c", program, tmp_path, *b], kind="light") for b in batches
    ]
    assert [p.wait(60) for p in racers] == [0, 0, 0]
    seen = [registry.resolve("color").version]
    while len(seen) < 7:
        seen.append(registry.rollback("color").version)
    assert sorted(seen) == [1, 2, 3, 4, 5, 6, 7]
    with pytest.raises(RegistryError, match="no earlier"):
        registry.rollback("color")


def test_readers_see_a_whole_pointer(color_bundle: Path, tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    for _ in range(2):
        registry.add(color_bundle, name="color")
    registry.promote("color@1")
    program = "import sys; from mlkit.bundle.registry import Registry; r = Registry(sys.argv[1])\n"
    program += "while True: r.promote('color@1'); r.promote('color@2')"
    writer = warm.Popen([sys.executable, "-c", program, tmp_path], kind="light")
    try:
        seen, deadline = set(), time.monotonic() + 60
        while seen != {1, 2} and time.monotonic() < deadline:
            seen |= {registry.resolve("color").version for _ in range(200)}
    finally:
        writer.kill()
        writer.wait()
    assert seen == {1, 2}


def test_removal_is_whole(color_bundle: Path, tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    for _ in range(2):
        registry.add(color_bundle, name="color")
    program = "import os, signal, sys, mlkit.bundle.registry as r\n"
    program += "r.shutil.rmtree = lambda p: os.kill(os.getpid(), signal.SIGKILL)\n"
    program += "r.Registry(sys.argv[1]).remove('color@2')"
    done = warm.run([sys.executable, "-c", program, tmp_path], kind="light")
    assert done.returncode == -signal.SIGKILL
    assert [v.version for v in registry.list()] == [1]
    assert registry.add(color_bundle, name="color").version == 3
    assert sorted(os.listdir(tmp_path / "color")) == [".lock", "1", "3", "production.json"]


def test_another_machine_cleans_up_nothing_that_lives(color_bundle: Path, tmp_path: Path) -> None:
    "Numbers of processes mean nothing in another container: here they belong to nobody, and to somebody who did not write."
    root, go = tmp_path / "models", tmp_path / "go"
    elsewhere = f"""
import os, time
os.getpid = lambda: {2**22 - 5}
v = r.verify_bundle
def waiting(folder):
    while ".part-" in str(folder) and not os.path.exists({str(go)!r}):
        time.sleep(0.01)
    return v(folder)
r.verify_bundle = waiting
"""
    with adding(root, color_bundle, 1, elsewhere) as slow:
        while not list(root.glob("color/.part-*/model.onnx")):
            assert slow.poll() is None
            time.sleep(0.01)
        (left := root / "color/.part-1-0123abcd").mkdir()  # of a process that is gone; 1 lives
        assert Registry(root).add(color_bundle, name="color").ref == "color@1"
        assert not left.exists()
        go.touch()
        assert slow.communicate(timeout=30)[0] == "color@2\n"
    assert [v.version for v in Registry(root).list()] == [1, 2]
    for version in Registry(root).list():
        Registry(root).verify(version.ref)
    assert not list(root.glob("color/.part-*"))


def _replace(path: Path, make: Callable[[Path], object]) -> None:
    path.unlink(missing_ok=True)
    make(path)


HOSTILE = {
    "a folder of the machine by a link": lambda b: (b / "report").symlink_to("/usr/share"),
    "a listed file by a link": lambda b: (
        shutil.move(b / "model.onnx", b.parent / "graph"),
        (b / "model.onnx").symlink_to(b.parent / "graph"),
    ),
    "a pipe": lambda b: os.mkfifo(b / "pipe"),
    "a pipe in a listed file's place": lambda b: _replace(b / "model.onnx", os.mkfifo),
    "a pipe for a manifest": lambda b: _replace(b / "manifest.json", os.mkfifo),
    "a device for a manifest": lambda b: _replace(
        b / "manifest.json", lambda p: p.symlink_to("/dev/zero")
    ),
    "a loop of links": lambda b: (b / "loop").symlink_to(b),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_bundle_adds_nothing(what: str, color_bundle: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(color_bundle, tmp_path / "bundle")
    HOSTILE[what](bundle)
    registry = Registry(tmp_path / "models")
    with pytest.raises(BundleError):
        registry.add(bundle, name="color")
    assert registry.list() == [] and not list(tmp_path.glob("models/color/*part*"))


def test_a_graph_reads_no_other_file(tmp_path: Path) -> None:
    (tmp_path / "secret.json").write_bytes(np.arange(3, dtype=np.float32).tobytes())
    graph = tmp_path / "graph.onnx"
    make_bundle(tmp_path / "made", "bias = Identity(mean)  p = Softmax<axis = 1>(bias)")
    model = onnx.load(tmp_path / "made.onnx")
    secret = model.graph.initializer.add(name="bias", dims=[1, 3], data_type=1, data_location=1)
    secret.external_data.add(key="location", value="secret.json")
    del model.graph.node[1]  # what made the bias until now
    graph.write_bytes(model.SerializeToString())
    fields = json.loads((tmp_path / "made/manifest.json").read_text()) | {"name": "thief"}
    del fields["files"]
    bundle = write_bundle(tmp_path / "thief", fields, {"model.onnx": graph})
    with pytest.raises(BundleError, match="numbers from another file"):
        Registry(tmp_path / "models").add(bundle, name="thief")
    with pytest.raises(BundleError, match="numbers from another file"):
        Predictor(bundle)
