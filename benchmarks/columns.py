"""Tables against the usual first choice: mlkit's default Learner and scikit-learn's HistGradientBoosting, in one run.

Both learn from the same rows and are tested on rows that neither has seen. mlkit holds a tenth of its rows out, to choose the
best epoch by; HistGradientBoosting, with its own defaults and the texts as categories, learns from all of them.

    python benchmarks/columns.py --tables FOLDER     # with diamonds.csv, titanic.csv, penguins.csv
"""

import argparse
import contextlib
import io
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pandas as pd
import torch
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
from sklearn.model_selection import KFold, StratifiedKFold

from mlkit.config import load_settings
from mlkit.inference.tabular import RowReader
from mlkit.model.tabular import learner
from mlkit.preprocess.columns import read_table
from mlkit.preprocess.tabular import dataloaders, split
from mlkit.preprocess.tabular_audit import TabularAudit, audit
from mlkit.runs.record import Run
from mlkit.tasks.tabular import answers, input_spec
from mlkit.tasks.task import TASKS
from mlkit.train.fit import fit

# table → repeated splits in five, and how many of the five are tested
TABLES = {"diamonds": (1, 3), "titanic": (5, 5), "penguins": (2, 5)}


def ours(
    rows: pd.DataFrame, test: pd.DataFrame, seed: int
) -> tuple[TabularAudit, pd.DataFrame, np.ndarray]:
    "Return what the audit found, the test rows that the model takes, and the Learner's answers to them."
    with tempfile.TemporaryDirectory() as tmp, contextlib.redirect_stderr(io.StringIO()):
        settings = load_settings(f"paths.runs={tmp}", "data.valid=0.1", f"train.seed={seed}")
        found = audit(rows, settings)
        settings = TASKS[found.target.task].settled(settings)
        dls = dataloaders(split(found, settings), settings)
        learn = learner(dls, settings)
        fit(learn, settings, Run.start(settings, join=False))
        needed = sorted(RowReader(input_spec(learn)).needed)  # never missing in training
        test = test.dropna(subset=needed).reset_index(drop=True)
        asked = test[list(found.features)].to_dict("records")
        asked = [{k: v for k, v in row.items() if not pd.isna(v)} for row in asked]
        return found, test, answers(learn, asked)


def theirs(found: TabularAudit, rows: pd.DataFrame, test: pd.DataFrame) -> np.ndarray:
    "Return the answers of HistGradientBoosting, from the same columns."
    names = list(found.features)
    both = pd.concat([rows[names], test[names]], ignore_index=True)
    for c in both.select_dtypes(exclude="number"):
        both[c] = both[c].astype("category")
    x, unseen = both[: len(rows)], both[len(rows) :]
    y = rows[found.target.targets[0]]
    if found.target.kind == "regression":
        y = np.log(y) if found.target.logs[0] else y
        return HistGradientBoostingRegressor(random_state=0).fit(x, y).predict(unseen)
    return HistGradientBoostingClassifier(random_state=0).fit(x, y.astype(str)).predict(unseen)


def errors(frame: pd.DataFrame, table: str) -> Iterator[tuple[str, float, float]]:
    "Yield a measure and what both have of it, for each split."
    repeats, used = TABLES[table]
    for seed in range(repeats):
        kind = KFold if table == "diamonds" else StratifiedKFold
        y = frame.survived if table == "titanic" else frame.get("species")
        folds = kind(5, shuffle=True, random_state=seed).split(frame, y)
        for rows, test in list(folds)[:used]:
            rows, test = (frame.iloc[i].reset_index(drop=True) for i in (rows, test))
            found, test, a = ours(rows, test, seed)
            b, truth = theirs(found, rows, test), test[found.target.targets[0]]
            if found.target.kind == "regression":
                truth = np.log(truth) if found.target.logs[0] else truth
                yield (
                    "RMSE of the log",
                    *(float(np.sqrt(np.mean((p.ravel() - truth) ** 2))) for p in (a, b)),
                )
            else:
                labels = np.array(found.labels)[a.argmax(1)]
                yield "accuracy", *(float(np.mean(p == truth.astype(str))) for p in (labels, b))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    shared = Path(__file__).resolve().parents[2] / "shared"
    parser.add_argument("--tables", type=Path, default=shared / "data/tables", help="CSV files")
    parser.add_argument("--only", choices=TABLES, help="one of them")
    options = parser.parse_args()
    if not options.tables.is_dir():
        sys.exit(f"there is no {options.tables}; give --tables FOLDER")
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print("| table | measure | splits | mlkit | HistGradientBoosting | mlkit ÷ theirs | seconds |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for table in [options.only] if options.only else TABLES:
        began = time.monotonic()
        frame = read_table(str(options.tables / f"{table}.csv"), load_settings())
        measures, *both = zip(*errors(frame, table), strict=True)
        n = len(measures)
        said = [f"{np.mean(x):.4f} ± {np.std(x, ddof=1) / n**0.5:.4f}" for x in both]
        ratio = np.mean(both[0]) / np.mean(both[1])
        seconds = time.monotonic() - began
        print(
            f"| {table} | {measures[0]} | {n} | {' | '.join(said)} | {ratio:.3f} | {seconds:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
