"""`mlkit predict` over a folder beside the bare loop of the same machine, and its memory as the inputs grow.

`python benchmarks/batch.py MODEL --photographs FOLDER [--models FOLDER] [--growth 1000,5000,20000] [--on ray]`. The limit is reading and the forward
pass alone: as many processes as cores, each with the files that fall to it, the same chunks, and nothing written. Start-up is left out of both.

With `--on ray` the peer is the local command, the cluster is one of this machine alone, and start-up is left out by a difference: the inputs of each round are
predicted once, and three times over, by both; a rate is what there was more by the time that it took longer.
"""

import argparse
import json
import multiprocessing
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil
from _photographs import SHARED, photographs

from mlkit.bundle.registry import Registry
from mlkit.config import load_settings
from mlkit.inference.batch import open_model
from mlkit.inference.engines import cores

CHUNK = 8


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


def memory(process: psutil.Process) -> float:
    "Return MiB of the process and of all that it has started; pages that are shared are counted once."
    total = 0
    for one in [process, *process.children(recursive=True)]:
        with suppress(psutil.Error):
            total += one.memory_full_info().pss
    return total / 2**20


def command(model: str, models: Path, names: list[str], folder: Path, on: str = "local") -> dict:
    "Return what the command says of itself, and its greatest memory, with that of its workers."
    program = "from mlkit.cli.main import run; run()"
    out = folder / ("shards" if on == "ray" else "out.csv")
    words = [sys.executable, "-c", program, "predict", model, "-", "--out", str(out)]
    words += ["--json", "--again", "--set", f"paths.models={models}"]
    if on == "ray":
        words += ["--on", "ray", "--set", "ray.batch_inputs=128"]
    before = time.perf_counter()
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    peak, looked = 0.0, psutil.Process(process.pid)

    def feed() -> None:
        process.stdin.write("\n".join(names))
        process.stdin.close()

    threading.Thread(target=feed).start()
    while process.poll() is None:
        with suppress(psutil.Error):
            peak = max(peak, memory(looked))
        time.sleep(0.5)
    told = json.loads(process.stdout.read())
    if process.returncode:
        sys.exit(told["error"]["message"])
    return told | {"peak_mb": round(peak), "wall": time.perf_counter() - before}


def slope(on: str, model: str, models: Path, names: list[str], folder: Path) -> float:
    "Return inputs a second, start-up left out."
    once = command(model, models, names, folder, on)
    thrice = command(model, models, names * 3, folder, on)
    return 2 * len(names) / (thrice["wall"] - once["wall"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="digits", help="that `make demo` makes")
    parser.add_argument("--photographs", type=Path, default=SHARED / "data/clothing")
    parser.add_argument("--models", type=Path, default=Path("models"))
    parser.add_argument("--inputs", type=int, default=600, help="for each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--on", choices=["local", "ray"], default="local")
    parser.add_argument("--growth", default="", help="numbers of inputs, comma-separated")
    asked = parser.parse_args()
    files = photographs(asked.photographs)
    some = files[: asked.inputs]
    with tempfile.TemporaryDirectory() as tmp:
        for turn in range(asked.rounds):
            if asked.on == "ray":
                both = [
                    slope(on, asked.model, asked.models, [*map(str, some)], Path(tmp))
                    for on in (("ray", "local") if turn % 2 else ("local", "ray"))
                ]
                local, ray = both[::-1] if turn % 2 else both
                print(
                    f"round {turn + 1}: local {local:.1f}/s, Ray {ray:.1f}/s = {ray / local:.2f}",
                    flush=True,
                )
                continue
            most = limit(asked.model, asked.models, some)
            told = command(asked.model, asked.models, [*map(str, some)], Path(tmp))
            rate = told["rows"] / told["seconds"]
            print(
                f"round {turn + 1}: bare loop {most:.1f}/s, command {rate:.1f}/s = {rate / most:.2f}",
                flush=True,
            )
        for count in [int(n) for n in asked.growth.split(",") if n]:
            names = [str(files[i % len(files)]) for i in range(count)]
            told = command(asked.model, asked.models, names, Path(tmp), asked.on)
            print(
                f"{count:>7} inputs: {told['wall']:.1f} s, start included, greatest memory {told['peak_mb']} MiB",
                flush=True,
            )


if __name__ == "__main__":
    main()
