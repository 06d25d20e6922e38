"""What the way through Ray costs: `mlkit serve` beside `mlkit serve --on ray`, in turn, with the same model, photographs and cores.

`python benchmarks/fleet.py MODEL [--photographs FOLDER] [--models FOLDER] [--rounds 3]`. Besides, a network that computes nearly nothing, on pictures of a
few pixels: what one door can pass on. The callers share the cores with the servers.
"""

import argparse
import io
import signal
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from statistics import median

import onnx
import onnx.parser
from _callers import request
from _photographs import SHARED, photographs
from PIL import Image
from serving import CACHE, Server

from mlkit.bundle.manifest import ImageInput, Parity, write_bundle
from mlkit.bundle.registry import Registry
from mlkit.inference.engines import cores

TEXT = """
<ir_version: 8, opset_import: ["" : 13]>
color (float[n, 3, 8, 8] x) => (float[n, 3] p) {
    m = ReduceMean<axes = [2, 3], keepdims = 0>(x)
    p = Softmax<axis = 1>(m)
}"""


def nearly_nothing(folder: Path) -> Path:
    "Return a registry with a model whose passes take no time."
    onnx.save(onnx.parser.parse_model(TEXT), str(folder / "model.onnx"))
    fields = dict(
        name="color",
        created="2026-01-01T00:00:00Z",
        task="image-classification",
        vocab=("red", "green", "blue"),
        input=ImageInput(size=(8, 8), resize="squish"),
        arch="mean",
        metrics={},
        lineage={},
        parity=Parity(examples=1, max_difference=0, labels_equal=True),
    )
    made = write_bundle(folder / "color", fields, {"model.onnx": folder / "model.onnx"})
    registry = Registry(folder / "models")
    registry.promote(registry.add(made, name="color").ref)
    return registry.root


class Awake(Server):
    "A server that is ended by SIGTERM, for the cluster has to end with it."

    def end(self) -> None:
        self.signal(signal.SIGCONT)
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)


def compare(name: str, models: Path, sent: list[bytes], callers: int, asked) -> None:
    "Print the rates of both, and their ratio."
    command = [sys.executable, "-m", "mlkit", "serve", name, "--set", f"paths.models={models}"]
    on = ["--on", "ray", "--set", f"ray.cpus={cores()}"]
    rates: dict[str, list[float]] = {}
    with ExitStack() as stack:
        servers = []
        for port, place, more in ((8101, "local", []), (8102, "ray", on)):
            told = [*command, "--port", str(port), *more]
            servers.append(Awake(f"{name}-{place}", told, port, "/v1/predict"))
            stack.callback(servers[-1].end)
            servers[-1].wait(sent[0])
        for _ in range(asked.rounds):
            for server in servers:
                requests = [request(server.path, one, server.port) for one in sent]
                found = server.measure(requests, callers, asked.seconds)
                rates.setdefault(server.name, []).append(found.rate)
                print(f"{server.name}: {found.rate:.1f}/s {found.statuses}", flush=True)
    local, ray = (median(rates[f"{name}-{place}"]) for place in ("local", "ray"))
    print(
        f"{name}, {callers} callers: local {local:.1f}/s, Ray {ray:.1f}/s: {ray / local:.2f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--photographs", type=Path, default=SHARED / "data/clothing")
    parser.add_argument("--models", type=Path, default=Path("models"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=15)
    asked = parser.parse_args()
    CACHE.mkdir(parents=True, exist_ok=True)
    files = photographs(asked.photographs)
    sent = [p.read_bytes() for p in files[:: max(1, len(files) // 64)]]
    compare(asked.model, asked.models, sent, 32, asked)
    small = io.BytesIO()
    Image.new("RGB", (9, 7), "red").save(small, "PNG")
    with tempfile.TemporaryDirectory() as tmp:
        models = nearly_nothing(Path(tmp))
        for callers in (32, 1):
            compare("color", models, [small.getvalue()], callers, asked)


if __name__ == "__main__":
    main()
