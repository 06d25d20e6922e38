"""The rule for chapters: short cells of one idea, an example after at most two of them.

`python tests/chapters.py` removes from chapters.json what no longer breaks the rule; nothing is added by it.
"""

import ast
import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EXCEPTIONS = Path(__file__).with_suffix(
    ".json"
)  # chapter → cell → which parts of the rule it breaks
LONG, LONG_CLASS, SHORT_METHOD, DEFINITIONS, IN_A_ROW = 40, 60, 25, 3, 2


def lines_of(text: str) -> int:
    return sum(
        bool(line.strip()) and not line.lstrip().startswith("#|") for line in text.splitlines()
    )


def length(node: ast.AST) -> int:
    return node.end_lineno - node.lineno + 1


def broken(text: str) -> list[str]:
    "Return the parts of the rule that an exported cell breaks by itself."
    body = ast.parse(text).body
    made = [n for n in body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)]
    methods = [m for n in made if isinstance(n, ast.ClassDef) for m in n.body if hasattr(m, "args")]
    limit = LONG_CLASS if methods and max(map(length, methods)) <= SHORT_METHOD else LONG
    found = {"lines": lines_of(text) > limit, "definitions": len(made) > DEFINITIONS}
    return [what for what, breaks in found.items() if breaks]


def imports_alone(text: str) -> bool:
    return all(isinstance(n, ast.Import | ast.ImportFrom | ast.If) for n in ast.parse(text).body)


def breaches(notebook: Path) -> dict[str, list[str]]:
    "Return by cell which parts of the rule a chapter breaks."
    found, row = {}, 0
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] != "code" or "#| default_exp" in text:
            continue
        if not text.startswith("#| export"):
            row = 0
        elif not imports_alone(text):
            row += 1
            what = broken(text) + ["example"] * (row > IN_A_ROW)
            found |= {cell["id"]: what} if what else {}
    return found


def everywhere() -> dict[str, dict[str, list[str]]]:
    chapters = sorted(ROOT.glob("nbs/**/*.ipynb"))
    found = {
        p.relative_to(ROOT).as_posix(): breaches(p) for p in chapters if ".ipynb_" not in str(p)
    }
    return {name: cells for name, cells in found.items() if cells}


def exceptions() -> dict[str, dict[str, list[str]]]:
    return json.loads(EXCEPTIONS.read_text(encoding="utf-8"))


if __name__ == "__main__":
    now = everywhere()
    left = {
        chapter: {
            cell: kept
            for cell, what in cells.items()
            if (kept := [w for w in what if w in now.get(chapter, {}).get(cell, ())])
        }
        for chapter, cells in exceptions().items()
    }
    left = {chapter: cells for chapter, cells in left.items() if cells}
    EXCEPTIONS.write_text(json.dumps(left, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    print(f"{sum(map(len, left.values()))} cells are left that break the rule")
