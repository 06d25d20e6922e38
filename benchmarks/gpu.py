"""mlkit on a GPU: whether it works at all, and how near it comes to what the device can do.

`python benchmarks/gpu.py [--minutes 8] [--parts works,training,…] [--photographs FOLDER] [--weights FILE] [--out FILE]`. Each part runs in a
process of its own, for its share of the minutes that are left, the most telling first; what it has found by then is kept. What cannot be measured here, for want of
time, a package or a file, is left out and said. `--device cpu` tries every step at toy sizes, where there is no GPU; its figures mean nothing.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
SHARED = HERE.parent.parent / "shared"
SHARES = {  # seconds of eight minutes, in the order of what they tell
    "works": 50,
    "training": 160,
    "serving": 110,
    "two": 50,
    "accuracy": 60,
    "demo": 60,
}


def rows_of(path: Path) -> list[dict]:
    "Return what a part has written down so far."
    lines = path.read_text().splitlines() if path.is_file() else []
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:  # the last one, of a part that was ended
            break
    return found


def said(row: dict) -> str:
    value = row["value"]
    if isinstance(value, float):
        value = f"{value:.3g}" if abs(value) < 10 else f"{value:.0f}"
    text = f"{row['what']} | {'—' if value is None else value} {row.get('unit') or ''}".rstrip()
    if row.get("bar"):
        text += f" | {row['bar']}: {'yes' if row['reached'] else 'NO'}"
    else:
        text += f" | {row.get('note') or ''}"
    return text


class Part:
    "A part in a process of its own, which gets ready while the one before it runs."

    def __init__(self, name: str):
        self.name, self.folder = name, tempfile.TemporaryDirectory()
        self.home = Path(self.folder.name)
        places = [str(HERE.parent), os.environ.get("PYTHONPATH")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, places))}
        self.log = open(self.home / "log", "w")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", str(HERE / "_gpu.py"), name],
            stdin=subprocess.PIPE,
            stdout=self.log,
            stderr=self.log,
            env=environment,
            cwd=self.home,
            start_new_session=True,
        )

    def run(self, seconds: float, args: argparse.Namespace, save) -> None:
        "Let it go on; `save` is called with its state whenever that has changed."
        found = self.home / "rows.jsonl"
        told = {
            "until": time.time() + seconds - 2,
            "rows": str(found),
            "device": args.device,
            "photographs": str(args.photographs.resolve()),
            "weights": str(args.weights.resolve()),
        }
        self.process.stdin.write(json.dumps(told).encode() + b"\n")
        self.process.stdin.close()
        part, began, shown = {"status": "runs", "seconds": 0.0, "rows": []}, time.monotonic(), 0
        try:
            while True:
                code = self.process.poll()
                part["rows"] = rows_of(found)
                for row in part["rows"][shown:]:
                    print(f"| {self.name} | {said(row)} |", flush=True)
                part["seconds"] = round(time.monotonic() - began, 1)
                if len(part["rows"]) > shown:
                    save(part)
                shown = len(part["rows"])
                if code is not None or part["seconds"] > seconds + 3:
                    break
                time.sleep(0.2)
        finally:
            end(self.process)
        part["status"] = (
            "done" if code == 0 else "out of time" if code is None else f"ended: {code}"
        )
        if code != 0:
            part["log"] = (self.home / "log").read_text(errors="replace")[-6000:]
        save(part)

    def close(self) -> None:
        end(self.process)
        self.log.close()
        self.folder.cleanup()


def end(process: subprocess.Popen) -> None:
    "End a part and all that it has started."
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def machine(device: str) -> dict:
    "Return what it is measured on."
    import platform

    import torch

    from mlkit.runs.record import environment

    found = environment() | {"torch": torch.__version__, "processor": platform.processor()}
    if device == "cuda":
        about = torch.cuda.get_device_properties(0)
        found |= {"gpu": about.name, "gpu_gib": round(about.total_memory / 2**30, 1)}
        found["capability"] = list(torch.cuda.get_device_capability(0))
        found["cuda"], found["cudnn"] = torch.version.cuda, torch.backends.cudnn.version()
    return found


def table(parts: dict[str, dict]) -> str:
    lines = ["| part | what | found | bar or note |", "|---|---|---|---|"]
    for name, part in parts.items():
        lines += [f"| {name} | {said(row)} |" for row in part["rows"]]
        lines.append(f"| {name} | **{part['status']}** | {part['seconds']:.0f} s | |")
    return "\n".join(lines)


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__)
    ask.add_argument("--minutes", type=float, default=8)
    ask.add_argument("--parts", default=",".join(SHARES), help=", ".join(SHARES))
    ask.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    ask.add_argument("--photographs", type=Path, default=SHARED / "data/clothing")
    ask.add_argument(
        "--weights", type=Path, default=SHARED / "weights/tf_efficientnet_lite0.safetensors"
    )
    ask.add_argument("--out", type=Path, default=Path("gpu.json"))
    args = ask.parse_args()
    began, names = time.monotonic(), args.parts.split(",")
    if wrong := [name for name in names if name not in SHARES]:
        sys.exit(f"no part {', '.join(wrong)}; there is: {', '.join(SHARES)}")
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("there is no GPU here; --device cpu tries the script at toy sizes")
    found = {"machine": machine(args.device), "parts": {}}
    print(json.dumps(found["machine"]), flush=True)

    def save(name: str, part: dict) -> None:
        found["parts"][name] = part
        kept = args.out.with_name(args.out.name + ".part")
        kept.write_text(json.dumps(found, indent=1))
        kept.replace(args.out)

    args.out.parent.mkdir(parents=True, exist_ok=True)
    ready = Part(names[0])
    for i, name in enumerate(names):
        part = ready
        ready = Part(names[i + 1]) if i + 1 < len(names) else None
        try:
            left = 60 * args.minutes - (time.monotonic() - began)
            seconds = left * SHARES[name] / sum(SHARES[n] for n in names[i:])
            part.run(seconds, args, lambda part, name=name: save(name, part))
        finally:
            part.close()
            if ready and sys.exc_info()[0]:
                ready.close()
    print(f"\n{table(found['parts'])}\n{time.monotonic() - began:.0f} s in all; {args.out}")


if __name__ == "__main__":
    main()
