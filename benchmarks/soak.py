"""One mlkit server under more than it can do: the same answers as alone, what careless callers cost, and minutes of 1.5 × capacity with bad inputs.

`python benchmarks/soak.py --photographs FOLDER [--learner FILE] [--minutes 30]`. Memory, statuses and times are printed as it goes.
"""

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

from _callers import call, request
from serving import CACHE, HERE, Server, mlkit_command, packed, trained

PORT = 8111
JSON = b"Content-Type: application/json\r\n"


def said(head: str, body: bytes = b"", *, host: str = "127.0.0.1") -> bytes:
    return (
        f"{head} HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n".encode()
        + JSON
        + b"\r\n"
        + body
    )


def bad_requests(photograph: bytes) -> dict[str, tuple[bytes, set[int]]]:
    "By name: what is sent, and what may come back."
    good = request("/v1/predict", photograph, PORT)
    bomb = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + (60000).to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0"
    return {
        "half a photograph": (
            request("/v1/predict", photograph[: len(photograph) // 2], PORT),
            {422},
        ),
        "an empty file": (request("/v1/predict", b"", PORT), {422}),
        "a text": (request("/v1/predict", b"hello" * 99, PORT), {415}),
        "a bomb": (request("/v1/predict", bomb, PORT), {413, 422}),
        "no JSON": (said("POST /v1/predict", b"{"), {400}),
        "deep JSON": (said("POST /v1/predict", b"[" * 100_000), {400}),
        "NaN": (said("POST /v1/predict", b'{"instances": NaN}'), {422}),
        "no such model": (good.replace(b"/v1/predict", b"/v1/models/none/predict"), {404}),
        "wrong method": (said("DELETE /v1/models"), {405}),
        "another host": (said("GET /v1/models", host="evil.example"), {400}),
        "not HTTP": (b"\x16\x03\x01\x02\0\r\n\r\n", {400}),
        "too large": (
            b"POST /v1/predict HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 99999999\r\n"
            + JSON
            + b"\r\n",
            {413},
        ),
        "gone": (good[:-100], {0}),
        "health": (said("GET /health/live"), {200}),
    }


async def ask(sent: bytes, *, leaves: bool = False) -> tuple[int, bytes]:
    "One request on a connection of its own: status and body; 0 when there was no answer."
    reader, writer = await asyncio.open_connection("127.0.0.1", PORT)
    try:
        writer.write(sent)
        if leaves:
            await asyncio.sleep(0.05)
            return 0, b""
        head = await reader.readuntil(b"\r\n\r\n")
        length = head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0]
        body = await reader.readexactly(int(length)) if length else await reader.read()
        return int(head[9:12]), body
    except (asyncio.IncompleteReadError, ConnectionError):
        return 0, b""
    finally:
        writer.close()


def resident(pid: int) -> float:
    "MiB."
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(s for s in lines if s.startswith("VmRSS")).split()[1]) / 1024


def apart(one: bytes, other: bytes) -> float:
    "The greatest difference of a probability."
    a, b = (json.loads(s)["predictions"][0]["probabilities"] for s in (one, other))
    return max(abs(a[k] - b[k]) for k in a)


async def soak(
    good: list[bytes], alone: list[bytes], bad, rate: float, seconds: float, pid: int
) -> None:
    statuses, wrong, took, differs = Counter(), Counter(), [], 0.0
    running: set[asyncio.Task] = set()
    chance = random.Random(1)

    async def one() -> None:
        nonlocal differs
        if chance.random() < 0.2:
            name = chance.choice(list(bad))
            sent, expected = bad[name]
            status, _ = await ask(sent, leaves=name == "gone")
            if status not in expected | {503}:
                wrong[f"{name}: {status}"] += 1
            return
        i = chance.randrange(len(good))
        began = time.perf_counter()
        status, body = await ask(good[i])
        statuses[status] += 1
        if status == 200:
            took.append(time.perf_counter() - began)
            differs = max(differs, apart(body, alone[i]))

    began, shown, base = time.perf_counter(), 0.0, resident(pid)
    next_ = began
    while (now := time.perf_counter()) < began + seconds:
        next_ += chance.expovariate(rate)
        await asyncio.sleep(max(0.0, next_ - now))
        task = asyncio.ensure_future(one())
        running.add(task)
        task.add_done_callback(running.discard)
        if now - shown > 60:
            shown = now
            print(
                f"{now - began:5.0f} s: {resident(pid):.0f} MiB, {dict(statuses)}, {len(running)} in flight",
                flush=True,
            )
    await asyncio.gather(*running)
    took.sort()
    print(
        f"\n{seconds:.0f} s of {rate:.0f} requests/s: {dict(statuses)}; unexpected: {dict(wrong)}"
    )
    print(
        f"accepted: {len(took) / seconds:.1f}/s, p50 {took[len(took) // 2]:.2f} s, p99 {took[int(0.99 * len(took))]:.2f} s; off by at most {differs:.1e}"
    )
    print(f"resident: {base:.0f} MiB before, {resident(pid):.0f} MiB after")


def main() -> None:
    ask_ = argparse.ArgumentParser(description=__doc__)
    ask_.add_argument(
        "--photographs", type=Path, default=HERE.parent.parent / "shared/data/clothing"
    )
    ask_.add_argument("--learner", type=Path, help="a fastai export; trained when it is not given")
    ask_.add_argument("--precision", default="fp32")
    ask_.add_argument("--minutes", type=float, default=1)
    ask_.add_argument("--answers", type=int, default=10_000)
    args = ask_.parse_args()
    if not args.photographs.is_dir():
        sys.exit(
            f"no photographs in {args.photographs}; give a folder of classes: --photographs FOLDER"
        )
    CACHE.mkdir(parents=True, exist_ok=True)
    files = sorted(args.photographs.rglob("*.jpg"))
    learner = args.learner or trained(args.photographs, "resnet18", None)
    with ExitStack() as stack:
        models = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        packed(learner, models, files[::3])
        server = Server("soak", mlkit_command(models, PORT, args.precision), PORT, "/v1/predict")
        stack.callback(server.end)
        photographs = [p.read_bytes() for p in files[:: max(1, len(files) // 64)]]
        server.wait(photographs[0])
        server.signal(18)
        good = [request("/v1/predict", p, PORT) for p in photographs]
        alone = [asyncio.run(ask(r))[1] for r in good]

        found = call(PORT, good, 64, 1e9, keep=True, most=args.answers)
        off = max(apart(body, alone[i]) for i, body in found.answers)
        labels = sum(
            json.loads(b)["predictions"][0]["label"]
            == json.loads(alone[i])["predictions"][0]["label"]
            for i, b in found.answers
        )
        print(
            f"{len(found.answers)} answers to 64 callers: {dict(found.statuses)}, {found.rate:.1f}/s, {labels} labels equal, off by at most {off:.1e}",
            flush=True,
        )

        careless = call(PORT, good, 512, 30)
        print(
            f"512 careless callers: {careless.rate:.1f}/s, {careless.rate / found.rate:.2f} of it, {dict(careless.statuses)}",
            flush=True,
        )
        asyncio.run(
            soak(
                good,
                alone,
                bad_requests(photographs[0]),
                1.5 * found.rate,
                60 * args.minutes,
                server.process.pid,
            )
        )


if __name__ == "__main__":
    main()
