"""The server's life: crowds, hangs, swaps, signals, workers, keys. Each test would fail without a defence."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import httpx
import numpy as np
import pytest
import warm
from conftest import SERVE, SLOW, SOFTMAX, Server, connect, head, make_bundle, picture
from tritonclient.http import InferenceServerClient, InferInput
from tritonclient.utils import InferenceServerException

from mlkit.bundle.registry import Registry
from mlkit.client import ApiError, Client
from mlkit.inference.engines import cores

RED, LIME = picture(fill="red"), picture(fill="lime")
PNG = {"content-type": "image/png"}
OTHER = "turned = Neg(mean)  p = Softmax<axis = 1>(turned)"  # red is the least likely of a red one
KEY = "a-key-of-these-tests"


ENDLESS = """
    turns = Constant<value = int64 {9000000000000000000}>()
    yes = Constant<value = bool {1}>()
    kept = Loop(turns, yes, mean) <body = turn (int64 i, bool go, float[n, 3] a) => (bool on, float[n, 3] b) {
        on = Identity(go)
        b = Neg(a)
    }>
    p = Softmax<axis = 1>(kept)"""
GREEDY = """
    shape = Constant<value = int64[1] {4000000000}>()
    zeros = ConstantOfShape(shape)
    more = ReduceMean(zeros)
    sum = Add(mean, more)
    p = Softmax<axis = 1>(sum)"""  # 16 GB of zeros
CRASH = """
import os, signal, onnxruntime
opened = onnxruntime.InferenceSession
def crash(graph, *args, **options):
    if b"crash_here" in graph:
        os.kill(os.getpid(), signal.SIGSEGV)
    return opened(graph, *args, **options)
