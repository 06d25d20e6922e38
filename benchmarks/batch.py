"""`mlkit predict` over a folder beside the bare loop of the same machine, and its memory as the inputs grow.

`python benchmarks/batch.py MODEL --photographs FOLDER [--models FOLDER] [--growth 1000,5000,20000]`. The limit is reading and the forward pass
alone: as many processes as cores, each with the files that fall to it, the same chunks, and nothing written. Start-up is left out of both.
"""

import argparse
import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from mlkit.batch import open_model
from mlkit.config import load_settings
from mlkit.engine import cores
from mlkit.registry import Registry

CHUNK = 8
SHARED = Path(__file__).resolve().parents[2] / "shared"


def bare(model: str, models: Path, files: list[Path], share: int, barrier, rates) -> None:
    settings = load_settings(models=models)
    predictor = open_model(Registry(models).resolve(model), settings)
    mine = files[share :: cores()]
    passes = [mine[i : i + CHUNK] for i in range(0, len(mine), CHUNK)]
    predictor.forward_narrow(predictor.reader.read_all([f.read_bytes() for f in passes[0]])[0])
    barrier.wait()
    began = time.perf_counter()
    for some in passes:
        predictor.forward_narrow(predictor.reader.read_all([f.read_bytes() for f in some])[0])
    rates.put(len(mine) / (time.perf_counter() - began))


def limit(model: str, models: Path, files: list[Path]) -> float:
    "Return inputs a second of the bare loop on all cores."
    context = multiprocessing.get_context("spawn")
    barrier, rates = context.Barrier(cores()), context.Queue()
    workers = [
        context.Process(target=bare, args=(model, models, files, share, barrier, rates))
        for share in range(cores())
    ]
    for worker in workers:
        worker.start()
    total = sum(rates.get(timeout=600) for _ in workers)
    for worker in workers:
        worker.join()
    return total


def command(model: str, models: Path, names: list[str], folder: Path, out: str) -> dict:
    "Return what the command says of itself, and its greatest memory."
    program = "from mlkit.main import run; run()"
    words = [sys.executable, "-c", program, "predict", model, "-", "--out", str(folder / out)]
    words += ["--json", "--again", "--set", f"paths.models={models}"]
    before = time.perf_counter()
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    peak, status = 0, Path(f"/proc/{process.pid}/status")

    def feed() -> None:
        process.stdin.write("\n".join(names))
        process.stdin.close()

    threading.Thread(target=feed).start()
    while process.poll() is None:
        if found := re.search(r"VmHWM:\s+(\d+)", status.read_text()):
            peak = max(peak, int(found[1]) // 1024)
        time.sleep(0.05)
    told = json.loads(process.stdout.read())
    if process.returncode:
        sys.exit(told["error"]["message"])
    return told | {"peak_mb": peak, "wall": time.perf_counter() - before}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="digits", help="that `make demo` makes")
    parser.add_argument("--photographs", type=Path, default=SHARED / "data/clothing")
    parser.add_argument("--models", type=Path, default=Path("models"))
    parser.add_argument("--inputs", type=int, default=600, help="for each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--growth", default="", help="numbers of inputs, comma-separated")
    asked = parser.parse_args()
    files = [
        p for p in sorted(asked.photographs.rglob("*")) if p.suffix in (".jpg", ".jpeg", ".png")
    ]
    if not files:
        sys.exit(f"there is no picture in {asked.photographs}; give --photographs FOLDER")
    some = files[: asked.inputs]
    with tempfile.TemporaryDirectory() as tmp:
        for turn in range(asked.rounds):
            most = limit(asked.model, asked.models, some)
            told = command(asked.model, asked.models, [*map(str, some)], Path(tmp), "out.csv")
            rate = told["rows"] / told["seconds"]
            print(
                f"round {turn + 1}: bare loop {most:.1f}/s, command {rate:.1f}/s = {rate / most:.2f}",
                flush=True,
            )
        for count in [int(n) for n in asked.growth.split(",") if n]:
            names = [str(files[i % len(files)]) for i in range(count)]
            told = command(asked.model, asked.models, names, Path(tmp), "out.csv")
            print(
                f"{count:>7} inputs: {told['seconds']:.1f} s, {told['rows'] / told['seconds']:.1f}/s, greatest memory {told['peak_mb']} MiB",
                flush=True,
            )


if __name__ == "__main__":
    main()
