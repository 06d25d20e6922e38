"""Pictures with several labels, with a number, with a mask: from a folder to what a server of its own says over HTTP."""

import base64
import csv
import io
import json
import os
import random
import sys
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import warm
from conftest import Server, picture, running
from PIL import Image
from sklearn.datasets import load_digits

from mlkit.bundle.manifest import read_manifest
from mlkit.inference.masks import at_size, default_palette

# a fastai process that mlkit is installed beside: it writes what Learners say of picture files
PLAIN = """
import sys
import numpy as np
import fastai.callback.all
from fastai.learner import load_learner
bundles, files = sys.argv[1].split(","), sys.argv[2:]
for bundle in bundles:
    learn = load_learner(bundle + "/learner.pkl")
    with learn.no_bar():
        out = learn.get_preds(dl=learn.dls.test_dl(files, num_workers=0))[0]
    np.save(bundle.split("/")[-2], (out.argmax(1) if out.ndim == 4 else out).numpy())
"""
DIGITS = ("three", "five", "seven")
SMALL = {
    "MLKIT_MODEL__ARCH": "test_resnet",
    "MLKIT_MODEL__PRETRAINED": "false",
    "MLKIT_DATA__SIZE": "32",
    "MLKIT_DATA__AUGMENT": "false",
    "MLKIT_DATA__BATCH_SIZE": "16",
    "MLKIT_DATA__WORKERS": "0",
    "MLKIT_DATA__UNITS": "ink=mg",
    "MLKIT_TRAIN__LR": "0.005",
    "MLKIT_TRAIN__PATIENCE": "20",  # from scratch, the first epochs say little of the last
    "OMP_NUM_THREADS": "1",
}
SHAPES = ((32, 32), (48, 32), (33, 61))  # width, height of canvases that are kept apart


def canvases(folder: Path, count: int, shape: tuple[int, int] = (48, 32)) -> list[dict[str, Any]]:
    "Write canvases with up to three digits on them, and their masks; return labels and ink of each."
    chance, digits = random.Random(count), load_digits()
    images = [digits.images[digits.target == n] for n in (3, 5, 7)]
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    rows, (width, height) = [], shape
    for i in range(count):
        ink, mask = np.zeros((height, width)), np.zeros((height, width), np.uint8)
        shown = chance.sample(range(3), chance.choice((1, 1, 2, 2, 3)) if i else 0)
        for place, kind in enumerate(shown):
            x = place * width // 3 + chance.randint(0, max(width // 3 - 10, 0))
            y = chance.randint(0, height - 10)
            digit = chance.choice(images[kind])
            box = np.s_[y : y + 8, x : x + 8]
            ink[box] = np.maximum(ink[box], digit)
            mask[box][digit > 6] = kind + 1
        name = f"images/{i:03}.png"
        Image.fromarray((ink * 15).astype(np.uint8)).save(folder / name)
        Image.fromarray(mask).save(folder / f"masks/{i:03}.png")
        labels = "|".join(DIGITS[k] for k in sorted(shown))
        rows.append({"path": name, "labels": labels, "ink": round(1000 * ink.mean() / 16, 2)})
    (folder / "codes.txt").write_text("\n".join(("paper", *DIGITS)) + "\n")
    for column in ("labels", "ink"):
        with open(folder / f"{column}.csv", "w", newline="") as f:
            out = csv.DictWriter(f, ("path", column), extrasaction="ignore")
            out.writeheader()
            out.writerows(rows)
    return rows