onnxruntime.InferenceSession = crash
"""  # for every process that begins


def slow(turns: int) -> str:
    return SLOW.format(turns=turns)


def ask(server: Server, data: bytes = RED, **options) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/predict", content=data, headers=PNG, timeout=60, **options)


def until(holds: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


def unready(server: Server) -> str:
    return httpx.get(f"{server.url}/health/ready", timeout=60).text


def is_alive(server: Server) -> bool:
    try:
        return httpx.get(f"{server.url}/health/live", timeout=60).is_success
    except httpx.ConnectError:
        return False


def is_ready(server: Server) -> bool:
    return httpx.get(f"{server.url}/health/ready", timeout=60).is_success


def metric(server: Server, name: str) -> float:
    text = httpx.get(f"{server.url}/metrics", timeout=60).text
    return sum(float(v) for v in re.findall(rf"^{re.escape(name)} (\S+)$", text, re.M))


def point_at(registry: Registry, version: int) -> None:
    "Put a version in production as a hand would that goes around the registry's checks."
    pointer = registry.root / "color" / "production.json"
    other = pointer.with_suffix(".new")
    other.write_text(json.dumps(json.loads(pointer.read_text()) | {"current": version}))
    other.replace(pointer)


@contextmanager
def crowd(server: Server, callers: int = 6) -> Iterator[list[httpx.Response | Exception]]:
    "Callers who ask again and again, each time on a connection of its own, until the block ends."
    said, ended = [], threading.Event()

    def keep_asking() -> None:
        while not ended.is_set():
            try:
                said.append(ask(server))
            except httpx.ConnectError:  # nobody accepts: nothing was begun
                time.sleep(0.05)
            except Exception as e:
                said.append(e)

    with ThreadPoolExecutor(callers) as pool:
        for _ in range(callers):
            pool.submit(keep_asking)
        try:
            yield said
        finally:
            ended.set()


# ---------------------------------------------------------------- deadlines and sizes of a connection


def test_slow_and_endless_headers_are_cut_off(start: Callable) -> None:
    with start("api.header_seconds=1") as server, ExitStack() as stack:
        socks = [stack.enter_context(connect(server)) for _ in range(4)]
        silent, slow_one, again, endless = socks
        slow_one.sendall(b"GET /health/live HTTP/1.1\r\nHost: loc")
        again.sendall(head("/health/live", method="GET"))
        first = b""
        while not first.endswith(b"}"):  # head and body may come apart
            first += again.recv(65536)
        assert first.startswith(b"HTTP/1.1 200")
        again.sendall(b"GET /health/l")  # on a connection that has answered already
        endless.sendall(b"GET / HTTP/1.1\r\n")
        with pytest.raises(OSError):
            for i in range(100_000):
                endless.sendall(b"X-%06d: %s\r\n" % (i, b"x" * 1000))
        for sock in (silent, slow_one, again):
            assert ask(server).is_success  # others are not harmed
            assert sock.recv(1) == b""


def test_trailers_without_end_are_cut_off(start: Callable) -> None:
    with start() as server:
        for line in (b"X-n: a\r\n" * 2000, b"x" * 16_000):
            with connect(server) as sock:
                sock.sendall(head("/v1/predict", "Transfer-Encoding: chunked"))
                sock.sendall(b"5\r\nhello\r\n0\r\n" + (b"" if b"\n" in line else b"X: "))
                with pytest.raises(OSError):
                    for _ in range(10_000):
                        sock.sendall(line)
        assert ask(server).is_success


LAST = head("/health/live", "Connection: close", method="GET")


def answers_to(server: Server, *sent: bytes, pause: float = 0.0) -> list[bytes]:
    "The statuses on one connection, up to that of a last request, which asks for its end; without it where the server had closed."
    said = b""
    with connect(server) as sock:
        try:
            for part in (*sent, LAST):
                sock.sendall(part)
                time.sleep(pause)
        except OSError:  # it is closed already
            pass
        try:
            while block := sock.recv(65536):
                said += block
        except ConnectionResetError:
            pass
    return re.findall(rb"HTTP/1.1 (\d+)", said)


SMUGGLED = head("/health/live", method="GET")
UPGRADES = b"\r\nupgrade:x" * 3000


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/v1/models/none/predict", "Content-Type: image/png"),  # 404
        ("/v1/predict", "Content-Type: application/zip"),  # 415
        ("/health/live", "Content-Type: image/png"),  # 405
        ("/v1/predict?top_k=none", "Content-Type: image/png"),  # 422
        ("/v2/models/color/infer", "Content-Type: text/plain"),  # 415
    ],
)
@pytest.mark.parametrize("filling", [b"\r\nupgrade:x", b"\r\nUpgrade: h2c\r\n\r\n", b"\r\n\r\n"])
def test_a_body_that_comes_late_is_answered_once(
    path: str, kind: str, filling: bytes, server: Server
) -> None:
    # whatever is read of it beyond its length would be a request that nobody has sent
    body = filling * 3000 + SMUGGLED
    sent = head(path, kind, f"Content-Length: {len(body)}")
    late = answers_to(server, sent, body[:20_000], body[20_000:], pause=0.5)
    at_once = answers_to(server, sent + body)
    assert len(late) == 1 and late[0][:1] == at_once[0][:1] == b"4"
    assert at_once[1:] in ([], [b"200"])  # the last request's, where all of the body was read


def test_a_connection_is_kept_only_behind_the_whole_body(server: Server) -> None:
    kind, size = "Content-Type: image/png", "Content-Length: 30000"
    refused, ask = head("/v1/models/none/predict", kind, size), head("/health/live", method="GET")
    assert answers_to(server, refused + bytes(30_000) + ask) == [b"404", b"200", b"200"]
    assert answers_to(server, refused, bytes(30_000), ask, pause=0.05) == [b"404", b"200", b"200"]
    with connect(server) as sock:
        sock.sendall(refused)
        said = sock.recv(65536)
        assert said.startswith(b"HTTP/1.1 404") and b"connection: close" in said
        sock.sendall(bytes(30_000) + ask)
        while block := sock.recv(65536):
            said += block
    assert said.count(b"HTTP/1.1") == 1


@pytest.mark.parametrize("step", [1, 3, 1 << 20])
def test_an_offer_to_upgrade_is_declined_and_what_follows_it_is_read(
    step: int, server: Server
) -> None:
    offer = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAEA")
    size, kind = f"Content-Length: {len(RED)}", "Content-Type: image/png"
    chunked = b"%x\r\n%b\r\n0\r\n\r\n" % (len(RED), RED)
    sent = head("/v1/predict", *offer, kind, size) + RED
    sent += head("/health/live", *offer, method="GET")
    sent += head("/v1/predict", kind, *offer, "Transfer-Encoding: chunked") + chunked
    sent += head("/v1/models/none", *offer, method="GET") + head("/v1/predict", kind, size) + RED
    parts = [sent[i : i + step] for i in range(0, len(sent), step)]
    assert answers_to(server, *parts) == [b"200", b"200", b"200", b"404", b"200", b"200"]


def test_no_tunnel_is_dug(server: Server) -> None:
    sent = head("localhost:1", method="CONNECT") + SMUGGLED
    assert answers_to(server, sent) == [b"400"]


def test_heads_that_clients_and_crooks_send(server: Server) -> None:
    size, kind = f"Content-Length: {len(RED)}", "Content-Type: image/png"
    upgrade = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAEA")
    cases = [
        (head("/v1/predict", *upgrade, kind, size) + RED, b"200"),  # Java's own client
        (head("/v1/predict", kind, "Content-Length: " + "0" * 5000 + "9"), b"413"),
        (head("/health/live", "Host: evil.example", method="GET"), b"400"),
        (b"GET /health/live HTTP/1.0\r\n\r\n", b"200"),
        (b"GET /health/live HTTP/1.1\r\n\r\n", b"400"),
        (
            head("/v1/predict", kind, size, "Content-Encoding: identity", "Content-Encoding: gzip"),
            b"415",
        ),
        (
            head("/v2/models/color/infer", "Content-Type: text/plain", "Content-Length: 2") + b"{}",
            b"415",
        ),
    ]
    for sent, status in cases:
        with connect(server) as sock:
            sock.sendall(sent)
            assert sock.recv(65536).split()[1] == status, sent[:200]


def test_who_does_not_read_is_not_waited_for(start: Callable) -> None:
    program = "import mlkit.api.connection as c; c._UNREAD = 3\n" + SERVE
    with start(program=program) as server, connect(server) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.sendall(head("/openapi.json", method="GET") * 1000)
        until(
            lambda: metric(server, "mlkit_in_flight") == 2
        )  # and the one that asks for the metrics
        until(lambda: metric(server, "mlkit_in_flight") == 1)


# ---------------------------------------------------------------- crowds


def test_the_excess_is_told_to_come_again(start: Callable, model_of: Callable) -> None:
    root = model_of(slow(400_000)).root
    with start("api.queue=4", "api.engine=onnxruntime", root=root) as server:
        with ThreadPoolExecutor(24) as pool:
            said = list(pool.map(lambda _: ask(server), range(24)))
        kinds = Counter(r.status_code for r in said)
        assert set(kinds) == {200, 503} and kinds[200] >= 4, kinds
        for r in said:
            if r.status_code == 503:
                assert int(r.headers["retry-after"]) >= 1
                assert "waiting already; come again in" in r.json()["detail"]
        assert metric(server, 'mlkit_rejected_total{reason="queue"}') == kinds[503]
        with Client(server.url, timeout=60, retries=9) as client, ThreadPoolExecutor(12) as pool:
            done = list(pool.map(lambda _: client.predict(RED)[0]["label"], range(12)))
        assert done == ["red"] * 12  # the client comes again


def test_bodies_have_a_budget_together(start: Callable) -> None:
    large = picture("RGB", (1, 1)) + bytes(700_000)
    with start("api.queue_mb=1") as server:
        with connect(server) as holds:
            holds.sendall(head("/v1/predict", "Content-Type: image/png", "Content-Length: 900000"))
            until(lambda: metric(server, "mlkit_in_flight") > 1)
            assert ask(server, large).is_success  # a word holds nothing
            holds.sendall(bytes(800_000))
            until(lambda: ask(server, large).status_code == 503)
            assert "MiB of requests are held" in ask(server, large).json()["detail"]
            assert ask(server).is_success  # there is room for a small one
        until(lambda: ask(server, large).is_success)


def test_what_takes_too_long_keeps_its_place_until_it_ends(
    start: Callable, model_of: Callable
) -> None:
    settings = ("api.predict_seconds=0.5", "api.queue=1", "api.engine=onnxruntime")
    with start(*settings, root=model_of(slow(20_000_000)).root) as server:
        assert "no answer within 0.5 s" in ask(server).json()["detail"]
        assert ask(server, LIME).status_code == 503  # it is still being computed
        until(lambda: ask(server, LIME).is_success)


COUNTS = """
from mlkit.inference.predictor import Predictor
finite = Predictor._finite
def count(self, out):
    with open("computed", "a") as f:
        f.write("." * len(out))
    return finite(self, out)
