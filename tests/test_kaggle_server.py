"""The stand-in for Kaggle answers the unpatched official client, over a socket."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from kaggle_server import KEY, Standin

# what a person would type at the official client; it must never reach another address than the stand-in's
CLIENT = """
import json, sys, time
from pathlib import Path
from kaggle.api.kaggle_api_extended import KaggleApi
api = KaggleApi()
api.authenticate()
assert api.build_kaggle_client().http_client()._endpoint.startswith("http://localhost")
folder = Path(sys.argv[1])
api.dataset_create_new(str(folder / "data"), quiet=True)
while api.dataset_status("tester/some-data") != "ready":
    time.sleep(0.1)
pushed = api.kernels_push(str(folder / "kernel"))
while (status := api.kernels_status("tester/hello-there").status.name) not in ("COMPLETE", "ERROR"):
    time.sleep(0.2)
files, _ = api.kernels_output("tester/hello-there", str(folder / "out"), quiet=True)
print(json.dumps({"status": status, "version": pushed.version_number, "files": sorted(Path(f).name for f in files)}))
"""
CELLS = [
    "from pathlib import Path\nfound = [p.read_text() for p in Path('../input').rglob('a.txt')]",
    "import socket\ntry:\n    socket.create_connection(('127.0.0.1', PORT), 2)\n    net = True\nexcept OSError:\n    net = False",
    "import importlib.util, json, os\nown = importlib.util.find_spec('mlkit')\n"
    "Path('told.json').write_text(json.dumps([found, net, own is None, 'KAGGLE_KEY' in os.environ]))\nprint('said aloud')",
]


@pytest.mark.parametrize("internet", [False, True])
@pytest.mark.parametrize("layout", ["old", "new"])
def test_official_client_runs_a_notebook(layout: str, internet: bool, tmp_path: Path) -> None:
    with Standin(tmp_path / "site", cold=layout == "old") as site:
        site.layout = layout
        (tmp_path / "data").mkdir()
        (tmp_path / "data/a.txt").write_text("abc")
        about = {"id": "tester/some-data", "title": "some-data", "licenses": [{"name": "CC0-1.0"}]}
        (tmp_path / "data/dataset-metadata.json").write_text(json.dumps(about))
        cells = [
            {
                "cell_type": "code",
                "metadata": {},
                "outputs": [],
                "execution_count": None,
                "source": [c.replace("PORT", str(site.port))],
            }
            for c in CELLS
        ]
        spec = {"name": "python3", "language": "python", "display_name": "Python 3"}
        notebook = {
            "cells": cells,
            "metadata": {"kernelspec": spec},
            "nbformat": 4,
            "nbformat_minor": 4,
        }
        (tmp_path / "kernel").mkdir()
        (tmp_path / "kernel/a.ipynb").write_text(json.dumps(notebook))
        about = {"id": "tester/hello-there", "title": "hello-there", "code_file": "a.ipynb"}
        about |= {"language": "python", "kernel_type": "notebook", "enable_internet": internet}
        about |= {"dataset_sources": ["tester/some-data"]}
        (tmp_path / "kernel/kernel-metadata.json").write_text(json.dumps(about))
        clean = {k: v for k, v in os.environ.items() if k.lower() not in ("no_proxy", "http_proxy")}
        done = subprocess.run(
            [sys.executable, "-c", CLIENT, tmp_path],
            env=clean | site.variables | {"HOME": str(tmp_path), "TMPDIR": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        told = json.loads(done.stdout.splitlines()[-1])
        assert told["status"] == "COMPLETE", site.kernels
        assert told["version"] == 1 and told["files"] == ["hello-there.log", "told.json"]
        assert json.loads((tmp_path / "out/told.json").read_text()) == [
            ["abc"],
            internet,
            True,
            False,
        ]
        log = (tmp_path / "out/hello-there.log").read_text()
        assert any(line["data"] == "said aloud\n" for line in json.loads(log)) and KEY not in log
