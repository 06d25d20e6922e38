"""Tables the whole way: from a CSV file to what a server of its own says over HTTP."""

import csv
import json
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import warm
from conftest import ROOT, Server, running

# a plain fastai process: it prints what the Learner says of the rows of a CSV file, and has no mlkit
PLAIN = """
import sys; sys.modules["mlkit"] = None
import json, warnings
warnings.simplefilter("ignore")
import pandas as pd
from fastai.tabular.all import add_datepart, load_learner
learn = load_learner(sys.argv[1])
frame = pd.read_csv(sys.argv[2])
for name in sys.argv[3:]:
    frame[name] = pd.to_datetime(frame[name]).astype("datetime64[ns]")
    add_datepart(frame, name, prefix=name + "_")
with learn.no_bar(), learn.no_logging():
    print(json.dumps(learn.get_preds(dl=learn.dls.test_dl(frame))[0].tolist()))
"""


def rents(count: int) -> list[dict[str, Any]]:
    "Flats with a rent whose tail is long, with gaps in two columns, a number of the row and the answer in other words."
    chance, rows = random.Random(0), []
    for i in range(count):
        town = chance.choice(["Bonn", "Köln", "Ulm", ""])
        size = round(chance.uniform(20, 200), 1)
        day = f"20{chance.randint(20, 23)}-{chance.randint(1, 12):02}-{chance.randint(1, 28):02}"
        rent = 400 * 2 ** (size / 60 + (town == "Bonn") + chance.gauss(0, 0.1))
        rows.append(
            {
                "flat": i + 1,
                "size": size if chance.random() > 0.1 else "",
                "rooms": chance.randint(1, 6),
                "town": town,
                "lift": chance.choice(["True", "False"]),
                "sold": day,
                "rent_in_cents": round(rent * 100),
                "rent": round(rent, 2),
            }
        )
    return rows


def write(rows: list[dict[str, Any]], path: Path) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as f:
        out = csv.DictWriter(f, rows[0])
        out.writeheader()
        out.writerows(rows)
    return path


def typed(row: dict[str, Any]) -> dict[str, Any]:
    "The row of the CSV file as a caller sends it in JSON."
    row = {k: v for k, v in row.items() if v != "" and k not in ("flat", "rent", "rent_in_cents")}
    return row | {"lift": row["lift"] == "True"}


