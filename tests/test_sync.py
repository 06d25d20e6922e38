"""What is in the repository agrees with itself: notebooks, modules, README, settings, imports."""

import ast
import configparser
import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from changed import MODULES, NOTEBOOKS, ROOT, named
from chapters import everywhere, exceptions
from readme import render

from mlkit._moved import RENAMED
from mlkit.config import Settings, known_keys, load_settings

KERNELS = sorted((ROOT / "kernels").glob("*/*.ipynb"))
BIN = Path(sys.executable).parent

# Who may import whom, besides its own wing: the wings of the package and the modules at its root. `config`, `bundle`,
# `progress` and the reader of tables are everybody's. What a single module may besides stands under its own name.
EVERYBODYS = {"config", "bundle", "progress", "encodings", "delimited", "table_formats", "tables"}
WINGS = {
    "_moved": set(),
    "config": set(),
    "bundle": set(),
    "progress": set(),
    "encodings": set(),
    "delimited": {"encodings"},
    "table_formats": {"delimited"},
    "tables": {"delimited", "table_formats"},
    "runs": set(),
    "inference": set(),
    "api": {"inference"},
    "client": set(),
    "preprocess": {"inference"},
    "model": {"preprocess", "inference"},
    "evaluate": {"model", "preprocess", "inference"},
    "tasks": {"evaluate", "model", "preprocess", "inference"},
    "train": {"tasks", "evaluate", "model", "preprocess", "runs", "cluster.connect"},
    "export": {"tasks", "model", "inference"},
    "convert": {"inference"},
    "convert.worker": {"export", "model", "tasks"},  # a program that the sandbox runs
    "kaggle": {"runs"},
    "kaggle.push": {"preprocess"},  # inside a function: what is to travel
    "cluster": {"api", "inference", "runs"},
    "main": {"_moved"},
    "__main__": {"cli"},
}
WINGS["main"] |= set(WINGS) - {"main", "__main__"}
WINGS["cli"] = set(WINGS) - {"__main__"}
LIGHT = {"config", "bundle", "runs", "inference", "api", "client", "convert", "kaggle", "cluster"}
LIGHT |= {
    "encodings",
    "delimited",
    "table_formats",
    "tables",
    "_moved",
    "progress",
    "main",
    "cli",
    "__main__",
}
HEAVY = {
    "pyarrow",
    "torch",
    "torchvision",
    "fastai",
    "timm",
    "papermill",
    "kaggle",
    "accelerate",
    "ray",
    "optuna",
    "matplotlib",
    "sklearn",
    "pandas",
}


def cells(notebook: Path) -> list[dict]:
    return json.loads(notebook.read_text(encoding="utf-8"))["cells"]


def source(cell: dict) -> str:
    return "".join(cell["source"])


def imported(module: Path, *, top_level: bool = False) -> set[str]:
    "Return the dotted names that the module imports; relative ones as mlkit's."
    tree = ast.parse(module.read_text(encoding="utf-8"))
    typing_only = {
        id(n)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for n in ast.walk(block)
    }
    nodes = [n for n in (tree.body if top_level else ast.walk(tree)) if id(n) not in typing_only]
    names = {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names}
    for n in nodes:
        if isinstance(n, ast.ImportFrom):
            above = ["mlkit", *named(module).split(".")][: -n.level] if n.level else []
            base = ".".join([*above, *filter(None, [n.module])])
            names |= {base, *(f"{base}.{a.name}" for a in n.names)}
    return names


def own(module: Path, **how: bool) -> set[str]:
    "Return the modules of mlkit that the module imports."
    names = {n.removeprefix("mlkit.") for n in imported(module, **how)}
    return names & {named(m) for m in MODULES} - {named(module)}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A copy of the repository, exported and cleaned anew."
    copy = tmp_path_factory.mktemp("copy") / "mlkit"
    for name in ("nbs", "mlkit", "kernels", "pyproject.toml", "README.md", "settings.ini"):
        place = ROOT / name
        (shutil.copytree if place.is_dir() else shutil.copy)(
            place, copy / name
        ) if place.exists() else None
        copy.mkdir(exist_ok=True)
    for command in (["nbdev-export"], ["nbdev-clean"], ["nbdev-clean", "--fname", "kernels"]):
        subprocess.run([BIN / command[0], *command[1:]], cwd=copy, check=True, capture_output=True)
    return copy


def test_exporting_leaves_no_difference(exported: Path) -> None:
    there, here = (
        {p.relative_to(root).as_posix(): p for p in root.glob("mlkit/**/*.py")}
        for root in (exported, ROOT)
    )
    assert there.keys() == here.keys()
    for name, module in here.items():
        assert there[name].read_text() == module.read_text(), name


def test_cleaning_leaves_no_difference(exported: Path) -> None:
    for notebook in [*NOTEBOOKS, *KERNELS]:
        assert (exported / notebook.relative_to(ROOT)).read_text() == notebook.read_text(), (
            notebook.name
        )


