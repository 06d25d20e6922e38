"""mlkit with 10, 30, 100 and 300 photographs of a class, beside what people do with so few, all judged by the same ones that none of them has seen.

`python benchmarks/few.py [--each 10 30 100 300] [--seeds 0 1 2 3 4] --photographs FOLDER --weights FILE`. The folder holds train/ and validation/. Peers: scikit-learn's
logistic regression on the frozen body's average-pooled features, the same network's head alone, and plain fastai with `fine_tune(3)`. All have the same
photographs, transforms and size; seconds are those of the processor, so that a busy machine does not change them.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean

from _photographs import SHARED, photographs
from training import loaders, mlkit_fit, plain

RECIPES = ("logistic regression", "head alone", "fine_tune(3)", "mlkit")


def draw(source: Path, each: int, seed: int, folder: Path) -> None:
    "Copy `each` photographs of every class, or all where there are fewer, and everything that judges."
    shutil.copytree(source / "validation", folder / "validation")
    for place in sorted(p for p in (source / "train").iterdir() if p.is_dir()):
        files = photographs(place)
        (folder / "train" / place.name).mkdir(parents=True)
        for path in random.Random(f"{seed} {place.name}").sample(files, min(each, len(files))):
            shutil.copy(path, folder / "train" / place.name)


# ---------------------------------------------------------------- in a process of its own


def regression(options: dict) -> float:
    "The accuracy of a logistic regression on average-pooled features of the frozen body."
    import torch
    from sklearn.linear_model import LogisticRegression

    from mlkit.model.vision import learner

    dls, settings = loaders(options)
    body = learner(dls, settings).model[0].eval()

    def features(loader) -> tuple:
        parts = [(body(x).mean((2, 3)), y) for x, y in loader]
        return [
            torch.cat(part).cpu().as_subclass(torch.Tensor).numpy()
            for part in zip(*parts, strict=True)
        ]

    with torch.no_grad():
        taught, judged = features(dls.valid.new(dls.train_ds)), features(dls.valid)
    return float(LogisticRegression(max_iter=1000).fit(*taught).score(*judged))


def fastai(options: dict, recipe: str) -> float:
    "The accuracy of plain fastai, its head alone or with the body."
    dls, settings = loaders(options)
    learn = plain(dls, settings)
    with learn.no_bar(), learn.no_logging():
        learn.fine_tune(3) if recipe == "fine_tune(3)" else learn.fit_one_cycle(4, 2e-3)
        return float(learn.validate()[1])


def ours(options: dict) -> tuple[float, list[float]]:
    "The accuracy of mlkit, and that after each epoch."
    from mlkit.evaluate.classification import evaluate
    from mlkit.model.vision import learner

    dls, settings = loaders(options)
    learn = learner(dls, settings)
    done = mlkit_fit(learn, settings)
    return evaluate(learn).accuracy, [row["accuracy"] for row in done.history]


def one(recipe: str, options: dict) -> dict:
    "Accuracy and seconds of the processor."
    began, wall = time.process_time(), time.monotonic()
    epochs: list[float] = []
    if recipe == "mlkit":
        accuracy, epochs = ours(options)
    else:
        accuracy = regression(options) if recipe == RECIPES[0] else fastai(options, recipe)
    spent = {"seconds": time.process_time() - began, "wall": time.monotonic() - wall}
    return {"accuracy": accuracy, "epochs": epochs, **spent}


# ---------------------------------------------------------------- side by side


def apart(recipe: str, options: dict) -> dict:
    "Return what a recipe gives in a process of its own."
    told = json.dumps([recipe, options])
    command = [sys.executable, "-W", "ignore", __file__, "--in-process", told]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    epochs = " ".join(f"{a:.3f}" for a in found["epochs"])
    print(
        f"{recipe}: {found['accuracy']:.3f} ({epochs}) {found['wall']:.0f} s",
        file=sys.stderr,
        flush=True,
    )
    return found


def rows(source: Path, each: int, seed: int, recipes: list[str], options: dict) -> dict[str, dict]:
    "Return what each recipe gives on one draw."
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp)
        draw(source, each, seed, folder / "photographs")
        here = options | {
            "data.source": str(folder / "photographs"),
            "data.workers": 0,
            "paths.cache": str(folder / "cache"),
            "paths.runs": str(folder / "runs"),
            "train.seed": seed,
        }
        return {recipe: apart(recipe, here) for recipe in recipes}


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__)
    ask.add_argument("--each", type=int, nargs="+", default=[10, 30, 100, 300])
    ask.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    ask.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=RECIPES)
    ask.add_argument("--photographs", type=Path, default=SHARED / "data/clothing")
    ask.add_argument("--arch", default="tf_efficientnet_lite0")
    ask.add_argument(
        "--weights", type=Path, default=SHARED / "weights/tf_efficientnet_lite0.safetensors"
    )
    ask.add_argument("--size", type=int, default=128, help="pixels")
    ask.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings of mlkit")
    ask.add_argument("--in-process", help=argparse.SUPPRESS)
    args = ask.parse_args()
    if args.in_process:
        print(json.dumps(one(*json.loads(args.in_process))))
        return
    options = {
        "data.size": args.size,
        "model.arch": args.arch,
        "model.weights": str(args.weights),
        **dict(text.split("=", 1) for text in args.set),
    }
    print(f"| of a class | recipe | {' | '.join(f'seed {s}' for s in args.seeds)} | mean | s |")
    print("|---|---|" + "---|" * (len(args.seeds) + 2), flush=True)
    for each in args.each:
        found = [rows(args.photographs, each, s, args.recipes, options) for s in args.seeds]
        for recipe in args.recipes:
            accuracies, seconds = ([f[recipe][k] for f in found] for k in ("accuracy", "seconds"))
            shown = " | ".join(f"{a:.3f}" for a in accuracies)
            print(
                f"| {each} | {recipe} | {shown} | {mean(accuracies):.3f} | {mean(seconds):.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