Predictor._finite = count
"""


def test_callers_who_left_are_not_computed(
    start: Callable, model_of: Callable, tmp_path: Path
) -> None:
    # of thirty for each core, eight have begun when they leave
    callers = 30 * cores()
    root, computed = model_of(slow(1_000_000)).root, tmp_path / "computed"
    settings = ("api.engine=onnxruntime", "api.predict_seconds=60", "api.queue=100000")
    with start(*settings, root=root, program=COUNTS + SERVE) as server:
        before = computed.stat().st_size
        socks = [connect(server) for _ in range(callers)]
        for sock in socks:
            size = f"Content-Length: {len(RED)}"
            sock.sendall(head("/v1/predict", "Content-Type: image/png", size) + RED)
        until(lambda: metric(server, "mlkit_in_flight") > callers)
        for sock in socks:
            sock.close()
        assert ask(server, LIME).is_success
        until(lambda: metric(server, "mlkit_in_flight") < 2)
        assert ask(server).is_success
        assert computed.stat().st_size - before < 20 * cores()
        gone = [line for line in server.lines() if line["status"] == 0]
        assert len(gone) == callers and "Traceback" not in server.log.read_text()


def test_a_stuck_engine_is_told_of_and_replaced(start: Callable, model_of: Callable) -> None:
    settings = ("api.predict_seconds=1", "api.watch_seconds=2", "api.engine=onnxruntime")
    with start(*settings, root=model_of(slow(2_000_000_000)).root) as server:
        assert ask(server).status_code == 504
        until(lambda: "hangs since" in unready(server))
        until(lambda: is_ready(server))
        assert ask(server, LIME).json()["predictions"][0]["label"] == "green"
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(25) == 0


HANGS = """
import time
from mlkit.inference.vision import ImageReader
read = ImageReader.read
def hang(self, data, **how):
    return time.sleep(100) if data.endswith(b"hang") else read(self, data, **how)
