"""What is refused, by name and with a remedy, in the corners that no chapter walks into."""

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import nbformat
import pytest
from conftest import make_bundle

from mlkit.bundle import manifest as bundles
from mlkit.bundle.manifest import BundleError, publish, read_manifest, verify_bundle
from mlkit.bundle.registry import Registry
from mlkit.config import SettingsError, load_settings, settings_file
from mlkit.kaggle.client import KaggleError
from mlkit.kaggle.kernel import describe_kernel
from mlkit.preprocess.source import DataError
from mlkit.preprocess.text_audit import audit, read_texts
from mlkit.runs.execute import NotebookError, find_parameters
from mlkit.runs.record import Run, RunError, read_events, read_run
from mlkit.runs.search import search


def test_a_published_folder_is_never_replaced(tmp_path: Path) -> None:
    for name in ("part", "there"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    with pytest.raises(FileExistsError):
        publish(tmp_path / "part", tmp_path / "there")
    assert (tmp_path / "there/file").read_text() == "there"
    assert (tmp_path / "part/file").read_text() == "part"


@pytest.mark.parametrize("name", ["", "/etc/passwd", "../up", "a/../b", "a\\b", "a\0b"])
def test_a_name_that_leads_out_of_a_bundle(name: str, tmp_path: Path) -> None:
    (file := tmp_path / "file").write_text("x")
    with pytest.raises(BundleError, match="not a name inside a bundle"):
        make_bundle(tmp_path / "made" / "one", files={name: file})
    assert not [p for p in (tmp_path / "made").iterdir() if p.is_dir()], "nothing is left"


@pytest.mark.parametrize("name", ["manifest.json", "manifest.json.sha256"])
def test_a_name_that_the_bundle_writes_itself(name: str, tmp_path: Path) -> None:
    (file := tmp_path / "file").write_text("x")
    with pytest.raises(BundleError, match="written by the bundle itself"):
        make_bundle(tmp_path / "one", files={name: file})


@pytest.mark.parametrize(
    ("what", "only", "said"),
    [
        ("gone", None, r"1 of 1 files are wrong: model.onnx \(missing\)"),
        ("a link", None, r"model.onnx \(missing\)"),
        ("longer", None, r"model.onnx \(altered\)"),
        ("same length", "model.onnx", r"model.onnx \(altered\)"),
        ("one more", None, r"extra.txt \(not listed\)"),
        ("one more", "extra.txt", r"extra.txt \(not listed\)"),
    ],
)
def test_what_is_wrong_in_a_bundle_is_named(
    what: str, only: str | None, said: str, color_bundle: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(color_bundle, tmp_path / "copy")
    assert verify_bundle(copy).name == "color"
    graph, content = copy / "model.onnx", (copy / "model.onnx").read_bytes()
    if what in ("gone", "a link"):
        graph.unlink()
    if what == "a link":
        graph.symlink_to(color_bundle / "model.onnx")
    if what == "longer":
        graph.write_bytes(content + b"\0")
    if what == "same length":
        graph.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    if what == "one more":
        (copy / "extra.txt").write_text("x")
    with pytest.raises(BundleError, match=said):
        verify_bundle(copy, only)
    if what == "one more":
        assert verify_bundle(copy, "model.onnx").name == "color", "only that file is asked about"


def test_a_manifest_of_another_schema(color_bundle: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(color_bundle, tmp_path / "copy")
    told = json.loads((copy / "manifest.json").read_text())
    text = json.dumps(told | {"task": 7}).encode()
    (copy / "manifest.json").write_bytes(text)
    with pytest.raises(BundleError, match="was altered"):
        read_manifest(copy)
    (copy / "manifest.json.sha256").write_bytes(bundles._seal_of(text))
    with pytest.raises(BundleError, match="not of a schema"):
        read_manifest(copy)
    (copy / "manifest.json.sha256").unlink()
    with pytest.raises(BundleError, match="manifest.json.sha256 cannot be read"):
        read_manifest(copy)


def test_settings_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "settings.ini").write_text("[DEFAULT]\nother = 1\n[nbdev]\nlib_name = x\n")
    assert settings_file() is None, "it is somebody else's"
    (tmp_path / "settings.ini").write_text("[train]\nepochs = 3\n[train\n")
    with pytest.raises(SettingsError, match="settings.ini cannot be read"):
        settings_file()
    monkeypatch.setenv("MLKIT_SETTINGS", str(tmp_path / "absent.ini"))
    with pytest.raises(SettingsError, match="MLKIT_SETTINGS names .*absent.ini"):
        load_settings()
    monkeypatch.delenv("MLKIT_SETTINGS")
    (tmp_path / "settings.ini").unlink()
    with pytest.raises(SettingsError, match="write section.key=value"):
        load_settings("train.epochs")
    with pytest.raises(SettingsError) as e:
        load_settings("train.epochs=many", "data.size=-1")
    assert "train.epochs = 'many'" in str(e.value) and "data.size = " in str(e.value), "both"


def test_folders_that_are_no_runs(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(RunError, match="set paths.runs to one that can"):
        Run.start(load_settings(runs=tmp_path / "runs"))
    assert list(read_events(tmp_path / "absent")) == []
    with pytest.raises(RunError, match="is no run"):
        read_run(tmp_path)


def test_a_run_of_another_machine_is_not_declared_dead(tmp_path: Path) -> None:
    run = Run.start(load_settings(runs=tmp_path / "runs"))
    assert read_run(run.folder).status == "running"
    events = run.file("events.jsonl")
    first, *rest = events.read_text().splitlines()
    for change, status in (({"pid": 2**22 - 3}, "died"), ({"since": "1"}, "died")):
        events.write_text("\n".join([json.dumps(json.loads(first) | change), *rest]) + "\n")
        assert read_run(run.folder).status == status, change
    change = {"pid": 2**22 - 3, "host": "elsewhere"}
    events.write_text("\n".join([json.dumps(json.loads(first) | change), *rest]) + "\n")
    assert read_run(run.folder).status == "running"


def test_texts_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for label, count in (("good", 3), ("bad", 3)):
        for i in range(count):
            (tmp_path / "texts" / label).mkdir(parents=True, exist_ok=True)
            (tmp_path / "texts" / label / f"{i}.txt").write_text(f"{label} {i}", encoding="utf-8")
    (tmp_path / "texts/good/latin.txt").write_bytes("Käse".encode("latin-1"))
    (tmp_path / "texts/good/russian.txt").write_bytes("Сыр".encode("cp1251"))
    (tmp_path / "texts/good/marked.txt").write_bytes("\ufeffgood mark".encode())
    (tmp_path / "texts/bad/locked.txt").write_text("bad lock")
    whole = Path.read_bytes

    def read_bytes(path: Path) -> bytes:
        if path.name == "locked.txt":
            raise OSError(errno.EACCES, "Permission denied", str(path))
        return whole(path)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    settings = load_settings(task="text-classification", cache=tmp_path / "cache")
    found = {t.example.path.name: t for t in read_texts(str(tmp_path / "texts"), settings)}
    assert found["latin.txt"].text == "Käse", "what Windows writes"
    assert found["russian.txt"].problem == "not UTF-8, UTF-16 or cp1252: set data.encoding"
    assert found["locked.txt"].problem == "Permission denied"
    assert found["marked.txt"].text == "good mark", "its mark is not part of it"
    assert len(audit(str(tmp_path / "texts"), settings).quarantine) == 1
    (tmp_path / "none").mkdir()
    with pytest.raises(
        DataError, match="holds 0 .txt files and 0 tables, and no text with a label"
    ):
        read_texts(str(tmp_path / "none"), settings)


@pytest.fixture
def notebook(tmp_path: Path) -> Path:
    "A notebook that is never run, with a number, a text and a whole number as parameters."
    cell = nbformat.v4.new_code_cell("lr = 0.1\nside = 'left'\nepochs = 3")
    cell.metadata["tags"] = ["parameters"]
    made = nbformat.v4.new_notebook(cells=[cell])
    spec = {"name": "python3", "language": "python", "display_name": "Python 3"}
    made.metadata.kernelspec = spec
    nbformat.write(made, tmp_path / "hill.ipynb")
    return tmp_path / "hill.ipynb"


@pytest.mark.parametrize(
    ("given", "axes", "said"),
    [
        ({"lr": 0.2}, {"lr": ["0..1"]}, "given both as -p and as --grid: lr"),
        ({}, {"rate": ["0..1"]}, "'rate'"),
        ({}, {"side": ["left..right"]}, "a range is LOW..HIGH"),
        ({}, {"lr": ["1..0"]}, "a range is LOW..HIGH"),
        ({}, {"lr": ["0..1:log"]}, "a range is LOW..HIGH"),
        ({}, {"epochs": ["1..2.5"]}, "a range is LOW..HIGH"),
    ],
)
def test_a_search_that_cannot_be(
    given: dict[str, Any], axes: dict[str, list[str]], said: str, notebook: Path, tmp_path: Path
) -> None:
    settings, began = load_settings(runs=tmp_path / "runs"), []
    with pytest.raises(NotebookError, match=said):
        search(
            notebook, given, axes, find_parameters(notebook), settings, trials=2, start=began.append
        )
    assert not began and not (tmp_path / "runs").exists()


class Ended:
    "A run that ends at once, and is the better the more epochs it is given."

    def __init__(self, folder: Path, asked: dict[str, Any], variables: dict[str, str]):
        self.returncode = 0
        value = asked["parameters"]["epochs"]
        assert isinstance(value, int)
        Run(folder).log("metrics", accuracy=value / 10)
        shutil.copy(asked["input_path"], asked["output_path"])

    def poll(self) -> int:
        return 0

    def stop(self) -> None:
        pass


def test_a_search_over_whole_numbers(notebook: Path, tmp_path: Path) -> None:
    settings, defaults = load_settings(runs=tmp_path / "runs"), find_parameters(notebook)
    axes = {"epochs": ["2..5"]}
    found = search(notebook, {}, axes, defaults, settings, trials=12, start=Ended)
    tried = [r.parameters["epochs"] for r in found]
    assert len(tried) == len(set(tried)) <= 4, "what was proposed again is not done again"
    assert tried == sorted(tried, reverse=True) and set(tried) <= {2, 3, 4, 5}
    with pytest.raises(NotebookError, match="no run that was done has the metric 'dice'"):
        search(notebook, {}, axes, defaults, settings, trials=2, metric="dice", start=Ended)


def test_metadata_that_is_not_json(notebook: Path) -> None:
    settings = load_settings().kaggle
    (about := notebook.with_name("kernel-metadata.json")).write_text("{id: mine}")
    with pytest.raises(KaggleError, match="kernel-metadata.json is not JSON"):
        describe_kernel(notebook, "me", settings)
    about.write_text(json.dumps({"id": "me/other", "code_file": "other.ipynb", "title": "Other"}))
    assert describe_kernel(notebook, "me", settings)["id"] == "me/mlkit-hill", "another notebook's"


def test_no_way_back_to_a_version_that_was_altered(color_bundle: Path, tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    for _ in range(2):
        registry.promote(registry.add(color_bundle, name="color").ref)
    graph = tmp_path / "color/1/model.onnx"
    graph.write_bytes(graph.read_bytes()[:-1])
    with pytest.raises(BundleError, match=r"model.onnx \(altered\)"):
        registry.rollback("color")
    assert registry.resolve("color").version == 2, "what is in production stays"
