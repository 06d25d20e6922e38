"""What `make check` runs after a change: what can have been broken by it."""

from pathlib import Path

import changed
import pytest
from changed import NOTEBOOKS, ROOT, Selection, chapter_of, imports_of, module_of, touched


def test_a_change_reaches_all_that_import_it(tmp_path: Path) -> None:
    graph = {"a": set(), "b": {"a"}, "c": {"b"}, "d": set()}
    assert touched({"a"}, graph) == {"a", "b", "c"}
    assert touched({"d"}, graph) == {"d"}
    (tmp_path / "x.py").write_text(
        "from .one import a\nimport mlkit.two as t\nfrom mlkit import three, four\nfrom ..five import (\n    b)\n"
        "def f():\n    from mlkit.six.seven import b\n    import json\n    from . import eight\n"
    )
    names = {"wing.one", "two", "three", "four", "five", "six.seven", "wing.eight"}
    assert names <= imports_of(tmp_path / "x.py", "wing")
    assert {"one", "eight"} <= imports_of(tmp_path / "x.py") and "json" not in names


@pytest.mark.parametrize(
    ("file", "chapters", "absent"),
    [
        (
            "mlkit/api/body.py",
            {"api/01_body", "api/11_app", "api/07_open_inference"},
            {"train/01_fit", "inference/03_text"},
        ),
        ("nbs/api/01_body.ipynb", {"api/01_body", "api/11_app"}, {"train/01_fit"}),
        (
            "mlkit/train/fit.py",
            {"train/01_fit", "train/08_distributed"},
            {"api/01_body", "01_tour"},
        ),
        ("mlkit/config.py", {"00_config", "api/01_body", "tasks/03_tabular"}, {"01_tour"}),
        ("mlkit/api/page.js", {"api/08_page", "api/11_app"}, {"api/01_body"}),
        ("README.md", set(), {"00_config"}),
    ],
)
def test_the_chapters_of_a_change(
    file: str, chapters: set[str], absent: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(changed, "changed_files", lambda ref: {file})
    chosen = Selection("HEAD")
    assert chapters <= chosen.chapters and not absent & chosen.chapters
    assert chosen.has(ROOT / "tests/test_sync.py", "test_x")
    assert not chosen.has(ROOT / "tests/test_kaggle.py", "test_x")
    for name in chapters:
        assert chosen.has(ROOT / "tests/test_notebooks.py", f"test_notebook_runs[{name}]")


def test_what_is_named_is_there() -> None:
    notebooks = {chapter_of(n) for n in NOTEBOOKS}
    tests = {p.stem for p in (ROOT / "tests").glob("test_*.py")}
    assert changed.LONG.keys() <= notebooks and changed.QUICK <= tests
    assert module_of(ROOT / "nbs/api/01_body.ipynb") == "api.body"
