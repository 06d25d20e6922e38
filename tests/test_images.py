"""Images as people bring them: more than 8 bits, masks in every writing, odd names, sizes and formats."""

import csv
import json
import os
import struct
import sys
import unicodedata
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import warm
from PIL import Image

from mlkit.bundle.manifest import InputError, read_manifest
from mlkit.config import Settings, SettingsError, load_settings
from mlkit.evaluate.segmentation import confusions
from mlkit.inference.predictor import Predictor
from mlkit.inference.vision import decode, open_image, reads_heif
from mlkit.main import pipeline
from mlkit.model.vision import MaskDice, fixed_size
from mlkit.preprocess.image_audit import audit
from mlkit.preprocess.mask_values import NO_CLASS
from mlkit.preprocess.source import DataError
from mlkit.preprocess.split import split
from mlkit.preprocess.vision import dataloaders
from mlkit.tasks.task import TASKS, infer_task

RNG = np.random.default_rng(0)
SMALL = (
    "data.size=32",
    "data.workers=0",
    "data.augment=false",
    "model.arch=test_resnet",
    "model.pretrained=false",
    "train.epochs=4",
    "train.lr=0.01",
    "train.calibration=0",
    "train.patience=30",
)


@pytest.fixture
def told(tmp_path: Path) -> Callable[..., Settings]:
    "`told(folder, …)`: settings for it, a small model, and folders of its own."
    own = [f"paths.{what}={tmp_path / what}" for what in ("cache", "models", "runs")]
    return lambda source, *more: load_settings(f"data.source={source}", *own, *SMALL, *more)


