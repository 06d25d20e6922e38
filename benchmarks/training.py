"""mlkit's recipe and plain fastai on the same photographs, in turn, beside the limit: a step on a batch that is in memory already.

`python benchmarks/training.py [PART…] --photographs FOLDER --weights FILE`. Parts: throughput, head, job, size, memory, ablation; all but the last
by default. Both sides have the allocator keep what is freed, and the same split, seed and transforms.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stderr
from dataclasses import replace
from io import StringIO
from pathlib import Path
from statistics import mean, median, stdev

HERE = Path(__file__).parent
SHARED = HERE.parent.parent / "shared"
JOB = {"data.size": 128}
ABLATION = {
    "the defaults": {},
    "no cache of pictures": {"data.cache_gb": 0},
    "channels first": {"train.channels_last": False},
    "early stages learn too": {"train.freeze": "none"},
    "no head on kept features": {"train.head_epochs": 0},
    "two views among the features": {"train.augmentations_per_image": 2},
    "no label smoothing": {"train.label_smoothing": 0},
    "mixup 0.4": {"train.mixup": 0.4},
    "average of weights, 0.98": {"train.ema": 0.98},
    "body at a tenth of the head's rate": {"train.body_lr": 0.1},
}


# ---------------------------------------------------------------- in a process of its own


def loaders(options: dict, pictures: int | None = None):
    from mlkit.config import load_settings
    from mlkit.preprocess.image_audit import audit
    from mlkit.preprocess.split import split
    from mlkit.preprocess.vision import dataloaders

    settings = load_settings(*(f"{k}={v}" for k, v in options.items()))
    parts = split(audit(settings.data.source, settings), settings)
    if pictures:
        step = max(1, len(parts.train) // pictures)
        parts = replace(parts, train=parts.train[::step], valid=parts.valid[::10])
    return dataloaders(parts, settings), settings


def plain(dls, settings):
    "Return what fastai's documentation has: a `vision_learner` with its defaults."
    from fastai.metrics import accuracy
    from fastai.vision.learner import vision_learner

    from mlkit.config import keep_freed_blocks
    from mlkit.model.vision import find_arch, load_weights, read_weights

    keep_freed_blocks(1 << 30)
    arch = settings.model.arch
    learn = vision_learner(
        dls, find_arch(arch), pretrained=False, normalize=False, metrics=accuracy
    )
    if settings.model.weights:
        load_weights(learn, arch, read_weights(settings.model.weights), "the file")
        learn.freeze()
    return learn


class Watch:
    "Seconds from the first batch's end to the last batch's, and the pictures between them."

    def __init__(self):
        from fastai.callback.core import Callback

        self.ends, self.pictures = [], 0
        self.callback = Callback(after_batch=lambda cb: self._tick(cb))

    def _tick(self, cb) -> None:
        if cb.training:
            self.ends.append(time.perf_counter())
            self.pictures += len(cb.yb[0])

    def rate(self) -> float:
        each = self.pictures / len(self.ends)
        return each * (len(self.ends) - 1) / (self.ends[-1] - self.ends[0])


def mlkit_fit(learn, settings):
    from mlkit.runs.record import Run
    from mlkit.train.fit import fit

    with Run.start(settings) as run, redirect_stderr(StringIO()):
        return fit(learn, settings, run)


def throughput(options: dict, pictures: int, rounds: int) -> dict:
    "Pictures a second of a fit of all layers."
    import torch

    scratch = {k: v for k, v in options.items() if k != "model.weights"}
    scratch |= {"model.pretrained": False, "train.epochs": 1, "train.lr": 1e-3}
    rates: dict[str, list[float]] = {"plain fastai": [], "mlkit": [], "limit": []}
    from mlkit.model.vision import learner

    for _ in range(rounds):
        dls, settings = loaders(scratch | {"data.workers": 2}, pictures)
        watch, learn = Watch(), plain(dls, settings)
        with learn.no_bar(), learn.no_logging():
            learn.fit_one_cycle(1, 1e-3, cbs=watch.callback)
        rates["plain fastai"].append(watch.rate())
        dls, settings = loaders(scratch, pictures)
        watch, learn = Watch(), learner(dls, settings)
        learn.add_cb(watch.callback)
        mlkit_fit(learn, settings)
        rates["mlkit"].append(watch.rate())
        learn = learner(dls, settings)
        learn.model.train().to(memory_format=torch.channels_last)
        learn.create_opt()
        x = torch.randn(dls.train.bs, 3, settings.data.size, settings.data.size)
        x = x.to(memory_format=torch.channels_last)
        y = torch.randint(dls.c, (len(x),))
        steps = max(4, pictures // len(x))
        for step in range(steps + 1):
            if step == 1:
                began = time.perf_counter()
            torch.nn.functional.cross_entropy(learn.model(x), y).backward()
            learn.opt.step()
            learn.opt.zero_grad()
        rates["limit"].append(steps * len(x) / (time.perf_counter() - began))
    return rates


def head(options: dict, rounds: int) -> dict:
    "Seconds an epoch of a head on a frozen body: plain, and mlkit's with the extraction shared out among its epochs."
    from mlkit.model.vision import learner

    seconds: dict[str, list[float]] = {"plain fastai": [], "mlkit": [], "epochs": []}
    for _ in range(rounds):
        dls, settings = loaders(options | {"data.workers": 2})
        learn = plain(dls, settings)
        with learn.no_bar(), learn.no_logging():
            began = time.perf_counter()
            learn.fit_one_cycle(1, 2e-3)
            seconds["plain fastai"].append(time.perf_counter() - began)
        dls, settings = loaders(options | {"train.epochs": 1})
        began = time.perf_counter()
        mlkit_fit(learner(dls, settings), settings)
        epochs = settings.train.head_epochs
        seconds["mlkit"].append((time.perf_counter() - began) / epochs)
        seconds["epochs"].append(epochs)
    return seconds


def job(options: dict, recipe: str) -> dict:
    "Fit, and the accuracy on what was held out."
    from mlkit.evaluate.classification import evaluate
    from mlkit.model.vision import learner

    if recipe == "plain":
        dls, settings = loaders(options | {"data.workers": 2})
        learn = plain(dls, settings)
        with learn.no_bar(), learn.no_logging():
            learn.fine_tune(3)
    else:
        dls, settings = loaders(options)
        learn = learner(dls, settings)
        mlkit_fit(learn, settings)
    return {"accuracy": evaluate(learn).accuracy, "examples": len(dls.valid_ds)}


def memory(options: dict) -> dict:
    "Most memory that was resident, MiB, over an epoch of a small network."
    from mlkit.model.vision import learner

    small = {k: v for k, v in options.items() if k != "model.weights"} | {
        "model.arch": "test_resnet",
        "model.pretrained": False,
        "train.epochs": 1,
        "train.lr": 1e-3,
    }
    dls, settings = loaders(small)
    mlkit_fit(learner(dls, settings), settings)
    status = Path("/proc/self/status").read_text()
    most = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    cache = sum(p.stat().st_size for p in settings.paths.cache.rglob("*.npy"))
    return {"pictures": len(dls.train_ds), "most": most / 1024, "cache": cache / 2**20}


# ---------------------------------------------------------------- side by side


def apart(what: str, *arguments, **options) -> tuple[dict, float]:
    "Return what a function of this file gives in a process of its own, with folders of its own, and its wall time."
    with tempfile.TemporaryDirectory() as tmp:
        folders = {"paths.cache": f"{tmp}/cache", "paths.runs": f"{tmp}/runs"}
        told = json.dumps([what, options | folders, *arguments])
        began = time.perf_counter()
        command = [sys.executable, "-W", "ignore", __file__, "--in-process", told]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        return json.loads(done.stdout.splitlines()[-1]), time.perf_counter() - began


def show_throughput(options: dict, args) -> None:
    rates, _ = apart("throughput", args.pictures, args.rounds, **options)
    middle = {k: median(v) for k, v in rates.items()}
    print("| fit of all layers | pictures a second | of the limit | × plain |\n|---|---|---|---|")
    for name, rate in middle.items():
        print(
            f"| {name} | {rate:.0f} | {rate / middle['limit']:.2f} | {rate / middle['plain fastai']:.2f} |"
        )


def show_head(options: dict, args) -> None:
    seconds, _ = apart("head", args.rounds, **options)
    ours, plains = median(seconds["mlkit"]), median(seconds["plain fastai"])
    print(
        f"head on a frozen body, an epoch: plain fastai {plains:.1f} s, mlkit {ours:.2f} s "
        f"({seconds['epochs'][0]} epochs, extraction and the search for a rate included): × {plains / ours:.1f}"
    )


def show_job(options: dict, args) -> None:
    found, wall = apart("job", "plain", **options)
    print(
        f"plain fastai, fine_tune(3): accuracy {found['accuracy']:.4f} in {wall:.0f} s", flush=True
    )
    walls, accuracies = [], []
    for seed in args.seeds:
        ours, took = apart("job", "mlkit", **options, **{"train.seed": seed})
        walls.append(took)
        accuracies.append(ours["accuracy"])
        print(f"mlkit, seed {seed}: accuracy {ours['accuracy']:.4f} in {took:.0f} s", flush=True)
    spread = stdev(accuracies) if len(accuracies) > 1 else 0
    print(
        f"mlkit: {mean(accuracies):.4f} ± {spread:.4f} on {ours['examples']}, {mean(walls):.0f} s: {mean(walls) / wall:.2f} of plain's wall"
    )


def show_size(options: dict, args) -> None:
    options = options | {"data.size": args.size, "train.epochs": args.epochs}
    for seed in args.seeds:
        found, wall = apart("job", "mlkit", **options, **{"train.seed": seed})
        print(
            f"{args.size} px, {args.epochs} epochs, seed {seed}: accuracy {found['accuracy']:.4f} in {wall:.0f} s",
            flush=True,
        )


def show_memory(options: dict, args) -> None:
    print("| pictures | cache, MiB | most resident, MiB |\n|---|---|---|")
    files = list(Path(options["data.source"]).rglob("*.jpg"))
    with tempfile.TemporaryDirectory() as tmp:
        for times in (1, 20):
            for path in files:
                folder = Path(tmp) / path.parent.name
                folder.mkdir(exist_ok=True)
                data = path.read_bytes()
                for i in range(len(list(folder.glob(f"*-{path.name}"))), times):
                    (folder / f"{i}-{path.name}").write_bytes(data + bytes([i]))  # no two alike
            found, _ = apart("memory", **options | {"data.source": tmp})
            print(
                f"| {found['pictures']} | {found['cache']:.0f} | {found['most']:.0f} |", flush=True
            )


def show_ablation(options: dict, args) -> None:
    print("| recipe | accuracy, mean | processor time, s |\n|---|---|---|")
    for name, changed in ABLATION.items():
        began, found = spent(), []
        for seed in args.seeds:
            done, _ = apart("job", "mlkit", **options | changed, **{"train.seed": seed})
            found.append(done["accuracy"])
        seconds = (spent() - began) / len(found)
        print(f"| {name} | {mean(found):.4f} | {seconds:.0f} |", flush=True)


def spent() -> float:
    "Return the processor time of all children that ended, seconds."
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


PARTS = {
    "throughput": show_throughput,
    "head": show_head,
    "job": show_job,
    "size": show_size,
    "memory": show_memory,
    "ablation": show_ablation,
}


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__)
    ask.add_argument("part", nargs="*", default=list(PARTS)[:-1], help=", ".join(PARTS))
    ask.add_argument("--photographs", type=Path, default=SHARED / "data/clothing")
    ask.add_argument("--arch", default="tf_efficientnet_lite0")
    ask.add_argument(
        "--weights", type=Path, default=SHARED / "weights/tf_efficientnet_lite0.safetensors"
    )
    ask.add_argument("--pictures", type=int, default=1024, help="of a window of throughput")
    ask.add_argument("--rounds", type=int, default=2)
    ask.add_argument("--seeds", type=int, nargs="+", default=[42, 1, 2])
    ask.add_argument("--size", type=int, default=224, help="of the longer job, pixels")
    ask.add_argument("--epochs", type=int, default=6, help="of the longer job")
    ask.add_argument("--in-process", help=argparse.SUPPRESS)
    args = ask.parse_args()
    if args.in_process:
        what, options, *arguments = json.loads(args.in_process)
        print(json.dumps(globals()[what](options, *arguments)))
        return
    for path, option in (
        (args.photographs, "--photographs FOLDER"),
        (args.weights, "--weights FILE"),
    ):
        if not path.exists():
            sys.exit(f"there is no {path}; give {option}")
    options = JOB | {
        "data.source": str(args.photographs),
        "model.arch": args.arch,
        "model.weights": str(args.weights),
    }
    for part in args.part:
        if part not in PARTS:
            sys.exit(f"no part {part!r}; there is: {', '.join(PARTS)}")
        print(f"\n{part}", flush=True)
        PARTS[part](options, args)


if __name__ == "__main__":
    main()
