"""A kind of data from another package: registered by its entry point, and everything else as it is."""

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from torch import nn

from mlkit.config import load_settings
from mlkit.main import pipeline
from mlkit.model.outputs import ExportError
from mlkit.tasks import kind as kinds
from mlkit.tasks.task import infer_task

PACKAGE = """
from pathlib import Path
import pandas as pd
from mlkit.preprocess.tabular_audit import audit
from mlkit.tasks.kind import TASKS, Match, Task, register_kind
from mlkit.tasks.tabular import TableKind

class ColourKind(TableKind):
    name = "colour"
    def match(self, found, settings):
        return Match("colour-classification", "a .colours file") if found.root.suffix == ".colours" else None
    def audit(self, source, settings):
        rows = [line.split() for line in Path(source).read_text().splitlines()]
        return audit(pd.DataFrame(rows, columns=["red", "green", "blue", "label"]), settings)

def register():
    rows = TASKS["table-classification"]
    register_kind([Task("colour-classification", ColourKind(), "label", rows.evaluate, 20, "For colours.", rows.defaults)])
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    "A package that brings a kind, as pip would install it."
    about = tmp_path / "site/colours-1.0.dist-info"
    about.mkdir(parents=True)
    (tmp_path / "site/colours_kind.py").write_text(PACKAGE)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: colours\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[mlkit.kinds]\ncolour = colours_kind:register\n")
    chance = np.random.default_rng(0).integers(0, 256, (60, 3))
    names = np.array(["red", "green", "blue"])[chance.argmax(1)]
    lines = (f"{r} {g} {b} {n}" for (r, g, b), n in zip(chance, names, strict=True))
    (tmp_path / "paint.colours").write_text("\n".join(lines) + "\n")
    yield tmp_path
    kinds.TASKS.pop("colour-classification", None)
    kinds._loaded.discard("colours_kind:register")
    sys.modules.pop("colours_kind", None)


def test_a_kind_from_outside(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load_settings(f"data.source={installed / 'paint.colours'}")
    assert infer_task(settings)[0].name != "colour-classification", "nobody knows it yet"
    monkeypatch.syspath_prepend(installed / "site")
    task, reason = infer_task(settings)
    assert (task.name, reason) == ("colour-classification", "a .colours file")
    parts = task.data.split(task.data.audit(settings.data.source, settings), settings)
    dls = task.data.dataloaders(parts, task.settled(settings))
    assert set(dls.vocab) == {"red", "green", "blue"} and len(parts.train) + len(parts.valid) == 60
    assert infer_task(load_settings("data.source=sklearn:wine"))[0].name == "table-classification"


def test_a_name_is_taken_once(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(installed / "site")
    infer_task(load_settings(f"data.source={installed / 'paint.colours'}"))
    other = kinds.TASKS["table-classification"].data
    with pytest.raises(
        ValueError, match="'colour-classification' is registered already, by ColourKind"
    ):
        kinds.register_kind([kinds.Task("colour-classification", other, "label", print, 1, "")])


def test_a_network_is_tried_before_the_fit_whatever_its_kind(
    installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(installed / "site")
    own = [f"paths.{what}={installed / what}" for what in ("cache", "models", "runs")]
    settings = load_settings(f"data.source={installed / 'paint.colours'}", *own)
    colours = type(infer_task(settings)[0].data)

    class Broken(colours):
        __qualname__ = colours.__qualname__
        tried = True

        def learner(self, dls, settings, *, path=None):
            learn = super().learner(dls, settings, path=path)
            learn.model = nn.Linear(7, 1)
            return learn

    known = kinds.TASKS["colour-classification"]
    kinds.TASKS[known.name] = kinds.Task(
        known.name, Broken(), "label", known.evaluate, 20, known.use, known.defaults
    )
    with pytest.raises(ExportError, match="does not take inputs of"):
        pipeline(name="paint", settings=settings)
    assert not list((installed / "runs").rglob("*.pth")), "it was fitted"
