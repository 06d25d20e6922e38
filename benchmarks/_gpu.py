"""The parts of gpu.py, each in a process of its own: `python benchmarks/_gpu.py PART JSON`. What is found is written down line by line."""

import copy
import functools
import json
import os
import socket
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from _callers import request
from _gpu_engines import Loop, half, loops, new_sizes, torch_loops
from fastai.callback.core import Callback
from PIL import Image
from serving import CACHE, Server, mlkit_command
from training import loaders, mlkit_fit, plain

from mlkit.config import load_settings


@dataclass(frozen=True)
class Sizes:
    "How much of everything."

    digits: str = "resnet18"
    nets: tuple[tuple[str, int], ...] = (
        ("resnet18", 128),
        ("resnet50", 224),
        ("tf_efficientnet_lite0", 128),
        ("convnext_tiny", 224),
        ("resnet50", 128),
        ("tf_efficientnet_lite0", 224),
        ("resnet18", 224),
        ("convnext_tiny", 128),
    )
    batch: int = 128
    batches: int = 40
    seconds: float = 1.0  # of a loop
    window: float = 6.0  # of many callers
    seeds: tuple[int, ...] = (42, 1, 2)
    served: tuple[str, int] = ("resnet50", 224)
    callers: tuple[int, ...] = (1, 32, 96)


TOY = Sizes(
    digits="test_resnet",
    nets=(("test_resnet", 32),),
    batch=16,
    batches=4,
    seconds=0.1,
    window=1.0,
    seeds=(42,),
    served=("resnet18", 64),
    callers=(1, 4),
)


class Job:
    "What a part is told, and where it writes down what it finds."

    def __init__(self, told: dict):
        self.device, self.rows = told["device"], Path(told["rows"])
        self.until = told["until"]
        self.photographs, self.weights = Path(told["photographs"]), Path(told["weights"])
        self.gpu = self.device == "cuda"
        self.sizes = Sizes() if self.gpu else TOY
        self.here = Path.cwd()

    def tell(
        self, what: str, value=None, unit: str = "", bar: tuple[str, float] | None = None, **more
    ) -> None:
        row = {"what": what, "value": value, "unit": unit} | more
        if bar and value is not None:
            sign, limit = bar
            row["bar"] = f"{'≥' if sign == '>=' else '≤'} {limit:g}"
            row["reached"] = bool(value >= limit if sign == ">=" else value <= limit)
        with open(self.rows, "a") as f:
            f.write(json.dumps(row, default=float) + "\n")

    def attempt(self, what: str, function: Callable, *arguments, needs: float = 5):
        "Return what the function gives, or None where it fails or there is no time; the others go on."
        if self.until - time.time() < needs:
            return self.tell(what, note="left out: no time")
        try:
            return function(*arguments)
        except (Exception, SystemExit) as e:
            first = (str(e).splitlines() or [""])[0][:200]
            self.tell(
                what, note=f"FAILED: {type(e).__name__}: {first}", error=traceback.format_exc()
            )

    def folders(self) -> dict[str, str]:
        return {f"paths.{name}": str(self.here / name) for name in ("cache", "runs", "models")}


def wait(job: Job) -> float:
    "Return the time when the device has done all that it was given."
    if job.gpu:
        torch.cuda.synchronize()
    return time.perf_counter()


def make_pictures(folder: Path, count: int, size: tuple[int, int], classes: int = 10) -> Path:
    "Write JPEG files in a folder for each class: blobs of colour, no two alike."

    def write(i: int) -> None:
        chance = np.random.default_rng(i)
        blobs = chance.integers(0, 256, (9, 9, 3), dtype=np.uint8)
        blobs[i % classes % 9, :, i % 3] = 255  # something to learn
        picture = Image.fromarray(blobs).resize(size, Image.Resampling.BICUBIC)
        grain = chance.integers(-9, 10, (size[1], size[0], 1))
        picture = Image.fromarray((np.asarray(picture) + grain).clip(0, 255).astype(np.uint8))
        target = folder / f"class{i % classes}" / f"{i}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        picture.save(target, quality=88)

    with ThreadPoolExecutor() as pool:
        list(pool.map(write, range(count)))
    return folder


# ---------------------------------------------------------------- does it work


