"""mlkit's recipe for texts beside the usual first choice, on docstrings: which package is one from? No network is needed, the packages are here.

`python benchmarks/texts.py [--each N] [--seeds 42,1,2] [--lstm]`. Names of the packages are struck out of the texts. Both sides learn from the same texts and
are judged by the same ones, by mlkit's split. `--lstm` times a few steps of fastai's `AWD_LSTM` as well, and says what an epoch would take.
"""

import argparse
import ast
import csv
import hashlib
import importlib.util
import re
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, stdev

PACKAGES = (
    "numpy", "pandas", "scipy", "sklearn", "torch", "matplotlib", "sympy", "networkx", "sqlalchemy", "IPython",
)  # fmt: skip
NAMES = re.compile(
    r"scikit|pyplot|\b(np|pd|plt|nx|sp|sa|mpl)\b|" + "|".join(PACKAGES), re.IGNORECASE
)


def docstrings(package: str) -> Iterator[str]:
    "Yield every different docstring of functions and classes, of 20 letters and more, without the packages' names."
    seen = set()
    for path in sorted(Path(importlib.util.find_spec(package).origin).parent.rglob("*.py")):
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, ValueError):  # a file that is there to be wrong
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and (
                found := ast.get_docstring(node)
            ):
                text = NAMES.sub(" ", found)
                if len(text) >= 20 and text not in seen:
                    seen.add(text)
                    yield text


def write(path: Path, each: int) -> None:
    "Write a table of at most `each` texts a package, chosen by their content; a text of two packages is left out."
    found, of = {}, defaultdict(set)
    for package in PACKAGES:
        texts = sorted(docstrings(package), key=lambda t: hashlib.sha256(t.encode()).digest())
        found[package] = texts
        for text in texts:
            of[text].add(package)
    with open(path, "w", newline="", encoding="utf-8") as f:
        out = csv.writer(f)
        out.writerow(["text", "label"])
        for package, texts in found.items():
            own = [t for t in texts if len(of[t]) == 1]
            out.writerows([t, package] for t in (own[:each] if each else own))


def usual(parts) -> Iterator[tuple[str, float, float]]:
    "Yield name, accuracy and seconds of the usual first choice."
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    train, valid = (
        ([p.text for p in texts], [p.example.label for p in texts])
        for texts in (parts.train, parts.valid)
    )
    for c in (1, 10):
        began = time.monotonic()
        model = make_pipeline(TfidfVectorizer(), LogisticRegression(C=c, max_iter=1000))
        model.fit(*train)
        name = f"TF-IDF, logistic regression, C={c}"
        yield name, model.score(*valid), time.monotonic() - began


def ours(settings, parts) -> tuple[float, float, int]:
    "Return accuracy, seconds and epochs of mlkit's fit, its tokenizer included."
    from mlkit.evaluate.classification import evaluate
    from mlkit.runs.record import Run
    from mlkit.tasks import text as texts
    from mlkit.train.fit import fit

    began = time.monotonic()
    with Run.start(settings, kind="benchmark") as run:
        learn = texts.learner(texts.dataloaders(parts, settings), settings, path=run.folder)
        done = fit(learn, settings, run)
    seconds = time.monotonic() - began
    return evaluate(learn).accuracy, seconds, done.epochs


def lstm(settings, parts, steps: int = 3) -> float:
    "Return the seconds that an epoch of fastai's `AWD_LSTM` would take, by a few steps."
    from fastai.text.models.awdlstm import AWD_LSTM
    from fastai.text.models.core import get_text_classifier

    from mlkit.preprocess.cache import on_pixels
    from mlkit.tasks import text as texts

    dls = texts.dataloaders(parts, settings)
    pieces = len(dls.vocab[0])
    learn = texts.learner(dls, settings)
    model = get_text_classifier(AWD_LSTM, pieces, len(parts.labels), pad_idx=pieces - 1)
    with on_pixels(learn, settings):
        batches = list(learn.dls.train)
    some, spent, tokens = batches[1 :: len(batches) // steps][:steps], 0.0, 0
    for x, y in some:
        began = time.monotonic()
        learn.loss_func(model.train()(x)[0], y).backward()
        spent, tokens = spent + time.monotonic() - began, tokens + x.numel()
    return spent / tokens * sum(x.numel() for x, _ in batches)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--each", type=int, default=1250, help="texts a package; 0 = all")
    parser.add_argument("--seeds", default="42")
    parser.add_argument("--lstm", action="store_true")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "docstrings.csv"
        write(table, asked.each)
        compare(table, folder, asked)


def compare(table: Path, folder: str, asked: argparse.Namespace) -> None:
    from mlkit.config import load_settings
    from mlkit.tasks.task import infer_task

    scores, rows = [], []
    for seed in asked.seeds.split(","):
        settings = load_settings(
            f"data.source={table}", f"train.seed={seed}", f"paths.runs={folder}/runs"
        )
        task, _ = infer_task(settings)
        settings = task.settled(settings)
        found = task.data.audit(str(table), settings)
        parts = task.data.split(found, settings)
        if not rows:
            print(
                f"{len(parts.train)} to learn from, {len(parts.valid)} to judge by: {found.count()}"
            )
            rows = list(usual(parts))
            for name, score, seconds in rows:
                print(f"{name:36} {score:.4f} {seconds:6.0f} s")
        score, seconds, epochs = ours(settings, parts)
        scores.append(score)
        print(f"{f'mlkit, bag, seed {seed}':36} {score:.4f} {seconds:6.0f} s, {epochs} epochs")
        sys.stdout.flush()
    if len(scores) > 1:
        print(f"{'mlkit, mean':36} {mean(scores):.4f} ± {stdev(scores):.4f}")
    if asked.lstm:
        print(f"an epoch of AWD_LSTM would take {lstm(settings, parts):.0f} s")


if __name__ == "__main__":
    main()
