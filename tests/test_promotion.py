"""What is not better than always giving one answer is exported, and not promoted."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from mlkit.bundle.registry import Registry, RegistryError
from mlkit.config import load_settings
from mlkit.main import pipeline


def test_noise_is_not_promoted(tmp_path: Path) -> None:
    chance = np.random.default_rng(0)
    noise = pd.DataFrame(chance.normal(size=(150, 2)).round(3), columns=["a", "b"])
    noise.assign(y=chance.choice(["p", "q"], 150)).to_csv(tmp_path / "noise.csv", index=False)
    folders = {name: tmp_path / name for name in ("models", "runs", "cache")}
    settings = load_settings("train.epochs=1", "train.calibration=0", **folders)
    done = pipeline(tmp_path / "noise.csv", "noise", settings=settings)
    assert not done.promoted and "is not above" in done.not_promoted
    assert "always answering" in done.not_promoted and done.to_dict()["promoted"] is False
    registry = Registry(folders["models"])
    with pytest.raises(RegistryError, match="promote one: `mlkit models promote noise@1`"):
        registry.resolve("noise")
    assert registry.resolve("noise@1").not_better == done.not_promoted
    assert registry.promote("noise@1").production, "whoever wants it may have it"


def test_what_is_better_is_promoted(tmp_path: Path) -> None:
    chance = np.random.default_rng(0)
    a = chance.normal(size=300)
    frame = pd.DataFrame(
        {"a": a.round(3), "b": chance.normal(size=300), "y": 10 * a + chance.normal(size=300)}
    )
    frame.to_csv(tmp_path / "line.csv", index=False)
    folders = {name: tmp_path / name for name in ("models", "runs", "cache")}
    settings = load_settings("train.epochs=12", "train.calibration=0", "data.target=y", **folders)
    done = pipeline(tmp_path / "line.csv", "line", settings=settings)
    assert done.promoted and not done.not_promoted and done.metrics["r2_low"] > 0
    assert Registry(folders["models"]).resolve("line").version == 1
