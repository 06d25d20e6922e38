"""Many callers from one thread: each sends a photograph, waits for the answer, sends the next. Cheap, for it shares the cores with the server."""

import selectors
import socket
import time
from dataclasses import dataclass, field

_DRAIN = 60  # seconds that are waited for the last answers


@dataclass
class Calls:
    "What came back."

    seconds: float
    took: list[float] = field(default_factory=list)  # seconds, of 200s
    statuses: dict[int, int] = field(default_factory=dict)
    answers: list[tuple[int, bytes]] = field(default_factory=list)  # photograph, body

    @property
    def rate(self) -> float:
        return len(self.took) / self.seconds

    def quantile(self, q: float) -> float:
        "Milliseconds."
        return 1e3 * sorted(self.took)[min(len(self.took) - 1, int(q * len(self.took)))]


def request(path: str, photograph: bytes, port: int) -> bytes:
    body = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.jpg"\r\n'
    body += b"Content-Type: image/jpeg\r\n\r\n" + photograph + b"\r\n--x--\r\n"
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Length: {len(body)}\r\n"
    return head.encode() + b"Content-Type: multipart/form-data; boundary=x\r\n\r\n" + body


class _Caller:
    def __init__(self, port: int, first: int):
        self.port, self.next, self.sock = port, first, None

    def connect(self) -> socket.socket:
        self.sock = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock.setblocking(False)  # a server that reads slowly holds up nobody else's caller
        return self.sock

    def begin(self, requests: list[bytes]) -> None:
        self.asked = self.next % len(requests)
        self.next, self.got, self.since = self.next + 1, b"", time.perf_counter()
        self.left = memoryview(requests[self.asked])

    def send(self) -> int:
        "Send what the socket takes, and return what to wait for."
        try:
            self.left = self.left[self.sock.send(self.left) :]
        except BlockingIOError:
            pass
        both = selectors.EVENT_WRITE | selectors.EVENT_READ  # a refusal may come before all is sent
        return both if self.left else selectors.EVENT_READ

    def receive(self) -> tuple[int, bytes] | None:
        block = self.sock.recv(1 << 18)
        if not block:
            raise ConnectionError("the server hung up")
        self.got += block
        head, found, body = self.got.partition(b"\r\n\r\n")
        if not found:
            return None
        length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
        return (int(head[9:12]), body) if len(body) >= length else None


def call(
    port: int,
    requests: list[bytes],
    callers: int,
    seconds: float,
    *,
    keep: bool = False,  # the answers
    most: int = 0,  # answers; 0 = as many as come
) -> Calls:
    selector, done = selectors.DefaultSelector(), Calls(0)
    everybody = [_Caller(port, i * 7) for i in range(callers)]
    began = time.perf_counter()

    def ask(one: _Caller) -> None:
        one.begin(requests)
        selector.register(one.sock, one.send(), one)

    for one in everybody:
        one.connect()
        ask(one)
    end = began + seconds
    last = (
        end + _DRAIN
    )  # what was asked is answered, or it would be work for whoever is measured next
    asking = set(everybody)
    while asking and (now := time.perf_counter()) < last:
        for key, events in selector.select(min(max(end - now, 0.05), 60)):
            one = key.data
            try:
                if not events & selectors.EVENT_READ:
                    selector.modify(one.sock, one.send(), one)
                    continue
                answer = one.receive()
            except OSError:
                selector.unregister(one.sock)
                one.sock.close()
                if time.perf_counter() >= end:
                    asking.discard(one)
                    continue
                done.statuses[0] = done.statuses.get(0, 0) + 1
                one.connect()
                ask(one)
                continue
            if answer is None:
                continue
            status, body = answer
            over = time.perf_counter() >= end or (most and len(done.took) >= most)
            if not over:
                done.statuses[status] = done.statuses.get(status, 0) + 1
            if status == 200 and not over:
                done.took.append(time.perf_counter() - one.since)
                if keep:
                    done.answers.append((one.asked, body))
            if over or (most and len(done.took) >= most):
                asking.discard(one)
                selector.unregister(one.sock)
                continue
            if one.left:  # refused on the way: the rest is not sent
                selector.unregister(one.sock)
                one.sock.close()
                one.connect()
                ask(one)
                continue
            one.begin(requests)
            selector.modify(one.sock, one.send(), one)
    done.seconds = min(time.perf_counter(), end) - began
    for one in everybody:
        one.sock.close()
    selector.close()
    return done
