"""The command line as a person meets it: whole processes, exit codes, what is left behind."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import warm
from PIL import Image

from mlkit.bundle.registry import Registry
from mlkit.config import load_settings
from mlkit.preprocess.samples import write_digits
from mlkit.runs.record import list_runs

SMALL = [
    "--set",
    "model.pretrained=false",
    "--set",
    "model.arch=test_resnet",
    "--set",
    "data.size=32",
]


def mlkit(
    *words: str | Path, cwd: Path, run: Callable = warm.run, **variables: str
) -> subprocess.CompletedProcess:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("MLKIT_")}
    command = [sys.executable, "-m", "mlkit", *map(str, words)]
    return run(command, cwd=cwd, env=clean | variables, capture_output=True, text=True, timeout=500)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "Threes and fives, forty of each, as a folder with a folder a class."
    cache = tmp_path_factory.mktemp("cache")
    seen, _ = write_digits(load_settings(cache=cache))
    for digit in "35":
        (cache / "few" / digit).mkdir(parents=True)
        for file in sorted((seen / digit).iterdir())[:40]:
            shutil.copy(file, cache / "few" / digit)
    return cache / "few"


def leftovers(folder: Path) -> list[str]:
    "Bundles and unfinished files below `folder`."
    return [
        str(p)
        for p in folder.rglob("*")
        if p.name in ("manifest.json", "model.onnx") or ".part" in p.name
    ]


# ---------------------------------------------------------------- the whole way


# 45 s: what a person types first, with nothing imported before
def test_demo(tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    done = mlkit("demo", "--json", cwd=tmp_path, run=subprocess.run, MLKIT_PATHS__CACHE=cache)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["score"] >= 0.97
    assert told["right"] >= 18 and told["unseen"] == 20
    assert told["http_difference"] <= 1e-4 and told["parity"] <= 1e-4
    assert Registry(tmp_path / "models").resolve("digits").version == told["version"]
    assert [r.status for r in list_runs(tmp_path / "runs")] == ["done"]
    assert "epoch 1/" in done.stderr, "piped: a line an epoch"


def test_pipeline_and_the_commands_after_it(digits: Path, tmp_path: Path) -> None:
    (digits / "3" / "text.jpg").write_text("I am no picture")
    cut = digits / "5" / "cut.jpg"
    Image.new("RGB", (64, 64), "red").save(cut)
    cut.write_bytes(cut.read_bytes()[:300])
    try:
        done = mlkit(
            "pipeline",
            digits,
            "--name",
            "two",
            *SMALL,
            "--set",
            "train.epochs=1",
            "--promote",
            "always",
            "--json",
            cwd=tmp_path,
        )
    finally:
        for bad in (digits / "3" / "text.jpg", cut):
            assert bad.is_file(), "an unreadable file is left where it is"
            bad.unlink()
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    listed = (Path(told["run"]) / "quarantine.tsv").read_text()
    assert "3/text.jpg\tnot a picture" in listed and "5/cut.jpg\t" in listed
    report = {p.name for p in (Path(told["run"]) / "report").iterdir()}
    assert {
        "card.md",
        "confusion.png",
        "top_losses.png",
        "history.csv",
        "history.png",
        "classes.csv",
        "metrics.csv",
        "reliability.png",
        "label_suspects.csv",
        "near_duplicates.csv",
    } <= report
    card = (Path(told["run"]) / "report" / "card.md").read_text()
    assert "mlkit train --set data.source=" in card and "## Doubts" in card
    assert told["metrics"]["accuracy_low"] < told["score"] <= told["metrics"]["accuracy_high"]
    trained = mlkit("train", digits, "--name", "two", "--epochs", "1", *SMALL, cwd=tmp_path)
    assert trained.returncode == 0 and "Added" in trained.stdout
    assert "labels likely wrong" in trained.stdout
    versions = json.loads(mlkit("models", "list", "--json", cwd=tmp_path).stdout)
    assert [(v["version"], v["production"]) for v in versions] == [(1, True), (2, False)]
    assert mlkit("models", "promote", "two@2", cwd=tmp_path).returncode == 0
    assert mlkit("models", "rollback", "two", cwd=tmp_path).returncode == 0
    assert Registry(tmp_path / "models").resolve("two").version == 1
    assert mlkit("models", "remove", "two@2", cwd=tmp_path).returncode == 0
    refused = mlkit("models", "remove", "two@1", cwd=tmp_path)
    assert refused.returncode == 1 and "production" in refused.stderr
    answer = json.loads(mlkit("predict", "two", digits / "3", "--json", cwd=tmp_path).stdout)
    assert len(answer) == 40 and set(answer[0]["probabilities"]) == {"3", "5"}


def test_verify_finds_a_flipped_bit(digits: Path, tmp_path: Path) -> None:
    mlkit("train", digits, "--name", "two", "--epochs", "1", *SMALL, cwd=tmp_path)
    assert mlkit("models", "verify", "two@1", cwd=tmp_path).returncode == 0
    for name in ("model.onnx", "manifest.json", "report/card.md", "manifest.json.sha256"):
        file = tmp_path / "models" / "two" / "1" / name
        good = file.read_bytes()
        file.write_bytes(good[:20] + bytes([good[20] ^ 1]) + good[21:])
        found = mlkit("models", "verify", "two@1", cwd=tmp_path)
        file.write_bytes(good)
        assert (
            found.returncode == 1 and "altered" in found.stderr and "Traceback" not in found.stderr
        ), name


def test_a_bundle_is_imported_as_it_is_or_not_at_all(color_bundle: Path, tmp_path: Path) -> None:
    told = mlkit("models", "import", color_bundle, "--json", cwd=tmp_path)
    assert told.returncode == 0 and json.loads(told.stdout)[0]["version"] == 1, told.stderr
    copy = shutil.copytree(color_bundle, tmp_path / "copy")
    (copy / "model.onnx").write_bytes(b"another")
    refused = mlkit("models", "import", copy, cwd=tmp_path)
    assert refused.returncode == 1 and "model.onnx" in refused.stderr, refused.stderr
    assert len(leftovers(tmp_path / "models")) == 2  # of the first


def test_interrupt_keeps_the_best_and_says_how_to_go_on(tmp_path: Path) -> None:
    command = [
        "train",
        "sklearn:digits",
        "--name",
        "long",
        "--epochs",
        "200",
        *SMALL,
        "--set",
        "train.lr=0.001",
        "--set",
        "train.patience=200",
    ]
    process = warm.Popen(
        [sys.executable, "-m", "mlkit", *command],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    for line in process.stderr:
        if line.startswith("epoch 2/"):
            process.send_signal(signal.SIGINT)
            break
    _, said = process.communicate(timeout=120)
    assert process.returncode == 1 and "Traceback" not in said
    best = re.search(r"--weights (\S+\.pth)", said)
    assert best and (tmp_path / best[1]).is_file()
    assert [r.status for r in list_runs(tmp_path / "runs")] == ["interrupted"]
    assert not leftovers(tmp_path)
    on = mlkit(
        "train",
        "sklearn:digits",
        "--name",
        "long",
        "--epochs",
        "1",
        "--weights",
        best[1],
        *SMALL,
        cwd=tmp_path,
    )
    assert on.returncode == 0, on.stderr


@pytest.mark.parametrize("moment", ["checkpoint", "export"])
def test_kill_leaves_the_whole_version_or_nothing(
    moment: str, digits: Path, tmp_path: Path
) -> None:
    place = {"checkpoint": "mlkit.train.fit.torch.save", "export": "mlkit.bundle.registry.publish"}[
        moment
    ]
    module, _, name = place.rpartition(".")
    code = f"""