@pytest.mark.parametrize(
    "notebook", [*NOTEBOOKS, *KERNELS], ids=lambda p: p.relative_to(ROOT).as_posix()
)
def test_notebook_is_whole(notebook: Path) -> None:
    content = json.loads(notebook.read_text(encoding="utf-8"))
    assert content["metadata"]["kernelspec"]["name"] == "python3"
    ids = [c.get("id") for c in content["cells"]]
    assert all(ids) and len(set(ids)) == len(ids)
    assert notebook.stat().st_size < 1_500_000
    shown = json.dumps([c.get("outputs", []) for c in content["cells"]])
    assert not re.search(r"/(?:home|root|tmp|Users)/[\w.-]", shown), "a path of somebody's machine"
    assert len(shown) < 200_000


def test_no_stale_or_missing_module() -> None:
    declared = {}
    for notebook in NOTEBOOKS:
        for c in cells(notebook):
            if found := re.search(r"^#\| ?default_exp (\S+)", source(c), re.M):
                assert found[1] not in declared, (
                    f"{notebook.name} and {declared[found[1]]} export one module"
                )
                declared[found[1]] = notebook
    assert set(declared) == {named(p) for p in MODULES}
    for module in MODULES:
        notebook = declared[named(module)].relative_to(ROOT).as_posix()
        assert f"../{notebook}" in module.read_text(encoding="utf-8")
        wing = ROOT / "mlkit" / notebook.removeprefix("nbs/")
        assert wing.parent == module.parent, "a notebook lies where its module does"


@pytest.mark.parametrize("notebook", KERNELS, ids=lambda p: p.stem)
def test_kernel_notebook(notebook: Path) -> None:
    tagged = [c for c in cells(notebook) if "parameters" in c["metadata"].get("tags", [])]
    assert len(tagged) == 1
    names = {t.id for line in ast.parse(source(tagged[0])).body for t in line.targets}
    assert names <= set(known_keys()), "parameters are settings"
    code = "\n".join(source(c) for c in cells(notebook) if c["cell_type"] == "code")
    assert len(cells(notebook)) <= 8
    assert not any(
        isinstance(n, (ast.FunctionDef, ast.ClassDef)) for n in ast.walk(ast.parse(code))
    )
    metadata = json.loads((notebook.parent / "kernel-metadata.json").read_text())
    assert metadata["code_file"] == notebook.name and metadata["is_private"] is True


def test_there_are_kernels_and_notebooks() -> None:
    assert KERNELS and len(NOTEBOOKS) > 14


def test_readme_is_its_source() -> None:
    assert (ROOT / "README.md").read_text(encoding="utf-8") == render(ROOT / "nbs" / "index.ipynb")


def wing_of(name: str) -> str:
    "Return the wing of a module, or the module itself where it stands at the root."
    return name.partition(".")[0]


@pytest.mark.parametrize("module", MODULES, ids=named)
def test_imports_follow_the_wings(module: Path) -> None:
    name = named(module)
    free = WINGS[wing_of(name)] | WINGS.get(name, set()) | EVERYBODYS | {wing_of(name)}
    if wing_of(name) in EVERYBODYS:
        free = {"config", wing_of(name)} | WINGS[wing_of(name)]
    assert not {n for n in own(module) if n not in free and wing_of(n) not in free}


def test_no_module_imports_itself_in_a_round() -> None:
    above = {named(m): own(m, top_level=True) for m in MODULES}
    while above:
        ends = {name for name, its in above.items() if not its & above.keys()}
        assert ends, f"a round among {sorted(above)}"
        above = {name: its for name, its in above.items() if name not in ends}


def test_no_two_wings_import_each_other() -> None:
    pairs = {(wing_of(named(m)), wing_of(n)) for m in MODULES for n in own(m)}
    assert not {(a, b) for a, b in pairs if a < b and (b, a) in pairs}


@pytest.mark.parametrize("module", MODULES, ids=named)
def test_light_modules_import_nothing_heavy(module: Path) -> None:
    if wing_of(named(module)) not in LIGHT or named(module) == "convert.worker":
        return
    tops = imported(module, top_level=True)
    assert not {n.partition(".")[0] for n in tops} & HEAVY
    assert {wing_of(n) for n in own(module, top_level=True)} <= LIGHT


