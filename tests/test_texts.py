"""Texts the whole way: a table of them, `mlkit pipeline`, a server, answers; and the Learner where there is no mlkit."""

import csv
import json
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
import warm
from conftest import Server, running

from mlkit.bundle.registry import Registry
from mlkit.client import Client
from mlkit.config import load_settings
from mlkit.inference.answers import to_json
from mlkit.inference.batch import answers as answered
from mlkit.inference.inputs import Inputs
from mlkit.inference.predictor import Predictor
from mlkit.main import pipeline

JSON = {"content-type": "application/json"}

TOPICS = {
    "cooking": "oven butter flour simmer garlic onion recipe pan salt dough sauce boil",
    "sailing": "harbour mast anchor wind tide keel rope deck sail buoy storm coast",
    "astronomy": "orbit telescope comet nebula planet lunar eclipse galaxy star dust light moon",
}
COMMON = "the a of and with in to we it was over under before after every small old new".split()
PLAIN = """
import json, sys
sys.modules["mlkit"] = None  # whoever imports it fails
from fastai.learner import load_learner
learn = load_learner(sys.argv[1])
texts = json.load(sys.stdin)
rows = learn.get_preds(dl=learn.dls.test_dl(texts))[0].tolist()
label, _, odds = learn.predict(texts[0])
print()  # after what fastai's bar may have written
print(json.dumps({"rows": rows, "label": label, "odds": odds.tolist()}))
"""
ODD = {
    "accents that are characters": "cre\u0300me bru\u0302le\u0301e and sauce",
    "emoji": "👩‍👩‍👧‍👦 sail 🇩🇪 ⛵",
    "right to left": "שלום לכולם, هذا نص",
    "no spaces": "漢字かな交じり文",
    "control characters": "a\0b\x1b[0m\u202e \ufeff",
    "what looks like a special token": "<pad> [PAD] the padding </s> <unk>",
    "one letter": "x",
    "astral letters": "𝔘𝔫𝔦𝔠𝔬𝔡𝔢",
}


