"""Photographs as telephones store them, lying down and large: all who read them see the same, and say so."""

import io
import json
import pickle
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
import warm
from conftest import Server, running
from fastai.learner import Learner, load_learner
from fastai.vision.core import PILImage
from PIL import Image, ImageOps

from mlkit.bundle.manifest import ImageInput, read_manifest
from mlkit.bundle.registry import Registry
from mlkit.config import Settings, load_settings
from mlkit.evaluate.base import gallery
from mlkit.evaluate.data_issues import near_duplicates
from mlkit.inference.batcher import Batcher, Oversized, memory_budget
from mlkit.inference.predictor import Predictor
from mlkit.inference.vision import ImageReader, open_image
from mlkit.main import pipeline
from mlkit.model.outputs import ExportError
from mlkit.preprocess.cache import find_recipe, pixels
from mlkit.preprocess.image_audit import audit
from mlkit.preprocess.split import split
from mlkit.preprocess.vision import OpenByLevels, OpenImage, dataloaders
from mlkit.tasks.vision import input_spec

pytestmark = pytest.mark.filterwarnings("ignore:load_learner")
TAGS = range(1, 9)
# what `ImageOps.exif_transpose` undoes
STORED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
SAVED = {
    "PNG": {},
    "TIFF": {"compression": "tiff_deflate"},
    "WEBP": {"lossless": True},
    "JPEG": {"quality": 95, "subsampling": 0},
    "MPO": {"quality": 95, "save_all": True, "append_images": [Image.new("RGB", (9, 9))]},
    "AVIF": {"quality": 95},
}
SMALL = (
    "data.size=32",
    "data.workers=0",
    "data.augment=false",
    "data.flip=false",
    "model.arch=test_resnet",
    "model.pretrained=false",
    "train.epochs=6",
    "train.lr=0.01",
    "train.calibration=0",
    "train.patience=30",
)


def scene(seed: int, label: str = "beach") -> Image.Image:
    "A beach has its light above; by night it is below."
    chance, (height, width) = np.random.default_rng(seed), (40, 56)
    light = np.linspace(230, 20, height)[:: 1 if label == "beach" else -1]
    pixels = light[:, None, None] + chance.normal(0, 12, (height, width, 3))
    pixels[5:12, 5:12] = chance.uniform(0, 255, 3)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def stored(image: Image.Image, tag: int, format: str = "PNG", written: Any = None) -> bytes:
    "The file of an image that is seen upright by whoever applies the tag; another one may be written."
    exif, out = Image.Exif(), io.BytesIO()
    exif[274] = tag if written is None else written
    turned = image.transpose(STORED[tag]) if tag in STORED else image
    turned.save(out, format, exif=exif, **SAVED[format])
    return out.getvalue()


def photographs(folder: Path, tags: Callable[[int], int], count: int = 24) -> Path:
    for k, label in enumerate(("beach", "night")):
        (folder / label).mkdir(parents=True)
        for i in range(count):
            data = stored(scene(100 * k + i, label), tags(i), "JPEG")
            (folder / label / f"{i:02}.jpg").write_bytes(data)
    return folder


def settings_in(folder: Path, source: Path, *more: str) -> Settings:
    own = [f"paths.{what}={folder / what}" for what in ("cache", "models", "runs")]
    return load_settings(f"data.source={source}", *own, *SMALL, *more)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A folder with a registry of two models: `apply` and `ignore`; half of what they learned from is turned."
    folder = tmp_path_factory.mktemp("upright")
    source = photographs(folder / "data", lambda i: 1 + i % 8 if i % 2 else 1)
    for exif in ("apply", "ignore"):
        more = f"model.name={exif}", f"data.exif={exif}"
        done = pipeline(settings=settings_in(folder, source, *more))
        assert done.parity < 1e-4
        Registry(folder / "models").promote(f"{exif}@1")
    return folder


