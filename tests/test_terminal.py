"""What a person sees on a terminal, where what a pipe gets is another thing."""

import json
import os
import pty
import re
import sys
from pathlib import Path

import pytest
import warm
from conftest import picture

COLORS = {"red": "red", "lime": "green", "blue": "blue"}


def typed(*words: str | Path, cwd: Path) -> tuple[int, str]:
    "Type `mlkit WORDS` at a terminal of 100 columns; return the exit code and what it shows, without colours."
    ours, theirs = pty.openpty()
    env = os.environ | {"COLUMNS": "100", "TERM": "xterm"}
    command = [sys.executable, "-m", "mlkit", *map(str, words)]
    process = warm.Popen(command, cwd=cwd, env=env, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = b""
    while True:
        try:
            if not (part := os.read(ours, 65536)):
                break
        except OSError:  # how Linux says that the other side is closed
            break
        shown += part
    os.close(ours)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    return process.wait(30), text.replace("\r\n", "\n")


@pytest.fixture
def seen(tmp_path: Path) -> Path:
    (folder := tmp_path / "seen").mkdir()
    for name in COLORS:
        (folder / f"{name}.png").write_bytes(picture(fill=name))
    return folder


def test_predictions_are_a_table_and_progress_a_bar(models: Path, seen: Path) -> None:
    place = "--set", f"paths.models={models}"
    code, text = typed("predict", "color", seen.name, *place, cwd=seen.parent)
    assert code == 0, text
    for name, label in COLORS.items():
        assert re.search(rf"│ \S*{name}\.png +│ {label} +│ 0\.\d+ ", text), text
    assert "━" in text and "{" not in text


def test_a_file_is_written_and_the_bar_says_how_far(models: Path, seen: Path) -> None:
    place = "--set", f"paths.models={models}"
    code, text = typed("predict", "color", seen.name, "--out", "out.csv", *place, cwd=seen.parent)
    assert code == 0, text
    assert len((seen.parent / "out.csv").read_text().splitlines()) == 4
    assert "3 rows" in text or "3 inputs" in text, text


def test_models_show_is_a_table(models: Path, tmp_path: Path) -> None:
    place = "--set", f"paths.models={models}"
    code, text = typed("models", "show", "color", *place, cwd=tmp_path)
    assert code == 0, text
    for name, value in {"version": "1", "production": "True", "task": "image-class"}.items():
        assert re.search(rf"│ {name} +│ {value}", text), text
    piped = warm.run(
        [sys.executable, "-m", "mlkit", "models", "show", "color", "--json", *place],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert json.loads(piped.stdout)["version"] == 1


def test_data_names_what_could_not_be_read(tmp_path: Path) -> None:
    for label in COLORS:
        (tmp_path / "data" / label).mkdir(parents=True)
        for i in range(8):
            whole = picture(fill=label, size=(9 + i, 8))
            (tmp_path / "data" / label / f"{i}.png").write_bytes(whole)
    (tmp_path / "data/red/text.png").write_text("no picture")
    code, text = typed("data", "data", cwd=tmp_path)
    assert code == 0, text
    assert "unreadable: red/text.png: " in text and "image-classification" in text
    (tmp_path / "few/one").mkdir(parents=True)
    (tmp_path / "few/one/a.png").write_bytes(picture())
    code, text = typed("data", "few", cwd=tmp_path)
    assert code == 1 and text.count("error:") == 1 and "Traceback" not in text
