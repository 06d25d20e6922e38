"""The parts of gpu.py, each in a process of its own: `python benchmarks/_gpu.py PART < JSON`. What is found is written down line by line."""

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
from _gpu_engines import Loop, half, loops, new_sizes, shared, torch_loops
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
        ("convnext_tiny", 128),
        ("convnext_tiny", 224),
        ("resnet50", 128),
        ("tf_efficientnet_lite0", 224),
        ("resnet18", 224),
    )
    batch: int = 256
    batches: int = 20
    seconds: float = 0.7  # of a loop
    window: float = 5.0  # of many callers
    seeds: tuple[int, ...] = (42, 1, 2)
    served: tuple[str, int] = ("resnet50", 224)
    callers: tuple[int, ...] = (32, 1, 96)


TOY = Sizes(
    digits="test_resnet",
    nets=(("test_resnet", 32),),
    batch=16,
    batches=4,
    seconds=0.1,
    window=1.0,
    seeds=(42,),
    served=("resnet18", 64),
    callers=(4, 1),
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
    made = job.attempt("fit on digits in fp32", precision, job, "fp32")
    if made is None:
        return
    learn, whole = made
    job.attempt("processor against GPU", compare, job, learn)
    job.attempt("resume in fp32", resume, job, "fp32", whole)
    for half_ in ("fp16", "bf16") if job.gpu else ():
        if made := job.attempt(f"fit on digits in {half_}", precision, job, half_):
            job.attempt(f"resume in {half_}", resume, job, half_, made[1])


def whole_way(job: Job) -> None:
    job.attempt("mlkit demo", demo, job, needs=20)


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
    from mlkit.train.callbacks import TrainInterrupted

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


def precision(job: Job, name: str):
    learn, done, _ = digits(job, name, {})
    last = done.history[-1]
    job.tell(
        f"digits, 4 epochs in {name}: accuracy",
        last["accuracy"],
        note=f"loss {last['valid_loss']:.3f}, {done.seconds:.1f} s on {done.device}",
    )
    return learn, done


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


def resume(job: Job, name: str, whole) -> None:
    "How far two fits differ that nothing stopped, and one that was stopped and went on."
    _, _, run = digits(job, name, {}, stop_after=2)
    resumed = digits(job, name, {"train.resume": str(run / "checkpoints/last.pth")})[1]
    again = digits(job, name, {})[1]
    job.tell(f"the same fit twice, {name}: of a loss", apart(whole, again))
    job.tell(
        f"stopped and resumed, {name}: of a loss",
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
    from mlkit.preprocess.image_audit import audit
    from mlkit.preprocess.split import split

    count = job.sizes.batch * job.sizes.batches
    source = make_pictures(job.here / "made", count + count // 20, (256, 256))
    settings = load_settings(f"data.source={source}", "data.valid=0.04")
    began = time.perf_counter()
    parts = split(audit(str(source), settings), settings)
    seconds = time.perf_counter() - began
    job.tell(f"audit and split of {count} pictures", seconds, "s")
    first = job.sizes.nets[0]
    job.attempt(f"{first[0]}, {first[1]} px", rates, job, parts, *first, needs=8)
    job.attempt("synchronisations", synchronisations, job, parts, *first)
    for arch, size in job.sizes.nets[1:4]:
        job.attempt(f"{arch}, {size} px", rates, job, parts, arch, size, needs=8)
    job.attempt("variants", variants, job, parts, *first, needs=8)
    for arch, size in job.sizes.nets[4:]:
        job.attempt(f"{arch}, {size} px", rates, job, parts, arch, size, needs=12)
    job.attempt("profile", profile, job, parts, *first, needs=15)
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
        "train.epochs": 2,
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


def limit(job: Job, parts, arch: str, size: int, precision: str, batch: int = 0, how: str = ""):
    "Return pictures a second of a step on a batch that is on the device already, and the seconds before the first one."
    learn, _, _ = prepared(job, parts, arch, size)
    net = learn.model.to(job.device).train().to(memory_format=torch.channels_last)
    weights = [p for p in net.parameters() if p.requires_grad]
    opt = torch.optim.AdamW(weights, lr=1e-3, betas=(0.9, 0.99), eps=1e-5, fused=True)
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision)
    scaler = torch.amp.GradScaler(job.device, enabled=precision == "fp16")
    x = torch.randn(batch or job.sizes.batch, 3, size, size, device=job.device)
    x = x.to(memory_format=torch.channels_last)
    y = torch.randint(learn.dls.c, (len(x),), device=job.device)
    began, step_of = time.perf_counter(), net
    if how == "compile":
        step_of = torch.compile(net)
    if how == "graph":  # forward and backward are one call each
        with torch.autocast(job.device, dtype, cache_enabled=False):
            step_of = torch.cuda.make_graphed_callables(net, (x,))
    for step in range(10 + job.sizes.batches):
        if step == 10:
            start = wait(job)
        cached = how != "graph"
        with torch.autocast(job.device, dtype or torch.bfloat16, bool(dtype), cached):
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
    theirs = of_fastai(job, parts, arch, size)
    job.tell(f"{name}: plain fastai", theirs, "pictures/s")
    bar = (">=", 5) if size == 128 else None
    job.tell(f"{name}: × plain fastai", ours / theirs, bar=bar)
    if job.gpu and (arch, size) == job.sizes.nets[0]:
        theirs = of_fastai(job, parts, arch, size, {"data.batch_size": 64})
        job.tell(f"{name}: plain fastai, its own batch of 64", theirs, "pictures/s")
        job.tell(f"{name}: × plain fastai, its own batch", ours / theirs)


def of_fastai(job: Job, parts, arch: str, size: int, more: dict | None = None) -> float:
    learn, dls, settings = prepared(job, parts, arch, size, more)
    clock, learn = Clock(job), plain(dls, settings)
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(1, 1e-3, cbs=clock.callback)
    return clock.rates[0]


def variants(job: Job, parts, arch: str, size: int) -> None:
    "What of mlkit's step costs how much."
    name, gpu = f"{arch}, {size} px", job.gpu
    kinds = {"fp16": {"train.precision": "fp16"}} if gpu else {}
    kinds["without augmentation"] = {"data.augment": "false", "data.flip": "false"}
    kinds |= {f"batch of {n}": {"data.batch_size": n} for n in (64, 128) if gpu}
    for kind, more in kinds.items():
        if job.until - time.time() > 5:
            ours, done = fitted(job, parts, arch, size, more)
            job.tell(f"{name}: mlkit, {kind}", ours, "pictures/s")
            top = limit(job, parts, arch, size, done.precision, more.get("data.batch_size", 0))[0]
            job.tell(f"{name}: of the synthetic step, {kind}", ours / top)
    if gpu:
        graphed, _ = limit(job, parts, arch, size, "bf16", how="graph")
        job.tell(f"{name}: synthetic step as a CUDA graph", graphed, "pictures/s")


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
    found = [w for w in seen if "called a synchronizing" in str(w.message)]
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
    fast, first = limit(job, parts, arch, size, precision, how="compile")
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
    made = job.attempt("bundle", bundle_of, job, arch, size)
    if made is None:
        return
    net, bundle = made
    pictures = make_pictures(job.here / "made", 64, (400, 533))
    photographs = [p.read_bytes() for p in sorted(pictures.rglob("*.jpg"))]
    graph = (bundle / "model.onnx").read_bytes()
    best: dict[tuple[str, int], Loop] = {}
    ways = "fp32", "fp16", "tf32"
    for precision_ in ways[:2] if job.gpu else ways[:1]:
        job.attempt(f"ONNX Runtime's own loop, {precision_}", own, job, graph, precision_, best)
        job.attempt(f"mlkit's engine, {precision_}", engine, job, graph, precision_, best)
    reading = job.attempt("decoding", decoding, job, bundle, photographs)
    job.attempt("server", server, job, photographs, best, reading, needs=12)
    if best and job.gpu:
        job.attempt("fp16 against fp32", guard, job, graph, bundle, photographs)
        job.attempt("engine=auto", chosen, job, graph, needs=12)
        job.attempt("new sizes of batch", first_passes, job, graph, size, needs=12)
        job.attempt("ONNX Runtime's own loop, tf32", own, job, graph, ways[2], best, needs=12)
    job.attempt("torch's own loop", torch_rows, job, net, size, needs=10)


def find_libraries() -> None:
    "Let ONNX Runtime find CUDA's libraries where torch has them, in programs that do not import torch as well."
    import site

    roots = [*site.getsitepackages(), *sys.path]
    found = {str(p) for root in roots if root for p in Path(root).glob("nvidia/*/lib")}
    words = [*sorted(found), os.environ.get("LD_LIBRARY_PATH")]
    os.environ["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, words))


def bundle_of(job: Job, arch: str, size: int):
    "Return a network whose weights are random, and the folder of its bundle, which is in production in the registry."
    from mlkit.bundle.manifest import ImageInput, Parity, write_bundle
    from mlkit.bundle.registry import Registry
    from mlkit.model.vision import find_arch

    began = time.perf_counter()
    torch.manual_seed(0)
    classes = tuple(f"class{i}" for i in range(10))
    net = torch.nn.Sequential(find_arch(arch)(num_classes=len(classes)), torch.nn.Softmax(1)).eval()
    path, axes = job.here / "model.onnx", {"x": {0: "n"}, "p": {0: "n"}}
    names = {"input_names": ["x"], "output_names": ["p"], "dynamic_axes": axes}
    torch.onnx.export(net, torch.randn(2, 3, size, size), path, dynamo=False, **names)
    fields = dict(
        name="photographs",
        created="2026-01-01T00:00:00Z",
        task="image-classification",
        vocab=classes,
        input=ImageInput(size=(size, size), resize="squish"),
        arch=arch,
        metrics={},
        lineage={},
        parity=Parity(examples=1, max_difference=0, labels_equal=True),
    )
    bundle = write_bundle(job.here / "bundle", fields, {"model.onnx": path})
    registry = Registry(job.here / "models")
    version = registry.promote(registry.add(bundle, name="photographs").ref)
    job.tell(f"{arch}, {size} px: its bundle is made in", time.perf_counter() - began, "s")
    return net, version.path


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


def own(job: Job, graph: bytes, precision_: str, best: dict[tuple[str, int], Loop]) -> None:
    "Put the fastest loop of ONNX Runtime alone by precision and batch into `best`."
    import onnxruntime as ort

    there = ort.get_available_providers()
    if job.gpu and "CUDAExecutionProvider" not in there:
        job.tell(f"ONNX Runtime {ort.__version__}", note=f"left out: only {', '.join(there)}")
        return
    made, size = half(graph) if precision_ == "fp16" else graph, job.sizes.served[1]
    for batch in (1, 32) if job.gpu else (1, 4):
        given = made, precision_, batch, size, job.sizes.seconds, job.gpu
        name = f"ONNX Runtime, {precision_}, batch {batch}"
        for loop in job.attempt(name, loops, *given) or []:
            note = f"{1e3 * batch / loop.rate:.2f} ms a pass"
            job.tell(f"{name}, {loop.how}", loop.rate, "pictures/s", note=note)
            if (precision_, batch) not in best or loop.rate > best[precision_, batch].rate:
                best[precision_, batch] = loop


def engine(job: Job, graph: bytes, precision_: str, best: dict[tuple[str, int], Loop]) -> None:
    "mlkit's engine, which takes and gives arrays in the processor's memory: one caller, and as many as it has lanes."
    from mlkit.inference.engines import open_engine

    made, size = half(graph) if precision_ == "fp16" else graph, job.sizes.served[1]
    ours = open_engine("cuda" if job.gpu else "onnxruntime", made)
    for batch in (1, 32) if job.gpu else (1, 4):
        x = np.random.default_rng(0).standard_normal((batch, 3, size, size), dtype=np.float32)
        once = functools.partial(ours.run, x)
        alone = Loop.of("", once, batch, job.sizes.seconds).rate
        name = f"mlkit's engine, {precision_}, batch {batch}"
        job.tell(f"{name}, one caller", alone, "pictures/s")
        rate = shared(once, ours.lanes, batch, job.sizes.seconds)
        job.tell(f"{name}, {ours.lanes} lanes", rate, "pictures/s")
        if found := best.get((precision_, batch)):
            job.tell(
                f"{name}, of the best loop", rate / found.rate, bar=(">=", 0.9), note=found.how
            )


def chosen(job: Job, graph: bytes) -> None:
    from mlkit.inference.engines import choose

    began, size = time.perf_counter(), job.sizes.served[1]
    _, probe = choose(graph, np.zeros((1, 3, size, size), np.float32))
    seconds = time.perf_counter() - began
    job.tell("engine=auto chooses in", seconds, "s", note=f"{probe.engine}, batch {probe.batch}")
    job.tell("its figures", note=str(probe.per_second))


def torch_rows(job: Job, net, size: int) -> None:
    for name, loop in torch_loops(net, job.device, size, job.sizes.seconds):
        job.tell(f"torch, {name}", loop.rate, "pictures/s")


def server(job: Job, photographs: list[bytes], best: dict, reading: float | None) -> None:
    "Many callers over HTTP; they share the cores with the server."
    wanted = "cuda" if job.gpu and best else "onnxruntime"
    port = free_port()
    sets = [f"{k}={v}" for k, v in job.folders().items() if k != "paths.models"]
    words = [w for s in (f"api.engine={wanted}", *sets) for w in ("--set", s)]
    command = [*mlkit_command(job.here / "models", port, "fp32"), *words]
    one = Server("gpu", command, port, "/v1/predict")
    try:
        one.wait(photographs[0])
        job.tell(f"mlkit serve, engine={wanted}: first answer", one.first, "s")
        asked = [request(one.path, p, port) for p in photographs]
        for callers in job.sizes.callers:
            if job.until - time.time() < 2 * job.sizes.window:
                break
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


def guard(job: Job, graph: bytes, bundle: Path, photographs: list[bytes]) -> None:
    "How far fp16 and TF32 are from the processor's fp32, on pictures."
    from _gpu_engines import session

    from mlkit.inference.predictor import Predictor

    predictor = Predictor(bundle)
    batch = predictor.reader.read_all(photographs)[0]
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
from mlkit.train.distributed import worker_main
worker_main(Path(sys.argv[1]))
"""


def two(job: Job) -> None:
    "A fit that two processes share, both on the one device: a stand-in for two devices."
    from mlkit.model.vision import learner
    from mlkit.runs.record import Run

    made = make_pictures(job.here / "made", 1000 if job.gpu else 80, (128, 128))
    options = job.folders() | {
        "data.source": str(made),
        "data.size": 64 if job.gpu else 32,
        "data.augment": "false",
        "data.flip": "false",
        "data.batch_size": 64 if job.gpu else 16,
        "model.arch": job.sizes.digits,
        "model.pretrained": "false",
        "train.epochs": 2,
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
        try:
            codes = [one.wait(max(0.1, job.until - 1 - time.time())) for one in ranks]
        except subprocess.TimeoutExpired:
            codes = [one.poll() for one in ranks]  # None: it was still at work
        seconds = time.perf_counter() - began
    if codes != [0, 0]:
        said = "\n".join(p.read_text()[-2500:] for p in sorted(folder.glob("error-*.json")))
        raise RuntimeError(f"the processes ended with {codes} in {seconds:.0f} s\n{said}")
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
    "demo": whole_way,
    "training": training,
    "accuracy": accuracy,
    "serving": serving,
    "two": two,
}


def main() -> None:
    name = sys.argv[1]
    find_libraries()
    get_ready()
    if not (told := sys.stdin.readline()):
        return
    job = Job(json.loads(told))
    threading.Thread(target=functools.partial(last_words, job), daemon=True).start()
    try:
        PARTS[name](job)
    except BaseException as e:
        job.tell(
            name, note=f"FAILED: {type(e).__name__}: {str(e)[:200]}", error=traceback.format_exc()
        )
        raise


def get_ready() -> None:
    "Import what every part needs, and wake the device, while the part before this one still runs."
    import mlkit.tasks.task  # noqa: F401
    import mlkit.train.fit  # noqa: F401

    if torch.cuda.is_available():
        torch.zeros(1, device="cuda")


def last_words(job: Job) -> None:
    "Say where the part is when its time is over."
    time.sleep(max(0, job.until - time.time()))
    frames = sys._current_frames()
    where = traceback.format_stack(frames[threading.main_thread().ident])
    job.tell("time is over", note="it stood in the code that the JSON names", error="".join(where))


if __name__ == "__main__":
    main()
