"""What people keep, and what it is taken for: folders, lists, masks, tables and texts in the layouts that are met."""

import itertools
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mlkit.config import load_settings
from mlkit.preprocess.image_source import find_examples
from mlkit.preprocess.source import DataError, look
from mlkit.tasks.task import infer_task

CHANCE = np.random.default_rng(0)


def image(path: Path, shade: int = 90, size: tuple[int, int] = (8, 8)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.clip(CHANCE.normal(shade, 40, (*size, 3)), 0, 255).astype("uint8")
    Image.fromarray(pixels).save(path)


def mask(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(CHANCE.integers(0, 2, (8, 8)).astype("uint8") * 255).save(path)


def rows(path: Path, head: str, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([head, *lines]) + "\n", encoding="utf-8")


def task_of(source: Path, *assignments: str) -> str:
    return infer_task(load_settings(f"data.source={source}", *assignments))[0].name


def counted(source: Path, *assignments: str) -> Counter:
    "Examples by label and part, as the task's own audit has them."
    settings = load_settings(f"data.source={source}", *assignments)
    task, _ = infer_task(settings)
    found = task.data.audit(str(source), settings)
    return Counter((r.example.label, r.example.part) for r in found.records)


# How the examples are kept, in which parts, and what lies beside them. ---------------------------------------------


def classes(top: Path) -> None:
    for label, i in itertools.product(("rye", "oat"), range(6)):
        image(top / label / f"{i}.png", 60 if label == "rye" else 190)


def masks(top: Path) -> None:
    for i in range(6):
        image(top / f"images/{i:02}.png")
        mask(top / f"masks/{i:02}.png")


def names(top: Path) -> None:
    for label, i in itertools.product(("rye", "oat"), range(6)):
        image(top / f"{label}_{i}.png")


def listed(top: Path) -> None:
    for i in range(12):
        image(top / f"photos/{i:03x}.png")
    rows(
        top / "labels.csv",
        "id,species",
        *(f"{i:03x},{'rye' if i % 2 else 'oat'}" for i in range(12)),
    )


LAYOUTS = {
    classes: "image-classification",
    masks: "image-segmentation",
    names: "image-classification",
    listed: "image-classification",
}


def extra(top: Path) -> None:
    (top / "Thumbs.db").write_bytes(b"\0")
    (top / "notes.md").write_text("taken in spring")
    (top / ".DS_Store").write_bytes(b"\0")
    (top / "__MACOSX").mkdir()
    (top / "sample_submission.csv").write_text("id,species\n1,rye\n2,rye\n3,rye\n4,rye\n5,rye\n")


def links(top: Path) -> None:
    for path in sorted(p for p in top.iterdir() if p.is_dir()):
        away = top.parent / f"{top.name}-{path.name}"
        path.rename(away)
        path.symlink_to(away)
    (top / "gone.png").symlink_to(top / "nowhere.png")


def odd(top: Path) -> None:
    for path in sorted(top.rglob("*0.png")):
        path.rename(path.with_suffix(".PNG"))


@pytest.mark.parametrize(
    "beside", [lambda top: None, extra, links, odd], ids=["", "extra", "links", "odd"]
)
@pytest.mark.parametrize(
    "parts",
    [("",), ("train", "valid"), ("Training", "test_set"), ("train", "val", "test")],
    ids=str,
)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_a_layout_is_what_it_is_in_any_order(
    layout: Callable,
    parts: tuple[str, ...],
    beside: Callable,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if layout is listed and len(parts) > 1:
        parts = ("",)  # a list says its parts in a column; see below
    top = tmp_path / "source"
    for part in parts:
        layout(top / part)
    beside(top)
    walk, found = os.walk, set()
    for seed in range(3):

        def shuffled(*args, seed=seed, **how):
            for place, folders, files in walk(*args, **how):
                random.Random(seed).shuffle(folders)
                random.Random(seed).shuffle(files)
                yield place, folders, files

        monkeypatch.setattr(os, "walk", shuffled)
        found.add(task_of(top))
    assert found == {LAYOUTS[layout]}
    kept = counted(top)
    assert {part for _, part in kept} == ({""} if len(parts) == 1 else {"train", "valid"})


# Cases that were met. ----------------------------------------------------------------------------------------------


def test_folders_of_parts_are_never_classes(tmp_path: Path) -> None:
    for i in range(12):
        image(tmp_path / f"d/train/cat.{i}.jpg")
        image(tmp_path / f"d/train/dog.{i}.jpg")
        image(tmp_path / f"d/test1/{i}.jpg")
        image(tmp_path / f"c/train_images/{i:04x}.jpg")
        image(tmp_path / f"c/test_images/{i:03x}.jpg")
        image(tmp_path / f"bare/train/{i * 7919:08x}.jpg")
        image(tmp_path / f"bare/test1/{i * 7919:08x}.jpg")
    assert counted(tmp_path / "d") == {("cat", ""): 12, ("dog", ""): 12}
    rows(tmp_path / "c/train.csv", "image_id,label", *(f"{i:04x}.jpg,{i % 2}" for i in range(12)))
    assert counted(tmp_path / "c") == {("0", ""): 6, ("1", ""): 6}
    with pytest.raises(DataError, match="24 images, and nothing says what is to be learned"):
        task_of(tmp_path / "bare")


def test_a_test_part_without_classes_is_left_alone(tmp_path: Path) -> None:
    for i in range(12):
        image(tmp_path / f"train/Black-grass/{i}.png")
        image(tmp_path / f"train/Charlock/{i}.png")
        image(tmp_path / f"test/{i:08x}.png")
    rows(
        tmp_path / "sample_submission.csv",
        "file,species",
        *(f"{i:08x}.png,Charlock" for i in range(12)),
    )
    assert counted(tmp_path) == {("Black-grass", ""): 12, ("Charlock", ""): 12}
    task, _ = infer_task(settings := load_settings(f"data.source={tmp_path}"))
    notes = task.data.audit(str(tmp_path), settings).notes
    assert any(
        "the test part holds 12 images without a class" in n and "mlkit predict" in n for n in notes
    )


@pytest.mark.parametrize(
    ("images", "masked"),
    [
        ("images/{}.png", "labels/{}_P.png"),
        ("train/{}.jpg", "train_masks/{}_mask.gif"),
        ("s/images/{}.png", "s/masks/{}_mask.png"),
        ("JPEGImages/{}.jpg", "SegmentationClass/{}.png"),
        ("images/img_{}.jpg", "annotations/gt_{}.png"),
        ("images/train/{}.jpg", "masks/train/{}.png"),
        ("train/images/{}.jpg", "train/masks/{}.png"),
        ("data/imgs/{}.png", "data/ground_truth/{}.tif"),
        ("{}_sat.jpg", "{}_mask.png"),
        ("{}.jpg", "{}_mask.png"),
    ],
)
def test_masks_are_found_whatever_they_are_called(images: str, masked: str, tmp_path: Path) -> None:
    for i in range(8):
        image(tmp_path / images.format(f"{i:02}"))
        mask(tmp_path / masked.format(f"{i:02}"))
    (tmp_path / "codes.txt").write_text("background\nthing\n")
    assert task_of(tmp_path) == "image-segmentation"
    settings = load_settings(f"data.source={tmp_path}")
    found = infer_task(settings)[0].data.audit(str(tmp_path), settings)
    assert len(found.readable) == 8 and found.labels == ("background", "thing")


def test_a_class_may_be_called_mask(tmp_path: Path) -> None:
    for i in range(6):
        image(tmp_path / f"mask/{i}.png")
        image(tmp_path / f"no_mask/{i + 9}.png")
    assert counted(tmp_path) == {("mask", ""): 6, ("no_mask", ""): 6}


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    for label, i in itertools.product(("bus", "car", "train"), range(6)):
        image(tmp_path / label / f"{i}.png")
    assert set(counted(tmp_path)) == {("bus", ""), ("car", ""), ("train", "")}


@pytest.mark.parametrize(
    "name", ["labels", "index", "sample_submission", "train", "data", "README"]
)
def test_class_folders_win_over_a_table_beside_them(name: str, tmp_path: Path) -> None:
    for label, i in itertools.product(("cats", "dogs"), range(8)):
        image(tmp_path / label / f"{i}.png")
    rows(tmp_path / f"{name}.csv", "file,species,weight", *(f"{i}.png,cat,{i}" for i in range(20)))
    assert task_of(tmp_path) == "image-classification"
    assert "not read: 1 table file" in " ".join(look(str(tmp_path), load_settings()).notes("image"))


@pytest.mark.parametrize(
    ("head", "line"),
    [
        ("id_code,diagnosis", "{0},{1}"),
        ("path,label", "train_images/{0},{1}"),
        ("filename,label", "train_images/{0}.png,{1}"),
        ("file;label", "{0}.png;{1}"),
        ("image\tlabel", "/kaggle/input/aptos/train_images/{0}.png\t{1}"),
        ("path,label", "train_images\\{0}.png,{1}"),
        (",Unnamed: 0,image_id,dx", "{2},{2},{0},{1}"),
        ("image_name,target", "./train_images/{0}.png,{1}"),
    ],
)
def test_a_table_names_images_in_any_column(head: str, line: str, tmp_path: Path) -> None:
    named = [(f"{i * 7919:012x}", i % 5, i) for i in range(60)]
    for name, grade, _ in named:
        image(tmp_path / f"train_images/{name}.png", 30 + 45 * grade)
    rows(tmp_path / "train.csv", head, *(line.format(*n) for n in named))
    assert counted(tmp_path / "train.csv") == {(str(k), ""): 12 for k in range(5)}
    assert counted(tmp_path) == counted(tmp_path / "train.csv")


def test_a_table_beside_the_folder_of_its_images(tmp_path: Path) -> None:
    for i in range(10):
        image(tmp_path / f"pictures/{i:03}.png")
    rows(tmp_path / "tables/train.csv", "id,kind", *(f"{i:03},{'ab'[i % 2]}" for i in range(10)))
    assert counted(tmp_path / "tables/train.csv") == {("a", ""): 5, ("b", ""): 5}


@pytest.mark.parametrize(
    ("yes", "no"),
    [
        ("1", "0"),
        ("1.0", "0.0"),
        ("True", "False"),
        ("yes", "no"),
        ("Y", "N"),
        ("1", "-1"),
        ("T", "F"),
    ],
)
def test_flags_in_any_spelling_are_several_labels(yes: str, no: str, tmp_path: Path) -> None:
    for i in range(12):
        image(tmp_path / f"{i}.jpg")
    said = [(i, *(yes if i % k else no for k in (2, 3, 5))) for i in range(12)]
    rows(
        tmp_path / "isic.csv",
        ",path,MEL,NV,BCC",
        *("{0},{0}.jpg,{1},{2},{3}".format(*s) for s in said),
    )
    assert task_of(tmp_path / "isic.csv") == "image-multilabel"
    settings = load_settings(f"data.source={tmp_path / 'isic.csv'}")
    found = infer_task(settings)[0].data.audit(settings.data.source, settings)
    assert found.labels == ("MEL", "NV", "BCC") and not found.quarantine
    assert found.records[1].example.target == ("MEL", "NV", "BCC")


def test_a_row_number_is_not_learned(tmp_path: Path) -> None:
    for i in range(12):
        image(tmp_path / f"{i}.jpg")
    rows(
        tmp_path / "s.csv",
        ",index,path,loes-score",
        *(f"{i},{i + 100},{i}.jpg,{i % 7 * 1.5}" for i in range(12)),
    )
    settings = load_settings(f"data.source={tmp_path / 's.csv'}")
    found = infer_task(settings)[0].data.audit(settings.data.source, settings)
    assert (found.task, found.labels) == ("image-regression", ("loes-score",))
    assert any("'index' is not learned" in n for n in found.notes)


def test_a_decimal_comma_is_a_number(tmp_path: Path) -> None:
    for i in range(40):
        image(tmp_path / f"img/{i}.jpg")
    rows(
        tmp_path / "q.csv",
        "path,gewicht",
        *(f'img/{i}.jpg,"{1 + i % 9},{i % 10}"' for i in range(40)),
    )
    for assignments in ((), ("data.target=gewicht",), ("data.task=image-regression",)):
        settings = load_settings(f"data.source={tmp_path / 'q.csv'}", *assignments)
        found = infer_task(settings)[0].data.audit(settings.data.source, settings)
        assert (found.task, found.labels) == ("image-regression", ("gewicht",))
        by_name = {r.example.name: r.example.target for r in found.records}
        assert by_name["img/3.jpg"] == (4.3,)


@pytest.mark.parametrize(
    ("column", "cells"),
    [
        ("is_valid", "01"),
        ("split", ["train", "val"]),
        ("Set", ["Training", "TEST"]),
        ("fold", "10"),
    ],
)
def test_a_column_says_the_part(column: str, cells: str, tmp_path: Path) -> None:
    for i in range(12):
        image(tmp_path / f"{i}.jpg")
    rows(
        tmp_path / "t.csv",
        f"path,label,{column}",
        *(f"{i}.jpg,{'ab'[i % 2]},{cells[i % 3 == 0]}" for i in range(12)),
    )
    assert {part for _, part in counted(tmp_path / "t.csv")} == {"train", "valid"}
    assert sum(n for (_, part), n in counted(tmp_path / "t.csv").items() if part == "valid") == 4


def test_a_group_stays_on_one_side(tmp_path: Path) -> None:
    for p, i in itertools.product(range(12), range(5)):
        image(tmp_path / f"p{p}-{i}.png")
    rows(
        tmp_path / "k.csv",
        "path,label,patient",
        *(
            f"p{p}-{i}.png,{('healthy', 'sick')[p % 2]},P{p}"
            for p, i in itertools.product(range(12), range(5))
        ),
    )
    settings = load_settings(f"data.source={tmp_path / 'k.csv'}", "data.group=patient")
    task = infer_task(settings)[0]
    parts = task.data.split(task.data.audit(settings.data.source, settings), settings)
    sides = [{r.example.group for r in part} for part in (parts.train, parts.valid)]
    assert not sides[0] & sides[1] and len(parts.valid) in (10, 15)
    assert {r.example.label for r in parts.valid} == {"healthy", "sick"}
    with pytest.raises(DataError, match="data.group: no column 'nonsense'"):
        wrong = load_settings(f"data.source={tmp_path / 'k.csv'}", "data.group=nonsense")
        infer_task(wrong)[0].data.audit(settings.data.source, wrong)


def test_a_class_that_only_one_part_has(tmp_path: Path) -> None:
    for part, kinds in (("train", "abc"), ("valid", "ab")):
        for kind, i in itertools.product(kinds, range(6)):
            image(tmp_path / part / kind / f"{i}.png")
    settings = load_settings(f"data.source={tmp_path}")
    task = infer_task(settings)[0]
    with pytest.raises(
        DataError, match=r"c \(6\) is in train alone and cannot be judged; .*data.ignore=c"
    ):
        task.data.split(task.data.audit(str(tmp_path), settings), settings)
    assert {label for label, _ in counted(tmp_path, "data.ignore=c")} == {"a", "b"}


def test_names_in_any_bytes_and_any_normal_form(tmp_path: Path) -> None:
    for name, i in itertools.product(("cafe\u0301", "caf\xe9", "tea"), range(6)):
        image(tmp_path / name / f"{i}-{len(name)}.png")
    os.rename(tmp_path / "tea/0-3.png", os.fsencode(tmp_path / "tea") + b"/t\xe9l\xe9.png")
    assert counted(tmp_path) == {("caf\xe9", ""): 12, ("tea", ""): 6}
    settings = load_settings(f"data.source={tmp_path}")
    found = infer_task(settings)[0].data.audit(str(tmp_path), settings)
    assert r"tea/t\xe9l\xe9.png" in [r.example.name for r in found.readable]
    os.rename(tmp_path / "tea", os.fsencode(tmp_path) + b"/t\xe9a")
    with pytest.raises(
        DataError, match=r"the class 't\\\\xe9a' has a name that is not UTF-8; rename its folder"
    ):
        counted(tmp_path)


def test_what_is_not_read_is_counted(tmp_path: Path) -> None:
    for label, i in itertools.product(("ripe", "unripe"), range(6)):
        image(tmp_path / label / f"{i}.jpg")
        image(tmp_path / label / f"b{i}.avif")
        (tmp_path / label / f"IMG_{i}.HEIC").write_bytes(b"\0\0\0\x18ftypheic" + bytes(99))
        (tmp_path / label / f"{i}.jpg").rename(tmp_path / label / f"{i}.jfif")
    (tmp_path / "ripe/scan").write_bytes((tmp_path / "ripe/0.jfif").read_bytes())
    assert counted(tmp_path) == {("ripe", ""): 13, ("unripe", ""): 12}
    notes = " ".join(look(str(tmp_path), load_settings()).notes("image"))
    assert "12 .heic" in notes and "where pillow-heif is installed" in notes


# What a stranger brought: layouts of public data sets, small. ------------------------------------------------------


def of_classes(top: Path, *patterns: str, n: int = 6) -> None:
    for pattern, i in itertools.product(patterns, range(n)):
        image(top / pattern.format(i))


@pytest.mark.parametrize(
    ("patterns", "right"),
    [
        (  # parts whose names share words
            [f"asl_{p}/asl_{p}/{c}/{{}}.jpg" for p in ("train", "test") for c in "AB"],
            {(c, p): 6 for c in "AB" for p in ("train", "valid")},
        ),
        (  # Keras' folder for what has no class
            ["train/cat/{}.jpg", "train/dog/{}.jpg", "test/unknown/{}.jpg"],
            {("cat", ""): 6, ("dog", ""): 6},
        ),
        (
            ["cat/{}.jpg", "dog/{}.jpg", "annotations/{}.png", "images_2/{}.jpg"],
            {("cat", ""): 6, ("dog", ""): 6},
        ),
        (["photos/rose_{}.jpg", "photos/tulip_{}.jpg"], {("rose", ""): 6, ("tulip", ""): 6}),
    ],
)
def test_parts_and_annotations_are_no_classes(
    patterns: list[str], right: dict, tmp_path: Path
) -> None:
    of_classes(tmp_path, *patterns)
    assert counted(tmp_path) == right


@pytest.mark.parametrize(
    "where", ["{}/images/{{}}.png {}/masks/{{}}.png", "{}/{{}}.png {}/{{}}_mask.png"]
)
def test_a_mask_is_of_no_class(where: str, tmp_path: Path) -> None:
    for label in ("benign", "malignant"):
        of_classes(tmp_path, *where.format(label, label).split())
    assert counted(tmp_path, "data.task=image-classification") == {
        ("benign", ""): 6,
        ("malignant", ""): 6,
    }


@pytest.mark.parametrize(
    ("images", "masked"),
    [
        ("Original/{}.tif", "Ground Truth/{}.tif"),
        ("leftImg8bit/{}_leftImg8bit.png", "gtFine/{}_gtFine_labelIds.png"),
        ("train/images/{}.png", "train/masks/{}.png"),
    ],
)
def test_a_part_without_masks_does_not_judge(images: str, masked: str, tmp_path: Path) -> None:
    for i in range(9):
        image(tmp_path / images.format(i))
        mask(tmp_path / masked.format(i))
    if "train" in images:
        of_classes(tmp_path, "test/images/x{}.png", "valid/images/y{}.png")
    settings = load_settings(f"data.source={tmp_path}")
    task, _ = infer_task(settings)
    parts = task.data.split(task.data.audit(str(tmp_path), settings), settings)
    assert task.name == "image-segmentation" and len(parts.train) + len(parts.valid) == 9


def test_a_list_in_each_part_means_the_images_beside_it(tmp_path: Path) -> None:
    for part, shift in (("train", 0), ("test", 1)):
        of_classes(tmp_path, f"{part}/{{}}.png", n=12)
        lines = (f"{i}.png,{'ab'[(i + shift) % 2]}" for i in range(12))
        rows(tmp_path / part / "metadata.csv", "file_name,label", *lines)
    assert counted(tmp_path) == {(c, p): 6 for c in "ab" for p in ("train", "valid")}


def test_a_folder_and_a_list_that_disagree_are_a_question(tmp_path: Path) -> None:
    of_classes(tmp_path, "line1/{}.jpg", "line2/{}.jpg")
    lines = (f"{d}/{i}.jpg,{('ok', 'bad')[i % 2]}" for d in ("line1", "line2") for i in range(6))
    rows(tmp_path / "labels.csv", "path,label", *lines)
    with pytest.raises(DataError, match="labels.csv says another; .*data.ignore=labels.csv"):
        task_of(tmp_path)
    assert counted(tmp_path / "labels.csv") == {("ok", ""): 6, ("bad", ""): 6}
    assert set(counted(tmp_path, "data.ignore=labels.csv")) == {("line1", ""), ("line2", "")}


def test_which_folders_are_the_classes_is_a_question(tmp_path: Path) -> None:
    of_classes(
        tmp_path, *(f"{v}/{c}/{{}}.jpg" for v in ("color", "grey") for c in ("rust", "scab"))
    )
    with pytest.raises(DataError, match="each of color, grey holds the folders rust, scab"):
        task_of(tmp_path)
    lower, upper = "data.label_pattern=/([^/]+)/[^/]+$", "data.label_pattern=/(color|grey)/"
    assert counted(tmp_path, lower) == {("rust", ""): 12, ("scab", ""): 12}
    assert counted(tmp_path, upper) == {("color", ""): 12, ("grey", ""): 12}


def notes_of(source: Path, *assignments: str) -> str:
    settings = load_settings(f"data.source={source}", *assignments)
    return "; ".join(infer_task(settings)[0].data.audit(str(source), settings).notes)


def test_drawers_are_no_classes(tmp_path: Path) -> None:
    hexes = "0123456789abcdef"
    for room in ("bedroom", "kitchen"):
        of_classes(tmp_path / "two", *(f"{room}/{d}/{{}}.webp" for d in hexes), n=1)
        of_classes(tmp_path / "deep", *(f"{room}/{d}/{d}/{d}/{{}}.webp" for d in "017"), n=2)
    assert counted(tmp_path / "two") == {("bedroom", ""): 16, ("kitchen", ""): 16}
    assert counted(tmp_path / "deep") == {("bedroom", ""): 6, ("kitchen", ""): 6}
    of_classes(tmp_path / "one", *(f"lsun/bedroom/{d}/{{}}.webp" for d in hexes), n=1)
    of_classes(tmp_path / "bare", *(f"train/{d}{e}/{{}}.jpg" for d in "19af" for e in "0b"), n=2)
    assert counted(tmp_path / "one") == {("bedroom", ""): 16}
    with pytest.raises(DataError, match="16 images, and nothing says what"):
        task_of(tmp_path / "bare")


def test_numbers_and_codes_are_classes(tmp_path: Path) -> None:
    of_classes(tmp_path / "digits", *(f"mnist/{d}/{{}}.png" for d in range(10)), n=2)
    of_classes(tmp_path / "nist", *(f"by_class/{c:x}/{{}}.png" for c in range(0x39, 0x7B)), n=1)
    assert len(counted(tmp_path / "digits")) == 10 and len(counted(tmp_path / "nist")) == 66


def test_folders_below_and_beside_the_classes_are_told(tmp_path: Path) -> None:
    of_classes(tmp_path, "oak/bark/{}.png", "oak/leaf/{}.png", "elm/{}.png")
    for name in ("ash/deep", "masks", "__MACOSX"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "yew").mkdir()
    (tmp_path / "yew/1.txt").write_text("to do")
    assert counted(tmp_path) == {("elm", ""): 6, ("oak", ""): 12}
    told = notes_of(tmp_path)
    assert "not told apart: bark, leaf; --set 'data.label_pattern=/([^/]+)/[^/]+$'" in told
    assert "folders without an example: ash, yew" in told
    assert "example: ash;" in notes_of(tmp_path, "data.ignore=yew")
    lower = counted(tmp_path, "data.label_pattern=/([^/]+)/[^/]+$")
    assert lower == {("bark", ""): 6, ("leaf", ""): 6, ("elm", ""): 6}


@pytest.mark.parametrize(
    "line",
    [
        "C:\\Users\\X\\new\\PHOTO {0}.JPG,{1}",  # Windows does not mind the case
        "https://ex.org/p/photo%20{0}.jpg?size=large,{1}",
        "TRAIN/Photo {0}.jpeg,{1}",
    ],
)
def test_a_cell_names_a_file_as_windows_and_the_web_do(line: str, tmp_path: Path) -> None:
    suffix = "jpeg" if "jpeg" in line else "jpg"
    of_classes(tmp_path, f"train/photo {{}}.{suffix}", n=12)
    rows(tmp_path / "list.csv", "picture,grade", *(line.format(i, "ab"[i % 2]) for i in range(12)))
    assert counted(tmp_path) == {("a", ""): 6, ("b", ""): 6}


def test_images_that_are_not_there_are_no_words_of_a_table(tmp_path: Path) -> None:
    for name, where in (("web", "https://ex.org/{}.jpg"), ("gone", "img/{}.jpg")):
        lines = (f"{where.format(i)},{i % 7},{i * 3 % 50}" for i in range(60))
        rows(tmp_path / name / "list.csv", "image,colour,price", *lines)
    with pytest.raises(DataError, match="60 of 60 files that do not exist.*Nothing is downloaded"):
        task_of(tmp_path / "web")
    with pytest.raises(DataError, match="names 60 of 60 files .*data.task=table-regression"):
        task_of(tmp_path / "gone")
    assert task_of(tmp_path / "gone", "data.ignore=image") == "table-regression"


@pytest.mark.parametrize(
    "cell", ["[{0}, {1}, 30, 40]", "{0} {1} 30 40", "({0}.5;{1}.5)", "{0} 3 {1} 3 77 3"]
)
def test_several_numbers_in_a_cell_are_no_class(cell: str, tmp_path: Path) -> None:
    of_classes(tmp_path, "scan{}.jpg", n=40)
    lines = (f'scan{i}.jpg,"{cell.format(i + 100, 2 * i)}"' for i in range(40))
    rows(tmp_path / "list.csv", "image,where", *lines)
    with pytest.raises(DataError, match="'where' holds several numbers in a cell.*a column for"):
        task_of(tmp_path)


def test_codes_with_blanks_between_them_are_several_labels(tmp_path: Path) -> None:
    of_classes(tmp_path, "train/cell{}.png", n=60)
    codes = (f"{i % 7} {i * 3 % 5 + 7}" if i % 4 else f"{i % 7}" for i in range(60))
    rows(tmp_path / "train.csv", "Id,Target", *(f"cell{i},{c}" for i, c in enumerate(codes)))
    assert task_of(tmp_path) == "image-multilabel"


def test_other_views_of_an_image_are_no_masks(tmp_path: Path) -> None:
    of_classes(tmp_path, *(f"IMG/{view}_{{}}.jpg" for view in ("center", "left", "right")), n=40)
    lines = (
        f"IMG/center_{i}.jpg, IMG/left_{i}.jpg, IMG/right_{i}.jpg,{(i - 20) / 40}"
        for i in range(40)
    )
    rows(tmp_path / "driving_log.csv", "center,left,right,steering", *lines)
    assert task_of(tmp_path) == "image-regression"
    assert "an angle is learned (steering)" in notes_of(tmp_path)


def test_a_text_that_lists_images_is_named(tmp_path: Path) -> None:
    of_classes(tmp_path, "jpg/image_{}.jpg", n=24)
    for part, first in (("train", 0), ("test", 12)):
        lines = (f"jpg/image_{first + i}.jpg {i % 2}\n" for i in range(12))
        (tmp_path / f"{part}.txt").write_text("".join(lines))
    with pytest.raises(DataError, match="train.txt lists its images; give .*train.txt"):
        task_of(tmp_path)
    assert counted(tmp_path / "train.txt") == {("0", ""): 6, ("1", ""): 6}


def test_the_number_of_an_image_is_no_class(tmp_path: Path) -> None:
    of_classes(tmp_path / "a", "photos/1{}.jpg", "photos/2{}.jpg", "photos/3{}.jpg", n=9)
    of_classes(tmp_path / "b", *(f"some_{k}/{{}}.jpg" for k in "ab"), n=9)
    with pytest.raises(DataError, match="has one class, 'photos'.*data.label_pattern takes"):
        settings = load_settings(f"data.source={tmp_path / 'a'}")
        task, _ = infer_task(settings)
        task.data.split(task.data.audit(str(tmp_path / "a"), settings), settings)
    assert counted(tmp_path / "b") == {("some_a", ""): 9, ("some_b", ""): 9}


def test_a_caption_has_no_image_as_its_label(tmp_path: Path) -> None:
    lines = (
        f"kid{i}.jpg,a child number {i} in a pink dress climbs stairs {k}"
        for i in range(9)
        for k in range(5)
    )
    rows(tmp_path / "captions.txt", "image,caption", *lines)
    with pytest.raises(DataError, match="column 'image' names 45 of 45 files that do not exist"):
        task_of(tmp_path / "captions.txt")


def test_a_weight_that_is_an_image_name_is_a_weight(tmp_path: Path) -> None:
    of_classes(tmp_path, "apples/{}.jpg", n=30)
    rows(tmp_path / "w.csv", "id,grams", *(f"{i},{(i + 1) % 30}" for i in range(30)))
    assert task_of(tmp_path / "w.csv") == "image-regression"


@pytest.mark.parametrize(
    ("beside", "head", "line", "told"),
    [
        ("{}.txt", "", "", "go with the images and say where things are"),
        ("{}.xml", "", "", "go with the images and say where things are"),
        ("", "filename,class,xmin,ymin", "{0}.jpg,a,{1},2", "'xmin' say where boxes are"),
        ("", "filename,label", "{0}.jpg,{1}", "an image has one answer"),
        ("scans/s{}.dcm", "id,age,target", "s{1},{1},{0}", r"names 24 files \(.dcm\)"),
    ],
)
def test_what_cannot_be_learned_is_told(
    beside: str, head: str, line: str, told: str, tmp_path: Path
) -> None:
    for i in range(24):
        if beside:
            (tmp_path / beside.format(i)).parent.mkdir(exist_ok=True)
            (tmp_path / beside.format(i)).write_text(f"0 0.5 0.5 0.2 0.{i}")
    if "scans" not in beside:
        of_classes(tmp_path, "{}.jpg", n=12)
    if head:
        rows(tmp_path / "list.csv", head, *(line.format(i // 2, i) for i in range(24)))
    with pytest.raises(DataError, match=told):
        task_of(tmp_path)


def test_plots_beside_a_table_are_a_question(tmp_path: Path) -> None:
    rows(
        tmp_path / "results.csv",
        "a,b,kind",
        *(f"{i * 7 % 50},{i % 17},{'xy'[i % 2]}" for i in range(60)),
    )
    of_classes(tmp_path, "figures/{}.png")
    assert task_of(tmp_path) == "table-classification"
    shutil.rmtree(tmp_path / "figures")
    of_classes(tmp_path, "loss_{}.png", "acc_{}.png")
    with pytest.raises(DataError, match="in 2 ways"):
        task_of(tmp_path)


# Texts, and tables that hold them. ---------------------------------------------------------------------------------

WORDS = "see the talk page for the article edit source and thanks".split()


def prose(i: int) -> str:
    return " ".join(random.Random(i).sample(WORDS, 9)) + f" {i}"


def test_texts_in_parts_with_a_part_that_has_no_labels(tmp_path: Path) -> None:
    for part, kinds in (("train", ("pos", "neg", "unsup")), ("test", ("pos", "neg"))):
        for kind, i in itertools.product(kinds, range(9)):
            (tmp_path / part / kind).mkdir(parents=True, exist_ok=True)
            (tmp_path / part / kind / f"{i}.txt").write_text(prose(i))
    assert counted(tmp_path) == {(k, p): 9 for k in ("pos", "neg") for p in ("train", "valid")}


def test_writing_without_blanks_is_text(tmp_path: Path) -> None:
    signs = "酒店房间服务早餐位置价格前台很好喜欢满意失望太差糟糕"
    rows(
        tmp_path / "hotel.csv",
        "label,review",
        *(f"{i % 2},{''.join(random.Random(i).sample(signs, 20))}" for i in range(60)),
    )
    assert task_of(tmp_path / "hotel.csv") == "text-classification"


def test_train_and_test_of_texts(tmp_path: Path) -> None:
    for name in ("train", "test"):
        target = name == "train"
        lines = (f"{i},k{i % 3},{prose(i)}" + f",{i % 2}" * target for i in range(60))
        rows(tmp_path / f"{name}.csv", "id,keyword,text" + ",target" * target, *lines)
    assert task_of(tmp_path) == task_of(tmp_path / "train.csv") == "text-classification"
    settings = load_settings(f"data.source={tmp_path}")
    assert (
        "columns that are not read: keyword"
        in infer_task(settings)[0].data.audit(str(tmp_path), settings).notes
    )


def test_texts_are_never_left_out_in_silence(tmp_path: Path) -> None:
    flags = ((f"a{i}", prose(i), i % 2, int(i % 3 == 0), int(i % 5 == 0)) for i in range(60))
    rows(
        tmp_path / "toxic.csv",
        "id,comment_text,toxic,obscene,threat",
        *("{},{},{},{},{}".format(*f) for f in flags),
    )
    with pytest.raises(
        DataError,
        match="'comment_text' holds texts.*data.task=text-classification --set data.target=COLUMN",
    ):
        task_of(tmp_path / "toxic.csv")
    assert task_of(tmp_path / "toxic.csv", "data.target=toxic") == "text-classification"
    assert task_of(tmp_path / "toxic.csv", "data.ignore=comment_text") == "table-classification"


def test_two_ways_are_a_question_with_both_commands(tmp_path: Path) -> None:
    lines = (
        f"{prose(i)},{'north south east west'.split()[i % 4] * 12},{'lorem ipsum dolor ' * 2 + str(i % 7)},{i % 2}"
        for i in range(60)
    )
    rows(tmp_path / "wine.csv", "description,region,winery,label", *lines)
    with pytest.raises(DataError, match="in 2 ways; choose one: .*data.task=t.*data.task=t"):
        task_of(tmp_path / "wine.csv")
    assert task_of(tmp_path / "wine.csv", "data.task=text-classification") == "text-classification"
    assert (
        task_of(tmp_path / "wine.csv", "data.task=table-classification") == "table-classification"
    )


def test_a_price_is_not_a_class_of_texts(tmp_path: Path) -> None:
    rows(
        tmp_path / "ads.csv",
        "text,rooms,price",
        *(f"{prose(i)},{i % 5},{100 + 7.5 * i}" for i in range(60)),
    )
    task, reason = infer_task(
        load_settings(f"data.source={tmp_path / 'ads.csv'}", "data.target=price")
    )
    assert task.name == "table-regression" and "texts that are not read: text" in reason


def test_two_targets_need_no_task(tmp_path: Path) -> None:
    lines = (f"{i % 7}.5,{i % 11}.1,{i % 7 * 3}.2,{i % 11 * 2}.7" for i in range(99))
    rows(tmp_path / "energy.csv", "X1,X2,Y1,Y2", *lines)
    assert task_of(tmp_path / "energy.csv", "data.target=Y1,Y2") == "table-regression"
    with pytest.raises(DataError, match="data.target: no column 'Y3'"):
        task_of(tmp_path / "energy.csv", "data.target=Y1,Y3")


def test_where_few_rows_differ_the_share_is_kept(tmp_path: Path) -> None:
    lines = (f"{'abcd'[i % 4]},{i % 2},{'yes no'.split()[(i * 7) % 3 == 0]}" for i in range(104))
    rows(tmp_path / "few.csv", "kind,flag,sure", *lines)
    settings = load_settings(f"data.source={tmp_path / 'few.csv'}")
    task = infer_task(settings)[0]
    parts = task.data.split(task.data.audit(settings.data.source, settings), settings)
    assert 18 <= len(parts.valid) <= 24 and "copies stand on both sides" in parts.how


def test_two_different_rows_are_split_by_row(tmp_path: Path) -> None:
    lines = (f"{'treated' if i % 5 == 0 else 'control'},{i % 2}" for i in range(40))
    rows(tmp_path / "trial.csv", "group,outcome", *lines)
    settings = load_settings(f"data.source={tmp_path / 'trial.csv'}", "data.target=outcome")
    task = infer_task(settings)[0]
    parts = task.data.split(task.data.audit(settings.data.source, settings), settings)
    assert set(parts.train["group"]) == {"treated", "control"} and 6 <= len(parts.valid) <= 10


def test_numbers_that_are_by_chance_names_of_images_nearby_name_none(tmp_path: Path) -> None:
    for i in range(1, 61):
        image(tmp_path / f"shots/{i}.png")
    ages = [f"{i + 10},{i % 7}.5,{i % 2}" for i in range(81)]  # 50 of 81 are there
    rows(tmp_path / "own" / "ages.csv", "age,dose,y", *ages)
    assert task_of(tmp_path / "own" / "ages.csv") == "table-classification"
    rows(tmp_path / "own" / "shots.csv", "id,y", *(f"{i},{'ab'[i % 3 > 0]}" for i in range(1, 61)))
    assert task_of(tmp_path / "own" / "shots.csv") == "image-classification"


def test_an_archive_that_cannot_be_opened_stops_no_table(tmp_path: Path) -> None:
    (tmp_path / "broken.zip").write_bytes(b"PK no archive")
    rows(tmp_path / "t.csv", "doc,x,y", *(f"{i}.pdf,{i % 7},{'ab'[i % 3 > 0]}" for i in range(60)))
    assert task_of(tmp_path / "t.csv", "data.target=y") == "table-classification"


def test_numbers_of_images_are_read_as_those_of_tables(tmp_path: Path) -> None:
    lines = []
    for i in range(40):
        image(tmp_path / f"{i}.png", i)
        lines.append(f'{i}.png,"1,{i:03d}.50 $"')
    rows(tmp_path / "prices.csv", "file,price", *lines)
    settings = load_settings(f"data.source={tmp_path / 'prices.csv'}")
    task, why = infer_task(settings)
    assert task.name == "image-regression" and "thousands ','" in why and "'$' removed" in why
    found = find_examples(settings.data.source, settings)
    assert sorted(e.target for e in found)[:2] == [(1000.5,), (1001.5,)]
