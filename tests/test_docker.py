"""What can be known of the image without building it: its installation line, what that brings, and a server made of it."""

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import httpx
from conftest import ROOT, picture


# 40 s: an environment is made and installed into
def test_the_installation_line_of_the_image(models: Path, tmp_path: Path) -> None:
    text = (ROOT / "Dockerfile").read_text()
    source = tmp_path / "src"
    source.mkdir()
    for line in re.findall(r"^COPY (.+) /src/", text, re.M):
        for name in line.split():
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, source / name)
    (wanted,) = re.findall(r'pip install --no-cache-dir "/src(\S*)"', text)
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    install = [venv / "bin/python", "-m", "pip", "install", "-q", f"{source}{wanted}"]
    subprocess.run(install, check=True)
    there = {p.name.lower() for p in venv.glob("lib/python*/site-packages/*")}
    assert {"mlkit", "onnxruntime", "openvino"} <= there
    assert not {"torch", "fastai", "pandas", "nbdev", "papermill"} & there
    size = sum(p.lstat().st_size for p in venv.rglob("*") if not p.is_dir())
    print(f"{size / 1e6:.0f} MB")
    assert size < 500e6
    command = json.loads(re.search(r"^ENTRYPOINT (.+)", text, re.M)[1])
    healthy = json.loads(re.search(r"^HEALTHCHECK.+?CMD (\[.+?\])$", text, re.M | re.S)[1])
    process = subprocess.Popen(
        [venv / "bin" / command[0], *command[1:], "--port", "0"],
        env={"PATH": "", "MLKIT_PATHS__MODELS": str(models)},
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        port = re.search(r"http://0\.0\.0\.0:(\d+)", process.stdout.readline())[1]
        check = [venv / "bin" / healthy[0], *(a.replace("8000", port) for a in healthy[1:])]
        subprocess.run(check, check=True)
        address = f"http://127.0.0.1:{port}/v1/predict"
        sent = {"content": picture(fill="red"), "headers": {"content-type": "image/png"}}
        assert httpx.post(address, **sent).json()["predictions"][0]["label"] == "red"
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        process.stdout.close()
    assert subprocess.run(check, stderr=subprocess.DEVNULL).returncode != 0