ImageReader.read = hang
"""


def test_a_reading_that_hangs_is_told_of_and_left_behind(start: Callable) -> None:
    settings = ("api.predict_seconds=1", "api.watch_seconds=0.5")
    with start(*settings, program=HANGS + SERVE) as server:
        with ThreadPoolExecutor(8) as pool:
            kinds = set(pool.map(lambda _: ask(server, RED + b"hang").status_code, range(8)))
        assert kinds <= {503, 504}
        until(lambda: "replaced" in unready(server) or is_ready(server))
        until(lambda: ask(server, LIME).is_success)
        assert "hangs; it is loaded anew" in server.log.read_text()


HOSTILE = {
    "v1": ("/v1/models/text-label/predict", b'{"instances": [{%b, "k": 1, "k": 2}]}'),
    "v2": ("/v2/models/text-label/infer", b'{"id": "a", "inputs": [], %b, "k": 1, "k": 2}'),
}


def keys(length: int) -> bytes:
    "Members of an object, each under a key of its own, in about so many bytes."
    return b", ".join(b'"%07d": 1' % i for i in range(length // 14))


@pytest.mark.parametrize("way", HOSTILE)
@pytest.mark.parametrize("length", [255_000, 1_600_000, 16_000_000])
def test_a_key_that_is_there_twice_behind_many_holds_nobody_up(
    way: str, length: int, all_kinds: Server
) -> None:
    path, form = HOSTILE[way]
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(
            httpx.post,
            all_kinds.url + path,
            content=form % keys(length),
            headers={"content-type": "application/json"},
            timeout=60,
        )
        while not asked.done():  # beside it others are answered
            assert httpx.get(f"{all_kinds.url}/health/live", timeout=5).is_success
        told = "'k' is there twice" if length < 300_000 else "more beside them"
        assert told in asked.result().json()["detail"]


READING_HANGS = """
import time
import mlkit.api.body as intake
parsed = intake.parsed
intake.parsed = lambda body: time.sleep(100) if b"hang" in body else parsed(body)
"""


def test_a_body_that_cannot_be_taken_apart_in_time_is_504_and_the_end_is_in_time(
    start: Callable,
) -> None:
    body = json.dumps({"instances": [{"b64": "hang" * 8000}]}).encode()
    with start("api.predict_seconds=1", program=READING_HANGS + SERVE) as server:
        with ThreadPoolExecutor(6) as pool:
            kind = {"content-type": "application/json"}
            said = [
                pool.submit(
                    httpx.post, f"{server.url}/v1/predict", content=body, headers=kind, timeout=60
                )
                for _ in range(6)
            ]
            until(lambda: all(one.done() or is_alive(server) for one in said))
            assert {one.result().status_code for one in said} == {504}
        assert "taken apart within 1 s" in said[0].result().json()["detail"]
        large = picture("RGB", (1, 1)) + bytes(200_000)
        assert ask(server, large).is_success  # what is no JSON is not behind them
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(20) == 0


def test_a_load_that_hangs_does_not_outlast_the_end(start: Callable, models: Path) -> None:
    hangs = "import time, mlkit.api.connection as c, mlkit.api.model_host as h\nc._GRACE = 2\n"
    hangs += (
        "h.LocalLoader.hold = lambda *a: print('http://nobody', flush=True) or time.sleep(100)\n"
    )
    with start(program=hangs + SERVE) as server:
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(10) == 0


def test_alive_while_it_loads(models: Path, tmp_path: Path) -> None:
    slowly = "import time, mlkit.api.model_host as h; hold = h.LocalLoader.hold\n"
    slowly += "h.LocalLoader.hold = lambda *a: time.sleep(3) or hold(*a)\n"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", slowly + SERVE, f"paths.models={models}", f"api.port={port}"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = warm.Popen(command, kind="light", **quiet)
    server = Server(f"http://127.0.0.1:{port}", process, tmp_path)
    try:
        with Client(server.url) as client:
            until(lambda: is_alive(server))
            assert "color is being loaded" in unready(server)
            client.wait_ready()
            assert client.predict(RED)[0]["label"] == "red"
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


# ---------------------------------------------------------------- versions


def test_no_request_fails_while_versions_are_swapped(start: Callable, model_of: Callable) -> None:
    registry = model_of(SOFTMAX)
    second = registry.add(make_bundle(registry.root.parent / "two", OTHER), name="color")
    with start("api.watch_seconds=0.1", root=registry.root) as server, crowd(server) as said:
        for ref, version in [(second.ref, 2), ("", 1), (second.ref, 2)] * 2:
            if ref:
                registry.promote(ref)
            else:
                registry.rollback("color")
            until(lambda v=version: ask(server).json()["version"] == v)
    answers = [r.json() for r in said]
    assert {r.status_code for r in said} == {200} and {a["version"] for a in answers} == {1, 2}
    for a in answers:
        assert (a["predictions"][0]["label"] == "red") == (a["version"] == 1), a


def test_a_version_that_cannot_be_taken_in_is_named(start: Callable, model_of: Callable) -> None:
    registry = model_of(SOFTMAX)
    bad = registry.add(make_bundle(registry.root.parent / "two", OTHER), name="color")
    registry.promote(bad.ref)
    registry.rollback("color")
    graph = bad.path / "model.onnx"
    graph.write_bytes(graph.read_bytes()[:-1] + b"?")
    with start("api.watch_seconds=0.1", root=registry.root) as server, crowd(server) as said:
        point_at(registry, 2)
        troubles = lambda: httpx.get(f"{server.url}/health/ready").json()["troubles"]  # noqa: E731
        until(troubles)
        assert "color@2 was not taken in: model.onnx" in troubles()[0]
        assert metric(server, 'mlkit_swaps_total{model="color",outcome="refused"}') == 1
        assert "color@2 was not taken in" in server.log.read_text()
    assert {(r.status_code, r.json()["version"]) for r in said} == {(200, 1)}


def test_a_version_that_is_asked_for_is_the_one_that_answers(
    start: Callable, model_of: Callable
) -> None:
    registry = model_of(SOFTMAX)
    second = registry.add(make_bundle(registry.root.parent / "two", OTHER), name="color")
    with start("api.watch_seconds=0.1", root=registry.root) as server, connect(server) as sock:
        size = f"Content-Length: {len(RED)}"
        sock.sendall(head("/v1/models/color@1/predict", "Content-Type: image/png", size))
        until(lambda: metric(server, "mlkit_in_flight") > 1)
        registry.promote(second.ref)
        until(lambda: ask(server).json()["version"] == 2)
        sock.sendall(RED)
        answer = b""
        while b"request_id" not in answer:
            answer += sock.recv(65536)
        assert b" 404 " in answer and b"color is now color@2" in answer


def test_models_are_loaded_when_asked_for_within_the_memory(
    start: Callable, tmp_path: Path
) -> None:
    weight = "w = Constant<value = float[300000] {{{values}}}>()  s = ReduceSum<keepdims = 0>(w)"
    body = weight.format(values=", ".join(["0.0"] * 300_000))
    registry = Registry(tmp_path / "models")
    for name in ("a", "b", "c"):
        graph = f"{body} more = Add(mean, s) p = Softmax<axis = 1>(more)"
        registry.promote(registry.add(make_bundle(tmp_path / name, graph, name), name=name).ref)
    with start("api.memory_mb=5", "api.watch_seconds=0.2", root=registry.root) as server:

        def loaded() -> list[str]:
            models = httpx.get(f"{server.url}/v1/models").json()["models"]
            return [m["name"] for m in models if m["loaded"]]

        assert loaded() == ["a", "b"]
        for name, left in (("c", ["a", "c"]), ("b", ["a", "b"]), ("a", ["a", "b"])):
            r = httpx.post(
                f"{server.url}/v1/models/{name}/predict", content=RED, headers=PNG, timeout=60
            )
            assert r.is_success and r.json()["model"] == name, r.text
            assert loaded() == left


# ---------------------------------------------------------------- the end


@pytest.mark.parametrize("workers", [1, 2])
def test_a_server_that_ends_answers_all_it_accepted(workers: int, start: Callable) -> None:
    with start(f"api.processes={workers}", "api.drain_seconds=6") as server:
        with crowd(server) as said:
            until(lambda: len(said) > 50)
            server.process.send_signal(signal.SIGTERM)
            until(lambda: "the server is ending" in unready(server))
            so_far = len(said)
            # accepting goes on: whoever looks at the readiness has time to leave
            until(lambda: len(said) > so_far + 20, 5)
        assert server.process.wait(20) == 0
        assert {getattr(r, "status_code", r) for r in said} == {200}
        assert "Traceback" not in server.log.read_text()


def test_nobody_is_left_standing_at_the_door(start: Callable) -> None:
    with start() as server:
        said, ended = [], threading.Event()

        def keep_asking() -> None:
            while not ended.is_set():
                try:
                    said.append(httpx.get(f"{server.url}/health/live", timeout=60).status_code)
                except httpx.ConnectError:  # refused, not reset
                    return
                except Exception as e:
                    said.append(e)

        with ThreadPoolExecutor(24) as pool:
            for _ in range(24):
                pool.submit(keep_asking)
            until(lambda: len(said) > 100)
            server.process.send_signal(signal.SIGTERM)
            server.process.wait(20)
            ended.set()
    assert Counter(map(str, said)).keys() == {"200"}


def test_a_connection_that_is_kept_is_closed_in_time(start: Callable) -> None:
    with start() as server, httpx.Client(base_url=server.url) as http:
        assert "connection" not in http.get("/health/live").headers
        server.process.send_signal(signal.SIGTERM)
        until(lambda: http.get("/health/ready").status_code == 503)
        assert http.get("/health/live").headers["connection"] == "close"


@pytest.mark.parametrize("workers", [1, 2])
def test_a_second_signal_ends_it(workers: int, start: Callable, model_of: Callable) -> None:
    root = model_of(slow(2_000_000_000)).root
    settings = ("api.engine=onnxruntime", "api.predict_seconds=100", f"api.processes={workers}")
    with start(*settings, root=root) as server, ThreadPoolExecutor(1) as pool:
        begun = pool.submit(ask, server)
        until(lambda: metric(server, "mlkit_in_flight") > 1)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(1)
        assert server.process.poll() is None  # it waits for what has begun
        server.process.send_signal(signal.SIGTERM)
        server.process.wait(10)
        begun.exception(60)


# ---------------------------------------------------------------- workers


def children(pid: int) -> list[int]:
    # of the workers, not of the tracker of resources that Python starts beside them
    said = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(c) for c in said if b"spawn_main" in Path(f"/proc/{c}/cmdline").read_bytes()]


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="processes are looked up in /proc")
def test_a_killed_worker_is_replaced_and_counted_on(start: Callable) -> None:
    with start("api.processes=2") as server:
        until(lambda: metric(server, "mlkit_ready") == 2)
        for _ in range(20):
            assert ask(server).is_success
        served = 'mlkit_requests_total{model="color",route="/v1/predict",status="200"}'
        until(lambda: metric(server, served) == 20)  # counted a moment after the answer
        before = children(server.process.pid)
        with crowd(server, 4) as said:
            until(lambda: len(said) > 20)
            os.kill(before[0], signal.SIGKILL)
            until(lambda: len(set(children(server.process.pid)) - {before[0]}) == 2)
            until(lambda: metric(server, "mlkit_ready") == 2)
            so_far = len(said)
            until(lambda: len(said) > so_far + 50)
        lost = [r for r in said if isinstance(r, Exception)]
        assert len(lost) <= 4  # what that worker had begun
        assert {r.status_code for r in said if r not in lost} == {200}
        assert not [r for r in said[so_far:] if r in lost]
        assert metric(server, served) >= 20 + len(said) - len(lost)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="processes are looked up in /proc")
def test_workers_that_cannot_start_do_not_end_those_that_serve(
    start: Callable, model_of: Callable
) -> None:
    registry = model_of(SOFTMAX)
    bad = registry.add(make_bundle(registry.root.parent / "two", OTHER), name="color")
    with start("api.processes=2", "api.watch_seconds=0.2", root=registry.root) as server:
        until(lambda: metric(server, "mlkit_ready") == 2)
        registry.promote(bad.ref)
        registry.rollback("color")
        graph = bad.path / "model.onnx"
        graph.write_bytes(graph.read_bytes()[:-1] + b"?")
        point_at(registry, 2)
        os.kill(children(server.process.pid)[0], signal.SIGKILL)
        until(lambda: server.log.read_text().count("model.onnx was altered") >= 2)
        assert ask(server).json()["version"] == 1 and server.process.poll() is None


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="processes are looked up in /proc")
def test_workers_do_not_outlive_their_parent(start: Callable) -> None:
    with start("api.processes=2") as server:
        until(lambda: metric(server, "mlkit_ready") == 2)
        workers = children(server.process.pid)
        assert len(workers) == 2
        server.process.kill()
        until(lambda: not any(Path(f"/proc/{w}/cmdline").exists() for w in workers))


# ---------------------------------------------------------------- who may ask


def test_keys(start: Callable, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(f"# of the tests\n{KEY}\nanother-key-of-these-tests\n")
    with start(f"api.keys_file={tmp_path / 'keys'}", "api.metrics=key") as server:
        for path in ("/v1/models", "/metrics", "/openapi.json", "/v2", "/nothing"):
            none = httpx.get(server.url + path)
            assert none.status_code == 401 and none.headers["www-authenticate"] == "Bearer"
            wrong = httpx.get(server.url + path, headers={"x-api-key": KEY + "s"})
            assert wrong.status_code == 403 and KEY not in wrong.text
        for headers in ({"x-api-key": KEY}, {"authorization": f"Bearer {KEY}"}):
            assert httpx.get(f"{server.url}/v1/models", headers=headers).is_success
        for path in ("/health/ready", "/health/live", "/v2/health/ready", "/v2/health/live"):
            assert httpx.get(server.url + path).is_success
        with Client(server.url, key=KEY) as client:
            assert client.predict([RED, LIME])[1]["label"] == "green"
        with Client(server.url) as client, pytest.raises(ApiError, match="a key is needed"):
            client.predict(RED)
        assert KEY not in server.log.read_text()
        assert KEY not in Path(f"/proc/{server.process.pid}/cmdline").read_text()


def test_keys_of_the_environment(start: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLKIT_API_KEYS", KEY)
    with start() as server:
        assert httpx.get(f"{server.url}/v1/models").status_code == 401
        assert httpx.get(f"{server.url}/v1/models", headers={"x-api-key": KEY}).is_success


def test_pages_of_named_origins_may_call(
    server: Server, start: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, allowed = {"origin": "https://page.example"}, "access-control-allow-origin"
    for sent in (mine, {"sec-fetch-site": "cross-site"}):  # a page of elsewhere
        for path in ("/v1/predict", "/v2/models/color/infer", "/v1/models"):
            r = httpx.request(
                "GET" if path.endswith("ls") else "POST", server.url + path, headers=sent
            )
            assert r.status_code == 403 and allowed not in r.headers, (path, r.text)
            assert "api.cors" in r.json()["detail"]
    own = {"origin": server.url, "content-type": "image/png"}
    assert httpx.post(f"{server.url}/v1/predict", headers=own, content=picture()).is_success
    monkeypatch.setenv("MLKIT_API_KEYS", "sixteen-characters-and-more")
    asked = {"access-control-request-method": "POST"}
    asked["access-control-request-headers"] = "authorization,content-type"
    with start("api.cors=https://page.example") as other:
        address = f"{other.url}/v1/predict"
        r = httpx.options(address, headers=mine | asked)  # a browser sends no key with it
        assert r.status_code == 200 and r.headers[allowed] == mine["origin"]
        assert "authorization" in r.headers["access-control-allow-headers"]
        for key, status in (("sixteen-characters-and-more", 200), ("", 401), ("wrong" * 4, 403)):
            sent = mine | {"x-api-key": key, "content-type": "image/png"}
            r = httpx.post(address, headers=sent, content=picture())
            assert r.status_code == status and r.headers[allowed] == mine["origin"]
        evil = {"origin": "https://evil.example"}
        assert allowed not in httpx.get(f"{other.url}/health/live", headers=evil).headers
        r = httpx.options(address, headers=evil | asked)
        assert r.headers["content-type"] == "application/problem+json" and r.status_code == 400


def test_names_and_docs(server: Server, start: Callable) -> None:
    r = httpx.get(f"{server.url}/v1/models", headers={"host": "evil.example"})
    assert r.status_code == 400 and "api.hosts" in r.json()["detail"]
    with start("api.hosts=models.example", "api.docs=false", "api.metrics=off") as other:
        assert httpx.get(f"{other.url}/v1/models", headers={"host": "models.example"}).is_success
        for path in ("/docs", "/openapi.json", "/metrics", "/redoc"):
            assert httpx.get(other.url + path).status_code == 404
    for path in ("/docs", "/openapi.json", "/metrics"):
        assert httpx.get(server.url + path).is_success


# ---------------------------------------------------------------- what it never does

TRAPS = """
import pickle, socket, sys, types
def trap(*args, **kwargs):
    print("a trap went off", file=sys.stderr, flush=True)
    raise SystemExit(9)
