"""What `mlkit --help` costs beside a Python that does nothing, and beside the import of FastAPI alone."""

import subprocess
import sys
import time
from statistics import median

RUNS = 9
COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "python -m mlkit --help": ["-m", "mlkit", "--help"],
    "python -c 'import fastapi'": ["-c", "import fastapi"],
}


def seconds(arguments: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


for arguments in COMMANDS.values():
    seconds(arguments)  # the caches are warm from here on
rounds = [
    [seconds(a) for a in COMMANDS.values()] for _ in range(RUNS)
]  # in turn: a drift of the machine meets all
taken = dict(zip(COMMANDS, zip(*rounds, strict=True), strict=True))
base = median(taken["python -c pass"])
for name, times in taken.items():
    print(f"{name:30} {1000 * median(times):7.0f} ms   × {median(times) / base:.1f}")