@pytest.fixture(scope="module")
def server(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(trained / "models", tmp_path_factory.mktemp("server")) as one:
        yield one


@pytest.fixture(scope="module", params=["apply", "ignore"])
def model(trained: Path, request: pytest.FixtureRequest) -> tuple[Predictor, Learner]:
    bundle = trained / "models" / request.param / "1"
    return Predictor(bundle), load_learner(bundle / "learner.pkl")


def odds(predictor: Predictor, *data: bytes) -> np.ndarray:
    return np.array([row for row, _ in predictor.rows(data)])


@pytest.mark.parametrize("format", SAVED)
def test_all_turns_mean_one_image(
    format: str, model: tuple[Predictor, Learner], server: Server, tmp_path: Path
) -> None:
    predictor, learn = model
    exif = predictor.manifest.input.exif
    image = scene(7)
    sent = [stored(image, tag, format) for tag in TAGS]
    # Pillow turns a TIFF by itself, and fastai with it
    seen = [
        image.transpose(STORED[tag]) if tag > 1 and exif == "ignore" != format == "TIFF" else image
        for tag in TAGS
    ]
    if exif == "ignore":
        seen = [Image.open(io.BytesIO(data)).convert("RGB") for data in sent]
    expected = odds(predictor, *(stored(one, 0) for one in seen))
    exact = format in ("PNG", "TIFF", "WEBP")
    ours = odds(predictor, *sent)
    assert np.abs(ours - expected).max() <= (1e-4 if exact or exif == "ignore" else 0.02)
    assert (ours.argmax(1) == expected.argmax(1)).all()
    spread = np.ptp(expected, axis=0).max()
    assert (spread == 0) if exif == "apply" or format == "TIFF" else (spread > 0.3)

    said = httpx.post(
        f"{server.url}/v1/models/{exif}/predict",
        files=[("file", (f"{tag}.img", data)) for tag, data in zip(TAGS, sent, strict=True)],
        timeout=30,
    ).json()["predictions"]
    assert [list(one["probabilities"].values()) for one in said] == ours.tolist()
    did = "applied" if exif == "apply" or format == "TIFF" else "ignored"
    told = [{did: [f"EXIF orientation {tag}"]} if tag > 1 else None for tag in TAGS]
    assert [one.get("notes") for one in said] == told

    paths = [tmp_path / f"{tag}.img" for tag in TAGS]
    for path, data in zip(paths, sent, strict=True):
        path.write_bytes(data)
    with learn.no_bar():
        theirs = learn.get_preds(dl=learn.dls.test_dl(paths, num_workers=0))[0].numpy()
        alone = learn.predict(sent[5])[2].numpy(), learn.predict(str(paths[5]))[2].numpy()
        opened = learn.predict(PILImage.create(sent[5]))[2].numpy()
    assert np.abs(theirs - ours).max() <= 1e-4
    assert np.abs(np.array([*alone, opened]) - ours[5]).max() <= 1e-4


def test_what_is_learned_is_upright(trained: Path) -> None:
    "Half of the files lay on their side: a model that turned them knows what is upright, the other is unsure."
    sure = {}
    for exif in ("apply", "ignore"):
        bundle = trained / "models" / exif / "1"
        assert read_manifest(bundle).input.exif == exif
        fresh = [
            (scene(900 + i, label), k)
            for k, label in enumerate(("beach", "night"))
            for i in range(20)
        ]
        found = odds(Predictor(bundle), *(stored(image, 1) for image, _ in fresh))
        sure[exif] = found[np.arange(40), [k for _, k in fresh]].mean()
    assert sure["apply"] > 0.9 and sure["apply"] > sure["ignore"], sure


def tag(kind: int, count: int, value: bytes) -> bytes:
    "EXIF that holds an orientation, of a type such as 3 for a short number."
    return (
        b"Exif\0\0MM\0*\0\0\0\x08\0\x01" + struct.pack(">HHI4s", 274, kind, count, value) + bytes(4)
    )


NOTHING = {
    "0": tag(3, 1, b"\0\0"),
    "9": tag(3, 1, b"\0\x09"),
    "a text": tag(2, 4, b"six"),
    "of no kind": tag(99, 1, b"\0\x06"),
    "of millions": tag(3, 1 << 30, b"\0\x06"),
    "broken": b"Exif\0\0MMMM" + tag(3, 1, b"\0\x06")[10:],
    "cut": tag(3, 1, b"\0\x06")[:18],
    "text in place of it": b"Exif\0\0hello there",
    "empty": b"Exif\0\0",
}


@pytest.mark.filterwarnings(
    "ignore:(Corrupt EXIF|Tag data larger|Metadata Warning)"
)  # Pillow's own
@pytest.mark.parametrize("kind", NOTHING)
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_a_tag_that_says_nothing_turns_nothing(
    format: str, kind: str, model: tuple[Predictor, Learner], tmp_path: Path
) -> None:
    predictor, learn = model
    image, out = scene(8), io.BytesIO()
    image.save(out, format, exif=NOTHING[kind], **SAVED[format])
    plain = io.BytesIO()
    image.save(plain, format, **SAVED[format])
    rows = [*predictor.rows([out.getvalue(), plain.getvalue()])]
    assert np.abs(rows[0][0] - rows[1][0]).max() == 0
    assert predictor.named(*rows[0]).notes is None
    (tmp_path / "a.img").write_bytes(out.getvalue())
    with learn.no_bar():
        assert np.abs(learn.predict(tmp_path / "a.img")[2].numpy() - rows[0][0]).max() <= 1e-4
    (tmp_path / "x").mkdir()
    (tmp_path / "a.img").rename(tmp_path / "x" / "a.jpg")
    found = audit(str(tmp_path), load_settings())
    assert not found.quarantine and found.to_dict()["rotated_by_exif"] == 0


def test_the_audit_and_the_cache_turn(trained: Path, tmp_path: Path) -> None:
    source = photographs(tmp_path / "data", lambda i: 6, count=10)
    told, shown, keys = {}, {}, {}
    for exif in ("apply", "ignore"):
        settings = settings_in(tmp_path, source, f"data.exif={exif}")
        found = audit(str(source), settings)
        told[exif] = found.to_dict()
        dls = dataloaders(split(found, settings), settings)
        kept = pixels(dls, settings)
        files = [*dls.train_ds.items, *dls.valid_ds.items]
        recipe = find_recipe(dls)
        exact = np.stack([recipe.pixels(item[0]) for item in files])
        assert (kept == exact).all()
        shown[exif] = exact.mean((0, 2, 3))
        keys[exif] = recipe.key(["same"])
        first = dls.valid.one_batch()[0][0].float().mean((0, 2))
        assert (np.ptp(first.numpy()) > 1) == (exif == "apply")
    assert [told[e]["rotated_by_exif"] for e in told] == [20, 20]
    assert [told[e]["width"]["max"] for e in ("apply", "ignore")] == [56, 40]
    assert np.ptp(shown["ignore"]) < 30  # its light goes from left to right
    assert keys["apply"] != keys["ignore"] and len([*(tmp_path / "cache/pixels").iterdir()]) == 2


def masked(folder: Path, tag: int, mask_tag: int | None, size: tuple[int, int] = (40, 56)) -> Path:
    "Images with a tag, and masks: upright with the tag `mask_tag`, or as the image is stored where it is None."
    (folder / "images").mkdir(parents=True)
    (folder / "masks").mkdir()
    for i in range(12):
        image = scene(i).resize(size[::-1])
        mask = np.zeros(size, np.uint8)
        mask[: size[0] // 2] = 1
        (folder / f"images/{i:02}.png").write_bytes(stored(image, tag))
        data = Image.fromarray(mask)
        data = stored(data, tag, written=0) if mask_tag is None else stored(data, mask_tag)
        (folder / f"masks/{i:02}.png").write_bytes(data)
    return folder


@pytest.mark.parametrize("tag", [3, 6, 7])
def test_masks_turn_with_their_images(tag: int, tmp_path: Path) -> None:
    for name, mask_tag in (("both", tag), ("drawn upright", 1)):
        source = masked(tmp_path / name, tag, mask_tag)
        settings = settings_in(tmp_path, source)
        found = audit(str(source), settings)
        assert not found.quarantine and found.to_dict()["width"]["max"] == 56
        said = " ".join(found.notes)
        assert ("turned differently by EXIF" in said) == (name != "both")
        assert ("see whether they lie on each other" in said) == (name != "both" and tag < 5)
        dls = dataloaders(split(found, settings), settings)
        for one in (dls.valid_ds, dls.train_ds):
            image, mask = (np.asarray(part) for part in one[0])
            assert image.shape[:2] == mask.shape == (40, 56)
            assert image[mask == 1].mean() > 90 + image[mask == 0].mean()


@pytest.mark.parametrize("tag", [2, 3, 4, 5, 6, 7, 8])
def test_a_mask_without_the_tag_is_found(tag: int, tmp_path: Path) -> None:
    for square in (False, True):
        size = (48, 48) if square else (40, 56)
        source = masked(tmp_path / str(square), tag, None, size)
        found = audit(str(source), settings_in(tmp_path, source))
        if tag > 4 and not square:
            assert len(found.quarantine) == 12
            (why,) = set(found.quarantine.values())
            assert "the image is turned by EXIF, and the mask has no such tag" in why
            assert "data.exif=ignore" in why
        else:
            (note,) = [n for n in found.notes if "turned differently by EXIF" in n]
            assert note.endswith("see whether they lie on each other")
        settings = settings_in(tmp_path, source, "data.exif=ignore")
        found = audit(str(source), settings)
        image, mask = (
            np.asarray(p) for p in dataloaders(split(found, settings), settings).valid_ds[0]
        )
        assert not found.quarantine and image[mask == 1].mean() > 90 + image[mask == 0].mean()


def test_near_duplicates_and_galleries_are_seen_upright(tmp_path: Path) -> None:
    source, chance = tmp_path / "data", np.random.default_rng(0)
    for i in range(12):
        image = Image.fromarray(chance.integers(0, 256, (5, 7, 3), np.uint8)).resize((112, 80))
        for part, turned in (("train", 1), ("valid", 8)):
            path = source / part / "beach night".split()[i % 2] / f"{i:02}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(stored(image, turned, "JPEG"))
    settings = settings_in(tmp_path, source)
    parts = split(audit(str(source), settings), settings)
    assert len(near_duplicates(parts)) == 12
    paths = [source / part / "beach/00.jpg" for part in ("train", "valid")]
    shown = np.asarray(gallery([(paths, "")]).axes[0].images[0].get_array()).astype(int)
    assert np.abs(shown[:, :200] - shown[:, 200:]).mean() < 6


def test_mkit_predict_says_how_many(trained: Path, tmp_path: Path) -> None:
    for tag in (1, 6, 6, 8):
        (tmp_path / f"{len([*tmp_path.iterdir()])}.jpg").write_bytes(
            stored(scene(tag), tag, "JPEG")
        )
    for exif, said in (
        ("apply", "applied before the model saw the image"),
        ("ignore", "ignored by the model"),
    ):
        words = ["predict", exif, str(tmp_path), "--out", str(trained / f"{exif}.csv"), "--json"]
        words += ["--set", f"paths.models={trained / 'models'}"]
        done: subprocess.CompletedProcess = warm.run(
            [sys.executable, "-m", "mlkit", *words], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        what = "applied" if exif == "apply" else "ignored"
        counts = {"EXIF orientation 6": 2, "EXIF orientation 8": 1}
        assert json.loads(done.stdout)[what] == counts
        words[4] = str(trained / f"{exif}-2.csv")
        done = warm.run(
            [sys.executable, "-m", "mlkit", *words[:5], *words[6:]], capture_output=True, text=True
        )
        assert f"{said}: EXIF orientation 6 (2), EXIF orientation 8 (1)" in done.stdout
        assert len((trained / f"{exif}.csv").read_text().splitlines()) == 5


def test_a_mask_has_the_size_that_is_seen() -> None:
    data = stored(scene(1), 6, "JPEG")
    with Image.open(io.BytesIO(data)) as image:
        assert image.size == (40, 56) == ImageOps.exif_transpose(image).size[::-1]
    for exif, size in (("apply", (56, 40)), ("ignore", (40, 56))):
        note = ImageReader(ImageInput(size=(8, 8), resize="squish", exif=exif)).read(data)[1]
        assert note[:2] == size


def test_a_learner_of_before_ignores_the_tag(tmp_path: Path) -> None:
    old = OpenImage((0.0, 4095.0))
    del old.exif  # as it was pickled
    old = pickle.loads(pickle.dumps(old))
    assert isinstance(old, OpenByLevels) and old.levels == (0, 4095)
    (tmp_path / "a.jpg").write_bytes(stored(scene(1), 6, "JPEG"))
    assert old(tmp_path / "a.jpg").size == (40, 56)
    assert OpenImage()(tmp_path / "a.jpg").size == (56, 40)


# ---------------------------------------------------------------- large ones


def large(seed: int, **save: Any) -> bytes:
    "A photograph of twelve megapixels, stored lying on its side."
    exif, out = Image.Exif(), io.BytesIO()
    exif[274] = 6
    image = scene(seed).resize((4032, 3024), Image.Resampling.BICUBIC)
    image.transpose(STORED[6]).save(out, "JPEG", exif=exif, quality=90, **save)
    return out.getvalue()


def test_a_telephone_s_photograph_is_decoded_small_by_one_rule(
    trained: Path, server: Server, tmp_path: Path
) -> None:
    bundle = trained / "models/apply/1"
    spec = read_manifest(bundle).input
    assert (spec.decode, spec.least) == ("draft", 64)
    predictor, learn = Predictor(bundle), load_learner(bundle / "learner.pkl")
    sent = [large(7), large(8, progressive=True)]
    opened = open_image(sent[0], least=spec.least)
    assert opened.image.size == (378, 504) and opened.size == (3024, 4032)
    rows = [*predictor.rows(sent)]
    ours = np.array([row for row, _ in rows])
    assert [note[:3] for _, note in rows] == [(4032, 3024, 6)] * 2
    for i, data in enumerate(sent):
        (tmp_path / f"{i}.jpg").write_bytes(data)
    with learn.no_bar():
        dl = learn.dls.test_dl([*sorted(tmp_path.iterdir())], num_workers=0)
        theirs = learn.get_preds(dl=dl)[0].numpy()
    assert np.abs(ours - theirs).max() <= 1e-4
    full = ImageReader(spec.model_copy(update={"decode": "full"}))
    whole = predictor.forward(full.read_all(sent)[0])
    assert (whole.argmax(1) == ours.argmax(1)).all() and np.abs(whole - ours).max() < 0.05
    said = httpx.post(
        f"{server.url}/v1/models/apply/predict", files={"file": ("a.jpg", sent[0])}, timeout=30
    ).json()["predictions"][0]
    assert list(said["probabilities"].values()) == ours[0].tolist()


def test_decode_changes_the_cache_and_an_odd_opener_is_refused(tmp_path: Path) -> None:
    source = photographs(tmp_path / "data", lambda i: 1, count=8)
    keys = set()
    for decode in ("draft", "full"):
        settings = settings_in(tmp_path, source, f"data.decode={decode}", "data.size=16")
        dls = dataloaders(split(audit(str(source), settings), settings), settings)
        recipe = find_recipe(dls)
        keys.add(recipe.key(["same"]))
        kept, path = pixels(dls, settings), dls.valid_ds.items[0][0]
        ours = ImageReader(ImageInput(size=(16, 16), resize="squish", exif="apply", decode=decode))
        read = ours.read(path.read_bytes())[0].transpose(1, 2, 0) * 255
        assert np.abs(read - kept[len(dls.train_ds)]).max() < 1e-3
    assert len(keys) == 2
    learn = Learner(dls, torch.nn.Identity(), loss_func=torch.nn.CrossEntropyLoss())
    assert input_spec(learn).decode == "full"
    dls.valid_ds.tls[0].tfms.fs[-1].least = 64
    with pytest.raises(ExportError, match="OpenImage.least=64. decodes JPEG for another size"):
        input_spec(learn)


def test_as_many_are_read_at_once_as_there_is_room_for() -> None:
    "Twelve megapixels in full need 12 of 64 each: five at a time, and none is lost."
    at_once, most, lock = 0, 0, threading.Lock()

    def read(value: int, *, index: int, alone: bool) -> tuple[np.ndarray, None]:
        nonlocal at_once, most
        if not alone:
            raise Oversized(12.2)
        with lock:
            at_once += 1
            most = max(most, at_once)
        time.sleep(0.02)
        with lock:
            at_once -= 1
        return np.array([value], np.float32), None

    batcher = Batcher(read, lambda batch: batch, workers=12, lanes=12, limit=100)
    futures = [batcher.submit([i]) for i in range(60)]
    assert [f.result(timeout=20).rows.item() for f in futures] == [*range(60)]
    batcher.close()
    assert 2 <= most <= int(memory_budget().most / 12.2)
    assert memory_budget().holders == 0
    assert all(f.began for f in futures)


def test_who_waits_in_vain_is_refused_and_not_timed_out(start: Callable) -> None:
    "Many more callers than can be answered in time: each is answered, or told to come again."
    data = large(1, progressive=True)
    settings = ("api.predict_seconds=3", "api.engine=onnxruntime", "api.queue_mb=1024")
    with start(*settings) as server, ThreadPoolExecutor(32) as callers:
        ask = lambda _: httpx.post(f"{server.url}/v1/predict", files={"file": data}, timeout=60)  # noqa: E731
        said = [*callers.map(ask, range(48))]
    statuses = Counter(one.status_code for one in said)
    assert set(statuses) <= {200, 503} and statuses[200], statuses
    assert all(int(one.headers["retry-after"]) >= 1 for one in said if one.status_code == 503)