def works(job: Job) -> None:
    job.attempt("mlkit demo", demo, job)
    learn = job.attempt("fit on digits", precisions, job)
    if learn is not None:
        job.attempt("processor against GPU", compare, job, learn)
    job.attempt("resume", resume, job)


def demo(job: Job) -> None:
    "The command, as it is typed: train, judge, pack, serve, ask."
    sets = job.folders() | ({} if job.gpu else {"train.epochs": "2"})
    words = [w for k, v in sets.items() for w in ("--set", f"{k}={v}")]
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "mlkit", "demo", "--json", *words], capture_output=True, text=True
    )
    seconds = time.perf_counter() - began
    if done.returncode:
        said = (done.stdout.strip() or done.stderr.strip()).splitlines() or [""]
        raise RuntimeError(f"{said[-1]}\n{done.stderr[-4000:]}")
    found = json.loads(done.stdout[done.stdout.index("{") :])
    job.tell("mlkit demo", seconds, "s", note=f"{found['right']} of {found['unseen']} right")
    job.tell("accuracy of it", found["metrics"].get("accuracy"))
    job.tell("bundle against Learner", found["parity"], bar=("<=", 1e-4))
    job.tell("HTTP against Learner", found["http_difference"], bar=("<=", 1e-4))


def digits(job: Job, precision: str, more: dict, stop_after: int = 0):
    "Return a Learner, its Fit, and the folder of its checkpoints; interrupted after so many epochs."
    from mlkit.model.vision import learner
    from mlkit.train.fit import TrainInterrupted

    options = job.folders() | {
        "data.source": "sklearn:digits",
        "data.size": 32,
        "data.flip": "false",
        "model.arch": job.sizes.digits,
        "model.pretrained": "false",
        "train.epochs": 4,
        "train.lr": 2e-3,
        "train.precision": precision,
    }
    dls, settings = loaders(options | more)
    learn = learner(dls, settings)
    if stop_after:

        def stop(cb) -> None:
            if cb.epoch + 1 == stop_after:
                raise KeyboardInterrupt

        cb = Callback(after_epoch=stop)
        cb.order = 90  # after the checkpoint is written
        learn.add_cb(cb)
    runs = set((job.here / "runs").glob("*"))
    try:
        done = mlkit_fit(learn, settings)
    except TrainInterrupted:
        done = None
    (run,) = set((job.here / "runs").glob("*")) - runs
    return learn, done, run


def precisions(job: Job):
    kept = None
    for precision in ("fp32", "fp16", "bf16") if job.gpu else ("fp32",):
        learn, done, _ = digits(job, precision, {})
        last = done.history[-1]
        job.tell(
            f"digits, 4 epochs in {precision}: accuracy",
            last["accuracy"],
            note=f"loss {last['valid_loss']:.3f}, {done.seconds:.1f} s on {done.device}",
        )
        kept = kept or learn
    return kept


def probabilities(net, batches, device: str, dtype=None, tf32: bool = False) -> torch.Tensor:
    net = copy.deepcopy(net).to(device).eval()
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32
    try:
        with torch.inference_mode(), torch.autocast(device, dtype or torch.bfloat16, bool(dtype)):
            said = [net(x.to(device)).float().softmax(1).cpu() for x in batches]
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before
    return torch.cat(said)


def compare(job: Job, learn) -> None:
    batches = [b[0].as_subclass(torch.Tensor).cpu() for b in learn.dls.valid]
    truth = probabilities(learn.model, batches, "cpu")
    kinds = {"fp32": (None, False), "fp32 with TF32": (None, True)}
    kinds |= {"fp16": (torch.float16, True), "bf16": (torch.bfloat16, True)}
    for name, (dtype, tf32) in kinds.items():
        ours = probabilities(learn.model, batches, job.device, dtype, tf32)
        off = float((ours - truth).abs().max())
        other = int((ours.argmax(1) != truth.argmax(1)).sum())
        job.tell(
            f"{job.device} against processor, {name}: of a probability",
            off,
            bar=("<=", 1e-3) if name == "fp32" else None,
            note=f"{other} of {len(truth)} labels differ",
            labels_differ=other,
        )
        if name == "fp32":
            job.tell("labels that differ, fp32", other, bar=("<=", 0))