class Trained:
    "What the commands have left: a registry with two models, what was printed, and rows that were kept apart."

    def __init__(self, folder: Path):
        self.folder, self.models = folder, folder / "models"
        rows = rents(660)
        self.apart = rows[600:]
        self.said = {
            "rent": self._pipeline(
                str(write(rows[:600], folder / "rents.csv")),
                "rent",
                "target=rent",
                "units=rent=EUR",
            ),
            "wine": self._pipeline("sklearn:wine", "wine"),
        }

    def _pipeline(self, source: str, name: str, *data: str) -> str:
        clean = {k: v for k, v in os.environ.items() if not k.startswith("MLKIT_")}
        command = [sys.executable, "-W", "error::UserWarning", "-m", "mlkit", "pipeline", source]
        command += ["--name", name, "--set", "train.epochs=8"]
        for word in data:
            command += ["--set", f"data.{word}"]
        done = warm.run(
            command, cwd=self.folder, env=clean, capture_output=True, text=True, timeout=500
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def learner(self, name: str, rows: Path, *dates: str) -> list[list[float]]:
        "What the exported Learner says of a CSV file, in a process without mlkit."
        pickle = self.models / name / "1" / "learner.pkl"
        command = [sys.executable, "-c", PLAIN, str(pickle), str(rows), *dates]
        done = warm.run(command, cwd=self.folder, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(tmp_path_factory.mktemp("tables"))


@pytest.fixture(scope="module")
def server(trained: Trained) -> Iterator[Server]:
    with running(trained.models, trained.folder, "api.max_inputs=64") as server:
        yield server


@pytest.fixture(scope="module")
def http(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


def ask(http: httpx.Client, name: str, *rows: Any) -> list[dict[str, Any]]:
    answer = http.post(f"/v1/models/{name}/predict", json={"instances": rows})
    assert answer.status_code == 200, answer.text
    return answer.json()["predictions"]


FLAT = {"size": 80, "rooms": 3, "town": "Bonn", "lift": True, "sold": "2022-05-31"}


# ---------------------------------------------------------------- what was decided


def test_the_command_says_what_it_decided_and_why(trained: Trained) -> None:
    said = " ".join(trained.said["rent"].replace("│", " ").split())
    assert "Task: table-regression, because: rent: as data.target says" in said
    assert "the logarithm of rent is learned" in said
    assert "rent_in_cents: it alone predicts rent with R²" in said
    assert "flat: it numbers the rows" in said
    assert "size (" in said.partition("missing values")[2]
    said = " ".join(trained.said["wine"].split())
    assert "Task: table-classification" in said and "3 different whole numbers" in said


# ---------------------------------------------------------------- right answers


def test_numbers_are_those_of_the_learner_without_mlkit(
    trained: Trained, http: httpx.Client
) -> None:
    import numpy as np

    path = write(trained.apart, trained.folder / "apart.csv")
    theirs = np.exp(trained.learner("rent", path, "sold"))[:, 0]
    rows = [dict(reversed(typed(row).items())) for row in trained.apart]  # columns in another order
    told = ask(http, "rent", *rows)
    ours = np.array([t["values"]["rent"] for t in told])
    assert np.abs(ours / theirs - 1).max() <= 1e-5
    assert told[0]["units"] == {"rent": "EUR"}
    truth = np.array([row["rent"] for row in trained.apart])
    assert np.median(np.abs(ours / truth - 1)) < 0.3
    assert any("size" not in row for row in rows) and any("town" not in row for row in rows)


def test_labels_are_those_of_the_learner_without_mlkit(
    trained: Trained, http: httpx.Client
) -> None:
    import numpy as np
    from sklearn.datasets import load_wine

    frame = load_wine(as_frame=True).frame
    frame.drop(columns="target").to_csv(trained.folder / "wine.csv", index=False)
    theirs = np.array(trained.learner("wine", trained.folder / "wine.csv"))
    rows = frame.drop(columns="target").to_dict("records")
    told = [t for i in range(0, len(rows), 64) for t in ask(http, "wine", *rows[i : i + 64])]
    ours = np.array([list(t["probabilities"].values()) for t in told])
    assert np.abs(ours / theirs - 1).max() <= 1e-5
    assert np.mean([t["label"] == str(y) for t, y in zip(told, frame.target, strict=True)]) > 0.9


def test_what_is_missing_or_unseen_is_answered_as_in_training(http: httpx.Client) -> None:
    without = {k: v for k, v in FLAT.items() if k != "size"}
    whole, absent, null, filled = ask(
        http, "rent", FLAT, without, FLAT | {"size": None}, FLAT | {"size": 109.0}
    )
    assert absent == null != whole
    unseen, nowhere, town = ask(
        http, "rent", FLAT | {"town": "Rom"}, FLAT | {"town": None}, FLAT | {"town": "Ulm"}
    )
    assert unseen.pop("notes") == {"unseen": ["town"]}
    assert unseen == nowhere != town and "notes" not in town
    first = ask(http, "rent", FLAT | {"rooms": None, "sold": None})[0]
    assert first["notes"] == {"filled": ["rooms", "sold"]}
    counted = http.get("/metrics").text
    assert 'mlkit_row_notes_total{model="rent",what="unseen"}' in counted
    far, farther = ask(http, "rent", FLAT | {"size": 1e4}, FLAT | {"size": 1e14})
    assert far == farther  # and finite


# ---------------------------------------------------------------- what is refused

BAD = {
    "a string for a number": ({"size": "80"}, "size"),
    "true for a number": ({"rooms": True}, "rooms"),
    "a list": ({"rooms": [3]}, "rooms"),
    "a number for a string": ({"town": 53}, "town"),
    "a number for a flag": ({"lift": 1}, "lift"),
    "no date": ({"sold": "31.5.2022"}, "sold"),
    "no such day": ({"sold": "2022-02-30"}, "sold"),
    "empty date": ({"sold": ""}, "sold"),
    "too large": ({"size": 1e300}, "size"),
    "unknown column": ({"colour": "red"}, "colour"),
}


@pytest.mark.parametrize("change,column", BAD.values(), ids=BAD)
def test_a_bad_value_is_a_422_that_names_row_and_column(
    http: httpx.Client, change: dict[str, Any], column: str
) -> None:
    body, url = {"instances": [FLAT, FLAT | change]}, "/v1/models/rent/predict"
    answer = http.post(url, json=body, params={"strict": "true"})
    said = answer.json()["detail"]
    assert answer.status_code == 422 and f"instances.1.{column}: " in said
    assert answer.headers["content-type"] == "application/problem+json"
    good, bad = http.post(url, json=body).json()["predictions"]
    assert [good] == ask(http, "rent", FLAT) and bad["error"]["detail"] == said


def test_what_the_table_had_and_the_model_does_not_read_is_ignored_and_said(
    http: httpx.Client,
) -> None:
    whole = FLAT | {"flat": 7, "rent": 700.5, "rent_in_cents": None}
    plain, told = ask(http, "rent", FLAT, whole)
    assert told.pop("notes") == {"ignored": ["flat", "rent", "rent_in_cents"]}
    assert told == plain
    body = json.dumps({"instances": [FLAT]}).replace("80", "NaN")
    answer = http.post(
        "/v1/models/rent/predict", content=body, headers={"content-type": "application/json"}
    )
    assert answer.json()["predictions"] == ask(http, "rent", FLAT | {"size": None})


def test_an_unknown_column_is_refused_with_the_nearest_name(http: httpx.Client) -> None:
    answer = http.post("/v1/models/rent/predict", json={"instances": [FLAT | {"room": 3}]})
    assert answer.status_code == 422
    assert "instances.0.room: no such column, did you mean 'rooms'?" in answer.json()["detail"]


@pytest.mark.parametrize("number", ["Infinity", "-Infinity", "1e999", "9" * 400])
def test_what_is_no_number_is_refused_by_name(http: httpx.Client, number: str) -> None:
    body = json.dumps({"instances": [FLAT]}).replace("80", number)
    answer = http.post(
        "/v1/models/rent/predict", content=body, headers={"content-type": "application/json"}
    )
    assert answer.status_code in (400, 422), answer.text
    assert "size" in answer.text or answer.status_code == 400


@pytest.mark.parametrize("row", ["x", 3, None, [1, 2], True])
def test_a_row_is_an_object(http: httpx.Client, row: Any) -> None:
    answer = http.post("/v1/models/rent/predict", json={"instances": [row]})
    assert answer.status_code == 422 and "instances.0" in answer.json()["detail"]


def test_all_bad_columns_are_named_at_once(http: httpx.Client) -> None:
    body = {"instances": [{"size": "80", "rooms": True, "town": 5, "floor": 1}]}
    said = http.post("/v1/models/rent/predict", json=body).json()["detail"]
    for name in ("size", "rooms", "town", "floor"):
        assert f"instances.0.{name}: " in said, name


def test_a_picture_is_not_taken(http: httpx.Client) -> None:
    picture = (ROOT / "tests" / "seven.png").read_bytes()
    for sent in (
        {"files": {"file": picture}},
        {"content": picture, "headers": {"content-type": "image/png"}},
    ):
        answer = http.post("/v1/models/rent/predict", **sent)
        assert answer.status_code == 415 and "application/json" in answer.json()["detail"]


# ---------------------------------------------------------------- what a caller can read


def test_the_schema_is_that_of_the_columns(http: httpx.Client) -> None:
    info = http.get("/v1/models/rent").json()
    assert info["task"] == "table-regression" and info["vocab"] == ["rent"]
    assert set(info["request"]["properties"]) == {*FLAT, "flat", "rent", "rent_in_cents"}
    assert info["request"]["required"] == []
    shown = http.get("/openapi.json").text
    assert '"rooms"' in shown  # of the default model


def test_the_open_inference_protocol_takes_rows(http: httpx.Client) -> None:
    asked = {
        "inputs": [
            {"name": "row", "shape": [1], "datatype": "BYTES", "data": [json.dumps(FLAT)]},
        ]
    }
    answer = http.post("/v2/models/rent/infer", json=asked)
    assert answer.status_code == 200, answer.text
    (values,) = (o for o in answer.json()["outputs"] if o["name"] == "values")
    assert values["data"] == [ask(http, "rent", FLAT)[0]["values"]["rent"]]
    asked["inputs"][0]["data"] = [json.dumps(FLAT | {"size": "80"})]
    answer = http.post("/v2/models/rent/infer", json=asked)
    assert answer.status_code == 422 and "size: " in answer.text


# ---------------------------------------------------------------- a fit that is stopped


def test_a_fit_that_was_stopped_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    from fastai.callback.core import Callback

    from mlkit.config import load_settings
    from mlkit.model.tabular import learner
    from mlkit.preprocess.tabular import dataloaders, split
    from mlkit.preprocess.tabular_audit import audit
    from mlkit.runs.record import Run
    from mlkit.tasks.task import TASKS
    from mlkit.train.callbacks import TrainInterrupted
    from mlkit.train.fit import fit

    class Stop(Callback):
        def after_epoch(self) -> None:
            if self.epoch == 1:
                raise KeyboardInterrupt

    Stop.order = 100  # after the checkpoint

    def fitted(*sets: str, stop: bool = False) -> tuple[Any, Run]:
        settings = load_settings(f"paths.runs={tmp_path}", "train.epochs=3", *sets)
        found = audit("sklearn:wine", settings)
        settings = TASKS[found.target.task].settled(settings)
        learn = learner(dataloaders(split(found, settings), settings), settings)
        run = Run.start(settings, join=False)
        if stop:
            learn.add_cb(Stop())
            with pytest.raises(TrainInterrupted):
                fit(learn, settings, run)
        else:
            fit(learn, settings, run)
        return learn.model.state_dict(), run

    rare = "train.balance=oversample"
    whole, _ = fitted(rare)
    _, run = fitted(rare, stop=True)
    resumed, _ = fitted(rare, f"train.resume={run.file('checkpoints/last.pth')}")
    assert all((resumed[k] == v).all() for k, v in whole.items())
