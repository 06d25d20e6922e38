"""naive FastAPI, LitServe and mlkit on the same learner and the same photographs, in turn, beside the limit of the machine.

`python benchmarks/serving.py --photographs FOLDER [--learner FILE] [--weights FILE]`. Without a learner one is trained first: a resnet18 from
scratch, or any other `--arch`, at 224 px. `--photographs phone` (or `phone:FOLDER`) brings the photographs to a telephone's 4032 × 3024 pixels first. The peers run with one
worker and with one a core, and are compared at their best; who is not asked is stopped. The limit is decoding, at the scale that the bundle says, and the
forward pass without HTTP, one process pinned to each core.
"""

import argparse
import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from statistics import median

from _callers import Calls, call, request
from PIL import Image

from mlkit.bundle.registry import Registry
from mlkit.config import load_settings
from mlkit.inference.engines import choose, cores
from mlkit.inference.predictor import GRAPHS, Predictor

HERE = Path(__file__).parent
CACHE = Path("~/.cache/mlkit/benchmarks").expanduser()


def trained(photographs: Path, arch: str, weights: str | None) -> Path:
    "Return a fastai export of a network that was fitted to the photographs; made once."
    target = CACHE / f"{arch}.pkl"
    if target.is_file():
        return target
    from mlkit.model.vision import learner
    from mlkit.preprocess.image_audit import audit
    from mlkit.preprocess.split import split
    from mlkit.preprocess.vision import dataloaders

    given = [f"model.weights={weights}"] if weights else ["model.pretrained=false"]

    def loaders(size: int):
        plain = {"exif": "ignore", "decode": "full"}  # as fastai opens images
        settings = load_settings(*given, arch=arch, size=size, source=str(photographs), **plain)
        parts = split(audit(str(photographs), settings), settings)
        return dataloaders(parts, settings), settings

    learn = learner(*loaders(128), path=CACHE)  # small first: three times as fast
    learn.unfreeze()
    learn.fit_one_cycle(2 if weights else 8, 1e-3 if weights else 3e-3)
    learn.dls, _ = loaders(224)
    learn.fit_one_cycle(2, 5e-4)
    target.parent.mkdir(parents=True, exist_ok=True)
    learn.export(target)
    return target


def packed(learner: Path, models: Path, photographs: list[Path]) -> dict:
    "Export the learner into a registry and return what int8 cost."
    import warnings

    from fastai.learner import load_learner

    from mlkit.export.bundle import export
    from mlkit.preprocess.vision import data_block

    warnings.simplefilter("ignore")
    learn = load_learner(learner)
    resize, normalize = learn.dls.after_item.fs[0], learn.dls.after_batch.fs[-1]
    block = data_block(learn.dls.vocab, load_settings(size=resize.size[0], augment=False))
    block.batch_tfms[-1] = normalize
    items = [(p, p.parent.name, i % 3 == 0) for i, p in enumerate(photographs)]
    learn.dls = block.dataloaders(items, bs=16, num_workers=0)
    with tempfile.TemporaryDirectory() as tmp:
        facts = dict(name="photographs", arch="resnet18", metrics={}, lineage={})
        bundle = export(learn, Path(tmp) / "bundle", **facts)
        registry = Registry(models)
        return registry.promote(
            registry.add(bundle, name="photographs").ref
        ).manifest.int8.model_dump()


