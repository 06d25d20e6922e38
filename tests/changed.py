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
    "test_refusals",
    "test_registry",
    "test_sync",
    "test_terminal",
}  # some seconds each
# more than ten seconds each, and why: run when they or their own module change, not for what they import
LONG = {
    "01_cluster": "begins a cluster",
    "04_train": "some fourteen fits, for what they leave in each way of ending; pictures with three other targets",
    "05_doubts": "a fit with flipped labels, and its features",
    "05_evaluate": "a fit, and thousands of drawn evaluations for the calibration",
    "05_report": "a fit, and its card",
    "07_words": "compared with spaCy, word by word",
    "08_confine": "a sandbox for each thing that is refused",
    "08_export": "seven exports, each traced by torch.onnx, one of them loaded where there is no mlkit",
    "08_foreign": "converts in a sandbox, which imports fastai",
    "12_notebook": "runs notebooks, in grids",
    "13_kaggle": "a dry run, with an environment of its own",
    "14_main": "the whole way, once",
    "15_tour": "the whole way, step by step, with all that it shows",
}


def changed_files(ref: str) -> set[str]:
    "Return the paths, relative to the repository, that differ from that commit or are not in git yet."

    def said(*words: str) -> list[str]:
        done = subprocess.run(["git", *words], cwd=ROOT, check=True, capture_output=True, text=True)
        return done.stdout.split("\0")

    since = said("diff", "-z", "--name-only", "--no-renames", ref)
    return {p for p in [*since, *said("ls-files", "-z", "-o", "--exclude-standard")] if p}


def module_of(notebook: Path) -> str | None:
    "Return the module that a notebook exports."
    found = re.search(r"#\| ?default_exp (\w+)", notebook.read_text(encoding="utf-8"))
    return found[1] if found else None


def imports_of(file: Path) -> set[str]:
    "Return the modules of mlkit that a module or notebook names in an import, at any depth."
    text = file.read_text(encoding="utf-8")
    direct = re.findall(r"(?:from|import) (?:mlkit)?\.(\w+)", text)
    named = re.findall(r"(?:from mlkit|from \.) import (?:\\n|[\s(])*([\w, ]+)", text)
    return {*direct, *(n.strip() for part in named for n in part.split(","))}


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
        modules = {p.stem: p for p in (ROOT / "mlkit").glob("*.py")}
        graph = {name: imports_of(path) & modules.keys() for name, path in modules.items()}
        notebooks = sorted((ROOT / "nbs").glob("*.ipynb"))
        self.own = {
            module
            for path in map(Path, self.files)
            for module in (path.stem, (ROOT / path).exists() and module_of(ROOT / path))
            if path.suffix in (".py", ".ipynb") and module in modules
        }
        reached = touched(self.own, graph)
        self.chapters = {
            n.stem
            for n in notebooks
            if f"nbs/{n.name}" in self.files
            or module_of(n) in self.own
            or (n.stem not in LONG and ({module_of(n)} | imports_of(n)) & reached)
        }

    def has(self, path: Path, name: str) -> bool:
        "Return whether a test is to be run."
        if path.stem == "test_notebooks":
            return not name.startswith("test_notebook_runs") or name[19:-1] in self.chapters
        return path.stem in QUICK or f"tests/{path.name}" in self.files
