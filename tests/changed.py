"""What a change can have broken: modules by what they import, chapters by their modules, and the tests that are quick.

`pytest --since REF` runs the chapters whose modules have changed since that commit, those that depend on them, and
the quick tests; `make check` is that. It says what it leaves out.
"""

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
QUICK = {
    "test_api",
    "test_audit",
    "test_batch",
    "test_changed",
    "test_kaggle_server",
    "test_page_files",
    "test_refusals",
    "test_registry",
    "test_sync",
    "test_terminal",
}  # some seconds each
# more than ten seconds each, and why: run when they or their own module change, not for what they import
LONG = {
    "cluster/01_connect": "begins a cluster",
    "train/01_fit": "some fourteen fits, for what they leave in each way of ending; pictures with three other targets",
    "evaluate/06_data_issues": "a fit with flipped labels, and its features",
    "evaluate/02_classification": "a fit, and thousands of drawn evaluations for the calibration",
    "evaluate/07_report": "a fit, and its card",
    "inference/04_word_tokenizer": "compared with spaCy, word by word",
    "convert/02_sandbox": "a sandbox for each thing that is refused",
    "export/01_bundle": "seven exports, each traced by torch.onnx, one of them loaded where there is no mlkit",
    "convert/04_import_learner": "converts in a sandbox, which imports fastai",
    "runs/03_execute": "runs notebooks, in grids",
    "02_main": "the whole way, once",
    "01_tour": "the whole way, step by step, with all that it shows",
}


IMPORT = re.compile(
    r"(?:from|import) (mlkit(?:\.\w+)*|\.+\w*(?:\.\w+)*)(?: import (?:\\n|[\s(])*([\w, ]+))?"
)
MODULES = sorted(
    p for p in (ROOT / "mlkit").rglob("*.py") if p.name not in ("__init__.py", "_modidx.py")
)
NOTEBOOKS = sorted([*(ROOT / "nbs").glob("*.ipynb"), *(ROOT / "nbs").glob("[!.]*/*.ipynb")])


def changed_files(ref: str) -> set[str]:
    "Return the paths, relative to the repository, that differ from that commit or are not in git yet."

    def said(*words: str) -> list[str]:
        done = subprocess.run(["git", *words], cwd=ROOT, check=True, capture_output=True, text=True)
        return done.stdout.split("\0")

    since = said("diff", "-z", "--name-only", "--no-renames", ref)
    return {p for p in [*since, *said("ls-files", "-z", "-o", "--exclude-standard")] if p}


def module_of(notebook: Path) -> str | None:
    "Return the module that a notebook exports, such as `api.body`."
    found = re.search(r"#\| ?default_exp ([\w.]+)", notebook.read_text(encoding="utf-8"))
    return found[1] if found else None


def chapter_of(notebook: Path) -> str:
    "Return what a notebook is called, such as `api/01_body`."
    return notebook.relative_to(ROOT / "nbs").with_suffix("").as_posix()


def named(module: Path) -> str:
    "Return the dotted name of a module in the package, such as `api.body`."
    return ".".join(module.relative_to(ROOT / "mlkit").with_suffix("").parts)


def imports_of(file: Path, package: str = "") -> set[str]:
    "Return what a module, in that package of mlkit's, or a notebook names in an import, at any depth: all that may be modules."
    found = set()
    wing = ["mlkit", *filter(None, [package])]
    for base, names in IMPORT.findall(file.read_text(encoding="utf-8")):
        dots = len(base) - len(base.lstrip("."))
        whole = (
            ".".join([*wing[: len(wing) - dots + 1], *filter(None, [base[dots:]])])
            if dots
            else base
        )
        found |= {whole, *(f"{whole}.{n.strip()}" for n in names.split(",") if n.strip())}
    return {name.removeprefix("mlkit.") for name in found}


def touched(changed: set[str], graph: dict[str, set[str]]) -> set[str]:
    "Return the modules that have changed and all that import them, directly or not."
    found = set(changed)
    while more := {name for name, its in graph.items() if its & found} - found:
        found |= more
    return found


class Selection:
    "What is to be run since a commit, and why."

    def __init__(self, ref: str):
        self.files = changed_files(ref)
        graph = {named(p): imports_of(p, ".".join(named(p).split(".")[:-1])) for p in MODULES}
        graph = {name: its & graph.keys() for name, its in graph.items()}
        here = {p.relative_to(ROOT).as_posix(): p for p in [*MODULES, *NOTEBOOKS]}
        data = (p for p in (ROOT / "mlkit").rglob("*.*") if p.with_suffix(".py") in MODULES)
        here |= {p.relative_to(ROOT).as_posix(): p.with_suffix(".py") for p in data}
        chosen = [here[name] for name in self.files if name in here]
        self.own = {named(p) if p.suffix == ".py" else module_of(p) for p in chosen} - {None}
        reached = touched(self.own, graph)
        self.chapters = {
            chapter_of(n)
            for n in NOTEBOOKS
            if n in chosen
            or module_of(n) in self.own
            or (chapter_of(n) not in LONG and ({module_of(n)} | imports_of(n)) & reached)
        }

    def has(self, path: Path, name: str) -> bool:
        "Return whether a test is to be run."
        if path.stem == "test_notebooks":
            return not name.startswith("test_notebook_runs") or name[19:-1] in self.chapters
        return path.stem in QUICK or f"tests/{path.name}" in self.files
