"""Every measurement: `python benchmarks/run.py [NAME…]`. Figures are medians and ratios of one run, on this machine."""

import platform
import runpy
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
there = sorted(p.stem for p in FOLDER.glob("[!_]*.py") if p.stem != "run")
names = sys.argv[1:] or there
for name in names:
    if name not in there:
        sys.exit(f"no measurement {name!r}; there is: {', '.join(there)}")
failed = False
print(f"{platform.machine()}, Python {platform.python_version()}")
for name in names:
    print(f"\n== {name}")
    sys.argv = [str(FOLDER / f"{name}.py")]  # each has options of its own, and here their defaults
    sys.path.insert(0, str(FOLDER))
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as e:  # what one lacks does not stop the others
        if e.code:
            print(e.code)
            failed = True
sys.exit(failed)