def resume(job: Job) -> None:
    "How far two fits differ that nothing stopped, and one that was stopped and went on."
    for precision in ("fp32", "fp16") if job.gpu else ("fp32",):
        whole, again = (digits(job, precision, {})[1] for _ in range(2))
        _, _, run = digits(job, precision, {}, stop_after=2)
        last = run / "checkpoints/last.pth"
        resumed = digits(job, precision, {"train.resume": str(last)})[1]
        job.tell(f"the same fit twice, {precision}: of a loss", apart(whole, again))
        job.tell(
            f"stopped and resumed, {precision}: of a loss",
            apart(whole, resumed),
            bar=("<=", max(0.02, 3 * apart(whole, again))),
        )


def apart(a, b) -> float:
    pairs = zip(a.history, b.history, strict=True)
    return max(abs(x["valid_loss"] - y["valid_loss"]) for x, y in pairs)


# ---------------------------------------------------------------- training


class Clock:
    "Pictures a second of each epoch, from the end of its first batch to the end of the last."

    def __init__(self, job: Job, inside: Callable = lambda: None, outside: Callable = lambda: None):
        self.job, self.rates, self.inside, self.outside = job, [], inside, outside
        self.callback = Callback(
            before_train=self._begin, after_batch=self._batch, after_train=self._end
        )

    def _begin(self, cb) -> None:
        self.first, self.pictures = None, 0

    def _batch(self, cb) -> None:
        if not cb.training:
            return
        if self.first is None:
            self.first = wait(self.job)
            self.inside()
        else:
            self.pictures += len(cb.yb[0])

    def _end(self, cb) -> None:
        self.outside()
        self.rates.append(self.pictures / (wait(self.job) - self.first))


def training(job: Job) -> None:
    from mlkit.preprocess.vision import audit, split

    count = job.sizes.batch * job.sizes.batches
    source = make_pictures(job.here / "made", count + count // 20, (256, 256))
    settings = load_settings(f"data.source={source}", "data.valid=0.04")
    began = time.perf_counter()
    parts = split(audit(str(source), settings), settings)
    seconds = time.perf_counter() - began
    job.tell(f"audit and split of {count} pictures", seconds, "s")
    for i, (arch, size) in enumerate(job.sizes.nets):
        job.attempt(f"{arch}, {size} px", rates, job, parts, arch, size, needs=8)
        if i == 0:
            job.attempt("synchronisations", synchronisations, job, parts, arch, size)
        if i == min(1, len(job.sizes.nets) - 1):
            job.attempt("variants", variants, job, parts, *job.sizes.nets[0])
    job.attempt("profile", profile, job, parts, *job.sizes.nets[0], needs=15)
    for arch, size in job.sizes.nets[:3] if job.gpu else ():
        job.attempt("torch.compile", compiled, job, parts, arch, size, needs=45)


def prepared(job: Job, parts, arch: str, size: int, more: dict | None = None):
    from mlkit.model.vision import learner
    from mlkit.preprocess.vision import dataloaders

    options = job.folders() | {
        "data.size": size,
        "data.batch_size": job.sizes.batch,
        "data.workers": min(16, os.cpu_count() or 1),
        "model.arch": arch,
        "model.pretrained": "false",
        "train.epochs": 3,
        "train.lr": 1e-3,
    }
    settings = load_settings(*(f"{k}={v}" for k, v in (options | (more or {})).items()))
    dls = dataloaders(parts, settings)
    return learner(dls, settings), dls, settings


def fitted(job: Job, parts, arch: str, size: int, more: dict | None = None):
    "Return pictures a second of mlkit's fit, its first epoch left out, and its Fit."
    learn, _, settings = prepared(job, parts, arch, size, more)
    clock = Clock(job)
    learn.add_cb(clock.callback)
    done = mlkit_fit(learn, settings)
    return max(clock.rates[1:]), done


def limit(job: Job, parts, arch: str, size: int, precision: str, compile_: bool = False):
    "Return pictures a second of a step on a batch that is on the device already, and the seconds before the first one."
    learn, _, _ = prepared(job, parts, arch, size)
    net = learn.model.to(job.device).train().to(memory_format=torch.channels_last)
    step_of = torch.compile(net) if compile_ else net
    weights = [p for p in net.parameters() if p.requires_grad]
    opt = torch.optim.AdamW(weights, lr=1e-3, betas=(0.9, 0.99), eps=1e-5, fused=True)
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision)
    scaler = torch.amp.GradScaler(job.device, enabled=precision == "fp16")
    x = torch.randn(job.sizes.batch, 3, size, size, device=job.device)
    x = x.to(memory_format=torch.channels_last)
    y = torch.randint(learn.dls.c, (len(x),), device=job.device)
    began = time.perf_counter()
    for step in range(10 + job.sizes.batches):
        if step == 10:
            start = wait(job)
        with torch.autocast(job.device, dtype or torch.bfloat16, bool(dtype)):
            loss = torch.nn.functional.cross_entropy(step_of(x), y)
        scaler.scale(loss).backward()
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
        if not step:
            first = wait(job) - began
    return job.sizes.batches * len(x) / (wait(job) - start), first