def texts(count: int, seed: int) -> list[tuple[str, str]]:
    "Return texts of several lengths, half of whose words tell the topic."
    rng, found = random.Random(seed), []
    for i in range(count):
        topic = list(TOPICS)[i % len(TOPICS)]
        words = [
            rng.choice(COMMON if rng.random() < 0.5 else TOPICS[topic].split())
            for _ in range(rng.randint(6, 60))
        ]
        found.append((" ".join(words), topic))
    return found


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict:
    "What `mlkit pipeline` says of a table of texts; a registry, with the model in production, is beside it."
    folder = tmp_path_factory.mktemp("texts")
    with open(folder / "texts.csv", "w", newline="", encoding="utf-8") as f:
        table = csv.writer(f)
        table.writerow(["number", "topic", "text"])
        table.writerows([i, topic, text] for i, (text, topic) in enumerate(texts(240, 1)))
        table.writerow([240, "cooking", " "])
    command = [sys.executable, "-m", "mlkit", "pipeline", "texts.csv", "--name", "topics", "--json"]
    command += ["--set", "train.epochs=6", "--set", "data.max_tokens=64"]
    done = warm.run(command, cwd=folder, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr
    registry = Registry(folder / "models")
    registry.promote("topics@1")
    return json.loads(done.stdout) | {"models": registry.root}


@pytest.fixture(scope="module")
def local(told: dict) -> Predictor:
    return Predictor(Path(told["bundle"]))


@pytest.fixture(scope="module")
def server(told: dict, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(told["models"], tmp_path_factory.mktemp("server")) as one:
        yield one


@pytest.fixture(scope="module")
def http(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=30) as client:
        yield client


def ask(http: httpx.Client, *asked: str) -> list[dict]:
    body = json.dumps({"instances": [{"text": text} for text in asked]})
    r = http.post("/v1/predict", content=body, headers={"content-type": "application/json"})
    assert r.status_code == 200, r.text
    return r.json()["predictions"]


def odds(predictions: list[dict]) -> np.ndarray:
    return np.array([list(p["probabilities"].values()) for p in predictions])


def test_pipeline_learns_and_keeps_parity(told: dict, local: Predictor) -> None:
    assert told["task"] == local.manifest.task == "text-classification"
    assert told["score"] >= 0.9 and told["parity"] <= 1e-4
    assert local.manifest.vocab == tuple(sorted(TOPICS)) and local.manifest.arch == "bag"
    assert "tokenizer.json" in local.manifest.files and local.manifest.input.max_tokens == 64
    assert "row 241\tempty" in (Path(told["run"]) / "quarantine.tsv").read_text()
    local.check_golden()


def test_server_tells_topics(http: httpx.Client) -> None:
    unseen = texts(30, 2)
    said = ask(http, *(text for text, _ in unseen))
    assert sum(p["label"] == topic for p, (_, topic) in zip(said, unseen, strict=True)) >= 28


@pytest.mark.parametrize("kind", ODD)
def test_any_unicode_is_answered(kind: str, http: httpx.Client, local: Predictor) -> None:
    [said] = ask(http, ODD[kind])
    assert said["truncated"] is False
    [here] = local.predict([ODD[kind]])
    assert said["label"] == here.label and abs(said["confidence"] - here.confidence) < 1e-6


def test_a_long_text_is_cut_off_and_the_answer_says_so(http: httpx.Client) -> None:
    start = "sail harbour mast " * 40
    short, long, huge = ask(http, "sail mast", start, start + "butter oven " * 80_000)
    assert [p["truncated"] for p in (short, long, huge)] == [False, True, True]
    assert long["probabilities"] == pytest.approx(huge["probabilities"], abs=1e-6)


@pytest.mark.parametrize(
    "instance, said",
    [
        ({"text": ""}, "instances.1.text: is empty"),
        ({"text": " \n\t"}, "instances.1.text: is empty"),
        ({"text": 5}, "instances.1.text: should be a text, and int"),
        ({"text": ["a"]}, "instances.1.text: should be a text, and list"),
        ({"text": None}, "instances.1.text: should be a text"),
        ({"text": "a\ud800"}, "instances.1.text: at 1 stands half of a surrogate pair"),
        ({"b64": "YQ=="}, "instances.1: 'b64' is unknown"),
        ({"text": "a", "\ud800": 1}, "instances.1: '\\ud800' is unknown"),
        ({}, "instances.1.text: is missing"),
        ("a text", "instances.1: should be an object"),
    ],
)
def test_what_is_no_text_is_422_naming_the_field(
    instance: object, said: str, http: httpx.Client
) -> None:
    body = json.dumps({"instances": [{"text": "good"}, instance]})
    headers = {"content-type": "application/json"}
    r = http.post("/v1/predict", content=body, headers=headers, params={"strict": "true"})
    assert r.status_code == 422 and said in r.json()["detail"], r.text
    good, bad = http.post("/v1/predict", content=body, headers=headers).json()["predictions"]
    assert good == ask(http, "good")[0] and bad["error"]["detail"] == r.json()["detail"]


def test_texts_of_other_kinds(http: httpx.Client) -> None:
    plain = {"content-type": "text/plain; charset=utf-8"}
    r = http.post("/v1/predict", content=b"garlic in the pan", headers=plain)
    assert r.json()["predictions"] == ask(http, "garlic in the pan")
    r = http.post("/v1/predict", content=b"\xff\xfe", headers=plain)
    assert r.status_code == 422 and "UTF-8" in r.json()["detail"]
    r = http.post("/v1/predict", content=b"", headers=plain)
    assert r.status_code == 422
    r = http.post("/v1/predict", files={"file": b"garlic"})
    assert r.status_code == 415 and "text/plain" in r.json()["detail"]
    tensor = {"name": "text", "shape": [1], "datatype": "BYTES", "data": ["garlic in the pan"]}
    r = http.post("/v2/models/topics/infer", json={"inputs": [tensor]})
    assert r.json()["outputs"][0]["data"] == ["cooking"], r.text


def test_model_says_what_it_takes(http: httpx.Client) -> None:
    model = http.get("/v1/models/topics").json()
    assert model["input"]["kind"] == "text" and "text" in model["request"]["properties"]
    assert model["prediction"]["properties"]["truncated"]["type"] == "boolean"
    assert http.get("/openapi.json").status_code == 200


def test_an_answer_does_not_depend_on_its_neighbours(http: httpx.Client) -> None:
    rng = random.Random(3)
    mixed = [text[: rng.randint(1, 300)] for text, _ in texts(32, 4)]
    together = odds(ask(http, *mixed))
    alone = odds([ask(http, text)[0] for text in mixed])
    assert np.abs(together - alone).max() <= 1e-6


def test_exported_learner_answers_the_same_where_there_is_no_mlkit(
    told: dict, http: httpx.Client, tmp_path: Path
) -> None:
    held_out = [text for text, _ in texts(24, 5)] + list(ODD.values())
    program = [sys.executable, "-c", PLAIN, Path(told["bundle"]) / "learner.pkl"]
    sent = json.dumps(held_out)
    done = warm.run(program, input=sent, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    there, served = json.loads(done.stdout.splitlines()[-1]), odds(ask(http, *held_out))
    assert np.abs(np.array(there["rows"]) - served).max() <= 1e-4
    assert there["label"] == ask(http, held_out[0])[0]["label"]
    assert np.abs(np.array(there["odds"]) - served[0]).max() <= 1e-4


@pytest.fixture(scope="module")
def joint(tmp_path_factory: pytest.TempPathFactory) -> dict:
    "A model of two columns of texts, with what its Learner says of rows that it never saw."
    folder = tmp_path_factory.mktemp("joint")
    rows = [
        {"id": i, "title": a, "body": b if i % 9 else "", "topic": topic}
        for i, ((a, topic), (b, _)) in enumerate(zip(texts(150, 3), texts(150, 4), strict=True))
    ]
    with open(folder / "posts.csv", "w", newline="", encoding="utf-8") as f:
        table = csv.DictWriter(f, rows[0])
        table.writeheader()
        table.writerows(rows)
    own = [f"paths.{what}={folder / what}" for what in ("cache", "models", "runs")]
    more = "data.text=title,body", "data.target=topic", "train.epochs=2", "train.calibration=0"
    settings = load_settings(f"data.source={folder / 'posts.csv'}", *own, *more)
    made = pipeline(name="posts", settings=settings, promote="always")
    asked = [{**r, "title": f" {r['title']} "} for r in rows[:12]]
    asked[3]["body"], asked[4]["title"] = None, float("nan")
    whole = ["\n".join(t.strip() for t in (r["title"], r["body"]) if t and t == t) for r in asked]
    dl = made.learn.dls.test_dl(whole)
    with made.learn.no_bar(), made.learn.no_logging():
        odds = made.learn.get_preds(dl=dl)[0].numpy()
    return {"bundle": made.bundle, "models": folder / "models", "rows": asked, "whole": whole} | {
        "odds": odds
    }


def close(answers: list[dict], joint: dict) -> bool:
    return bool(np.abs(odds(answers) - joint["odds"]).max() < 1e-4)


def test_columns_that_were_joined_are_fields_of_an_instance(
    joint: dict, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    spec = Predictor(joint["bundle"]).manifest.input
    assert (spec.columns, spec.ignored) == (("title", "body"), ("id", "topic"))
    rows, plain = joint["rows"], [{"text": text} for text in joint["whole"]]
    with running(joint["models"], tmp_path_factory.mktemp("server")) as server:
        with httpx.Client(base_url=server.url, timeout=30) as http:
            answers = {}
            for kind, instances in (("rows", rows), ("plain", plain)):
                body = json.dumps({"instances": instances})
                sent = http.post("/v1/predict", content=body, headers=JSON)
                answers[kind] = sent.json()["predictions"]
            told = http.get("/v1/models/posts").json()
            tensor = {"name": "row", "shape": [len(rows)], "datatype": "BYTES"}
            tensor["data"] = [json.dumps(row) for row in rows]
            second = http.post("/v2/models/posts/infer", json={"inputs": [tensor]})
            wrong = {
                json.dumps(row): http.post("/v1/predict", json={"instances": [row]})
                for row in ({"titel": "a"}, {"title": 5}, {"title": "", "body": None}, {"id": 1})
            }
        with Client(server.url) as client:
            answers["client"] = client.predict(
                [{k: v for k, v in r.items() if v == v} for r in rows]
            )
    assert all(close(found, joint) for found in answers.values())
    assert answers["rows"][0]["notes"] == {"ignored": ["id", "topic"]}
    assert "notes" not in answers["plain"][0]
    probabilities = next(o for o in second.json()["outputs"] if o["name"] == "probabilities")
    assert (
        np.abs(np.reshape(probabilities["data"], joint["odds"].shape) - joint["odds"]).max() < 1e-4
    )
    assert [w.status_code for w in wrong.values()] == [422] * 4
    said = [w.json()["detail"] for w in wrong.values()]
    assert "'titel' is unknown; did you mean 'title'" in said[0] and "title: should be" in said[1]
    assert "all of title, body: is empty" in said[2] and "title: is missing" in said[3]
    assert {"title", "body", "text"} <= told["request"]["properties"].keys()


def test_predict_reads_the_columns_of_a_table(joint: dict, tmp_path: Path) -> None:
    known = [{k: v for k, v in r.items() if v is not None and v == v} for r in joint["rows"]]
    with open(tmp_path / "new.csv", "w", newline="", encoding="utf-8") as f:
        table = csv.DictWriter(f, ["body", "title"], extrasaction="ignore")
        table.writeheader()
        table.writerows(known)
    (tmp_path / "new.jsonl").write_text("".join(json.dumps(r) + "\n" for r in known))
    predictor = Predictor(joint["bundle"])
    for name in ("new.csv", "new.jsonl"):
        found = Inputs([str(tmp_path / name)], predictor.manifest.input)
        said = [to_json(one.answer) for chunk in answered(predictor, found) for one in chunk]
        assert close(said, joint), name
