"""A node of three is killed with -9 in the middle of a batch on Ray: are the rows those of the local command?

`python benchmarks/cluster.py MODEL [--photographs FOLDER] [--models FOLDER] [--inputs 20000]`. The photographs are repeated until there are so many inputs.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow
import pyarrow.parquet as parquet
from _photographs import SHARED, photographs
from ray.cluster_utils import Cluster


def begin(model: str, models: Path, names: str, out: Path, *words: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "mlkit", "predict", model, "-", "--out", str(out), "--json"]
    command += [*words, "--set", f"paths.models={models}"]
    list_of_names = tempfile.TemporaryFile("w+")
    list_of_names.write(names)
    list_of_names.seek(0)
    return subprocess.Popen(command, stdin=list_of_names, stdout=subprocess.PIPE, text=True)


def end(process: subprocess.Popen, began: float) -> float:
    said = process.communicate()[0]
    if process.returncode:
        sys.exit(f"mlkit predict ended with {process.returncode}: {said or 'not a word'}")
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="digits", help="that `make demo` makes")
    parser.add_argument("--photographs", type=Path, default=SHARED / "data/clothing")
    parser.add_argument("--models", type=Path, default=Path("models"))
    parser.add_argument("--inputs", type=int, default=20_000)
    asked = parser.parse_args()
    files = photographs(asked.photographs)
    names = "\n".join(str(files[i % len(files)]) for i in range(asked.inputs))
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}
    )
    cluster.add_node(num_cpus=1)
    lost = cluster.add_node(num_cpus=1)
    with tempfile.TemporaryDirectory() as tmp:
        out, one, began = Path(tmp, "shards"), Path(tmp, "local.parquet"), time.perf_counter()
        words = ["--on", "ray", "--address", cluster.address, "--set", "ray.batch_inputs=256"]
        process = begin(asked.model, asked.models, names, out, *words)
        shards = -(-asked.inputs // 256)
        while process.poll() is None and len(list(out.glob("part-*.parquet"))) < shards // 2:
            time.sleep(0.05)
        if process.poll() is not None:
            sys.exit("it was over before a node could be killed")
        cluster.remove_node(lost, allow_graceful=False)
        print(f"killed a node of three after {shards // 2} of {shards} shards", flush=True)
        spent = end(process, began)
        cluster.shutdown()
        began = time.perf_counter()
        locally = end(begin(asked.model, asked.models, names, one), began)
        parts = [parquet.read_table(p) for p in sorted(out.glob("part-*.parquet"))]
        there, here = pyarrow.concat_tables(parts), parquet.read_table(one)
    same = there.equals(here)
    print(f"{there.num_rows} rows in {spent:.1f} s, locally in {locally:.1f} s; equal: {same}")
    sys.exit(not same)


if __name__ == "__main__":
    main()