def rates(job: Job, parts, arch: str, size: int) -> None:
    if job.gpu:
        torch.cuda.reset_peak_memory_stats()
    ours, done = fitted(job, parts, arch, size)
    peak = torch.cuda.max_memory_allocated() / 2**30 if job.gpu else None
    name = f"{arch}, {size} px"
    job.tell(f"{name}: mlkit, {done.precision}", ours, "pictures/s", peak_gib=peak)
    top, _ = limit(job, parts, arch, size, done.precision)
    job.tell(f"{name}: synthetic step", top, "pictures/s")
    job.tell(f"{name}: of the synthetic step", ours / top, bar=(">=", 0.9))
    if job.until - time.time() < 6:
        return
    learn, dls, settings = prepared(job, parts, arch, size)
    clock, learn = Clock(job), plain(dls, settings)
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(1, 1e-3, cbs=clock.callback)
    job.tell(f"{name}: plain fastai", clock.rates[0], "pictures/s")
    bar = (">=", 5) if size == 128 else None
    job.tell(f"{name}: × plain fastai", ours / clock.rates[0], bar=bar)


def variants(job: Job, parts, arch: str, size: int) -> None:
    "What of mlkit's step costs how much."
    kinds = {"without augmentation": {"data.augment": "false", "data.flip": "false"}}
    kinds |= {"batch of 64": {"data.batch_size": 64}} if job.gpu else {}
    kinds |= {"fp16": {"train.precision": "fp16"}} if job.gpu else {}
    for name, more in kinds.items():
        job.tell(
            f"{arch}, {size} px: mlkit, {name}",
            fitted(job, parts, arch, size, more)[0],
            "pictures/s",
        )
    if job.gpu:
        top, _ = limit(job, parts, arch, size, "fp16")
        job.tell(f"{arch}, {size} px: synthetic step, fp16", top, "pictures/s")


def synchronisations(job: Job, parts, arch: str, size: int) -> None:
    "Where the loop waits for the device, a batch."
    if not job.gpu:
        return job.tell("synchronisations a batch", note="left out: no GPU")
    learn, _, settings = prepared(job, parts, arch, size, {"train.epochs": 1})
    mode = torch.cuda.set_sync_debug_mode
    clock = Clock(job, lambda: mode("warn"), lambda: mode("default"))
    learn.add_cb(clock.callback)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        mlkit_fit(learn, settings)
    found = [w for w in seen if "synchroniz" in str(w.message)]
    batches = job.sizes.batches - 1
    places = Counter(f"{'/'.join(Path(w.filename).parts[-2:])}:{w.lineno}" for w in found)
    each = {place: round(n / batches, 2) for place, n in places.most_common(12)}
    job.tell("synchronisations a batch", len(found) / batches, note=str(each), bar=("<=", 0.1))


def profile(job: Job, parts, arch: str, size: int) -> None:
    from torch.profiler import ProfilerActivity

    few = replace(parts, train=parts.train[: 12 * job.sizes.batch], valid=parts.valid[:8])
    learn, _, settings = prepared(job, few, arch, size, {"train.epochs": 1})
    kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if job.gpu else [])
    with torch.profiler.profile(activities=kinds) as seen:
        mlkit_fit(learn, settings)
    found = seen.key_averages()
    keys = ["self_cpu_time_total", *(["self_cuda_time_total"] if job.gpu else [])]
    text = {k: found.table(sort_by=k, row_limit=16, max_name_column_width=50) for k in keys}
    job.tell("profile of an epoch of 12 batches", note="in the JSON", profile=text)


