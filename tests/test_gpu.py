"""What can only be seen on a GPU; where there is none, it is said how many tests were left out for that."""

import warnings
from pathlib import Path

import numpy as np
import onnx.parser
import pytest
import torch

from mlkit.config import Settings, load_settings
from mlkit.inference.engines import available, choose, open_engine
from mlkit.model.outputs import exact
from mlkit.model.vision import learner
from mlkit.preprocess.image_audit import audit
from mlkit.preprocess.split import split
from mlkit.preprocess.vision import dataloaders
from mlkit.runs.record import Run
from mlkit.train.callbacks import TrainError, TrainInterrupted
from mlkit.train.fit import Callback, Fit, Learner, fit

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]
GRAPH = """
<ir_version: 8, opset_import: ["" : 13]>
color (float[n, 3, 8, 8] x) => (float[n, 3] p) {
    m = ReduceMean<axes = [2, 3], keepdims = 0>(x)
    p = Softmax<axis = 1>(m)
}"""


def prepared(folder: Path, **more: object) -> tuple[Learner, Settings]:
    given = {
        "data.source": "sklearn:digits",
        "data.size": 32,
        "data.flip": "false",
        "model.arch": "test_resnet",
        "model.pretrained": "false",
        "train.epochs": 3,
        "train.lr": 2e-3,
        "train.calibration": 0,
        "paths.cache": folder / "cache",
        "paths.runs": folder / "runs",
    }
    settings = load_settings(*(f"{k}={v}" for k, v in (given | more).items()))
    parts = split(audit(settings.data.source, settings), settings)
    return learner(dataloaders(parts, settings), settings), settings


def fitted(folder: Path, *callbacks: Callback, **more: object) -> tuple[Learner, Fit | None, Path]:
    learn, settings = prepared(folder, **more)
    learn.add_cbs(callbacks)
    with Run.start(settings) as run:
        try:
            return learn, fit(learn, settings, run), run.folder
        except TrainInterrupted:
            return learn, None, run.folder


@pytest.mark.parametrize("precision", ["fp32", "fp16", "auto"])
def test_a_fit_learns_and_goes_on(tmp_path: Path, precision: str) -> None:
    def stop(cb: Callback) -> None:
        if cb.epoch == 1:
            raise KeyboardInterrupt

    halt = Callback(after_epoch=stop)
    halt.order = 90  # after the checkpoint is written
    how = {"train.precision": precision}
    learn, whole, _ = fitted(tmp_path, **how)
    assert whole.device.startswith("cuda") and whole.history[-1]["accuracy"] > 0.7
    _, _, folder = fitted(tmp_path, halt, **how)
    last = folder / "checkpoints/last.pth"
    _, resumed, _ = fitted(tmp_path, **how | {"train.resume": last})
    off = [
        abs(a["valid_loss"] - b["valid_loss"])
        for a, b in zip(whole.history, resumed.history, strict=True)
    ]
    assert [r["epoch"] for r in resumed.history] == [1, 2, 3]
    if (
        precision != "fp32"
    ):  # whose kernels add in any order: two fits differ from their first epoch on
        assert max(off) < 0.02, (whole.history, resumed.history)
    x = torch.randn(8, 3, 32, 32)
    with exact():
        on_gpu, on_cpu = (learn.model.to(d).eval()(x.to(d)).cpu() for d in ("cuda", "cpu"))
    assert (on_gpu.softmax(1) - on_cpu.softmax(1)).abs().max() < 1e-2


def test_the_loop_never_waits_for_the_device(tmp_path: Path) -> None:
    def after(cb: Callback) -> None:
        if cb.training and cb.iter == 2:
            torch.cuda.set_sync_debug_mode("warn")

    watch = Callback(
        after_batch=after, after_train=lambda _: torch.cuda.set_sync_debug_mode("default")
    )
    watch.order = -100
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        fitted(tmp_path, watch, **{"train.epochs": 1})
    found = [f"{w.filename}:{w.lineno}" for w in seen if "called a synchronizing" in str(w.message)]
    assert not found, found


def test_a_loss_that_is_no_number_ends_the_fit(tmp_path: Path) -> None:
    def spoil(cb: Callback) -> None:
        if cb.training and (cb.epoch, cb.iter) == (1, 3):
            with torch.no_grad():
                next(cb.model.parameters())[0] = torch.inf

    with pytest.raises(TrainError, match="in epoch 2, batch 4, at a learning rate"):
        fitted(tmp_path, Callback(before_batch=spoil))


@pytest.mark.skipif("cuda" not in available(), reason="this onnxruntime has no CUDA")
def test_an_engine_on_the_gpu_answers_like_the_processor() -> None:
    graph = onnx.parser.parse_model(GRAPH).SerializeToString()
    x = np.random.default_rng(0).random((70, 3, 8, 8), np.float32)
    cpu, gpu = (open_engine(name, graph) for name in ("onnxruntime", "cuda"))
    for count in (1, 3, 64, 70):
        assert np.abs(gpu.run(x[:count]) - cpu.run(x[:count])).max() < 1e-5
    assert choose(graph, x[:1], wanted="cuda")[1].device == "GPU"