@pytest.mark.parametrize(
    "code", ["import mlkit.api.server", "import mlkit.cli.main", "import mlkit.inference.predictor"]
)
def test_light_half_starts_without_torch(code: str) -> None:
    show = "import sys; print([m for m in ('torch', 'fastai') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{show}"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_help_imports_neither_torch_nor_fastai() -> None:
    code = (
        "import sys\nfrom mlkit.cli.main import run\nsys.argv = ['mlkit', '--help']\n"
        "try:\n    run()\nexcept SystemExit as e:\n    assert not e.code\n"
        "print(sorted({'torch', 'fastai', 'fastapi', 'onnxruntime', 'pydantic'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("[]") and "pipeline" in done.stdout


def test_settings_file_holds_the_defaults(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ini = configparser.ConfigParser(interpolation=None)
    ini.read(ROOT / "settings.ini", encoding="utf-8")
    assert ini.sections() == list(Settings.model_fields)
    for section, field in Settings.model_fields.items():
        assert list(ini[section]) == list(field.annotation.model_fields), section
    monkeypatch.chdir(tmp_path)  # the default folders are relative to the file, or to here
    shutil.copy(ROOT / "settings.ini", tmp_path / "settings.ini")
    from_file = load_settings()
    (tmp_path / "settings.ini").unlink()
    assert from_file == load_settings()


def test_light_dependencies_hold_nothing_heavy() -> None:
    light = [d for d in importlib.metadata.requires("mlkit-nb") or [] if "extra ==" not in d]
    names = {re.split(r"[<>=!\[; ]", d)[0] for d in light}
    assert "fastapi" in names and not names & (HEAVY | {"scikit-learn", "nbdev", "jupyterlab"})
    assert all(">=" in d for d in light), "lower bounds"


def test_nothing_asks_an_index_for_the_strangers_name() -> None:
    wanted = re.compile(r"(pip|uv)3? (install|download)[^\n]*[ \"']mlkit(?![-\w/])")
    files = [
        ROOT / n for n in ("Makefile", "README.md", "pyproject.toml", "requirements.txt", ".ci/run")
    ]
    for file in [*files, *NOTEBOOKS, *KERNELS, *MODULES]:
        assert not wanted.search(file.read_text(encoding="utf-8")), file.name


@pytest.mark.parametrize("module", MODULES, ids=named)
def test_no_module_is_long(module: Path) -> None:
    lines = len(module.read_text(encoding="utf-8").splitlines())
    assert lines <= (600 if named(module) == "config" else 450)


# what a stranger asks, the path that answers, and a name that has to be there
ANSWERS = {
    "where is the micro-batching?": ("inference.batcher", "Batcher"),
    "what reads a CSV?": ("tables", "read_table"),
    "what finds a separator?": ("delimited", "find_dialect"),
    "where is the Kaggle upload?": ("kaggle.transfer", "upload"),
    "what pushes a kernel?": ("kaggle.push", "push"),
    "what follows a Kaggle session?": ("kaggle.session", "Watch"),
    "where is `mlkit predict`?": ("cli.predict", "predict"),
    "where is the whole way in Python?": ("main", "pipeline"),
    "what runs the ONNX graph?": ("inference.engines", "OnnxRuntime"),
    "what makes a tensor of an image?": ("inference.vision", "ImageReader"),
    "what makes numbers of a row?": ("inference.tabular", "RowReader"),
    "where are the metrics of the server?": ("api.metrics", "Metrics"),
    "what checks API keys?": ("api.auth", "Gate"),
    "where are versions promoted?": ("bundle.registry", "Registry"),
    "what writes a file whole or not at all?": ("bundle.files", "write_whole"),
    "what must a reader of inputs have?": ("inference.reader", "Reader"),
    "where is the manifest's schema?": ("bundle.manifest", "Manifest"),
    "where is int8 made?": ("export.quantize", "quantize"),
    "what opens somebody's export.pkl?": ("convert.import_learner", "import_learner"),
    "where is the sandbox?": ("convert.sandbox", "run_sandboxed"),
    "where does a fit resume?": ("train.checkpoint", "CheckpointCallback"),
    "where is the learning rate found?": ("train.lr_finder", "find_lr"),
    "where are label errors found?": ("evaluate.data_issues", "find_label_issues"),
    "where is the model card written?": ("evaluate.report", "Report"),
    "what runs a notebook with parameters?": ("runs.execute", "run_notebook"),
}


@pytest.mark.parametrize("question", ANSWERS)
def test_a_path_answers_the_question(question: str) -> None:
    module, name = ANSWERS[question]
    (file,) = (m for m in MODULES if named(m) == module)
    tree = ast.parse(file.read_text(encoding="utf-8"))
    assert name in {n.name for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)}


@pytest.mark.parametrize("module", MODULES, ids=named)
def test_no_module_bears_a_name_of_before(module: Path) -> None:
    if named(module) == "_moved":
        return
    tree = ast.parse(module.read_text(encoding="utf-8"))
    names = {n.name for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    assert not names & RENAMED.keys()
    gone = "express doubts several intake gate confine fleet shards nodes account foreign pickles words"
    assert named(module).rpartition(".")[2] not in gone.split()


def test_chapters_keep_their_rule_but_for_a_list_that_only_shrinks() -> None:
    "Short cells of one idea, an example after at most two: what breaks it today stands in tests/chapters.json."
    now, listed = everywhere(), exceptions()
    flat = [
        {
            (chapter, cell, what)
            for chapter, cells in some.items()
            for cell, whats in cells.items()
            for what in whats
        }
        for some in (now, listed)
    ]
    assert not flat[0] - flat[1], "new cells obey: fewer lines or definitions, or an example before"
    assert not flat[1] - flat[0], "mended: `python tests/chapters.py` takes them from the list"