def compiled(job: Job, parts, arch: str, size: int) -> None:
    precision = "bf16" if job.gpu else "fp32"
    plain_rate, _ = limit(job, parts, arch, size, precision)
    fast, first = limit(job, parts, arch, size, precision, compile_=True)
    saved = 1 / plain_rate - 1 / fast
    worth = f"worth it from {first / saved:.0f} pictures on" if saved > 0 else "never worth it"
    job.tell(f"{arch}, {size} px: torch.compile, × the step", fast / plain_rate, note=worth)
    job.tell(f"{arch}, {size} px: to compile", first, "s")


# ---------------------------------------------------------------- accuracy


def accuracy(job: Job) -> None:
    for path in (job.photographs, job.weights):
        if not path.exists():
            return job.tell("accuracy", note=f"left out: there is no {path.name}")
    options = job.folders() | {
        "data.source": str(job.photographs),
        "data.size": 128 if job.gpu else 48,
        "model.arch": "tf_efficientnet_lite0",
        "model.weights": str(job.weights),
    }
    few = {} if job.gpu else {"train.epochs": 1, "train.head_epochs": 1}
    found = []
    for seed in job.sizes.seeds:
        job.attempt(f"mlkit, seed {seed}", of_mlkit, job, options | few, seed, found)
    if found:
        job.tell("mlkit, mean", mean(found))
    job.attempt("plain fastai", of_plain, job, options)
    if job.gpu:
        for precision in ("fp16", "fp32"):
            more = options | {"train.precision": precision}
            job.attempt(f"mlkit in {precision}", of_mlkit, job, more, 42, [])


def of_mlkit(job: Job, options: dict, seed: int, found: list[float]) -> None:
    from mlkit.evaluate.classification import evaluate
    from mlkit.model.vision import learner

    began = time.perf_counter()
    dls, settings = loaders(options | {"train.seed": seed})
    learn = learner(dls, settings)
    done = mlkit_fit(learn, settings)
    seconds = wait(job) - began
    found.append(evaluate(learn).accuracy)
    count = f"{len(dls.train_ds)} teach, {len(dls.valid_ds)} are held out"
    job.tell(
        f"mlkit, {done.precision}, seed {seed}: accuracy",
        found[-1],
        note=f"{seconds:.1f} s with audit and cache, fit {done.seconds:.1f} s; {count}",
        seconds=seconds,
    )


def of_plain(job: Job, options: dict) -> None:
    from mlkit.evaluate.classification import evaluate

    began = time.perf_counter()
    dls, settings = loaders(options | {"data.workers": min(16, os.cpu_count() or 1)})
    learn = plain(dls, settings)
    with learn.no_bar(), learn.no_logging():
        learn.fine_tune(3 if job.gpu else 1)
    seconds = wait(job) - began
    job.tell(
        "plain fastai, fine_tune(3): accuracy",
        evaluate(learn).accuracy,
        note=f"{seconds:.1f} s with audit",
        seconds=seconds,
    )


# ---------------------------------------------------------------- serving