def photo(path: Path, shade: float = 90, size: tuple[int, int] = (40, 50), **save: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = RNG.normal(shade, 40, (*size, 3)).clip(0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(path, **save)


def png16(pixels: np.ndarray) -> bytes:
    "A PNG of 16 bits a channel, which Pillow cannot write."
    height, width, bands = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    kind = {1: 0, 3: 2, 4: 6}[bands]
    head = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    parts = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def deep(folder: Path, make: Callable[[float], Any], suffix: str = ".png", count: int = 8) -> None:
    "Two classes of different brightness, `make(0.3)` and `make(0.6)`."
    for label, level in (("benign", 0.3), ("malignant", 0.6)):
        (folder / label).mkdir(parents=True)
        for i in range(count):
            made, path = make(level), folder / label / f"{i}{suffix}"
            path.write_bytes(made) if isinstance(made, bytes) else made.save(path)


def noise(level: float, top: float, shape: tuple[int, ...] = (24, 24)) -> np.ndarray:
    return RNG.normal(level * top, 0.05 * top, shape).clip(0, top)


def grey(top: float, kind: Any, offset: float = 0) -> Callable[[float], Image.Image]:
    return lambda level: Image.fromarray((noise(level, top) + offset).astype(kind))


DEEP = {
    "12 bits": (grey(4095, np.uint16), ".png", (0, 4095)),
    "16 bits": (grey(65535, np.uint16), ".png", (0, 65535)),
    "TIFF, 16 bits": (grey(65535, np.uint16), ".tif", (0, 65535)),
    "TIFF, big-endian": (grey(4095, ">u2"), ".tif", (0, 4095)),
    "Hounsfield": (grey(2000, np.int32, -1000), ".tif", None),
    "fractions": (grey(1, np.float32), ".tiff", (0, 1)),
    "metres": (grey(700, np.float32, 1300), ".tif", None),
    "color, 16 bits": (lambda v: png16(noise(v, 65535, (24, 24, 3))), ".png", (0, 65535)),
    "color, 12 of 16 bits": (lambda v: png16(noise(v, 4095, (24, 24, 3))), ".png", (0, 4095)),
}


@pytest.mark.parametrize("kind", DEEP)
def test_more_than_8_bits_keep_their_content(
    kind: str, tmp_path: Path, told: Callable[..., Settings]
) -> None:
    make, suffix, levels = DEEP[kind]
    deep(tmp_path / "x", make, suffix)
    settings = told(tmp_path / "x")
    found = audit(str(tmp_path / "x"), settings)
    assert levels is None or found.levels == levels
    assert any("16 images have more than 8 bits" in note for note in found.notes)
    assert not any("one colour" in note for note in found.notes)
    parts = split(found, settings)
    dls = dataloaders(parts, settings)
    x, y = (torch.cat(v) for v in zip(*[b for b in dls.valid], strict=True))
    dark, bright = (float(x[y == label].mean()) for label in (0, 1))
    assert bright - dark > 0.5  # in standard deviations of ImageNet
    for one in found.readable[:2]:
        ours = decode(one.example.path.read_bytes(), levels=found.levels)
        theirs = dls.valid_ds.tls[0].tfms.fs[-1](one.example.path)
        assert (np.asarray(ours) == np.asarray(theirs)).all()
        assert np.unique(np.asarray(ours)).size > 4  # of 12 bits in 16 Pillow leaves 4


def test_other_modes_stay_as_they_are(tmp_path: Path, told: Callable[..., Settings]) -> None:
    source = tmp_path / "x"
    for label, shade in (("a", 60), ("b", 190)):
        for mode in ("1", "L", "P", "LA", "RGBA", "CMYK", "RGB"):
            photo(source / "in.png", shade)
            image = Image.open(source / "in.png").convert(mode)
            (source / label).mkdir(exist_ok=True)
            image.save(source / label / f"{mode}.{'tif' if mode == 'CMYK' else 'png'}")
    (source / "in.png").unlink()
    found = audit(str(source), told(source))
    assert found.levels is None and len(found.readable) == 14
    for one in found.readable:
        with Image.open(one.example.path) as image:
            plain = np.asarray(image.convert("RGB"))
        assert (np.asarray(decode(one.example.path.read_bytes(), levels=(0, 4095))) == plain).all()


def test_one_colour_is_counted_and_refused(tmp_path: Path, told: Callable[..., Settings]) -> None:
    for label, shade in (("a", 60), ("b", 190)):
        for i in range(6):
            photo(tmp_path / "x" / label / f"{i}.png", shade)
        Image.new("RGB", (9, 9), "white").save(tmp_path / "x" / label / "white.png")
        (tmp_path / "clear" / label).mkdir(parents=True)
        (tmp_path / "white" / label).mkdir(parents=True)
        for i in range(6):
            ink = Image.new("RGBA", (20, 20), (i * 9, 0, 0))
            ink.putalpha(Image.effect_noise((20, 20), 60))
            ink.save(tmp_path / "clear" / label / f"{i}.png")
            Image.new("L", (9 + i, 9 + (label == "a")), 255).save(
                tmp_path / "white" / label / f"{i}.png"
            )
    found = audit(str(tmp_path / "x"), told(tmp_path / "x"))
    assert "2 images are one colour: a/white.png, b/white.png" in found.notes
    assert split(found, told(tmp_path / "x"))
    for name, said in (("white", "the same one colour"), ("clear", "transparency is not read")):
        settings = told(tmp_path / name)
        with pytest.raises(DataError, match=said):
            split(audit(str(tmp_path / name), settings), settings)


def test_the_whole_way_of_deep_images_with_odd_names(
    tmp_path: Path, told: Callable[..., Settings]
) -> None:
    source = tmp_path / "x"
    deep(source, grey(4095, np.uint16), count=16)
    decomposed = unicodedata.normalize("NFD", "café")
    (source / "benign").rename(source / decomposed)
    odd = os.fsencode(source / decomposed) + b"/t\xe9l\xe9.png"
    os.rename(source / decomposed / "0.png", odd)
    done = pipeline(settings=told(source, "model.name=xray", "train.epochs=16"))
    manifest = read_manifest(done.bundle)
    assert manifest.input.levels == (0, 4095) and manifest.vocab == ("café", "malignant")
    assert done.parity < 1e-4 and done.score > 0.8
    rows = list(csv.reader((done.run / "split.csv").read_text(encoding="utf-8").splitlines()))
    assert "\\xe9" in "".join(row[0] for row in rows) and len(rows) == 33
    assert (done.run / "report/card.md").read_text(encoding="utf-8")
    code = """
import sys, numpy as np, fastai.callback.all
from fastai.learner import load_learner
learn = load_learner(sys.argv[1])
with learn.no_bar():
    print(*learn.get_preds(dl=learn.dls.test_dl(sys.argv[2:], num_workers=0))[0].flatten().tolist())
    assert str(learn.predict(sys.argv[2])[0]) == "malignant"
"""
    files = [source / "malignant/1.png", source / decomposed / "1.png"]
    words = [sys.executable, "-W", "ignore", "-c", code, done.bundle / "learner.pkl", *files]
    there = warm.run(words, capture_output=True, text=True, cwd=tmp_path)
    assert there.returncode == 0, there.stderr
    theirs = np.array(there.stdout.split(), float).reshape(2, 2)
    predictor = Predictor(done.bundle)
    ours = np.array([row for row, _ in predictor.rows([f.read_bytes() for f in files])])
    assert np.abs(ours - theirs).max() < 1e-4 and abs(ours[0] - ours[1]).max() > 0.3
    words = ["predict", "xray", str(source), "--out", str(tmp_path / "p.csv")]
    words += ["--set", f"paths.models={tmp_path / 'models'}"]
    told_ = warm.run([sys.executable, "-m", "mlkit", *words], capture_output=True, text=True)
    assert told_.returncode == 0, told_.stderr
    table = list(csv.DictReader((tmp_path / "p.csv").read_text(encoding="utf-8").splitlines()))
    assert len(table) == 32 and not any(row["error"] for row in table if "error" in row)


def test_one_limit_of_size_and_it_is_ours(tmp_path: Path, told: Callable[..., Settings]) -> None:
    for label in "ab":
        for i in range(5):
            photo(tmp_path / "x" / label / f"{i}.png", 60 + i)
    Image.new("1", (9500, 9500)).save(tmp_path / "x/a/large.png")  # 90 megapixels: Pillow warns
    said = "at most 64 megapixels are taken (api.max_megapixels)"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = audit(str(tmp_path / "x"), told(tmp_path / "x"))
        assert list(found.quarantine) == ["a/large.png"]
        assert said in found.quarantine["a/large.png"]
        with pytest.raises(InputError, match="api.max_megapixels"):
            decode((tmp_path / "x/a/large.png").read_bytes())
        more = told(tmp_path / "x", "api.max_megapixels=100")
        found = audit(str(tmp_path / "x"), more)
        assert not found.quarantine
        for _ in dataloaders(split(found, more), more).train:
            pass


def test_telephones_and_cameras(tmp_path: Path, told: Callable[..., Settings]) -> None:
    for label, shade in (("a", 60), ("b", 190)):
        for i in range(5):
            photo(tmp_path / "x" / label / f"{i}.avif", shade)
            photo(tmp_path / "x" / label / f"{i}.jfif", shade, format="JPEG")
            other = {"save_all": True, "append_images": [Image.new("RGB", (50, 40))]}
            photo(tmp_path / "x" / label / f"{i}.mpo", shade, format="MPO", **other)
            photo(tmp_path / "x" / label / f"avif{i}", shade, format="AVIF")
    found = audit(str(tmp_path / "x"), told(tmp_path / "x"))
    assert len(found.readable) == 40 and not found.quarantine
    for one in found.readable:
        image = decode(one.example.path.read_bytes())
        with Image.open(one.example.path) as plain:
            assert (np.asarray(image) == np.asarray(plain.convert("RGB"))).all()
    heic = b"\0\0\0\x18ftypheic" + bytes(99)
    (tmp_path / "only/a").mkdir(parents=True)
    (tmp_path / "only/a/1.heic").write_bytes(heic)
    (tmp_path / "x/a/IMG.HEIC").write_bytes(heic)
    (tmp_path / "x/a/renamed.jpg").write_bytes(heic)
    found = audit(str(tmp_path / "x"), told(tmp_path / "x"))
    if not reads_heif():
        assert any("pillow-heif" in note for note in found.notes)
        assert "pillow-heif" in found.quarantine["a/renamed.jpg"]
        with pytest.raises(InputError, match="pillow-heif"):
            open_image(heic)
        with pytest.raises(DataError, match="pillow-heif"):
            infer_task(told(tmp_path / "only"))


# Masks


def voc(i: int) -> np.ndarray:
    m = np.zeros((40, 50), np.uint8)
    m[8:24, 8:24] = 255
    m[9:23, 9:23] = 1 + i % 2
    return m


def masked(folder: Path, make: Callable[[int], Any], suffix: str = ".png", **save: Any) -> Path:
    for i in range(16):
        photo(folder / f"images/{i:02}.png")
        (folder / "masks").mkdir(exist_ok=True)
        made = make(i)
        image = made if isinstance(made, Image.Image) else Image.fromarray(made)
        image.save(folder / f"masks/{i:02}{suffix}", **save)
    return folder


def indexed(pixels: np.ndarray) -> Image.Image:
    image = Image.fromarray(pixels)
    image.putpalette([c for j in range(256) for c in (j, 255 - j, j * 7 % 256)])
    return image


def black_white(i: int) -> np.ndarray:
    return (voc(i) % 255 > 0).astype(np.uint8) * 255


def soft(i: int) -> np.ndarray:
    m = black_white(i)
    m[9, 9:23] = 128 if i == 3 else 255
    return m


def blurred(i: int) -> Image.Image:
    image = Image.fromarray(black_white(i))
    return image.resize((25, 20), Image.Resampling.BILINEAR).resize(
        (50, 40), Image.Resampling.BILINEAR
    )


def of(*values: int) -> Callable[[int], np.ndarray]:
    "Areas of these values, the first one as ground."

    def make(i: int) -> np.ndarray:
        m = np.full((40, 50), values[0], np.uint8)
        for k, value in enumerate(values[1:]):
            m[2 : 30 + i % 3, 3 + 12 * k : 12 + 12 * k] = value
        return m

    return make


def colors(i: int) -> np.ndarray:
    table = np.array([(0, 0, 0), (128, 0, 0), (0, 128, 0), (224, 224, 192)], np.uint8)
    return table[np.minimum(voc(i), 3)]


MASKS: dict[str, tuple[Callable[[int], Any], dict[str, Any], tuple[str, ...], tuple[int, ...]]] = {
    # what, how it is saved, labels, classes and 255 in the masks that are learned from
    "VOC": (lambda i: indexed(voc(i)), {}, ("class 0", "class 1", "class 2"), (0, 1, 2, 255)),
    "Cityscapes": (voc, {}, ("class 0", "class 1", "class 2"), (0, 1, 2, 255)),
    "254 as border": (
        lambda i: np.where(voc(i) == 255, 254, voc(i)).astype(np.uint8),
        {},
        ("class 0", "class 1", "class 2"),
        (0, 1, 2, 255),
    ),
    "black and white": (black_white, {}, ("class 0", "class 1"), (0, 1)),
    "1 bit": (lambda i: black_white(i) > 0, {}, ("class 0", "class 1"), (0, 1)),
    "JPEG": (black_white, {"suffix": ".jpg", "quality": 75}, ("class 0", "class 1"), (0, 1)),
    "bad JPEG": (black_white, {"suffix": ".jpg", "quality": 20}, ("class 0", "class 1"), (0, 1)),
    "soft": (soft, {}, ("class 0", "class 1"), (0, 1)),
    "blurred": (blurred, {}, ("class 0", "class 1"), (0, 1)),
    "three greys": (of(0, 127, 255), {}, ("class 0", "class 127", "class 255"), (0, 1, 2)),
    "four greys": (
        of(0, 85, 170, 255),
        {},
        ("class 0", "class 85", "class 170", "class 255"),
        (0, 1, 2, 3),
    ),
    "from 1 on": (of(1, 2, 3), {}, ("class 1", "class 2", "class 3"), (0, 1, 2)),
    "0 and 1 as RGB": (
        lambda i: np.stack([of(0, 1)(i)] * 3, -1),
        {},
        ("class 0", "class 1"),
        (0, 1),
    ),
    "VOC in colours": (colors, {}, ("#000000", "#800000", "#008000"), (0, 1, 2, 255)),
    "Cityscapes, with -1": (
        lambda i: np.where(voc(i) == 255, -1, voc(i).astype(np.int32) * 11).astype(np.int32),
        {"suffix": ".tif"},
        ("class 0", "class 11", "class 22"),
        (0, 1, 2, 255),
    ),
    "far from 255": (
        lambda i: np.where(voc(i) == 255, 255, of(0, 7, 11, 26)(i)).astype(np.uint8),
        {},
        ("class 0", "class 7", "class 11", "class 26"),
        (0, 1, 2, 3, 255),
    ),
    "red on black": (
        lambda i: np.stack([black_white(i), black_white(i) * 0, black_white(i) * 0], -1),
        {},
        ("#000000", "#ff0000"),
        (0, 1),
    ),
    "transparency": (
        lambda i: np.stack([black_white(i) * 0] * 3 + [black_white(i)], -1),
        {},
        ("class 0", "class 1"),
        (0, 1),
    ),
    "16 bits": (
        lambda i: of(0, 1, 2)(i).astype(np.uint16),
        {},
        ("class 0", "class 1", "class 2"),
        (0, 1, 2),
    ),
    "fractions": (
        lambda i: of(0, 1)(i).astype(np.float32),
        {"suffix": ".tif"},
        ("class 0", "class 1"),
        (0, 1),
    ),
    "palettes that differ": (
        lambda i: Image.fromarray(colors(i) if i % 2 else colors(i)[::-1]).quantize(4 + i % 3),
        {},
        ("#000000", "#800000", "#008000"),
        (0, 1, 2, 255),
    ),
}


@pytest.mark.parametrize("kind", MASKS)
def test_masks_become_classes(kind: str, tmp_path: Path, told: Callable[..., Settings]) -> None:
    make, save, labels, classes = MASKS[kind]
    source = masked(tmp_path / "x", make, **save)
    settings = told(source)
    found = audit(str(source), settings)
    assert not found.quarantine and found.labels == labels
    parts = split(found, settings)
    dls = dataloaders(parts, settings)
    pixels = [np.asarray(Image.open(item[1])) for item in dls.train_ds.items]
    assert tuple(sorted({*np.concatenate([p.ravel() for p in pixels]).tolist()})) == classes
    assert json.dumps(found.to_dict()["masks"])
    if 255 in classes:
        assert any("no class" in note for note in found.notes)


def test_a_cut_is_said(tmp_path: Path, told: Callable[..., Settings]) -> None:
    source = masked(tmp_path / "x", soft)
    found = audit(str(source), told(source))
    assert any("14 pixels in 1 masks lie between black and white" in n for n in found.notes)


def test_names_of_classes(tmp_path: Path, told: Callable[..., Settings]) -> None:
    for kind, make, names, labels in (
        ("voc", lambda i: indexed(voc(i)), "background\ncat\ndog\n", ("background", "cat", "dog")),
        ("greys", of(0, 127, 255), "sky\nroad\ncar\n", ("sky", "road", "car")),
        ("bw", black_white, "skin\nlesion\n", ("skin", "lesion")),
        ("colors", colors, "0 0 0 void\n0 128 0 dog\n128 0 0 cat\n", ("void", "dog", "cat")),
        ("spare", of(0, 1), "a\nb\nc\n", ("a", "b", "c")),
    ):
        source = masked(tmp_path / kind, make)
        (source / "codes.txt").write_text(names)
        found = audit(str(source), told(source))
        assert (found.labels, found.quarantine) == (labels, {}), kind
    (tmp_path / "greys/codes.txt").write_text("sky\nroad\n")
    with pytest.raises(DataError, match="2 classes are named .* the masks have 3 values"):
        split(audit(str(tmp_path / "greys"), told(tmp_path)), told(tmp_path))


BAD = {
    "a photograph": lambda: RNG.integers(0, 256, (40, 50), np.uint8),
    "a photograph in colours": lambda: RNG.integers(0, 256, (40, 50, 3), np.uint8),
    "another size": lambda: np.zeros((30, 50), np.uint8),
    "a strange value": lambda: of(0, 77)(0),
    "colours of a GIF": lambda: indexed(voc(0)).convert("RGB"),
    "nothing but border": lambda: np.full((40, 50), 255, np.uint8),
}


@pytest.mark.parametrize("bad", BAD)
def test_one_bad_mask_costs_one_image(
    bad: str, tmp_path: Path, told: Callable[..., Settings]
) -> None:
    for kind, make in (("voc", voc), ("greys", of(0, 127, 254)), ("colors", colors)):
        source = masked(tmp_path / kind, lambda i, make=make: BAD[bad]() if i == 5 else make(i))
        found = audit(str(source), told(source))
        fits = (kind, bad) == ("colors", "nothing but border")  # white is a colour like any other
        assert list(found.quarantine) == ["images/05.png"] or fits, (kind, found.labels)
        assert split(found, told(source))


def test_where_all_are_bad_the_reason_is_told(
    tmp_path: Path, told: Callable[..., Settings]
) -> None:
    wild = lambda i: RNG.integers(0, 256, (40, 50), np.uint8)  # noqa: E731
    slope = np.add.outer(np.arange(40), np.arange(50)).astype(np.uint8)
    cases = {
        "depth": (lambda i: slope + np.uint8(i), {}, "are no classes"),
        "two ways": (
            lambda i: black_white(i) if i % 2 else of(0, 1)(i),
            {},
            "written in two ways: 8 have the values 0, 255, the others 0, 1",
        ),
        "wild": (wild, {}, "are no classes; write a grey PNG"),
        "three as JPEG": (of(0, 127, 255), {"suffix": ".jpg"}, "JPEG blurs them"),
        "fractions": (lambda i: voc(i) / np.float32(3), {"suffix": ".tif"}, "has fractions"),
        "sizes": (
            lambda i: np.zeros((9, 9), np.uint8),
            {},
            "the mask is 9 × 9 pixels, the image 50",
        ),
    }
    for name, (make, save, said) in cases.items():
        source = masked(tmp_path / name, make, **save)
        with pytest.raises(DataError, match=said):
            split(audit(str(source), told(source)), told(source))


def test_turns_are_named(tmp_path: Path, told: Callable[..., Settings]) -> None:
    source, tags = masked(tmp_path / "x", of(0, 1)), Image.Exif()
    tags[274] = 6
    photo(source / "images/03.png", size=(50, 40), exif=tags)  # seen upright it is 40 × 50
    photo(source / "images/04.png", exif=tags)
    wrong = {"ignore": "images/03.png", "apply": "images/04.png"}
    for exif, other in (("ignore", "04.png"), ("apply", "03.png")):
        found = audit(str(source), told(source, f"data.exif={exif}"))
        assert list(found.quarantine) == [wrong[exif]]
        assert "the image is turned by EXIF" in found.quarantine[wrong[exif]]
        assert any("turned differently by EXIF" in n and other in n for n in found.notes)


def test_no_class_counts_nowhere(tmp_path: Path, told: Callable[..., Settings]) -> None:
    truth = np.array([[[0, 1], [NO_CLASS, 1]]])
    assert confusions(truth, np.zeros((1, 2, 2)), 2).tolist() == [[[1, 0], [2, 0]]]
    source = masked(tmp_path / "x", voc)
    settings = told(source)
    learn = TASKS["image-segmentation"].data.learner(
        dataloaders(split(audit(str(source), settings), settings), settings), settings
    )
    out, y = torch.randn(2, 3, 4, 4), torch.randint(0, 3, (2, 4, 4))
    known = y.clone()
    y[0, :2] = NO_CLASS
    kept = torch.ones(2, 4, 4, dtype=torch.bool)
    kept[0, :2] = False
    plain = torch.nn.functional.cross_entropy(out.permute(0, 2, 3, 1)[kept], known[kept])
    assert torch.isclose(learn.loss_func(out, y), plain)
    dice = MaskDice()
    dice.reset()
    dice.accumulate(type("Seen", (), {"pred": out, "y": y}))
    assert sum(dice.union.values()) == 2 * int(kept.sum())


def test_the_table_goes_with_the_model(tmp_path: Path, told: Callable[..., Settings]) -> None:
    source = masked(tmp_path / "x", voc)
    settings = told(source, "model.name=cells", "train.epochs=1", "model.arch=resnet18")
    done = pipeline(settings=settings)
    kept = read_manifest(done.bundle).lineage["masks"]
    assert kept["no class"] == ["255"] and [*kept["classes"]] == ["0", "1", "2"]
    assert np.isfinite(done.metrics["dice"]) and done.parity < 1e-3


# Architectures


def test_an_architecture_of_one_size(tmp_path: Path, told: Callable[..., Settings]) -> None:
    task, vit = TASKS["image-classification"], "model.arch=vit_tiny_patch16_224"
    assert fixed_size("vit_tiny_patch16_224") == 224 and fixed_size("resnet18") is None
    assert task.settled(told(tmp_path, vit, "data.size=128")).data.size == 224
    assert task.settled(told(tmp_path)).data.size == 32
    with pytest.raises(SettingsError, match="takes 224 × 224; set data.size=224"):
        task.settled(told(tmp_path, vit))


def lit(path: Path, left: bool = True) -> None:
    "An image whose one half is bright."
    pixels = np.full((32, 32, 3), 40, np.uint8)
    pixels[:, :16] += np.uint8(150)
    path.parent.mkdir(parents=True, exist_ok=True)
    noisy = pixels[:, :: 1 if left else -1] + RNG.integers(0, 40, pixels.shape, np.uint8)
    Image.fromarray(noisy).save(path)


SIDED = {  # head, or the names of two folders → what spoils it
    "go_left go_right": "mirror",
    "links rechts": "mirror",
    "Knee-L Knee-R": "mirror",
    "cats dogs": "",
    "file,x,y": "places",
    "file,left_eye_x,left_eye_y,nose_x,nose_y": "places",
    "file,steering_angle": "places",
    "file,keypoint_1,keypoint_2": "places",
    "file,grams": "",
    "file,left,right": "mirror",
}


@pytest.mark.parametrize(
    ("kind", "flip"),
    [*((kind, "auto") for kind in SIDED), ("links rechts", "true"), ("file,x,y", "true")],
)
def test_what_a_mirror_would_spoil_is_not_mirrored(
    kind: str, flip: str, tmp_path: Path, told: Callable[..., Settings]
) -> None:
    folders, columns, source = kind.split(), kind.split(",")[1:], tmp_path / "x"
    for i in range(24):
        lit(source / (f"{folders[i % 2]}/{i}.png" if not columns else f"{i}.png"))
    if columns:
        lines = (f"{i}.png" + f",{i + 0.5}" * len(columns) for i in range(24))
        (source / "list.csv").write_text("\n".join([kind, *lines]))
    more = "data.augment=auto", f"data.flip={flip}", f"data.target={','.join(columns)}"
    settings = told(source, *more)
    found = audit(str(source), settings)
    said = " ".join(found.notes)
    assert ("not mirrored (data.flip=true does it)" in said) is bool(SIDED[kind] and flip != "true")
    assert ("not turned and zoomed (data.augment=true" in said) is (SIDED[kind] == "places")
    dls = dataloaders(split(found, settings), settings)
    seen = torch.cat([x for _ in range(3) for x, _ in dls.train])
    mirrored = seen[..., :12].mean((1, 2, 3)) < seen[..., 20:].mean((1, 2, 3))
    assert bool(mirrored.any()) is (flip == "true" or (flip == "auto" and not SIDED[kind]))
    if SIDED[kind] == "places" and flip != "true":  # the edge between the halves stays where it was
        rows = seen.mean(1)
        assert bool(((rows[..., 15] - rows[..., 16]) > (rows[..., 14] - rows[..., 15]).abs()).all())