def of_a_phone(files: list[Path], count: int = 30) -> list[bytes]:
    "Return photographs brought to 12 megapixels, quality 88 to 92, a fifth of them progressive."
    found = []
    for i, path in enumerate(files[:: max(1, len(files) // count)][:count]):
        with Image.open(path) as image:
            size = (4032, 3024) if image.width >= image.height else (3024, 4032)
            large, out = image.convert("RGB").resize(size, Image.Resampling.LANCZOS), io.BytesIO()
        large.save(out, "JPEG", quality=88 + i % 5, progressive=i // 5 % 5 == i % 5)
        found.append(out.getvalue())
    return found


# ---------------------------------------------------------------- the limit


def _core(
    core: int, bundle: Path, precision: str, engine: str, batch: int, photographs, pipe
) -> None:
    os.sched_setaffinity(0, {core})
    predictor = Predictor(bundle, precision=precision, engine=engine)  # sees one core

    def once(i: int) -> None:
        chosen = [photographs[(i + k) % len(photographs)] for k in range(batch)]
        predictor.engine.run(predictor.reader.read_all(chosen)[0])

    once(0)
    pipe.send("ready")
    while seconds := pipe.recv():
        done, end = 0, time.perf_counter() + seconds
        while time.perf_counter() < end:
            once(done)
            done += batch
        pipe.send(done / seconds)


class Limit:
    "Decoding and forward passes on every core, nothing else; `measure` gives photographs a second."

    def __init__(
        self, bundle: Path, precision: str, engine: str, batch: int, photographs: list[bytes]
    ):
        spawn = multiprocessing.get_context("spawn")
        self.pipes = []
        for core in sorted(os.sched_getaffinity(0)):
            ours, theirs = spawn.Pipe()
            args = (core, bundle, precision, engine, batch, photographs, theirs)
            spawn.Process(target=_core, args=args, daemon=True).start()
            self.pipes.append(ours)
        for pipe in self.pipes:
            pipe.recv()

    def measure(self, seconds: float) -> float:
        for pipe in self.pipes:
            pipe.send(seconds)
        return sum(pipe.recv() for pipe in self.pipes)

    def end(self) -> None:
        for pipe in self.pipes:
            pipe.send(0)


# ---------------------------------------------------------------- the servers


class Server:
    "A process group that sleeps (SIGSTOP) while others are measured."

    def __init__(self, name: str, command: list[str], port: int, path: str, threads: int):
        self.name, self.port, self.path = name, port, path
        env = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
        log = open(CACHE / f"{name.replace(' ', '-')}.log", "w")  # noqa: SIM115
        self.began = time.perf_counter()
        self.process = subprocess.Popen(
            command, stdout=log, stderr=log, start_new_session=True, env=env
        )
        self.first = 0.0

    def wait(self, photograph: bytes) -> None:
        while not self.first:
            if self.process.poll() is not None:
                sys.exit(f"{self.name} ended; its log is in {CACHE}")
            try:
                if call(self.port, [request(self.path, photograph, self.port)], 1, 30, most=1).took:
                    self.first = time.perf_counter() - self.began
            except OSError:
                time.sleep(0.02)
        self.signal(signal.SIGSTOP)

    def signal(self, sig: int) -> None:
        os.killpg(self.process.pid, sig)

    def measure(self, requests: list[bytes], callers: int, seconds: float) -> Calls:
        self.signal(signal.SIGCONT)
        call(self.port, requests, callers, min(2, seconds / 4))  # awake and warm
        found = call(self.port, requests, callers, seconds)
        self.signal(signal.SIGSTOP)
        return found

    def memory(self) -> float:
        "Proportional set size of all its processes, MiB."
        total = 0
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                if int(stat.read_text().rpartition(")")[2].split()[2]) == self.process.pid:
                    lines = (stat.parent / "smaps_rollup").read_text().splitlines()
                    total += next(int(s.split()[1]) for s in lines if s.startswith("Pss:"))
            except (OSError, StopIteration):
                pass
        return total / 1024

    def end(self) -> None:
        if self.process.poll() is None:
            for sig in (signal.SIGCONT, signal.SIGKILL):
                self.signal(sig)
            self.process.wait()


def mlkit_command(models: Path, port: int, precision: str, *more: str) -> list[str]:
    keys = [f"paths.models={models}", f"api.precision={precision}", *more]
    sets = [word for key in keys for word in ("--set", key)]
    return [sys.executable, "-m", "mlkit", "serve", "photographs", "--port", str(port), *sets]


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__)
    folder = HERE.parent.parent / "shared/data/clothing"
    ask.add_argument(
        "--photographs", default=str(folder), help="a folder of classes, phone, or phone:FOLDER"
    )
    ask.add_argument("--learner", type=Path, help="a fastai export; trained when it is not given")
    ask.add_argument("--arch", default="resnet18")
    ask.add_argument("--weights", help="a file to start the training from")
    ask.add_argument("--seconds", type=float, default=20, help="of one window")
    ask.add_argument("--rounds", type=int, default=3)
    ask.add_argument("--set", action="append", default=[], help="a setting for mlkit's servers")
    args = ask.parse_args()
    what, _, there = args.photographs.partition(":")
    phone = what == "phone"
    args.photographs = Path(there or folder) if phone else Path(args.photographs)
    if not args.photographs.is_dir():
        sys.exit(
            f"no photographs in {args.photographs}; give a folder of classes: --photographs FOLDER"
        )
    if not find_spec("litserve"):
        sys.exit("LitServe is not installed here: .venv/bin/pip install litserve")
    CACHE.mkdir(parents=True, exist_ok=True)
    learner = args.learner or trained(args.photographs, args.arch, args.weights)
    files = sorted(args.photographs.rglob("*.jpg"))
    with ExitStack() as stack:
        models = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        int8 = packed(learner, models, files[::3])
        print(f"int8: {json.dumps(int8)}")
        precisions = ["fp32", "int8"] if int8["kept"] else ["fp32"]
        photographs = [p.read_bytes() for p in files[:: max(1, len(files) // 64)]]
        if phone:
            photographs = of_a_phone(files)
            megabytes = sum(map(len, photographs)) / len(photographs) / 1e6
            print(f"{len(photographs)} photographs of 12 megapixels, {megabytes:.1f} MB each")
        bundle = Registry(models).resolve("photographs").path
        commands = {}
        for peer, file in (("naive", "naive.py"), ("LitServe", "lit.py")):
            for workers in sorted({1, cores()}):
                port = str(8101 + len(commands))
                command = [sys.executable, str(HERE / "peers" / file), str(learner), port]
                name = f"{peer}, {workers} worker{'s' * (workers > 1)}"
                commands[name] = [*command, str(workers)], "/predict", cores() // workers
        for precision in precisions:
            command = mlkit_command(models, 8101 + len(commands), precision, *args.set)
            commands[f"mlkit {precision}"] = command, "/v1/predict", 0
        servers, limits = {}, {}
        for i, (name, (command, path, threads)) in enumerate(commands.items()):
            for last in (False, True):  # one after the other; with their files in memory
                servers[name] = Server(name, command, 8101 + i, path, threads)
                stack.callback(servers[name].end)
                servers[name].wait(photographs[0])
                if not last:
                    servers[name].end()
        for precision in precisions:
            graph = (bundle / GRAPHS[precision]).read_bytes()
            blank = Predictor(bundle).reader.read_all(photographs[:1])[0]
            _, probe = choose(graph, blank)
            print(f"{precision}: {probe}")
            limits[precision] = Limit(bundle, precision, probe.engine, 8, photographs)
            stack.callback(limits[precision].end)
        show(servers, limits, photographs, bundle, args)


def show(servers, limits, photographs, bundle, args) -> None:
    rates = {name: [] for name in [*servers, *(f"limit {p}" for p in limits)]}
    fewer, crowd, alone = ({name: [] for name in servers} for _ in range(3))
    statuses = {name: Counter() for name in servers}
    requests = {n: [request(s.path, p, s.port) for p in photographs] for n, s in servers.items()}
    read = {
        32: lambda found: found.rate,
        16: lambda found: found.rate,
        8: lambda found: found.quantile(0.99),
        1: lambda found: found.quantile(0.5),
    }
    for number in range(args.rounds):
        for precision, limit in limits.items():
            rates[f"limit {precision}"].append(limit.measure(args.seconds / 2))
        for name, server in servers.items():
            for (callers, value), store in zip(
                read.items(), (rates, fewer, crowd, alone), strict=True
            ):
                seconds = args.seconds if callers > 8 else args.seconds / 2
                found = server.measure(requests[name], callers, seconds)
                statuses[name] += Counter(found.statuses)
                store[name].append(value(found) if found.took else float("nan"))
        print(
            f"round {number + 1}: " + ", ".join(f"{n} {v[-1]:.1f}" for n, v in rates.items()),
            f"(load {os.getloadavg()[0]:.1f})",
            flush=True,
        )
    bare = {p: bare_ms(bundle, p, photographs) for p in limits}
    middle = {name: median(v) for name, v in rates.items()}
    best = {p: max(v for n, v in middle.items() if n.startswith(p)) for p in ("LitServe", "naive")}
    print(f"\n{cores()} cores; medians of {args.rounds} windows of {args.seconds:g} s in turn\n")
    print(
        "| server | requests/s, 32 callers | 16 callers | of its limit | × LitServe | × naive | p99 at 8, ms | one caller, ms | × bare | first answer, s | PSS, MiB | 503 | other errors |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|---|---|")
    for name, server in servers.items():
        precision = name.partition(" ")[2] if name.startswith("mlkit") else "fp32"
        rate, of = middle[name], statuses[name]
        row = [name, f"{rate:.1f}", f"{median(fewer[name]):.1f}"]
        row += [f"{rate / middle[f'limit {precision}']:.2f}"]
        row += [f"{rate / best[peer]:.2f}" for peer in best]
        row += [f"{median(crowd[name]):.0f}", f"{median(alone[name]):.1f}"]
        row += [f"{median(alone[name]) / bare[precision]:.2f}", f"{server.first:.1f}"]
        row += [f"{server.memory():.0f}", str(of[503]), str(of.total() - of[200] - of[503])]
        print("| " + " | ".join(row) + " |")
    for precision in limits:
        print(
            f"| limit {precision} | {middle[f'limit {precision}']:.1f} | | 1 | | | | {bare[precision]:.1f} | 1 | | | | |"
        )


def bare_ms(bundle: Path, precision: str, photographs: list[bytes]) -> float:
    "Median of decode and forward pass of one photograph, all cores in the pass, in this process."
    predictor = Predictor(bundle, precision=precision, engine="auto")
    took = []
    for i in range(100):
        began = time.perf_counter()
        predictor.predict([photographs[i % len(photographs)]])
        took.append(1e3 * (time.perf_counter() - began))
    return median(took[10:])


if __name__ == "__main__":
    main()