pickle.load = pickle.loads = pickle.Unpickler = pickle._Unpickler = trap
sys.modules["torch"] = types.SimpleNamespace(load=trap, jit=types.SimpleNamespace(load=trap))
socket.socket.connect = socket.socket.connect_ex = trap
"""


def test_it_opens_no_pickle_and_calls_nobody(models: Path, start: Callable, server: Server) -> None:
    with start(program=TRAPS + SERVE, cold=True) as trapped:
        evil = b"cos\nsystem\n(S'true'\ntR."
        for data, status in ((RED, 200), (evil, 415), (b"\x80\x04\x95" + evil, 415)):
            assert ask(trapped, data).status_code == status
        for body in (
            {"instances": [{"url": f"{server.url}/v1/models"}]},
            {"instances": [{"b64": f"{server.url}/v1/models"}]},
            {
                "inputs": [
                    {"name": "image", "shape": [1], "datatype": "BYTES", "data": ["file:///"]}
                ]
            },
        ):
            path = "/v2/models/color/infer" if "inputs" in body else "/v1/predict"
            r = httpx.post(trapped.url + path, json=body)
            assert r.status_code in (400, 415, 422), r.text
        for path in ("/", "/v1/models", "/metrics", "/v2/models/color", "/openapi.json"):
            assert httpx.get(trapped.url + path).is_success
        assert "a trap" not in trapped.log.read_text()
        (trapped.log.parent / "probe").write_bytes(evil)
    program = TRAPS + "import pickle; pickle.loads(b'')"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True).returncode == 9


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a disk that is always full")
def test_a_full_disk_stops_only_the_log(start: Callable) -> None:
    with start(log="/dev/full") as server:
        for _ in range(30):
            assert ask(server).is_success
        assert ask(server, b"text").status_code == 415 and is_ready(server)


def memory(server: Server, kind: str) -> float:
    "MiB of the server's process, VmRSS now or VmHWM at the most."
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(re.search(rf"{kind}:\s+(\d+)", status)[1]) / 1024


def test_requests_that_wait_for_their_turn_stay_bytes(start: Callable) -> None:
    one = head("/health/live", method="GET")
    with start(cold=True) as server, ExitStack() as stack:
        baseline = memory(server, "VmRSS")
        callers = [stack.enter_context(connect(server)) for _ in range(20)]
        for caller in callers:
            caller.sendall(one * 4000)
        assert is_ready(server)
        assert memory(server, "VmHWM") < baseline + 100
        read = callers[0].makefile("rb")
        for _ in range(300):
            assert read.readline() == b"HTTP/1.1 200 OK\r\n"
            length = 0
            while (line := read.readline()) != b"\r\n":
                length = int(line[16:]) if line.startswith(b"content-length: ") else length
            assert json.loads(read.read(length)) == {"status": "live"}


@pytest.mark.parametrize("broken", [b"G\0T / HTTP/1.1\r\n\r\n", head("x:1", method="CONNECT")])
def test_what_cannot_be_read_is_refused_in_its_turn(server: Server, broken: bytes) -> None:
    data, asked = picture(), head("/v1/predict", "content-type: image/png", "content-length: {}")
    good = asked.replace(b"{}", str(len(data)).encode()) + data
    begun = head("/v1/predict", "content-type: image/png", "transfer-encoding: chunked") + b"zz\r\n"
    for sent, expected in ((good + broken, [200, 400]), (2 * good + begun, [200, 200, 400])):
        with connect(server) as caller:
            caller.sendall(sent)
            said = b"".join(iter(lambda c=caller: c.recv(65536), b""))
        assert [int(m) for m in re.findall(rb"HTTP/1.1 (\d+) ", said)] == expected


GEMS = [{"carat": 1.0, "cut": "Ideal", "round": True}, {"carat": "x"}, {"carat": 0.5, "cat": 1}]


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (2, 1, 0)])
def test_one_bad_input_costs_the_others_nothing(order: tuple, all_kinds: Server) -> None:
    url, rows = f"{all_kinds.url}/v1/models/table-numbers/predict", [GEMS[i] for i in order]
    said = httpx.post(url, json={"instances": rows}).raise_for_status().json()["predictions"]
    alone = httpx.post(url, json={"instances": [GEMS[0]]}).json()["predictions"]
    for place, i in enumerate(order):
        if i == 0:
            assert said[place] == alone[0]
            continue
        assert f"instances.{place}" in said[place]["error"]["detail"]
        assert said[place]["error"].keys() == {"type", "title", "detail"}
    for strict in (rows, [GEMS[1]], GEMS[1:]):  # none is answered, or all are wanted
        params = {"strict": "true"} if strict is rows else {}
        r = httpx.post(url, json={"instances": strict}, params=params)
        assert r.status_code == 422 and "instances." in r.json()["detail"], r.text
    tensor = {"name": "row", "shape": [3], "datatype": "BYTES", "data": list(map(json.dumps, GEMS))}
    v2 = f"{all_kinds.url}/v2/models/table-numbers/infer"
    r = httpx.post(v2, json={"inputs": [tensor]})  # all or nothing, and each is named
    assert r.status_code == 422 and "inputs.0.1" in r.text and "inputs.0.2" in r.text


def test_a_request_may_bring_its_own_threshold(all_kinds: Server) -> None:
    url, red = f"{all_kinds.url}/v1/models/image-labels/predict", picture(fill=(255, 120, 0))
    with Client(all_kinds.url, model="image-labels") as client:
        odds = client.predict(red)[0]["probabilities"]
        for threshold in (0.0, 0.55, 0.65, 1.0):
            expected = [name for name, p in odds.items() if p >= threshold]
            assert client.predict(red, threshold=threshold)[0]["labels"] == expected, odds
    for params, said in (
        ({"threshold": 2}, "threshold"),
        ({"treshold": 0.5}, "did you mean 'threshold'"),
    ):
        r = httpx.post(url, content=red, headers=PNG, params=params)
        assert r.status_code == 422 and said in r.json()["detail"]
    r = httpx.post(
        url.replace("labels", "label"), content=red, headers=PNG, params={"threshold": 0.5}
    )
    assert r.status_code == 422 and "several labels" in r.json()["detail"]


# 2 s each beside the trial itself: the old version is asked all the time
@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("crash", "SIGSEGV"),
        ("hang", "within 3 s"),
        ("names", "model.onnx"),
        ("memory", "no engine here"),
    ],
)
def test_a_version_that_harms_is_not_let_in(
    what: str, said: str, start: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = Registry(tmp_path / "models")
    registry.promote(registry.add(make_bundle(tmp_path / "one"), name="color").ref)
    crash = "crash_here = Identity(mean)  p = Softmax<axis = 1>(crash_here)"
    graphs = {"memory": GREEDY, "hang": ENDLESS, "crash": crash}
    graph = graphs.get(what, SOFTMAX)
    vocab = {"vocab": ("red", "green", "blue", "grey")} if what == "names" else {}
    bad = registry.add(make_bundle(tmp_path / "two", graph, **vocab), name="color")
    if what == "crash":  # of the engine, in whatever process opens that graph
        (tmp_path / "crash").mkdir()
        (tmp_path / "crash/sitecustomize.py").write_text(CRASH)
        monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'crash'}:{os.environ.get('PYTHONPATH', '')}")
    seconds = 3 if what == "hang" else 60
    with start(f"api.load_seconds={seconds}", root=registry.root, cold=True) as server:
        assert ask(server).is_success
        registry.promote(bad.ref)
        until(lambda: httpx.get(f"{server.url}/health/ready").json().get("troubles"))
        r = httpx.get(f"{server.url}/health/ready")
        assert r.is_success and said in r.json()["troubles"][0], r.text
        assert ask(server).json()["version"] == 1
        registry.promote("color@1")
        until(lambda: not httpx.get(f"{server.url}/health/ready").json()["troubles"])


def test_one_broken_model_takes_no_other_along(start: Callable, tmp_path: Path) -> None:
    registry = Registry(tmp_path / "models")
    for name in ("color", "flat", "graph", "manifest", "pointer"):
        bundle = make_bundle(tmp_path / name, name=name)
        registry.promote(registry.add(bundle, name=name).ref)
    (registry.root / "flat/1").rename(registry.root / "flat/kept")  # the version is gone
    for damaged in ("graph/1/model.onnx", "manifest/1/manifest.json", "pointer/production.json"):
        (registry.root / damaged).write_bytes(b"?")
    with start(root=registry.root, cold=True) as server:
        assert ask(server).is_success and is_ready(server)
        told = httpx.get(f"{server.url}/v1/models").json()
        assert [m["name"] for m in told["models"] if m["loaded"]] == ["color"]
        assert sorted(told["troubles"]) == ["graph", "manifest", "pointer"], told["troubles"]
        for name in told["troubles"]:
            r = httpx.post(f"{server.url}/v1/models/{name}/predict", content=picture(), headers=PNG)
            assert r.status_code == 503 and name in r.json()["detail"], r.text
            assert httpx.get(f"{server.url}/v1/models/{name}").status_code in (200, 503)
            assert httpx.get(f"{server.url}/v2/models/{name}").status_code in (200, 503)
    words = ["models", "list", "--set", f"paths.models={registry.root}"]
    run = partial(warm.run, kind="light", capture_output=True, text=True)
    told = run([sys.executable, "-m", "mlkit", *words, "--json"])
    wrong = {d["name"]: "trouble" in d for d in json.loads(told.stdout)}
    assert wrong == {"color": False, "graph": False, "manifest": True, "pointer": True}
    table = run([sys.executable, "-m", "mlkit", *words]).stdout
    assert "color" in table and "pointer@1: " in table and "is damaged" in table


# 20 s each: twenty pictures of 64 megapixels are decoded
@pytest.mark.parametrize("resize", ["squish", "pad"])
def test_the_largest_pictures_stay_within_the_memory(
    resize: str, start: Callable, tmp_path: Path
) -> None:
    registry = Registry(tmp_path / "models")
    bundle = make_bundle(tmp_path / "one", resize=resize)
    registry.promote(registry.add(bundle, name="color").ref)
    large = [
        picture("RGBA", (8000, 8000), (1, 2, 3, 4)),
        picture("L", (7900, 8000), format="JPEG"),
        picture("RGB", (8000, 8000), "red", "JPEG", progressive=True),
        picture("RGB", (8000, 8000), "red", "WEBP", method=0),
        picture("RGB", (5600, 5600), "red", "WEBP", method=0),
    ]
    with start("api.predict_seconds=60", root=registry.root, cold=True) as server:
        for _ in range(10):
            assert ask(server).is_success
        baseline = memory(server, "VmHWM")
        with ThreadPoolExecutor(10) as pool:
            said = [r.status_code for r in pool.map(lambda d: ask(server, d), large * 4)]
        assert said == [200, 200, 413, 413, 200] * 4
        assert memory(server, "VmHWM") < baseline + 600
        assert memory(server, "VmRSS") < baseline + 100  # it was given back


# ---------------------------------------------------------------- other people's clients


# 20 s: some hundred generated requests for each operation
def test_it_is_as_its_description_says(server: Server, tmp_path: Path) -> None:
    there = Path(__file__).parent
    command = [
        Path(sys.executable).parent / "schemathesis",
        "--config-file",
        there / "openapi.toml",
    ]
    command += ["run", f"{server.url}/openapi.json"]
    env = os.environ | {"PYTHONPATH": there, "SCHEMATHESIS_HOOKS": there / "openapi_pictures.py"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_clients_of_the_open_inference_protocol(server: Server) -> None:
    client = InferenceServerClient(server.url.removeprefix("http://"))
    assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("color")
    assert client.get_model_metadata("color", "1")["versions"] == ["1"]
    asked = client.get_model_metadata("color")["inputs"][0]
    for binary in (True, False):
        two = InferInput(asked["name"], [2], asked["datatype"])
        two.set_data_from_numpy(np.array([RED, LIME], dtype=object), binary_data=True)
        outputs = None if binary else []
        said = client.infer("color", [two], outputs=outputs, request_id="mine")
        rows = said.as_numpy("probabilities")
        assert rows.shape == (2, 3) and rows.argmax(1).tolist() == [0, 1]
        assert said.get_response()["id"] == "mine"
    wrong = InferInput(asked["name"], [1], asked["datatype"])
    wrong.set_data_from_numpy(np.array([b"text"], dtype=object))
    with pytest.raises(InferenceServerException, match="no picture of a kind"):
        client.infer("color", [wrong])
    tensor = {"name": "image", "shape": [1], "datatype": "BYTES"}
    for inputs, more in (
        ([tensor | {"name": "\ud800", "data": ["eA=="]}], {}),
        ([tensor | {"parameters": {"binary_data_size": "\ud800"}}], {}),
        ([tensor | {"data": ["eA=="]}], {"outputs": [{"name": "label"}] * 2}),
        ([tensor], {}),
    ):
        body = json.dumps({"inputs": inputs} | more)
        r = httpx.post(f"{server.url}/v2/models/color/infer", content=body)
        assert r.status_code == 422 and r.headers["content-type"] == "application/problem+json"
    with pytest.raises(InferenceServerException, match="no model 'shape'"):
        client.get_model_metadata("shape")
    client.close()
