"""The photographs that several measurements read."""

import sys
from pathlib import Path

SHARED = Path(__file__).resolve().parents[2] / "shared"


def photographs(folder: Path) -> list[Path]:
    "Return the pictures below the folder, sorted; end the program where there are none."
    files = [p for p in sorted(folder.rglob("*")) if p.suffix in (".jpg", ".jpeg", ".png")]
    if not files:
        sys.exit(f"there is no picture in {folder}; give --photographs FOLDER")
    return files
