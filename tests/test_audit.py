"""A column of every type, however many different values it has and however many are missing: audited, split, made into batches."""

import datetime as dt
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from mlkit.config import load_settings
from mlkit.preprocess.tabular import dataloaders, split
from mlkit.preprocess.tabular_audit import audit

# fastai asks pandas 3 for what pandas 4 will not have
pytestmark = pytest.mark.filterwarnings("ignore::pandas.errors.Pandas4Warning")
ROWS = 240
DAY = dt.date(2020, 1, 1)
TYPES: dict[str, Callable[[int], Any]] = {
    "whole number": lambda i: i * 7,
    "numbers in turn": lambda i: i,
    "negative": lambda i: -i - 1,
    "fraction": lambda i: i / 7,
    "huge": lambda i: 1e300 * (1 + i),
    "decimal": lambda i: Decimal(i) / 8,
    "truth": lambda i: bool(i % 2),
    "word": lambda i: f"word {i}",
    "one letter": lambda i: chr(0x4E00 + i),
    "a sentence": lambda i: f"it is said {i} times, and not always kindly",
    "code with zeros": lambda i: f"{i:05}",
    "number and unit": lambda i: f"{i} kg",
    "day": lambda i: DAY + dt.timedelta(days=i),
    "day as text": lambda i: str(DAY + dt.timedelta(days=i)),
    "moment": lambda i: pd.Timestamp(DAY) + pd.Timedelta(hours=i),
    "moment with zone": lambda i: pd.Timestamp(DAY, tz="Europe/Berlin") + pd.Timedelta(hours=i),
    "time of day": lambda i: dt.time(i // 60 % 24, i % 60),
    "duration": lambda i: pd.Timedelta(minutes=i),
    "mixed": lambda i: i if i % 2 else f"v{i}",
    "bytes": lambda i: f"{i}".encode(),
    "category": lambda i: f"c{i}",
    "nullable whole": lambda i: i,
}
DIFFERENT = {"two": 2, "25": 25, "many": 120, "all": ROWS}
MISSING = {"none": 1.0, "few": 0.95, "most": 0.1}


def column(kind: str, different: int, kept: float) -> pd.Series:
    values = [TYPES[kind](i % different + 1) for i in range(ROWS)]
    there = np.random.default_rng(0).random(ROWS) < kept
    made = pd.Series([v if t else None for v, t in zip(values, there, strict=True)])
    return made.astype({"category": "category", "nullable whole": "Int64"}.get(kind, made.dtype))


@pytest.mark.parametrize("missing", MISSING)
@pytest.mark.parametrize("different", DIFFERENT)
@pytest.mark.parametrize("form", ["frame", "csv", "parquet"])
def test_every_column_goes_the_whole_way(
    form: str, different: str, missing: str, tmp_path: Path
) -> None:
    shape = DIFFERENT[different], MISSING[missing]
    frame = pd.DataFrame({kind: column(kind, *shape) for kind in TYPES})
    side, noise = np.random.default_rng(1).normal(size=(2, ROWS))
    frame = frame.assign(side=side, answer=np.where(side + noise > 0, "yes", "no"))
    source: pd.DataFrame | str = frame
    if form == "csv":
        frame.to_csv(source := str(tmp_path / "table.csv"), index=False)
    elif form == "parquet":
        frame = frame.drop(columns="mixed")  # arrow has no column of both
        frame.to_parquet(source := str(tmp_path / "table.parquet"))
    settings = load_settings("data.target=answer")
    found = audit(source, settings)
    assert len(found.usable) == ROWS and "side" in found.features
    assert {*found.features, *found.left_out} == {*frame} - {"answer"}
    assert all(found.left_out.values()) and dict(found.rows())["decided"]
    parts = split(found, settings)
    assert len(parts.train) > 150
    dataloaders(parts, settings).one_batch()


def test_a_reason_is_given_by_what_a_column_holds() -> None:
    shown = {
        "whole number": "numbers the rows",
        "numbers in turn": "numbers the rows",
        "word": "names the row",
        "a sentence": "names the row",
        "huge": "beyond 1e+150",
    }
    frame = pd.DataFrame({kind: column(kind, ROWS, 1) for kind in shown})
    frame = frame.rename(columns={"whole number": "flat_id"}).assign(
        repeated=column("word", 25, 1), answer=column("truth", ROWS, 1)
    )
    left = audit(frame, load_settings("data.target=answer", "data.keep=repeated")).left_out
    for name, said in shown.items():
        assert said in left[{"whole number": "flat_id"}.get(name, name)], name
