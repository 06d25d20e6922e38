"""`mlkit predict` over many inputs: whole processes, killed and taken up again."""

import csv
import io
import json
import math
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet as parquet
import pytest
import warm
from conftest import PALETTE, picture
from PIL import Image

from mlkit.bundle.registry import Registry
from mlkit.inference.predictor import Predictor

COLORS = {"red": "red", "lime": "green", "blue": "blue"}
SLOWLY = """
import time
import mlkit.inference.batch, mlkit.inference.predictor
from mlkit.cli.main import run
mlkit.inference.batch._EVERY = 0.05
forward = mlkit.inference.predictor.Predictor.forward_narrow
def slow(self, batch):
    time.sleep(PAUSE)
    return forward(self, batch)
mlkit.inference.predictor.Predictor.forward_narrow = slow
run()
"""


@pytest.fixture
def predict(
    models: Path, kinds: Path, tmp_path: Path
) -> Callable[..., subprocess.CompletedProcess]:
    "`predict('a.png', …)`: the command in a process of its own, in `tmp_path`."

    def run(
        *words: str | Path, stdin: bytes = b"", model: str = "color"
    ) -> subprocess.CompletedProcess:
        where = models if model == "color" else kinds
        command = [*_command(where), "predict", model, *map(str, words)]
        how = {"input": stdin, "capture_output": True, "timeout": 120}
        done = warm.run(command, kind="light", cwd=tmp_path, **how)
        assert b"Traceback" not in done.stderr, done.stderr.decode()
        return done

    return run


def _command(models: Path, program: str = "from mlkit.cli.main import run; run()") -> list[str]:
    where = f"import os; os.environ['MLKIT_PATHS__MODELS'] = {str(models)!r}\n"
    return [sys.executable, "-c", where + program]


@pytest.fixture
def seen(tmp_path: Path) -> Path:
    "Sixty pictures, three of them none."
    folder = tmp_path / "seen"
    folder.mkdir()
    for i in range(60):
        color = list(COLORS)[i % 3]
        (folder / f"{i:03d}.png").write_bytes(picture(fill=color, size=(9 + i, 7)))
    (folder / "007.png").write_bytes(b"I am no picture")
    (folder / "008.png").write_bytes(b"")
    (folder / "059.png").write_bytes((folder / "058.png").read_bytes()[:40])
    return folder


def read_csv(text: str | Path) -> list[dict[str, str]]:
    text = text.read_text(encoding="utf-8") if isinstance(text, Path) else text
    return list(csv.DictReader(text.splitlines()))


def truth(i: int) -> str:
    return "" if i in (7, 8, 59) else list(COLORS.values())[i % 3]


def test_order_and_bad_inputs(predict: Callable, seen: Path, tmp_path: Path) -> None:
    done = predict(seen, "--out", "out.csv", "--probabilities")
    assert done.returncode == 0 and b"60 rows, 3 without an answer" in done.stdout
    rows = read_csv(tmp_path / "out.csv")
    assert [r["input"] for r in rows] == [str(seen / f"{i:03d}.png") for i in range(60)]
    assert [r["label"] for r in rows] == [truth(i) for i in range(60)]
    assert [i for i, r in enumerate(rows) if r["error"]] == [7, 8, 59]
    assert all(float(r["p_red"]) == float(r["confidence"]) for r in rows if r["label"] == "red")
    assert [p.name for p in tmp_path.iterdir() if "part" in p.name] == []