class Trained:
    "What the command has left: a registry with three models, what was printed, and canvases that were kept apart."

    def __init__(self, folder: Path):
        self.folder, self.models = folder, folder / "models"
        canvases(folder / "data", 160)
        self.apart, self.rows = [], []
        for i, shape in enumerate(SHAPES):
            self.rows += canvases(folder / f"apart{i}", 4, shape)
            self.apart += sorted((folder / f"apart{i}/images").iterdir())
        self.said = {
            "labels": self._pipeline("data/labels.csv", "labels", 14),
            "ink": self._pipeline("data/ink.csv", "ink", 14),
            "masks": self._pipeline("data", "masks", 14, "data.resize=crop"),
        }

    def _pipeline(self, source: str, name: str, epochs: int, *assignments: str) -> str:
        command = [sys.executable, "-m", "mlkit", "pipeline", source, "--name", name]
        for one in (f"train.epochs={epochs}", f"paths.cache={self.folder}/cache", *assignments):
            command += ["--set", one]
        clean = {k: v for k, v in os.environ.items() if not k.startswith("MLKIT_")} | SMALL
        how = {"cwd": self.folder, "env": clean, "capture_output": True, "text": True}
        done = warm.run(command, timeout=300, **how)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def bundle(self, name: str) -> Path:
        return self.models / name / "1"

    @cached_property
    def plain(self) -> dict[str, np.ndarray]:
        "What the exported Learners say of the files in a process of fastai, by name of the model."
        bundles = ",".join(str(self.bundle(name)) for name in self.said)
        command = [sys.executable, "-W", "ignore", "-c", PLAIN, bundles, *self.apart]
        done = warm.run(command, cwd=self.folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return {name: np.load(self.folder / f"{name}.npy") for name in self.said}


# 50 s: three fits of fourteen epochs, for answers that can be told from chance
@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def server(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(trained.models, tmp_path_factory.mktemp("server")) as one:
        yield one


def ask(server: Server, name: str, *files: bytes) -> httpx.Response:
    instances = [{"b64": base64.b64encode(data).decode()} for data in files]
    where = f"{server.url}/v1/models/{name}/predict"
    return httpx.post(where, json={"instances": instances}, timeout=30)


def predictions(server: Server, name: str, trained: Trained) -> list[dict[str, Any]]:
    said = ask(server, name, *(path.read_bytes() for path in trained.apart))
    assert said.status_code == 200, said.text
    return said.json()["predictions"]


def info(server: Server, name: str) -> dict[str, Any]:
    return httpx.get(f"{server.url}/v1/models/{name}", timeout=30).json()


@pytest.mark.parametrize(
    ("name", "task", "reason"),
    [
        ("labels", "image-multilabel", "labels with '|' between them"),
        ("ink", "image-regression", "column ink: numbers"),
        ("masks", "image-segmentation", "images, and masks in masks/"),
    ],
)
def test_the_task_is_found_out_and_said(
    trained: Trained, name: str, task: str, reason: str
) -> None:
    assert f"Task: {task}, because: " in trained.said[name] and reason in trained.said[name]
    manifest = read_manifest(trained.bundle(name))
    assert manifest.task == task and manifest.parity.labels_equal
    assert manifest.parity.max_difference <= (1e-3 if name == "masks" else 1e-4)
    assert len(manifest.golden) == 4 and "report/card.md" in manifest.files


def test_many_labels(trained: Trained, server: Server) -> None:
    found, theirs = predictions(server, "labels", trained), trained.plain["labels"]
    ours = np.array([list(p["probabilities"].values()) for p in found])
    assert np.abs(ours - theirs).max() <= 1e-4
    told = info(server, "labels")
    assert told["vocab"] == sorted(DIGITS) and told["metrics"]["mean_average_precision"] > 0.65
    thresholds = dict(zip(told["vocab"], told["output"]["thresholds"], strict=True))
    assert len(set(thresholds.values())) == 3, "each has its own"
    for one in found:
        odds = one["probabilities"]
        assert one["labels"] == [v for v in odds if odds[v] >= thresholds[v]]
    assert set(found[0]) == set(told["prediction"]["required"])


def test_a_number(trained: Trained, server: Server) -> None:
    found, theirs = predictions(server, "ink", trained), trained.plain["ink"]
    ours = np.array([[one["values"]["ink"]] for one in found])
    assert (np.abs(ours - theirs) / np.maximum(1, np.abs(theirs))).max() <= 1e-4
    assert {json.dumps(one["units"]) for one in found} == {'{"ink": "mg"}'}
    assert info(server, "ink")["metrics"]["r2"] > 0.8
    same = [
        i for i, path in enumerate(trained.apart) if path.parts[-3] == "apart1"
    ]  # as in training
    true = np.array([trained.rows[i]["ink"] for i in same])
    assert np.corrcoef(true, ours[same, 0])[0, 1] > 0.9


def test_a_mask_has_the_size_of_the_picture(trained: Trained, server: Server) -> None:
    found, theirs = predictions(server, "masks", trained), trained.plain["masks"]
    manifest = read_manifest(trained.bundle("masks"))
    assert manifest.vocab == ("paper", *DIGITS) and manifest.metrics["dice"] > 0.4
    for one, path, model in zip(found, trained.apart, theirs, strict=True):
        image = Image.open(io.BytesIO(base64.b64decode(one["mask"])))
        with Image.open(path) as sent:
            size = sent.size
        assert (image.format, image.mode) == ("PNG", "P")
        assert image.size == size == (one["width"], one["height"])
        assert image.getpalette()[:12] == [v for color in default_palette(4) for v in color]
        pixels = np.asarray(image)
        assert (pixels == at_size(model, manifest.input, size)).mean() >= 0.999
        shares = [(pixels == i).mean() for i in range(4)]
        assert np.allclose(list(one["areas"].values()), shares) and list(one["areas"]) == list(
            manifest.vocab
        )
    wide = np.asarray(Image.open(io.BytesIO(base64.b64decode(found[4]["mask"]))))
    assert not wide[:, :8].any() and not wide[:, -8:].any(), "48 × 32 is cropped to its middle"


def test_a_photograph_of_twelve_megapixels(trained: Trained, server: Server) -> None:
    data = picture(size=(4000, 3000), fill="white", format="JPEG")
    (one,) = ask(server, "masks", data).json()["predictions"]
    image = Image.open(io.BytesIO(base64.b64decode(one["mask"])))
    assert image.size == (4000, 3000) and sum(one["areas"].values()) == pytest.approx(1)


def test_a_mask_by_the_open_inference_protocol(trained: Trained, server: Server) -> None:
    text = base64.b64encode(trained.apart[0].read_bytes()).decode()
    tensor = {"name": "image", "shape": [1], "datatype": "BYTES", "data": [text]}
    said = httpx.post(f"{server.url}/v2/models/masks/infer", json={"inputs": [tensor]}).json()
    outputs = {one["name"]: one["data"] for one in said["outputs"]}
    (direct,) = ask(server, "masks", trained.apart[0].read_bytes()).json()["predictions"]
    assert outputs["mask"] == [direct["mask"]]
    assert np.allclose(outputs["areas"], list(direct["areas"].values()))


@pytest.mark.parametrize("name", ["labels", "ink", "masks"])
def test_a_bad_input_is_refused_by_name(trained: Trained, server: Server, name: str) -> None:
    where, good = f"{server.url}/v1/models/{name}/predict", picture()
    for bad, status, words in [
        ([{"b64": 7}], 422, "instances.0.b64"),
        ([{"b64": "§"}], 422, "instances.0.b64"),
        ([{"picture": ""}], 422, "instances.0: 'picture' is unknown"),
        ([{"b64": base64.b64encode(good).decode()}, {}], 422, "instances.1.b64"),
        ([{"b64": base64.b64encode(good[:40]).decode()}], 422, "instances.0"),
        ([{"b64": base64.b64encode(b"words").decode()}], 415, "instances.0"),
        ([], 422, "instances"),
    ]:
        how = {"timeout": 30, "params": {"strict": "true"}}
        said = httpx.post(where, json={"instances": bad}, **how)
        assert (said.status_code, words in said.text) == (status, True), (bad, said.text)
    assert httpx.post(where, content=good, headers={"content-type": "image/png"}).status_code == 200