import os, signal, sys
import mlkit.train.fit, mlkit.bundle.registry
from mlkit.cli.main import run
def die(*args, **options):
    os.kill(os.getpid(), signal.SIGKILL)
{module}.{name} = die
sys.argv = ["mlkit", *{["pipeline", str(digits), "--name", "two", *SMALL, "--set", "train.epochs=1"]!r}]
run()
"""
    killed = warm.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    listed = mlkit("models", "list", "--json", cwd=tmp_path)
    assert listed.returncode == 0 and json.loads(listed.stdout) == []
    assert [r.status for r in list_runs(tmp_path / "runs")] == ["died"]
    again = mlkit(
        "pipeline", digits, "--name", "two", *SMALL, "--set", "train.epochs=1", cwd=tmp_path
    )
    assert again.returncode == 0, again.stderr
    assert [p.name for p in (tmp_path / "models" / "two").glob(".part*")] == []


# ---------------------------------------------------------------- bad input: one clear message, exit 1 or 2, nothing half-written


def bad_sources(digits: Path, folder: Path) -> dict[str, tuple[Path, str]]:
    picture = next((digits / "3").iterdir())
    for name in ("empty", "one/cat", "text/cat", "text/dog", "cut/cat", "cut/dog"):
        (folder / name).mkdir(parents=True)
    for i in range(6):
        shutil.copy(picture, folder / "one/cat" / f"{i}.png")
        for label in ("cat", "dog"):
            (folder / "text" / label / f"{i}.jpg").write_text("a text")
            Image.new("RGB", (80, 80), (i * 20, 0, label == "cat")).save(
                folder / "cut" / label / f"{i}.jpg"
            )
            whole = (folder / "cut" / label / f"{i}.jpg").read_bytes()
            (folder / "cut" / label / f"{i}.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "gap.csv").write_text("path,label\nlost.png,cat\nempty,dog\n")
    return {
        "an empty folder": (folder / "empty", "nothing says what is to be learned"),
        "one class": (folder / "one", "one class, 'cat'"),
        "texts named .jpg": (folder / "text", "cat (0), dog (0); 12 files could not be used"),
        "truncated JPEGs": (folder / "cut", "cat (0), dog (0); 12 files could not be used"),
        "a CSV with a missing file": (folder / "gap.csv", "lost.png"),
        "no such folder": (folder / "absent", "does not exist"),
    }


@pytest.mark.parametrize(
    "what",
    [
        "an empty folder",
        "one class",
        "texts named .jpg",
        "truncated JPEGs",
        "a CSV with a missing file",
        "no such folder",
    ],
)
def test_bad_source(what: str, digits: Path, tmp_path: Path) -> None:
    source, words = bad_sources(digits, tmp_path / "data")[what]
    done = mlkit("pipeline", source, "--name", "bad", *SMALL, cwd=tmp_path)
    assert done.returncode == 1
    assert words in done.stderr
    assert done.stderr.count("error:") == 1 and "Traceback" not in done.stderr
    assert not leftovers(tmp_path) and not (tmp_path / "models").exists()


def test_audit_as_json_says_what_is_missing_in_the_same_document(
    digits: Path, tmp_path: Path
) -> None:
    source, words = bad_sources(digits, tmp_path / "data")["texts named .jpg"]
    done = mlkit("data", source, "--json", cwd=tmp_path)
    said = json.loads(done.stdout)
    assert done.returncode == 1
    assert words in said["too_little"] and len(said["unreadable"]) == 12


def test_wrong_key_in_settings_file(tmp_path: Path) -> None:
    (tmp_path / "settings.ini").write_text("[train]\nepoch = 3\n")
    done = mlkit("pipeline", "sklearn:digits", "--name", "bad", cwd=tmp_path)
    assert done.returncode == 2
    assert (
        "settings.ini" in done.stderr
        and "'train.epoch'" in done.stderr
        and "did you mean 'train.epochs'" in done.stderr
    )
    assert [p.name for p in tmp_path.iterdir()] == ["settings.ini"]


def test_busy_port(models: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = mlkit("serve", "--port", str(port), "--set", f"paths.models={models}", cwd=tmp_path)
    assert done.returncode == 1
    assert str(port) in done.stderr and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "words", [["pipeline", "sklearn:digits"], ["train", "--epochs", "0"], ["nonsense"], ["data"]]
)
def test_wrong_usage_exits_with_2(words: list[str], tmp_path: Path) -> None:
    done = mlkit(*words, cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr


def test_errors_as_json(tmp_path: Path) -> None:
    done = mlkit("models", "show", "cats", "--json", cwd=tmp_path)
    assert done.returncode == 1
    assert json.loads(done.stdout)["error"]["type"] == "RegistryError"


def test_the_light_half_names_what_is_missing() -> None:
    code = "import sys; sys.modules['requests'] = None; from mlkit.cli.main import app; app()"
    done = subprocess.run(
        [sys.executable, "-c", code, "kaggle", "doctor"], capture_output=True, text=True
    )
    assert done.returncode == 1 and 'pip install ".[train]"' in done.stderr
    assert "requests is not installed" in done.stderr and "Traceback" not in done.stderr