def test_folders_globs_lists_and_stdin_are_the_same(
    predict: Callable, seen: Path, tmp_path: Path
) -> None:
    names = [f"seen/{i:03d}.png" for i in range(60)]
    (tmp_path / "list.csv").write_text("\n".join(["path,id", *(f"{n},{n[5:8]}" for n in names)]))
    asked = {
        "folder": predict("seen"),
        "glob": predict("se*/**/*.png"),
        "list": predict("list.csv", "--keep", ""),
        "stdin": predict("-", stdin="\n".join(names).encode()),
        "two": predict("seen/00*", "seen/0[1-5]*.png"),
    }
    assert all(done.returncode == 0 for done in asked.values())
    assert len({done.stdout for done in asked.values()}) == 1
    assert len(read_csv(asked["folder"].stdout.decode())) == 60
    kept = read_csv(predict("list.csv").stdout.decode())
    assert [r["id"] for r in kept] == [n[5:8] for n in names]


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_killed_and_taken_up_it_is_the_same(
    suffix: str, predict: Callable, models: Path, seen: Path, tmp_path: Path
) -> None:
    assert predict("seen", "--out", f"whole.{suffix}").returncode == 0
    part = tmp_path / f"out.{suffix}.part"
    words = ["predict", "color", "seen", "--out", f"out.{suffix}"]
    process = warm.Popen([*_command(models, SLOWLY.replace("PAUSE", "0.05")), *words], cwd=tmp_path)
    rows_of = lambda: json.loads((part / "state.json").read_text())["done"]["rows"]  # noqa: E731
    while not (part / "state.json").exists() or rows_of() < 16:
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = rows_of()
    if suffix == "csv":
        with open(part / "rows.csv", "a") as f:
            f.write("half a ro")  # what the disk had got after the last state
    assert 16 <= kept < 60 and not (tmp_path / f"out.{suffix}").exists()
    done = predict("seen", "--out", f"out.{suffix}")
    assert f"60 rows ({kept} from before)" in done.stdout.decode()
    if suffix == "csv":
        assert (tmp_path / "out.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()
    else:
        table = parquet.read_table(tmp_path / "out.parquet")
        assert table.equals(parquet.read_table(tmp_path / "whole.parquet"))
        assert table["label"].to_pylist() == [truth(i) or None for i in range(60)]
    assert not part.exists()


def test_interrupted_it_says_how_to_go_on(
    predict: Callable, models: Path, seen: Path, tmp_path: Path
) -> None:
    process = warm.Popen(
        [
            *_command(models, SLOWLY.replace("PAUSE", "4")),
            *"predict color seen --out out.csv".split(),
        ],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    )
    state = tmp_path / "out.csv.part" / "state.json"
    while not state.exists() or not json.loads(state.read_text())["done"]["rows"]:
        time.sleep(0.005)
    busy = predict("seen", "--out", "out.csv")
    assert busy.returncode == 1 and b"is being written by another process" in busy.stderr
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1 and "the same command goes on there" in said
    assert "Traceback" not in said and not (tmp_path / "out.csv").exists()
    (seen / "000.png").write_bytes(picture(fill="blue"))
    other = predict("seen", "--out", "out.csv")
    assert other.returncode == 1 and b"are not those that" in other.stderr
    assert predict("seen", "--out", "out.csv", "--again").returncode == 0
    assert read_csv(tmp_path / "out.csv")[0]["label"] == "blue"


def test_what_is_there_is_not_written_over(predict: Callable, seen: Path, tmp_path: Path) -> None:
    (tmp_path / "out.csv").write_text("mine")
    done = predict("seen", "--out", "out.csv")
    assert done.returncode == 1 and b"out.csv exists; --again" in done.stderr
    assert (tmp_path / "out.csv").read_text() == "mine"
    assert predict("seen", "--out", "out.csv", "--again").returncode == 0


def test_named_and_missing_is_an_error_listed_and_missing_is_a_row(
    predict: Callable, seen: Path, tmp_path: Path
) -> None:
    done = predict("seen/000.png", "gone.png", "lost", "--out", "out.csv")
    assert done.returncode == 1 and b"2 of 3 inputs do not exist: gone.png, lost" in done.stderr
    assert not list(tmp_path.glob("out.csv*"))
    rows = read_csv(predict("-", stdin=b"gone.png\nseen/000.png\n").stdout.decode())
    assert [(r["label"], r["error"]) for r in rows] == [
        ("", "the file does not exist"),
        ("red", ""),
    ]


def test_all_bad_fails(predict: Callable, seen: Path, tmp_path: Path) -> None:
    done = predict("seen/007.png", "seen/008.png", "--out", "out.csv")
    assert done.returncode == 1 and len(read_csv(tmp_path / "out.csv")) == 2
    assert predict("seen/006.png", "seen/007.png").returncode == 0


def test_json_is_one_document(predict: Callable, seen: Path) -> None:
    told = json.loads(predict("seen", "--json").stdout)
    assert [one.get("label", "") for one in told] == [truth(i) for i in range(60)]
    assert set(told[0]["probabilities"]) == {"red", "green", "blue"}
    assert told[8] == {"input": "seen/008.png", "error": "the file is empty"}
    summary = json.loads(predict("seen", "--out", "out.csv", "--json").stdout)
    assert (summary["rows"], summary["bad"], summary["out"]) == (60, 3, "out.csv")
    assert json.loads(predict("-", "--json").stdout) == []


def test_a_reader_that_has_seen_enough(predict: Callable, models: Path, seen: Path) -> None:
    words = [*_command(models), "predict", "color", *["seen"] * 200]
    process = warm.Popen(words, cwd=seen.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline().startswith(b"input,label")
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait(60) == 1
    process.stderr.close()


def test_without_pyarrow_it_says_what_to_install(models: Path, seen: Path, tmp_path: Path) -> None:
    program = "import sys; sys.modules['pyarrow'] = None; from mlkit.cli.main import run; run()"
    words = ["predict", "color", "seen", "--out", "out.parquet"]
    done = subprocess.run(
        [*_command(models, program), *words], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 1 and "Parquet needs pyarrow" in done.stderr
    assert 'pip install ".[train]"' in done.stderr
    assert not (tmp_path / "out.parquet").exists()


def test_memory_does_not_grow_with_the_inputs(models: Path, seen: Path, tmp_path: Path) -> None:
    program = (
        "import sys; from mlkit.cli.main import run\n"
        "try:\n    run()\n"
        "finally:\n    print(open('/proc/self/status').read(), file=sys.stderr)"
    )
    peaks = []
    for times in (20, 200):
        names = "".join(f"seen/{i % 7:03d}.png,{'x' * 2000}\n" for i in range(60 * times))
        (tmp_path / "list.csv").write_text(f"path,said\n{names}")
        words = ["predict", "color", "list.csv", "--out", f"{times}.csv"]
        done = subprocess.run(
            [*_command(models, program), *words], cwd=tmp_path, capture_output=True, text=True
        )
        assert len(read_csv(tmp_path / f"{times}.csv")) == 60 * times
        peaks.append(int(re.search(r"VmHWM:\s+(\d+)", done.stderr)[1]))
    assert peaks[1] < peaks[0] + 8_000, peaks  # KiB; all of the rows would be 24,000


# ---------------------------------------------------------------- other inputs, other answers

GEMS = [
    {"id": "a", "carat": 0.5, "cut": "Ideal", "round": True, "price": 7.0},
    {"id": "=b", "carat": None, "cut": None, "round": False, "price": -1.0},
    {"id": "c", "carat": "much", "cut": "Ideal", "round": True, "price": 7.0},
    {"id": "d", "carat": 2.5, "cut": "unseen", "round": True, "price": 7.0},
]
PRICES = [2 + 20 + 50, 0 + 10 + 25, None, 0 + 20 + 250]


def test_rows_of_every_kind_of_table(predict: Callable, tmp_path: Path) -> None:
    with open(tmp_path / "gems.csv", "w", newline="", encoding="utf-8") as f:
        table = csv.DictWriter(f, GEMS[0])
        table.writeheader()
        table.writerows(GEMS)
    lines = "".join(json.dumps(row) + "\n" for row in GEMS)
    (tmp_path / "gems.jsonl").write_text(lines)
    columns = {name: [row[name] for row in GEMS if row["id"] != "c"] for name in GEMS[0]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "gems.parquet")
    for given, stdin in {"gems.csv": b"", "gems.jsonl": b"", "-": lines.encode()}.items():
        done = predict(given, stdin=stdin, model="table-numbers")
        assert done.returncode == 0, done.stderr
        rows = read_csv(done.stdout.decode())
        head = "input,id,carat,cut,round,price,predicted_price,mass,error".split(",")
        assert list(rows[0]) == head
        assert [float(r["predicted_price"] or "nan") for r in rows] == pytest.approx(
            [math.nan if p is None else p for p in PRICES], nan_ok=True
        )
        assert [bool(r["error"]) for r in rows] == [False, False, True, False]
        assert "carat" in rows[2]["error"] and "much" in rows[2]["error"]
        assert [r["id"] for r in rows] == ["a", "'=b", "c", "d"]
        assert float(rows[1]["price"]) == -1.0
    done = predict("gems.parquet", "--out", "out.parquet", model="table-numbers")
    assert done.returncode == 0, done.stderr
    told = parquet.read_table(tmp_path / "out.parquet")
    assert told["predicted_price"].to_pylist() == pytest.approx([p for p in PRICES if p])
    assert str(told.schema.field("carat").type) == "double" and told["id"].to_pylist()[1] == "=b"
    assert told.schema.field("predicted_price").metadata == {b"unit": b"USD"}
    few = predict("gems.parquet", "--keep", "id", model="table-label")
    assert list(read_csv(few.stdout.decode())[0]) == ["input", "id", "label", "confidence", "error"]


def test_what_has_no_probabilities_says_so(predict: Callable, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("carat,cut,round\n1,Ideal,true\n")
    done = predict("rows.csv", "--probabilities", model="table-numbers")
    assert done.returncode == 1 and b"its answers are numbers" in done.stderr
    assert predict("rows.csv", "--probabilities", model="table-label").returncode == 0


def test_many_rows_are_as_one_by_one(predict: Callable, kinds: Path, tmp_path: Path) -> None:
    rows = [{"carat": i / 100, "cut": ["Fair", "Ideal", ""][i % 3]} for i in range(3000)]
    rows[1700]["carat"] = "much"
    with open(tmp_path / "many.csv", "w", newline="", encoding="utf-8") as f:
        table = csv.DictWriter(f, rows[0])
        table.writeheader()
        table.writerows(rows)
    done = predict("many.csv", "--out", "out.csv", model="table-label")
    assert b"many.csv lacks columns: round" in done.stderr
    assert b"3,000 rows, 1 without an answer" in done.stdout
    told = read_csv(tmp_path / "out.csv")
    predictor = Predictor(Registry(kinds).resolve("table-label").path)
    for i in (0, 1, 1699, 1701, 2999):
        one = predictor.predict([{k: v for k, v in rows[i].items() if v != ""}])[0]
        assert told[i]["label"] == one.label
        assert float(told[i]["confidence"]) == pytest.approx(one.confidence, abs=1e-6)
    assert told[1700]["label"] == "" and "carat" in told[1700]["error"]


def test_labels(predict: Callable, seen: Path, tmp_path: Path) -> None:
    words = ["seen/000.png", "seen/007.png", "--probabilities"]
    row, bad = read_csv(predict(*words, model="image-labels").stdout.decode())
    assert row["labels"] == "red;green" and float(row["p_red"]) == pytest.approx(0.731, abs=1e-3)
    assert bad["labels"] == "" and bad["error"]
    assert predict(*words, "--out", "out.parquet", model="image-labels").returncode == 0
    labels = parquet.read_table(tmp_path / "out.parquet")["labels"].to_pylist()
    assert labels == [["red", "green"], None]


def test_texts(predict: Callable, tmp_path: Path) -> None:
    said = ["good, very good", "bad", " ", "good 🎉 Größe\u2028bad bad", "=good " * 9]
    folder = tmp_path / "said"
    (folder / "more").mkdir(parents=True)
    for i, text in enumerate(said):
        (folder / "more" / f"{i}.txt").write_text(text, encoding="utf-8")
    (folder / "picture.png").write_bytes(picture())
    (folder / "more" / "9.txt").write_bytes(b"\x81\x8d\xff good")
    with open(tmp_path / "said.csv", "w", newline="", encoding="utf-8") as f:
        csv.writer(f).writerows([["id", "text"], *enumerate(said)])
    columns = {"id": list(range(5)), "words": said}
    parquet.write_table(pyarrow.table(columns), tmp_path / "said.parquet")
    asked = {
        "files": predict("said/**/*.txt", model="text-label"),
        "folder": predict("said", model="text-label"),
        "csv": predict("said.csv", model="text-label"),
        "parquet": predict("said.parquet", "--column", "words", model="text-label"),
        "stdin": predict("-", stdin="\n".join(said).encode(), model="text-label"),
    }
    for way, done in asked.items():
        assert done.returncode == 0, (way, done.stderr)
        rows = list(csv.DictReader(io.StringIO(done.stdout.decode(), newline="")))
        assert [r["label"] for r in rows[:5]] == ["good", "bad", "", "bad", "good"], way
        assert [r["truncated"] for r in rows[:5]] == ["false", "false", "", "false", "true"], way
        assert "empty" in rows[2]["error"], way
        assert len(rows) == (6 if way in ("files", "folder") else 5), way
        if way in ("csv", "parquet"):
            text = rows[3]["text" if way == "csv" else "words"]
            assert text == said[3] and rows[4]["id"] == "4"
    assert "UTF-8" in list(csv.DictReader(asked["folder"].stdout.decode().split("\n")))[-1]["error"]
    refused = predict("said.parquet", model="text-label")
    assert refused.returncode == 1 and b"no column 'text'" in refused.stderr


def test_masks_lie_beside_the_table(predict: Callable, seen: Path, tmp_path: Path) -> None:
    both = Image.new("RGB", (40, 20), "red")
    both.paste("blue", (0, 0, 10, 20))
    both.save(tmp_path / "both.png")
    words = ["both.png", "seen/007.png", "seen/001.png"]
    done = predict(*words, "--out", "out.csv", model="image-mask")
    assert done.returncode == 0, done.stderr
    rows = read_csv(tmp_path / "out.csv")
    assert [r["mask"] for r in rows] == [
        "out.masks/000001-both.png",
        "",
        "out.masks/000003-001.png",
    ]
    assert [float(rows[0][f"area_{c}"]) for c in COLORS.values()] == [0.75, 0.0, 0.25]
    mask = Image.open(tmp_path / rows[0]["mask"])
    assert mask.size == (40, 20) and mask.mode == "P"
    assert (mask.getpixel((5, 5)), mask.getpixel((30, 5))) == (2, 0)
    assert mask.convert("RGB").getpixel((30, 5)) == PALETTE[0]
    assert (
        predict(*words, "--out", "two.csv", "--masks", "kept", model="image-mask").returncode == 0
    )
    assert read_csv(tmp_path / "two.csv")[0]["mask"] == "kept/000001-both.png"
    told = read_csv(predict("both.png", model="image-mask").stdout.decode())
    assert "mask" not in told[0] and told[0]["area_red"] == "0.75"


def test_a_table_that_is_none_of_the_models_says_what_the_model_wants(
    predict: Callable, tmp_path: Path
) -> None:
    (tmp_path / "other.csv").write_text("mass;price\n1;2\n")
    done = predict("other.csv", model="table-label")
    assert done.returncode == 1 and b"carat, cut, round; it has mass, price" in done.stderr
    (tmp_path / "gems.png").write_bytes(picture())
    done = predict("gems.png", model="table-label")
    assert (
        done.returncode == 1
        and b"gems.png is not a table but an image; tables are .csv" in done.stderr
    )
