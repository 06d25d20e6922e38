"""What `make check` runs after a change: what can have been broken by it."""

from pathlib import Path

import changed
import pytest
from changed import ROOT, Selection, imports_of, module_of, touched


def test_a_change_reaches_all_that_import_it(tmp_path: Path) -> None:
    graph = {"a": set(), "b": {"a"}, "c": {"b"}, "d": set()}
    assert touched({"a"}, graph) == {"a", "b", "c"}
    assert touched({"d"}, graph) == {"d"}
    (tmp_path / "x.py").write_text(
        "from .one import a\nimport mlkit.two as t\nfrom mlkit import three, four\n"
        "def f():\n    from mlkit.five import b\n    import json\n"
    )
    assert imports_of(tmp_path / "x.py") == {"one", "two", "three", "four", "five"}


@pytest.mark.parametrize(
    ("file", "chapters", "absent"),
    [
        ("mlkit/intake.py", {"10_intake", "10_api", "10_v2"}, {"04_train", "07_text"}),
        ("nbs/10_intake.ipynb", {"10_intake", "10_api"}, {"04_train"}),
        ("mlkit/train.py", {"04_train", "04_several"}, {"10_intake", "15_tour"}),
        ("mlkit/config.py", {"00_config", "10_intake", "02_columns"}, {"15_tour"}),
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
    notebooks = {p.stem for p in (ROOT / "nbs").glob("*.ipynb")}
    tests = {p.stem for p in (ROOT / "tests").glob("test_*.py")}
    assert changed.LONG.keys() <= notebooks and changed.QUICK <= tests
    assert module_of(ROOT / "nbs/10_intake.ipynb") == "intake"
