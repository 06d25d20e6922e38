"""Every measurement: `python benchmarks/run.py [NAME…]`. Figures are medians and ratios of one run, on this machine."""

import platform
import runpy
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
names = sys.argv[1:] or sorted(p.stem for p in FOLDER.glob("*.py") if p.stem != "run")
print(f"{platform.machine()}, Python {platform.python_version()}")
for name in names:
    if not (FOLDER / f"{name}.py").is_file():
        sys.exit(
            f"no measurement {name!r}; there is: {', '.join(p.stem for p in FOLDER.glob('*.py'))}"
        )
    print(f"\n== {name}")
    runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