def serving(job: Job) -> None:
    CACHE.mkdir(parents=True, exist_ok=True)
    arch, size = job.sizes.served
    made = make_pictures(job.here / "made", 400 if job.gpu else 60, (400, 533))
    made_bundle = job.attempt("export", bundle_of, job, made, arch, size)
    if made_bundle is None:
        return
    learn, bundle = made_bundle
    files = sorted(made.rglob("*.jpg"))
    photographs = [p.read_bytes() for p in files[:: max(1, len(files) // 64)]]
    graph = (bundle / "model.onnx").read_bytes()
    reading = job.attempt("decoding", decoding, job, bundle, photographs)
    best = job.attempt("ONNX Runtime's own loop", own_loops, job, graph, size)
    if best:
        job.attempt("mlkit's engine", engine, job, graph, size, best)
    job.attempt("torch's own loop", torch_rows, job, learn, size)
    job.attempt("server", server, job, photographs, best or {}, reading)
    if best and job.gpu:
        job.attempt("new sizes of batch", first_passes, job, graph, size)
        job.attempt("fp16 against fp32", guard, job, graph, bundle, files)


def find_libraries() -> None:
    "Let ONNX Runtime find CUDA's libraries where torch has them, in programs that do not import torch as well."
    import site

    roots = [*site.getsitepackages(), *sys.path]
    found = {str(p) for root in roots if root for p in Path(root).glob("nvidia/*/lib")}
    words = [*sorted(found), os.environ.get("LD_LIBRARY_PATH")]
    os.environ["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, words))


def bundle_of(job: Job, source: Path, arch: str, size: int):
    "Return a Learner and the folder of its bundle, which is in production in the registry."
    from mlkit.bundle.registry import Registry
    from mlkit.export.bundle import export
    from mlkit.model.vision import learner

    options = job.folders() | {
        "data.source": str(source),
        "data.size": size,
        "data.batch_size": 32,
        "model.arch": arch,
        "model.pretrained": "false",
        "train.epochs": 4 if job.gpu else 1,
        "train.lr": 1e-3,
    }
    dls, settings = loaders(options)
    learn = learner(dls, settings)
    done = mlkit_fit(learn, settings)
    job.tell(f"{arch}, {size} px: accuracy", done.history[-1]["accuracy"])
    facts = dict(name="photographs", arch=arch, metrics={}, lineage={}, calibration=0)
    began = time.perf_counter()
    try:
        bundle = export(learn, job.here / "bundle", **facts)
    except Exception as e:
        job.tell("export with torch's defaults", note=f"FAILED: {e}")
        torch.backends.cudnn.allow_tf32 = False
        bundle = export(learn, job.here / "bundle", **facts)
    job.tell("export", time.perf_counter() - began, "s")
    registry = Registry(settings.paths.models)
    version = registry.promote(registry.add(bundle, name="photographs").ref)
    parity = version.manifest.parity.max_difference
    job.tell("bundle on the processor against Learner", parity, bar=("<=", 1e-4))
    return learn, version.path


def decoding(job: Job, bundle: Path, photographs: list[bytes]) -> float:
    "Pictures a second that all cores read, nothing else."
    from mlkit.inference.engines import cores
    from mlkit.inference.predictor import Predictor

    reader, end = Predictor(bundle).reader, time.perf_counter() + 2 * job.sizes.seconds

    def read(first: int) -> int:
        done = 0
        while time.perf_counter() < end:
            reader.read(photographs[(first + done) % len(photographs)])
            done += 1
        return done

    with ThreadPoolExecutor(cores()) as pool:
        began = time.perf_counter()
        found = sum(pool.map(read, range(cores()))) / (time.perf_counter() - began)
    job.tell(f"decoding alone, {cores()} cores, 400 × 533", found, "pictures/s")
    return found


def own_loops(job: Job, graph: bytes, size: int) -> dict[tuple[str, int], Loop]:
    "Return the fastest loop by precision and batch."
    import onnxruntime as ort

    there = ort.get_available_providers()
    job.tell(f"ONNX Runtime {ort.__version__}", note=", ".join(there))
    if job.gpu and "CUDAExecutionProvider" not in there:
        job.tell("ONNX Runtime's own loop", note="left out: no CUDA provider")
        return {}
    best: dict[tuple[str, int], Loop] = {}
    for precision in ("fp32", "tf32", "fp16") if job.gpu else ("fp32",):
        made = job.attempt(f"graph in {precision}", half, graph) if precision == "fp16" else graph
        for batch in (1, 32) if job.gpu else (1, 4):
            found = made and job.attempt(
                f"ONNX Runtime, {precision}, batch {batch}",
                loops,
                made,
                precision,
                batch,
                size,
                job.sizes.seconds,
                job.gpu,
            )
            for loop in found or []:
                job.tell(
                    f"ONNX Runtime, {precision}, batch {batch}, {loop.how}",
                    loop.rate,
                    "pictures/s",
                    note=f"{1e3 * batch / loop.rate:.2f} ms a pass",
                )
                if (precision, batch) not in best or loop.rate > best[precision, batch].rate:
                    best[precision, batch] = loop
    return best


def engine(job: Job, graph: bytes, size: int, best: dict) -> None:
    "mlkit's engine, which takes and gives arrays in the processor's memory."
    from mlkit.inference.engines import choose, open_engine

    ours = open_engine("cuda" if job.gpu else "onnxruntime", graph)
    for batch in (1, 32) if job.gpu else (1, 4):
        x = np.random.default_rng(0).standard_normal((batch, 3, size, size), dtype=np.float32)
        rate = Loop.of("", lambda x=x: ours.run(x), batch, job.sizes.seconds).rate
        job.tell(f"mlkit's engine, fp32, batch {batch}", rate, "pictures/s")
        if found := best.get(("fp32", batch)):
            name = f"mlkit's engine of ONNX Runtime's best loop, fp32, batch {batch}"
            job.tell(name, rate / found.rate, bar=(">=", 0.9), note=found.how)
    began = time.perf_counter()
    _, probe = choose(graph, np.zeros((1, 3, size, size), np.float32))
    seconds = time.perf_counter() - began
    job.tell("engine=auto chooses in", seconds, "s", note=f"{probe.engine}, batch {probe.batch}")
    job.tell("its figures", note=str(probe.per_second))


def torch_rows(job: Job, learn, size: int) -> None:
    for name, loop in torch_loops(learn.model, job.device, size, job.sizes.seconds):
        job.tell(f"torch, {name}", loop.rate, "pictures/s")


def server(job: Job, photographs: list[bytes], best: dict, reading: float | None) -> None:
    "Many callers over HTTP; they share the cores with the server."
    chosen = "cuda" if job.gpu and best else "onnxruntime"
    port = free_port()
    sets = [f"{k}={v}" for k, v in job.folders().items() if k != "paths.models"]
    words = [w for s in (f"api.engine={chosen}", *sets) for w in ("--set", s)]
    command = [*mlkit_command(job.here / "models", port, "fp32"), *words]
    one = Server("gpu", command, port, "/v1/predict")
    try:
        one.wait(photographs[0])
        job.tell(f"mlkit serve, engine={chosen}: first answer", one.first, "s")
        asked = [request(one.path, p, port) for p in photographs]
        for callers in reversed(job.sizes.callers):  # many first: the sizes of batch are met
            found = one.measure(asked, callers, job.sizes.window)
            errors = sum(n for status, n in found.statuses.items() if status != 200)
            job.tell(
                f"mlkit serve, {callers} callers",
                found.rate,
                "requests/s",
                note=f"p50 {found.quantile(0.5):.1f} ms, p99 {found.quantile(0.99):.1f} ms, {errors} errors",
            )
            loop = best.get(("fp32", 1 if callers == 1 else 32))
            if loop and callers > 1:
                bound = min(loop.rate, reading or loop.rate)
                who = "device" if bound == loop.rate else "decoding"
                job.tell(f"of what binds, {callers} callers", found.rate / bound, note=who)
        job.tell("memory of the server", one.memory(), "MiB")
    finally:
        one.end()
        log = (CACHE / "gpu.log").read_text(errors="replace")
        job.tell("log of the server", note="in the JSON", log=log[-3000:])


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return found.getsockname()[1]


def first_passes(job: Job, graph: bytes, size: int) -> None:
    "What the first pass at a size of batch costs that has not been met."
    for how, (first, rate) in new_sizes(graph, size, job.sizes.seconds).items():
        job.tell(
            f"first pass at a new size of batch, {how}", first, "ms", note=f"{rate:.0f}/s at 32"
        )


def guard(job: Job, graph: bytes, bundle: Path, files: list[Path]) -> None:
    "How far fp16 and TF32 are from the processor's fp32, on pictures."
    from _gpu_engines import session

    from mlkit.inference.predictor import Predictor

    predictor = Predictor(bundle)
    batch = predictor.reader.read_all([p.read_bytes() for p in files[:128]])[0]
    truth = predictor.forward(batch)
    for name, made in (("fp32", graph), ("tf32", graph), ("fp16", half(graph))):
        one = session(made, name, True)
        ours = one.run(None, {one.get_inputs()[0].name: batch})[0]
        other = int((ours.argmax(1) != truth.argmax(1)).sum())
        job.tell(
            f"ONNX Runtime on the GPU against the processor, {name}",
            float(np.abs(ours - truth).max()),
            bar=("<=", 1e-3) if name == "fp32" else None,
            note=f"{other} of {len(truth)} labels differ",
        )


# ---------------------------------------------------------------- two processes on one device

SHARE = """
import functools, sys
from pathlib import Path
import accelerate.utils as utils
if sys.argv[2] == "cuda":  # NCCL refuses two processes on one device
    utils.InitProcessGroupKwargs = functools.partial(utils.InitProcessGroupKwargs, backend="gloo")
from mlkit.train.distributed import take_part
take_part(Path(sys.argv[1]))
"""


def two(job: Job) -> None:
    "A fit that two processes share, both on the one device: a stand-in for two devices."
    from mlkit.model.vision import learner
    from mlkit.runs.record import Run

    made = make_pictures(job.here / "made", 2000 if job.gpu else 80, (128, 128))
    options = job.folders() | {
        "data.source": str(made),
        "data.size": 64 if job.gpu else 32,
        "data.augment": "false",
        "data.flip": "false",
        "data.batch_size": 64 if job.gpu else 16,
        "model.arch": job.sizes.digits,
        "model.pretrained": "false",
        "train.epochs": 3,
        "train.lr": 1e-3,
        "model.name": "made",
    }
    dls, settings = loaders(options)
    learn = learner(dls, settings)
    weights = copy.deepcopy(learn.model.state_dict())
    alone = mlkit_fit(learn, settings)
    job.tell("one process: loss", alone.history[-1]["valid_loss"], note=f"{alone.seconds:.1f} s")
    with Run.start(settings) as run:
        folder = job.here / "task"
        folder.mkdir()
        torch.save(weights, folder / "weights.pth")
        told = {"settings": settings.model_dump(mode="json"), "run": str(run.folder.resolve())}
        (folder / "task.json").write_text(json.dumps(told | {"where": str(job.here)}))
        began = time.perf_counter()
        ranks = [subprocess.Popen(**of_rank(job, folder, rank)) for rank in (0, 1)]
        codes = [one.wait(max(1, job.until - time.time())) for one in ranks]
        seconds = time.perf_counter() - began
    if any(codes):
        said = "\n".join(p.read_text()[-2500:] for p in sorted(folder.glob("error-*.json")))
        raise RuntimeError(f"the processes ended with {codes}\n{said}")
    shared = json.loads((folder / "fit.json").read_text())
    last = shared["history"][-1]
    job.tell(
        "two processes on one device: loss",
        last["valid_loss"],
        note=f"{shared['seconds']:.1f} s of {seconds:.1f} s, {shared['device']}",
    )
    off = abs(last["accuracy"] - alone.history[-1]["accuracy"])
    job.tell("accuracy, two against one", off, bar=("<=", 0.03))


def of_rank(job: Job, folder: Path, rank: int, port: list[int] = []) -> dict:  # noqa: B006
    if not port:
        port.append(free_port())
    environment = os.environ | {
        "RANK": str(rank),
        "LOCAL_RANK": "0" if job.gpu else str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port[0]),
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 2) // 2)),
    }
    command = [sys.executable, "-c", SHARE, str(folder), job.device]
    return {"args": command, "env": environment}


PARTS = {
    "works": works,
    "training": training,
    "accuracy": accuracy,
    "serving": serving,
    "two": two,
}


def main() -> None:
    name, told = sys.argv[1], json.loads(sys.argv[2])
    job = Job(told)
    find_libraries()
    threading.Thread(target=functools.partial(last_words, job), daemon=True).start()
    try:
        PARTS[name](job)
    except BaseException as e:
        job.tell(
            name, note=f"FAILED: {type(e).__name__}: {str(e)[:200]}", error=traceback.format_exc()
        )
        raise


def last_words(job: Job) -> None:
    "Say where the part is when its time is over."
    time.sleep(max(0, job.until - time.time()))
    frames = sys._current_frames()
    where = traceback.format_stack(frames[threading.main_thread().ident])
    job.tell("time is over", note="it stood in the code that the JSON names", error="".join(where))


if __name__ == "__main__":
    main()
