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
from readme import render

from mlkit.config import Settings, known_keys, load_settings

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
KERNELS = sorted((ROOT / "kernels").glob("*/*.ipynb"))
MODULES = sorted(
    p for p in (ROOT / "mlkit").glob("*.py") if p.name not in ("__init__.py", "_modidx.py")
)
BIN = Path(sys.executable).parent

# who may import whom: the table of rooms, plus the error root and the settings, which are everybody's
ROOMS = {
    "config": set(),
    "runs": {"config"},
    "cluster": {"config"},
    "preprocess": {"config"},
    "views": set(),
    "cache": {"config", "views"},
    "step": set(),
    "track": {"config", "runs"},
    "model": {"config", "preprocess", "cache"},
    "express": {"config"},
    "pictures": {"config", "preprocess", "model", "express", "bundle"},
    "ulmfit": {"express", "words"},
    "texts": {"config", "preprocess", "cache", "express", "bundle", "ulmfit", "words"},
    "columns": {"config", "preprocess", "express", "bundle", "table"},
    "measure": {"config", "bundle"},
    "labelsets": {"bundle", "evaluate"},
    "masks": {"bundle", "evaluate", "mask", "express", "pictures"},
    "task": {
        "config",
        "pictures",
        "columns",
        "texts",
        "express",
        "evaluate",
        "measure",
        "labelsets",
        "masks",
    },
    "train": {"config", "runs", "cache", "model", "step", "track"},
    "several": {"cluster", "config", "runs", "task", "train"},
    "evaluate": {"config", "preprocess", "answer", "bundle"},
    "doubts": {"preprocess", "evaluate"},
    "report": {"preprocess", "evaluate", "doubts"},
    "bundle": {"config"},
    "engine": {"config"},
    "mask": {"bundle"},
    "picture": {"bundle", "engine", "mask"},
    "table": {"bundle"},
    "words": {"bundle"},
    "text": {"bundle", "words"},
    "answer": {"bundle", "mask"},
    "inference": {"config", "bundle", "engine", "picture", "table", "text", "answer"},
    "quantize": {"config"},
    "export": {"bundle", "inference", "quantize", "express", "task"},
    "pickles": {"config", "bundle"},
    "confine": {"config"},
    "convert": {"config", "bundle", "express", "export", "inference", "inputs", "mask", "task"},
    "foreign": {"config", "bundle", "inference", "pickles", "confine"},
    "registry": {"config", "bundle"},
    "intake": {"config", "bundle"},
    "gate": {"config"},
    "metrics": set(),
    "page": set(),
    "v2": {"bundle", "intake"},
    "host": {"config", "bundle", "engine", "inference", "registry"},
    "fleet": {"bundle", "cluster", "config", "engine", "host", "inference", "registry", "serve"},
    "api": {
        "config",
        "bundle",
        "registry",
        "engine",
        "picture",
        "answer",
        "inference",
        "host",
        "intake",
        "gate",
        "metrics",
        "page",
        "v2",
    },
    "serve": {"config", "host", "api"},
    "inputs": {"config", "bundle"},
    "batch": {"config", "bundle", "engine", "inference", "registry", "inputs"},
    "shards": {"config", "cluster", "inference", "registry", "inputs", "batch"},
    "client": set(),
    "notebook": {"config", "runs"},
    "nodes": {"config", "notebook"},
    "search": {"config", "notebook", "runs"},
    "account": {"config", "bundle"},
    "kaggle": {"config", "registry", "runs", "notebook", "account", "preprocess", "bundle"},
}
ROOMS["main"] = set(ROOMS)
ROOMS["__main__"] = {"main"}
LIGHT = [
    "config",
    "runs",
    "cluster",
    "bundle",
    "engine",
    "mask",
    "picture",
    "table",
    "words",
    "text",
    "answer",
    "inference",
    "pickles",
    "confine",
    "foreign",
    "registry",
    "intake",
    "gate",
    "metrics",
    "host",
    "v2",
    "page",
    "api",
    "serve",
    "inputs",
    "batch",
    "shards",
    "client",
    "notebook",
    "nodes",
    "search",
    "main",
    "__main__",
]
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
            base = f"mlkit.{n.module or ''}".rstrip(".") if n.level else n.module
            names |= {f"{base}.{a.name}" for a in n.names} if base == "mlkit" else {base}
    return names


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
    for module in (ROOT / "mlkit").glob("*.py"):
        assert (exported / "mlkit" / module.name).read_text() == module.read_text(), module.name
    assert {p.name for p in (exported / "mlkit").glob("*.py")} == {
        p.name for p in (ROOT / "mlkit").glob("*.py")
    }


def test_cleaning_leaves_no_difference(exported: Path) -> None:
    for notebook in [*NOTEBOOKS, *KERNELS]:
        assert (exported / notebook.relative_to(ROOT)).read_text() == notebook.read_text(), (
            notebook.name
        )


@pytest.mark.parametrize("notebook", [*NOTEBOOKS, *KERNELS], ids=lambda p: p.stem)
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
                declared[found[1]] = notebook.name
    assert set(declared) == {p.stem for p in MODULES}
    for module in MODULES:
        assert f"../nbs/{declared[module.stem]}" in module.read_text(encoding="utf-8")


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


@pytest.mark.parametrize("module", MODULES, ids=lambda p: p.stem)
def test_imports_follow_the_rooms(module: Path) -> None:
    names = {n.split(".")[1] for n in imported(module) if n.startswith("mlkit.")}
    assert names <= ROOMS[module.stem] - {module.stem}


@pytest.mark.parametrize("name", LIGHT)
def test_light_modules_import_nothing_heavy(name: str) -> None:
    tops = {n.partition(".")[0] for n in imported(ROOT / "mlkit" / f"{name}.py", top_level=True)}
    assert not tops & HEAVY


@pytest.mark.parametrize(
    "code", ["import mlkit.serve", "import mlkit.main", "import mlkit.inference"]
)
def test_light_half_starts_without_torch(code: str) -> None:
    show = "import sys; print([m for m in ('torch', 'fastai') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{show}"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_help_imports_neither_torch_nor_fastai() -> None:
    code = (
        "import sys\nfrom mlkit.main import run\nsys.argv = ['mlkit', '--help']\n"
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
