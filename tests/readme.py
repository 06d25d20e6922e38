"""Render nbs/index.ipynb as README.md: `python tests/readme.py`."""

import json
from pathlib import Path

ROOT = Path(__file__).parents[1]


def render(notebook: Path) -> str:
    "Return the notebook as Markdown: its texts, its code that is not hidden, and what that printed."
    parts = []
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"]).strip()
        if cell["cell_type"] == "markdown":
            parts.append(source)
        elif "#| hide" not in source:
            parts.append(f"```python\n{source}\n```")
            said = "".join(t for o in cell["outputs"] for t in o.get("text", []))
            parts += [f"```\n{said.rstrip()}\n```"] if said.strip() else []
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    (ROOT / "README.md").write_text(render(ROOT / "nbs" / "index.ipynb"), encoding="utf-8")
