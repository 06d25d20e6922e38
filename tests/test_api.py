"""The contract of the API, over real sockets: what notebooks cannot hold."""

import base64
import io
import json
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
import warm
from conftest import NAN, ROOT, Server, connect, head, make_bundle, picture
from PIL import Image

from mlkit.bundle.registry import Registry
from mlkit.client import Client
from mlkit.inference.answers import to_json
from mlkit.inference.predictor import Predictor


def noise(
    mode: str = "RGB", size: tuple[int, int] = (40, 30), format: str = "PNG", **save
) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, (*size[::-1], 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(out, format, **save)
    return out.getvalue()


def frames() -> bytes:
    out, colors = io.BytesIO(), ("red", "lime", "blue")
    first, *rest = (Image.new("RGB", (20, 20), c) for c in colors)
    first.save(out, "GIF", save_all=True, append_images=rest)
    return out.getvalue()


def exif(orientation: int) -> bytes:
    tags = Image.Exif()
    tags[274] = orientation
    return noise(format="JPEG", exif=tags)


RED = picture(fill="red")


def response(sock: socket.socket) -> tuple[int, dict[str, str], bytes]:
    "Read to the end of the connection, which must be a clean one."
    data = b""
    while block := sock.recv(65536):
        data += block
    top, _, body = data.partition(b"\r\n\r\n")
    status, *lines = top.decode().split("\r\n")
    return (
        int(status.split()[1]),
        {k.lower(): v for k, v in (x.split(": ", 1) for x in lines)},
        body,
    )


def problem(r: httpx.Response, status: int) -> str:
    "Check the form of a refusal and return its detail."
    assert r.status_code == status, r.text
    assert r.headers["content-type"] == "application/problem+json"
    said = r.json()
    assert set(said) == {"type", "title", "status", "detail", "instance", "request_id"}
    assert (said["status"], said["request_id"]) == (status, r.headers["x-request-id"])
    assert not re.search(r"Traceback|File \"|site-packages|/tmp/|[a-z]Error\b", r.text)
    return said["detail"]


@pytest.fixture(scope="module")
def http(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def local(models: Path) -> Predictor:
    return Predictor(Registry(models).resolve("color").path)


# ---------------------------------------------------------------- pictures

ODD = {
    "16-bit grey": picture("I;16", (5, 5), 999),
    "one bit": picture("1", (5, 5), 1),
    "grey": noise("L"),
    "grey with alpha": noise("LA"),
    "palette": noise("P"),
    "palette, GIF": noise("P", format="GIF"),
    "alpha": noise("RGBA"),
    "cmyk": noise("CMYK", format="JPEG"),
    "cmyk, TIFF": noise("CMYK", format="TIFF"),
    "progressive": noise(format="JPEG", progressive=True),
    "webp": noise(format="WEBP"),
    "bmp": noise(format="BMP"),
    "tiff": noise(format="TIFF"),
    "animated": frames(),
    "one pixel": picture(size=(1, 1), fill="lime"),
    "a line": picture(size=(50_000, 1), fill="blue"),
    "rotated by EXIF": exif(6),
    "trailing bytes": RED + b"<?php and more" * 50,
    "no picture's suffix": RED,
}


@pytest.mark.parametrize("kind", ODD)
def test_odd_pictures_are_answered(kind: str, http: httpx.Client, local: Predictor) -> None:
    r = http.post("/v1/predict", files={"file": ("odd.bin", ODD[kind])})
    assert r.status_code == 200, r.text
    expected = local.predict([ODD[kind]])[0]
    assert r.json()["model"] == "color" and r.json()["version"] == 1
    assert r.json()["predictions"] == [to_json(expected)]


def test_animations_show_their_first_frame(http: httpx.Client) -> None:
    r = http.post("/v1/predict", content=frames(), headers={"content-type": "image/gif"})
    assert r.json()["predictions"][0]["label"] == "red"


def test_confidences_are_calibrated_when_asked(
    http: httpx.Client, start: Callable, local: Predictor
) -> None:
    plain = http.post("/v1/predict", files={"file": RED}).json()["predictions"][0]
    assert http.get("/v1/models/color").json()["temperature"] is None
    with start("api.calibrated=true") as server:
        warm = httpx.post(f"{server.url}/v1/predict", files={"file": RED}).json()["predictions"][0]
        assert httpx.get(f"{server.url}/v1/models/color").json()["temperature"] == 2
    asked = Predictor(local.folder, calibrated=True).predict([RED])[0]
    assert warm == to_json(asked) and plain == to_json(local.predict([RED])[0])
    assert 1 / 3 < warm["confidence"] < plain["confidence"]


NAMES = [
    "../../etc/passwd",
    "C:\\x.png",
    "ü漢字🙂.png",
    "a;b=c.png",
    "'; drop table--",
    " ",
    "x" * 1000,
    "nul\0.png",
]


@pytest.mark.parametrize("name", NAMES)
def test_hostile_file_names(name: str, http: httpx.Client) -> None:
    part = f'--b\r\nContent-Disposition: form-data; name="file"; filename="{name}"\r\n\r\n'
    kind = {"content-type": "multipart/form-data; boundary=b"}
    for data, status in ((RED, 200), (RED[:40], 422)):
        body = part.encode() + data + b"\r\n--b--\r\n"
        r = http.post("/v1/predict", content=body, headers=kind)
        assert r.status_code == status, r.text


@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"])
def test_cut_anywhere_is_never_a_failure(format: str, http: httpx.Client) -> None:
    whole = noise(format=format)
    for length in [*range(1, 40, 3), *range(40, len(whole) - 1, len(whole) // 15)]:
        r = http.post("/v1/predict", files={"file": ("cut.png", whole[:length])})
        assert r.status_code in (200, 415, 422), (length, r.text)
        if r.status_code != 200:
            assert "'cut.png'" in problem(r, r.status_code)


def test_flipped_bits_are_never_a_failure(http: httpx.Client) -> None:
    chance = random.Random(0)
    for format in ("PNG", "JPEG", "GIF", "WEBP", "TIFF"):
        whole = noise(format=format)
        for _ in range(12):
            data = bytearray(whole)
            for _ in range(4):
                data[chance.randrange(len(data))] = chance.randrange(256)
            r = http.post("/v1/predict", files={"file": ("flipped", bytes(data))})
            assert r.status_code in (200, 413, 415, 422), r.text


KINDS = {
    "drawing.svg": b"<?xml version='1.0'?><svg xmlns='http://www.w3.org/2000/svg'/>",
    "text.pdf": b"%PDF-1.7\n1 0 obj",
    "files.zip": b"PK\x03\x04" + bytes(40),
    "page.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    "learner.pkl": b"\x80\x04\x95" + bytes(40),
    "text.jpg": b"I am a text",
}


@pytest.mark.parametrize("name", KINDS)
def test_other_kinds_are_415(name: str, http: httpx.Client) -> None:
    files = [("file", ("red.png", RED)), ("file", (name, KINDS[name]))]
    said = problem(http.post("/v1/predict", files=files, params={"strict": "true"}), 415)
    assert repr(name) in said and "JPEG, PNG" in said
    good, bad = http.post("/v1/predict", files=files).json()["predictions"]
    assert good["label"] == "red" and bad["error"]["detail"] == said
    assert problem(http.post("/v1/predict", files=files[1:]), 415) == said


def test_a_bomb_is_refused_by_its_header(http: httpx.Client) -> None:
    data = picture("1", (13_000, 13_000))
    assert "64 megapixels" in problem(http.post("/v1/predict", files={"file": ("a", data)}), 413)


# ---------------------------------------------------------------- bodies

JSON = {"content-type": "application/json"}
BODIES = [
    (422, b'{"instances": [{"b64": NaN}]}'),
    (422, b'{"instances": Infinity}'),
    (422, b'{"instances": [{"b64": 1e999}]}'),
    (422, b'{"instances": [{"b64": null}]}'),
    (422, b'{"instances": {"b64": ""}}'),
    (422, b'{"instances": [{"b64": "", "extra": 1}]}'),
    (422, b'{"inputs": []}'),
    (422, b'{"instances": [{"b64": "%%%"}]}'),
    (422, b'{"instances": [{"b64": ""}]}'),
    (422, b"null"),
    (400, b""),
    (400, b"{"),
    (400, b'{"instances": [}'),
    (400, b'{"instances": "\xff\xfe"}'),
    (400, b"[" * 500_000),
    (400, b'{"a":' * 200_000),
    (400, b"1" * 10_000),
    (413, b"[" + b"0," * 100_000),
    (413, json.dumps({"instances": [{"b64": ""}] * 33}).encode()),
]


@pytest.mark.parametrize(("status", "body"), BODIES, ids=[str(b[:30]) for _, b in BODIES])
def test_json_that_is_refused(status: int, body: bytes, http: httpx.Client) -> None:
    assert len(problem(http.post("/v1/predict", content=body, headers=JSON), status)) < 300


def test_inputs_in_json_keep_their_order(http: httpx.Client) -> None:
    colors = ["red", "blue", "lime", "blue"]
    sent = [{"b64": base64.b64encode(picture(fill=c)).decode()} for c in colors]
    r = http.post("/v1/predict", json={"instances": sent})
    assert [p["label"] for p in r.json()["predictions"]] == ["red", "blue", "green", "blue"]


def test_malformed_multipart_is_400(http: httpx.Client) -> None:
    part = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
    broken = [b"", b"hello", part, part + RED, part + RED + b"\r\n--b", b"--b\r\n: \0\r\n\r\n--b--"]
    for kind in ("multipart/form-data", "multipart/form-data; boundary=b"):
        for body in broken:
            r = http.post("/v1/predict", content=body, headers={"content-type": kind})
            assert "malformed" in problem(r, 400)
    long = {"content-type": f"multipart/form-data; boundary={'b' * 5000}"}
    assert problem(http.post("/v1/predict", content=part, headers=long), 400)


def test_a_declared_large_body_is_refused_unread(server: Server) -> None:
    with connect(server) as sock:
        sock.sendall(head("/v1/predict", "Content-Type: image/png", "Content-Length: 99999999999"))
        sock.shutdown(socket.SHUT_WR)
        status, headers, body = response(sock)
    assert (status, headers["connection"]) == (413, "close")
    assert "2 MiB" in json.loads(body)["detail"]


def test_a_caller_who_waits_to_be_asked_sends_nothing(server: Server) -> None:
    with connect(server) as sock:
        length = "Content-Length: 99999999"
        sock.sendall(head("/v1/predict", "Content-Type: image/png", length, "Expect: 100-continue"))
        status, headers, _ = response(sock)
    assert (status, headers["connection"]) == (413, "close")


@pytest.mark.parametrize("path", ["/v1/predict", "/v1/models/nothing/predict", "/nothing"])
@pytest.mark.parametrize("framing", ["declared", "chunked"])
def test_an_early_refusal_reaches_one_who_is_still_sending(
    path: str, framing: str, server: Server
) -> None:
    # closing with unread bytes would reset the connection, and take the answer back
    size = "Transfer-Encoding: chunked" if framing == "chunked" else "Content-Length: 8388608"
    block = bytes(65536)
    chunk = b"10000\r\n" + block + b"\r\n" if framing == "chunked" else block
    with connect(server) as sock:
        sock.sendall(head(path, "Content-Type: image/png", size))
        for _ in range(128):
            sock.sendall(chunk)
        if framing == "chunked":
            sock.sendall(b"0\r\n\r\n")
        status, headers, body = response(sock)
    assert (status, headers["connection"]) == (413 if path == "/v1/predict" else 404, "close")
    assert json.loads(body)["status"] == status


def test_a_slow_body_is_408_and_harms_nobody(start: Callable) -> None:
    with start("api.body_seconds=1") as server, connect(server) as slow, connect(server) as silent:
        for sock in (slow, silent):
            sock.sendall(head("/v1/predict", "Content-Type: image/png", "Content-Length: 5000"))
        slow.sendall(RED[:10])
        assert httpx.post(f"{server.url}/v1/predict", files={"file": ("r", RED)}).is_success
        for sock in (slow, silent):
            status, headers, body = response(sock)
            assert (status, headers["connection"]) == (408, "close")
            assert "1 s" in json.loads(body)["detail"]
        assert httpx.post(f"{server.url}/v1/predict", files={"file": ("r", RED)}).is_success


def test_too_long_computing_is_504(start: Callable) -> None:
    big = picture("L", (7000, 7000), format="JPEG")
    with start("api.predict_seconds=0.05") as server:
        r = httpx.post(f"{server.url}/v1/predict", files=[("file", ("big", big))] * 4, timeout=60)
        assert "0.05 s" in problem(r, 504)
        assert httpx.get(f"{server.url}/health/live").is_success


def test_callers_who_leave_are_no_error(server: Server, http: httpx.Client) -> None:
    for part in (b"", RED[:10]):
        with connect(server) as sock:
            sock.sendall(head("/v1/predict", "Content-Type: image/png", "Content-Length: 500"))
            sock.sendall(part)
    assert http.post("/v1/predict", files={"file": ("red", RED)}).is_success
    assert "Traceback" not in server.log.read_text()


# ---------------------------------------------------------------- paths, methods, ids

PATHS = [
    "/v1/models/../../etc/passwd",
    "/v1/models/..%2f..%2fetc",
    "/v1/models/%00",
    "/v1/models/%ff",
]
PATHS += [
    "/v1/models/%E6%BC%A2",
    "/v1/models/" + "x" * 10_000,
    "/v1/models/color@2",
    "/v1//models",
    "//",
]
PATHS += [
    "/v1/models/color@production",
    "/v1/models/color/",
    "/v1/models/color%0d%0aX:1",
    "/../color",
]


@pytest.mark.parametrize("path", PATHS, ids=[p[:30] for p in PATHS])
def test_hostile_paths_are_404(path: str, server: Server) -> None:
    with connect(server) as sock:
        sock.sendall(head(path, "Connection: close", method="GET"))
        status, headers, body = response(sock)
    assert status == 404 and "is: " in json.loads(body)["detail"]
    assert headers["content-type"] == "application/problem+json" and len(body) < 1200


def test_methods(http: httpx.Client) -> None:
    for method, path, allow in (("GET", "/v1/predict", "POST"), ("DELETE", "/v1/models", "GET")):
        r = http.request(method, path)
        assert allow in problem(r, 405) and r.headers["allow"] == allow
    for path in ("/", "/health/live", "/v1/models", "/v1/models/color", "/metrics"):
        r, whole = http.head(path), http.get(path)
        assert (r.status_code, r.content) == (200, b"") and int(r.headers["content-length"]) > 0
        assert r.headers["content-type"] == whole.headers["content-type"]
    assert http.head("/v1/predict").status_code == 405


def test_an_encoded_slash_is_none(server: Server) -> None:
    for method, path in (("POST", "/v1/models%2fcolor/predict"), ("GET", "/v1/models%2Fcolor")):
        with connect(server) as sock:  # a client could write it in another way
            sock.sendall(head(path, "Connection: close", "Content-Length: 0", method=method))
            assert response(sock)[0] == 404


def test_request_ids_and_the_log(server: Server, http: httpx.Client) -> None:
    files = {"file": ("secret-name.png", RED)}
    r = http.post("/v1/predict", files=files, headers={"x-request-id": "me.1_a-b"})
    assert r.headers["x-request-id"] == "me.1_a-b"
    for bad in ("a b", "x" * 65, "<script>", ""):
        made = http.get("/health/live", headers={"x-request-id": bad}).headers["x-request-id"]
        assert re.fullmatch(r"[A-Za-z0-9._-]{1,64}", made) and made != bad
    deadline = time.monotonic() + 10  # a line is written after its answer, by a thread of its own
    while not (told := [x for x in server.lines() if x["id"] == "me.1_a-b"]):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    (line,) = told
    assert (line["model"], line["version"], line["status"]) == ("color", 1, 200)
    assert "secret-name" not in server.log.read_text()


def test_media_types(http: httpx.Client) -> None:
    for kind in ("text/plain", "application/xml", "nonsense", "application/x-www-form-urlencoded"):
        said = problem(http.post("/v1/predict", content=RED, headers={"content-type": kind}), 415)
        assert "multipart/form-data" in said and "image/*" in said
    for kind in ("image/png", "IMAGE/JPEG; q=1", "application/octet-stream"):
        assert http.post("/v1/predict", content=RED, headers={"content-type": kind}).is_success
    packed = {"content-type": "image/png", "content-encoding": "gzip"}
    assert "gzip" in problem(http.post("/v1/predict", content=RED, headers=packed), 415)


# ---------------------------------------------------------------- the server's life


def test_fifty_callers_get_their_own_answers(server: Server, local: Predictor) -> None:
    chance = random.Random(1)
    pictures = [
        [picture(fill=tuple(chance.randrange(256) for _ in range(3))) for _ in range(i % 3 + 1)]
        for i in range(50)
    ]

    def ask(mine: list[bytes]) -> list[dict]:
        with Client(server.url, model="color", timeout=60) as client:
            return [p for _ in range(3) for p in client.predict(mine)]

    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(ask, pictures))
    for mine, answer in zip(pictures, answers, strict=True):
        assert [a["label"] for a in answer] == [p.label for p in local.predict(mine)] * 3
        expected = [v for p in local.predict(mine) * 3 for v in p.probabilities.values()]
        found = [v for a in answer for v in a["probabilities"].values()]
        assert found == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("which", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_it_with_what_was_begun_answered(which: int, start: Callable) -> None:
    with start() as server:
        with connect(server) as sock:
            length = f"Content-Length: {len(RED)}"
            sock.sendall(head("/v1/predict", "Content-Type: image/png", length) + RED[:20])
            httpx.get(f"{server.url}/health/live")  # by now the first has begun
            server.process.send_signal(which)
            time.sleep(0.3)
            sock.sendall(RED[20:])
            assert response(sock)[0] == 200
        assert server.process.wait(20) == 0
        assert "Traceback" not in server.log.read_text()


def test_a_busy_port_is_told_before_anything_else(server: Server, tmp_path: Path) -> None:
    port = urlsplit(server.url).port
    program = "import sys; from mlkit.api.server import serve; from mlkit.config import *\n"
    program += "try: serve(load_settings(*sys.argv[1:]))\nexcept MlkitError as e: print(e)"
    asked = [f"api.port={port}", f"paths.models={tmp_path / 'nothing'}"]
    said = warm.run(
        [sys.executable, "-c", program, *asked], kind="light", capture_output=True, text=True
    )
    assert f"port {port} on 127.0.0.1 is in use" in said.stdout and "--port" in said.stdout


def test_a_model_that_fails_is_live_but_not_ready(start: Callable, tmp_path: Path) -> None:
    registry = Registry(tmp_path / "models")
    registry.promote(registry.add(make_bundle(tmp_path / "b", NAN), name="color").ref)
    with start(root=registry.root) as server, httpx.Client(base_url=server.url) as http:
        deadline = time.monotonic() + 30
        while "failed" not in http.get("/health/ready").text and time.monotonic() < deadline:
            time.sleep(0.05)
        r = http.get("/health/ready")
        assert "color@1 failed its last forward pass" in problem(r, 503)
        assert r.headers["retry-after"] == "1"
        assert http.get("/health/live").is_success
        said = problem(http.post("/v1/predict", files={"file": ("red.png", RED)}), 500)
        assert "finite" not in said
        for path in ("/v1/predict?top_k=1", "/v1/models/color@1/predict?top_k=2"):
            problem(http.post(path, files={"file": ("red.png", RED)}), 500)
        assert "not finite" in server.log.read_text()


def test_the_light_half_is_light() -> None:
    program = (
        "import sys, mlkit.api.server, mlkit.client; print({'torch', 'fastai'} & set(sys.modules))"
    )
    said = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert said.stdout.strip() == "set()"


# ---------------------------------------------------------------- what is written down works


def written_requests(model: str, host: str) -> list[tuple[str, str, dict[str, str], bytes]]:
    "The requests of test_main.http: method, address, headers, body; as the editors send them."
    text = (ROOT / "test_main.http").read_text()
    values = dict(re.findall(r"^@(\w+) = (.*)$", text, re.M)) | {"host": host, "model": model}
    text = re.sub(r"\{\{(\w+)\}\}", lambda m: values[m[1]], text)
    found = []
    for block in re.split(r"^###.*\n", text, flags=re.M)[1:]:
        top, _, body = block.partition("\n\n")
        (first, *headers), parts = top.strip().split("\n"), []
        for line in body.strip("\n").split("\n"):
            file = re.fullmatch(r"< (.+)", line)
            parts.append((ROOT / file[1]).read_bytes() if file else line.encode())
        method, address = first.split()
        found.append((method, address, dict(h.split(": ") for h in headers), b"\r\n".join(parts)))
    return found


def test_every_request_of_test_main_http_is_answered(server: Server, http: httpx.Client) -> None:
    with Client(server.url) as client:
        client.wait_ready()
    asked = set()
    for method, address, headers, body in written_requests("color", server.url):
        r = http.request(method, address, headers=headers, content=body)
        assert r.is_success, (address, r.text)
        path = urlsplit(address).path
        path = path.replace("/color", "/{name}").replace("/versions/1", "/versions/{version}")
        asked.add((method, path))
        if method == "POST":
            said = r.json()
            assert (
                all(p.get("label") or p["error"]["detail"] for p in said.get("predictions", []))
                and len(said) >= 3
            )
    paths = http.get("/openapi.json").json()["paths"]
    assert {(m.upper(), path) for path, methods in paths.items() for m in methods} <= asked


def test_examples_of_openapi_are_accepted(http: httpx.Client) -> None:
    for path, methods in http.get("/openapi.json").json()["paths"].items():
        if not (operation := methods.get("post")):
            continue
        address = path.replace("{name}", "color").replace("{version}", "1")
        content = operation["requestBody"]["content"]
        example = content.pop("application/json")["example"]
        answers = [http.post(address, json=example)]
        promised = operation["responses"]["200"]["content"]["application/json"]["example"]
        if path.startswith("/v1"):
            data = base64.b64decode(example["instances"][0]["b64"])
            (field,) = content.pop("multipart/form-data")["schema"]["required"]
            answers.append(http.post(address, files={field: ("example.png", data)}))
            for kind in content:
                answers.append(http.post(address, content=data, headers={"content-type": kind}))
            labels = set(promised["predictions"][0]["probabilities"])
            assert labels == {"red", "green", "blue"}
        for r in answers:
            assert r.status_code == 200, r.text
            assert shape(r.json()) == shape(promised)
            assert r.json() == answers[0].json()


def shape(said: object) -> object:
    "What is left of JSON when the values are forgotten."
    if isinstance(said, dict):
        return {k: shape(v) for k, v in said.items()}
    return [shape(one) for one in said] if isinstance(said, list) else type(said)
