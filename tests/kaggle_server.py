"""A stand-in for Kaggle, a test double: it speaks the client's wire protocol over a socket and really runs what is pushed.

Nothing here is Kaggle's. It is written from what the official client sends and reads, and holds one account.
`Standin(folder)` serves until closed; `fault` makes the next calls go wrong.
"""

import base64
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import uuid
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

import warm

USER, KEY, TOKEN = "tester", "0123456789abcdef0123456789abcdef", "KGAT_standin_token"
TERMINAL = {"COMPLETE", "ERROR", "CANCEL_ACKNOWLEDGED"}

# what a session's process does: no network when told so, then papermill, its streams as lines of JSON
RUNNER = """
import ctypes, fcntl, json, os, socket, struct, sys, time
asked = json.loads(sys.argv[1])
if not asked["internet"]:
    libc, uid, gid = ctypes.CDLL(None, use_errno=True), os.getuid(), os.getgid()
    flags = 0x40000000 | (0x10000000 if uid else 0)  # a network namespace, and for it a user namespace
    if libc.unshare(flags):
        sys.exit(f"no network namespace can be had: errno {ctypes.get_errno()}")
    if uid:
        open("/proc/self/setgroups", "w").write("deny")
        open("/proc/self/uid_map", "w").write(f"0 {uid} 1")
        open("/proc/self/gid_map", "w").write(f"0 {gid} 1")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:  # the kernel's own sockets need the loopback
        fcntl.ioctl(s, 0x8914, struct.pack("16sh14x", b"lo", 1))
if asked["warm"]:
    sys.path.append(asked["warm"])
    import warm
    warm.seat(asked["seat"])
began = time.time()
class Stream:
    def __init__(self, name): self.name = name
    def flush(self): pass
    def write(self, data):
        line = {"stream_name": self.name, "time": round(time.time() - began, 6), "data": data}
        os.write(1, (json.dumps(line) + "\\n").encode())
import papermill
Stream("stderr").write("0.00s - Debugger warning: It seems that frozen modules are being used, which may\\n")
try:
    papermill.execute_notebook(
        asked["notebook"], asked["executed"], cwd=asked["cwd"], progress_bar=False,
        stdout_file=Stream("stdout"), stderr_file=Stream("stderr"),
    )
except Exception as e:
    Stream("stderr").write(f"{type(e).__name__}: {e}\\n")
    sys.exit(1)
"""


@dataclass
class Version:
    "One version of a kernel, and its session."

    number: int
    asked: dict[str, Any]
    folder: Path  # input/, working/, home/
    status: str = "QUEUED"
    failure: str = ""
    log: list[dict[str, Any]] = field(default_factory=list)
    process: subprocess.Popen | None = None
    lag: int = 0  # status calls that do not know of it yet

    @property
    def gpu(self) -> bool:
        return bool(self.asked.get("enableGpu")) or "Nvidia" in self.asked.get("machineShape", "")

    def files(self) -> list[Path]:
        root = self.folder / "working"
        return sorted(p for p in root.rglob("*") if p.is_file()) if self.status in TERMINAL else []


@dataclass
class Dataset:
    "A dataset: versions, each a folder, the newest perhaps still being processed."

    title: str
    private: bool
    versions: list[Path] = field(default_factory=list)
    ready: float = 0.0  # when

    @property
    def status(self) -> str:
        return "READY" if time.time() >= self.ready else "BLOBS_RECEIVED"


@dataclass
class Blob:
    "An upload: `size` bytes are announced."

    name: str
    size: int
    path: Path
    expired: bool = False

    @property
    def whole(self) -> bool:
        return self.path.exists() and self.path.stat().st_size == self.size


@dataclass
class Competition:
    "Files to download, and what was handed in."

    folder: Path
    rules_accepted: bool = True
    submissions: list[dict[str, Any]] = field(default_factory=list)
    score_after: float = 0.5  # seconds


@dataclass
class Fault:
    "What goes wrong at the next `times` calls of `method`."

    method: str  # SaveKernel, …; or file, upload, stream
    kind: str  # 429, 500, …; reset, reset-after, silence, silence-after, truncate, short, flip, error-body, cut, expire
    times: int = 1
    retry_after: float | None = None
    match: str = ""  # in the request's path or body


class Refused(Exception):
    "An error answer."

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


def slug_of(title: str) -> str:
    "Return the slug that the site makes of a title."
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


class Standin:
    "The server and everything that it holds; a context manager."

    def __init__(
        self,
        folder: Path,  # for what it holds
        *,
        cold: bool = False,  # whether all that a session imports is imported by itself
    ):
        self.folder, self.cold = folder, cold or warm.FOLDER not in os.environ
        self.kernels: dict[str, list[Version]] = {}
        self.titles: dict[str, str] = {}
        self.datasets: dict[str, Dataset] = {}
        self.blobs: dict[str, Blob] = {}
        self.competitions: dict[str, Competition] = {}
        self.calls: list[tuple[str, dict[str, Any]]] = []  # method and request, as they came
        self.served: list[str] = []  # GETs and PUTs
        self.faults: list[Fault] = []
        self.layout = "new"  # /kaggle/input/datasets/OWNER/SLUG, or old: /kaggle/input/SLUG
        self.queue_seconds, self.processing_seconds, self.link_seconds = 0.3, 0.3, 3600.0
        self.lag_polls = 0  # so many status calls after a push tell of the version before
        self.gpu_sessions, self.gpu_quota, self.gpu_used = 2, 30 * 3600, 0
        self.page = 200  # most entries of a page
        self.drop_files = (
            0  # so many versions of datasets lose their last file, and nothing is said
        )
        self.session_variables: dict[str, str] = {}  # besides those of a session
        self.sessions: list[threading.Thread] = []
        self.lock = threading.RLock()
        self.closing = threading.Event()

        class Handler(_Handler):
            standin = self

        class Server(ThreadingHTTPServer):
            def handle_error(self, *_: object) -> None:
                if not isinstance(sys.exc_info()[1], ConnectionError):  # a client may hang up
                    super().handle_error(*_)

        self.http = Server(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.port = self.http.server_address[1]
        threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True).start()

    def __enter__(self) -> "Standin":
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        for versions in self.kernels.values():
            for v in versions:
                if v.process and v.process.poll() is None:
                    os.killpg(v.process.pid, signal.SIGKILL)
        for session in self.sessions:
            session.join(10)
        self.http.shutdown()
        self.http.server_close()

    @property
    def variables(self) -> dict[str, str]:
        "The environment in which the unpatched client speaks to this server, and to nobody else."
        proxy = f"http://127.0.0.1:{self.port}"
        return {
            "KAGGLE_API_ENVIRONMENT": "LOCALHOST",
            "HTTP_PROXY": proxy,
            "http_proxy": proxy,
            "KAGGLE_USERNAME": USER,
            "KAGGLE_KEY": KEY,
        }

    def fault(self, method: str, kind: str | int, times: int = 1, **options: Any) -> None:
        "Let the next `times` calls go wrong."
        self.faults.append(Fault(method, str(kind), times, **options))

    def take_fault(self, method: str, text: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.method == method and fault.times > 0 and fault.match in text:
                    fault.times -= 1
                    return fault
        return None

    def count(self, method: str) -> int:
        "Return how often a method was called."
        return sum(m == method for m, _ in self.calls)

    def add_dataset(self, ref: str, files: dict[str, bytes]) -> None:
        "Put a dataset there, as if it always had been."
        folder = self.folder / "datasets" / ref / "1"
        for name, data in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
        self.datasets[ref] = Dataset(ref, ref.startswith(f"{USER}/"), [folder])

    def add_competition(self, name: str, files: dict[str, bytes], accepted: bool = True) -> None:
        "Put a competition there."
        folder = self.folder / "competitions" / name
        folder.mkdir(parents=True)
        for file, data in files.items():
            (folder / file).write_bytes(data)
        self.competitions[name] = Competition(folder, accepted)

    # ------------------------------------------------------------ kernels

    def _kernel(self, asked: dict[str, Any]) -> list[Version]:
        ref = f"{asked.get('userName', '')}/{asked.get('kernelSlug', '')}"
        if ref not in self.kernels:
            raise Refused(403, "Permission 'kernels.get' was denied")
        return self.kernels[ref]

    def _version(self, asked: dict[str, Any]) -> Version:
        versions = self._kernel(asked)
        label = asked.get("versionLabel")
        if label is None:
            return versions[-1]
        match = re.fullmatch(r"v(\d+)", label)
        if not match or not 1 <= int(match[1]) <= len(versions):
            raise Refused(404, "Not found")
        return versions[int(match[1]) - 1]

    def save_kernel(self, asked: dict[str, Any]) -> dict[str, Any]:
        owner, _, slug = asked.get("slug", "").partition("/")
        if owner != USER:
            return {"error": "Notebook not found"}
        title = asked.get("newTitle") or self.titles.get(asked["slug"], slug)
        slug = slug_of(title)  # the title decides
        if len(slug) < 5:
            return {"error": "Title must be at least five characters"}
        ref = f"{owner}/{slug}"
        spec = json.loads(asked["text"]).get("metadata", {}).get("kernelspec", {})
        gone = {
            "invalidDatasetSources": [
                d
                for d in asked.get("datasetDataSources", [])
                if "/".join(d.split("/")[:2]) not in self.datasets
            ],
            "invalidCompetitionSources": [
                c for c in asked.get("competitionDataSources", []) if c not in self.competitions
            ],
            "invalidKernelSources": [
                k for k in asked.get("kernelDataSources", []) if k not in self.kernels
            ],
        }
        with self.lock:
            versions = self.kernels.get(ref, [])
            number = len(versions) + 1
            folder = self.folder / "sessions" / f"{slug}-{number}"
            version = Version(number, asked, folder, lag=self.lag_polls)
            busy = [
                v for vs in self.kernels.values() for v in vs if v.gpu and v.status not in TERMINAL
            ]
            if version.gpu and len(busy) >= self.gpu_sessions:
                return {"error": f"Maximum batch GPU session count of {self.gpu_sessions} reached."}
            if not spec.get("name"):
                version.failure = "No kernel name found in notebook and no override provided."
            self.kernels[ref] = [*versions, version]
            self.titles[ref] = title
        session = threading.Thread(target=self._run, args=(version,), daemon=True)
        self.sessions.append(session)
        session.start()
        return {
            "ref": f"/code/{ref}",
            "url": f"https://www.kaggle.com/code/{ref}",
            "versionNumber": number,
            "kernelId": abs(hash(ref)) % 10**6,
            **{k: v for k, v in gone.items() if v},
        }

    def _mount(self, version: Version) -> None:
        root = version.folder / "input"
        for source in version.asked.get("datasetDataSources", []):
            owner, slug, *number = source.split("/")
            dataset = self.datasets.get(f"{owner}/{slug}")
            if dataset:
                place = root / "datasets" / owner / slug if self.layout == "new" else root / slug
                shutil.copytree(dataset.versions[int(number[0]) - 1 if number else -1], place)
        for name in version.asked.get("competitionDataSources", []):
            if name in self.competitions:
                place = root / "competitions" / name if self.layout == "new" else root / name
                shutil.copytree(self.competitions[name].folder, place)

    def _python(self, home: Path) -> Path:
        "Return a new interpreter that sees this environment's packages, but not this project."
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", home], check=True)
        site = next(home.glob("lib/python*/site-packages"))
        own = [p for p in sys.path if p.endswith(("site-packages", "dist-packages"))]
        (site / "image.pth").write_text("\n".join(own))  # its own .pth files are not followed
        return home / "bin" / "python"

    def _run(self, version: Version) -> None:
        try:
            self._session(version)
        except Exception as e:  # a test must see it
            version.failure, version.status = f"the stand-in failed: {e!r}", "ERROR"

    def _session(self, version: Version) -> None:
        for name in ("input", "working", "home"):
            (version.folder / name).mkdir(parents=True)
        self._mount(version)
        python = self._python(version.folder / "image")
        notebook = version.folder / "__notebook_source__.ipynb"
        notebook.write_text(version.asked["text"], encoding="utf-8")
        if self.closing.wait(self.queue_seconds):
            return
        if version.failure:
            version.status = "ERROR"
            return
        version.status = "RUNNING"
        begin = subprocess.Popen if self.cold else warm.Popen
        asked = {
            "notebook": str(notebook),
            "executed": str(version.folder / "__notebook__.ipynb"),
            "cwd": str(version.folder / "working"),
            "internet": bool(version.asked.get("enableInternet")),
            "warm": "" if self.cold else str(Path(__file__).parent),
            "seat": tempfile.mkdtemp(prefix="seat-"),  # a short name: a socket is made there
        }
        clean = {
            "PATH": f"{python.parent}:/usr/local/bin:/usr/bin:/bin",
            "HOME": str(version.folder / "home"),
            "LANG": "C.UTF-8",
            "KAGGLE_KERNEL_RUN_TYPE": "Batch",
            "PIP_CONFIG_FILE": os.devnull,
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(os.cpu_count())),
            **self.session_variables,
        }
        version.process = begin(
            [str(python), "-c", RUNNER, json.dumps(asked)],
            env=clean,
            cwd=version.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        limit = version.asked.get("sessionTimeoutSeconds") or 12 * 3600
        ended = threading.Timer(limit, self._expire, [version])
        ended.daemon = True
        ended.start()
        with version.process:
            for line in version.process.stdout:
                try:
                    version.log.append(json.loads(line))
                except ValueError:
                    version.log.append({"stream_name": "stderr", "time": 0.0, "data": line})
        code = version.process.returncode
        shutil.rmtree(asked["seat"])
        ended.cancel()
        version.status = "ERROR" if code or version.failure else "COMPLETE"

    def _expire(self, version: Version) -> None:
        version.failure = "Your notebook tried to run for longer than its time limit"
        os.killpg(version.process.pid, signal.SIGKILL)

    def get_kernel_session_status(self, asked: dict[str, Any]) -> dict[str, Any]:
        newest, label = self._kernel(asked)[-1], asked.get("versionLabel")
        with self.lock:
            if newest.lag > 0:
                newest.lag -= 1
                if label == f"v{newest.number}":
                    raise Refused(404, "Not found")
                if label is None and newest.number > 1:
                    return {"status": self._kernel(asked)[-2].status}
        version = self._version(asked)
        return {"status": version.status} | (
            {"failureMessage": version.failure} if version.failure else {}
        )

    def list_kernel_session_output(self, asked: dict[str, Any], base: str) -> dict[str, Any]:
        version = self._version(asked)
        root = version.folder / "working"
        files, more = self._paged(version.files(), asked, 20)
        listed = [
            {"fileName": p.relative_to(root).as_posix(), "url": self._sign(p, base)} for p in files
        ]
        return {"files": listed, "log": log_text(version.log), **more}

    def list_kernel_files(self, asked: dict[str, Any]) -> dict[str, Any]:
        version = self._version(asked)
        files, more = self._paged(version.files(), asked, 20)
        root = version.folder / "working"
        return {
            "files": [
                {"name": p.relative_to(root).as_posix(), "size": p.stat().st_size} for p in files
            ],
            **more,
        }

    def get_kernel(self, asked: dict[str, Any]) -> dict[str, Any]:
        version, newest = self._version(asked), self._kernel(asked)[-1]
        ref = f"{asked['userName']}/{asked['kernelSlug']}"
        names = ("isPrivate", "enableGpu", "enableInternet", "machineShape", "datasetDataSources")
        told = {n: version.asked[n] for n in names if n in version.asked}
        metadata = {
            "id": abs(hash(ref)) % 10**6,
            "ref": ref,
            "title": self.titles[ref],
            "slug": asked["kernelSlug"],
            "currentVersionNumber": newest.number,
            "dockerImage": "gcr.io/kaggle-images/python@sha256:" + "0" * 64,
            **told,
        }
        blob = {"source": version.asked["text"], "language": "python", "kernelType": "notebook"}
        return {"metadata": metadata, "blob": {**blob, "slug": ref}}

    def list_kernels(self, asked: dict[str, Any]) -> dict[str, Any]:
        found = [
            {"ref": ref, "title": self.titles[ref], "slug": ref.split("/")[1]}
            for ref in sorted(self.kernels)
        ]
        return {"kernels": found}

    def quota(self) -> dict[str, Any]:
        refresh = datetime.now(UTC) + timedelta(days=3)

        def told(used: int, total: int) -> dict[str, Any]:
            return {"timeUsed": f"{used}s", "timeReserved": "0s", "totalTimeAllowed": f"{total}s"}

        return {
            "quotaRefreshTime": refresh.strftime("%Y-%m-%dT%H:%M:%S.000Z"),
            "tpuQuota": told(0, 20 * 3600),
        } | ({"gpuQuota": told(self.gpu_used, self.gpu_quota)} if self.gpu_quota else {})

    # ------------------------------------------------------------ datasets

    def _dataset(self, asked: dict[str, Any]) -> Dataset:
        ref = f"{asked.get('ownerSlug', '')}/{asked.get('datasetSlug', '')}"
        if ref not in self.datasets:
            raise Refused(403, "Permission 'datasets.get' was denied")
        return self.datasets[ref]

    def _new_version(self, ref: str, dataset: Dataset, asked: dict[str, Any]) -> None:
        folder = self.folder / "datasets" / ref / str(len(dataset.versions) + 1)
        folder.mkdir(parents=True)
        files = asked.get("files", [])
        if self.drop_files:
            self.drop_files, files = self.drop_files - 1, files[:-1]
        for file in files:
            blob = self.blobs.pop(file.get("token", ""), None)  # a token serves once
            if blob is None or not blob.whole:
                continue  # as the site does: it says nothing
            if blob.name.endswith(".zip"):
                with zipfile.ZipFile(blob.path) as archive:
                    archive.extractall(folder / blob.name.removesuffix(".zip"))
            else:
                (folder / blob.name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(blob.path, folder / blob.name)
        dataset.versions.append(folder)
        dataset.ready = time.time() + self.processing_seconds

    def create_dataset(self, asked: dict[str, Any]) -> dict[str, Any]:
        owner, slug = asked.get("ownerSlug") or USER, asked.get("slug", "")
        title = asked.get("title", "")
        if owner != USER:
            raise Refused(403, "Permission 'datasets.create' was denied")
        if not (6 <= len(title) <= 50 and 6 <= len(slug) <= 50):
            return {"status": "error", "error": "Title and slug must have 6 to 50 characters"}
        ref = f"{owner}/{slug}"
        if ref in self.datasets or any(d.title == title for d in self.datasets.values()):
            return {
                "status": "error",
                "error": "The requested title is already in use by a dataset.",
            }
        dataset = Dataset(title, bool(asked.get("isPrivate")))
        self._new_version(ref, dataset, asked)
        self.datasets[ref] = dataset
        return {"ref": ref, "url": f"https://www.kaggle.com/datasets/{ref}", "status": "Ok"}

    def create_dataset_version(self, asked: dict[str, Any]) -> dict[str, Any]:
        dataset = self._dataset(asked)
        if dataset.status != "READY":
            raise Refused(403, "Permission 'datasets.update' was denied")
        ref = f"{asked['ownerSlug']}/{asked['datasetSlug']}"
        self._new_version(ref, dataset, asked.get("body", {}))
        return {"ref": ref, "url": f"https://www.kaggle.com/datasets/{ref}", "status": "Ok"}

    def get_dataset(self, asked: dict[str, Any]) -> dict[str, Any]:
        dataset = self._dataset(asked)
        files = [p for p in dataset.versions[-1].rglob("*") if p.is_file()]
        return {
            "ref": f"{asked['ownerSlug']}/{asked['datasetSlug']}",
            "title": dataset.title,
            "isPrivate": dataset.private,
            "currentVersionNumber": len(dataset.versions),
            "totalBytes": sum(p.stat().st_size for p in files),
        }

    def list_dataset_files(self, asked: dict[str, Any]) -> dict[str, Any]:
        dataset = self._dataset(asked)
        root = dataset.versions[asked.get("datasetVersionNumber", 0) - 1]
        every = sorted(p for p in root.rglob("*") if p.is_file())
        files, more = self._paged(every, asked, 20)
        listed = [
            {"name": p.relative_to(root).as_posix(), "totalBytes": p.stat().st_size} for p in files
        ]
        return {"datasetFiles": listed, **more}

    def download_dataset(self, asked: dict[str, Any], base: str) -> str:
        dataset = self._dataset(asked)
        root = dataset.versions[asked.get("datasetVersionNumber", 0) - 1]
        if name := asked.get("fileName"):
            if not (root / name).is_file():
                raise Refused(404, "Not found")
            return self._sign(root / name, base)
        return self._sign(self._zip(root), base)

    def _zip(self, root: Path) -> Path:
        path = self.folder / "zips" / f"{uuid.uuid4().hex}.zip"
        path.parent.mkdir(exist_ok=True)
        with zipfile.ZipFile(path, "w") as archive:
            for p in sorted(root.rglob("*")):
                if p.is_file():
                    archive.write(p, p.relative_to(root).as_posix())
        return path

    def start_upload(self, name: str, size: int, base: str) -> dict[str, Any]:
        token = uuid.uuid4().hex
        path = self.folder / "blobs" / token
        path.parent.mkdir(parents=True, exist_ok=True)
        self.blobs[token] = Blob(name, size, path)
        return {"token": token, "createUrl": f"{base}/upload/{token}"}

    # ------------------------------------------------------------ competitions

    def _competition(self, asked: dict[str, Any]) -> Competition:
        found = self.competitions.get(asked.get("competitionName", ""))
        if found is None:
            raise Refused(404, "Not found")
        if not found.rules_accepted:
            raise Refused(403, "You must accept this competition's rules before you can download")
        return found

    def list_data_files(self, asked: dict[str, Any]) -> dict[str, Any]:
        every = sorted(self._competition(asked).folder.iterdir())
        files, more = self._paged(every, asked, 20)
        return {"files": [{"name": p.name, "totalBytes": p.stat().st_size} for p in files], **more}

    def submit(self, asked: dict[str, Any], file: str) -> dict[str, Any]:
        found = self._competition(asked)
        ref = 1000 + len(found.submissions)
        made = {"ref": ref, "fileName": file, "at": time.time()}
        found.submissions.append(made | {"description": asked.get("submissionDescription", "")})
        return {"message": "Successfully submitted", "ref": ref}

    def list_submissions(self, asked: dict[str, Any]) -> dict[str, Any]:
        found = self._competition(asked)
        listed = []
        for s in reversed(found.submissions):
            scored = time.time() - s["at"] >= found.score_after
            listed.append(
                {
                    "ref": s["ref"],
                    "fileName": s["fileName"],
                    "description": s["description"],
                    "status": "COMPLETE" if scored else "PENDING",
                    **({"publicScore": "0.87500"} if scored else {}),
                }
            )
        return {"submissions": listed}

    # ------------------------------------------------------------ helpers

    def _paged(
        self, entries: list[Path], asked: dict[str, Any], default: int
    ) -> tuple[list[Path], dict[str, str]]:
        size = min(asked.get("pageSize") or default, self.page)
        start = int(asked.get("pageToken") or 0)
        more = {"nextPageToken": str(start + size)} if start + size < len(entries) else {}
        return entries[start : start + size], more

    def _sign(self, path: Path, base: str) -> str:
        until = time.time() + self.link_seconds
        return f"{base}/file/{quote(str(path.relative_to(self.folder)))}?until={until:.3f}"

    def answer(self, method: str, asked: dict[str, Any], base: str) -> Any:
        "Return the answer as JSON, or the address of a redirect as a string."
        calls: dict[str, Callable[[], Any]] = {
            "IntrospectToken": lambda: (
                {"active": True, "username": USER} if asked.get("token") == TOKEN else {}
            ),
            "SaveKernel": lambda: self.save_kernel(asked),
            "GetKernelSessionStatus": lambda: self.get_kernel_session_status(asked),
            "ListKernelSessionOutput": lambda: self.list_kernel_session_output(asked, base),
            "ListKernelFiles": lambda: self.list_kernel_files(asked),
            "GetKernel": lambda: self.get_kernel(asked),
            "ListKernels": lambda: self.list_kernels(asked),
            "GetAcceleratorQuotaStatistics": self.quota,
            "CreateDataset": lambda: self.create_dataset(asked),
            "CreateDatasetVersion": lambda: self.create_dataset_version(asked),
            "GetDataset": lambda: self.get_dataset(asked),
            "GetDatasetStatus": lambda: {"status": self._dataset(asked).status},
            "ListDatasetFiles": lambda: self.list_dataset_files(asked),
            "DownloadDataset": lambda: self.download_dataset(asked, base),
            "StartBlobUpload": lambda: self.start_upload(
                asked["name"], asked.get("contentLength", 0), base
            ),
            "ListDataFiles": lambda: self.list_data_files(asked),
            "DownloadDataFiles": lambda: self._sign(
                self._zip(self._competition(asked).folder), base
            ),
            "DownloadDataFile": lambda: self._sign(
                self._competition(asked).folder / asked["fileName"], base
            ),
            "StartSubmissionUpload": lambda: self.start_upload(
                asked["fileName"], asked.get("contentLength", 0), base
            ),
            "CreateSubmission": lambda: self.submit(
                asked, self.blobs[asked["blobFileTokens"]].name
            ),
            "CreateCodeSubmission": lambda: self.submit(asked, asked.get("fileName", "")),
            "ListSubmissions": lambda: self.list_submissions(asked),
        }
        if method not in calls:
            raise Refused(404, f"the stand-in has no {method}")
        return calls[method]()


def log_text(log: list[dict[str, Any]]) -> str:
    "Return a log as the site keeps it: a JSON array, an entry a line."
    return "[" + "\n,".join(json.dumps(line) for line in log) + "\n]"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    standin: Standin

    def log_message(self, *_: object) -> None:
        pass

    @property
    def base(self) -> str:
        return f"http://{self.headers['Host']}"

    def _body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            data = b""
            while size := int(self.rfile.readline(), 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return data
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _send(
        self, status: int, body: bytes, kind: str = "application/json", **headers: str
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Kaggle-ApiVersion", "99.0.0")  # there is always a newer client
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def _error(self, status: int, message: str, **headers: str) -> None:
        body = {"code": status, "message": message}
        if status == 429:
            body = {"error": {"code": 429, "message": message, "status": "RESOURCE_EXHAUSTED"}}
        self._send(status, json.dumps(body).encode(), **headers)

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    def _broken(self, fault: Fault | None) -> bool:
        "Do what a fault does before the call has any effect; return whether that was all."
        if fault is None:
            return False
        if fault.kind.isdigit():
            after = {"Retry_After": f"{fault.retry_after:g}"} if fault.retry_after else {}
            self._error(int(fault.kind), "an error on demand", **after)
        elif fault.kind == "reset":
            self._reset()
        elif fault.kind == "silence":
            self.standin.closing.wait(600)
            self._reset()
        else:
            return False
        return True

    def _known(self) -> bool:
        sent = self.headers.get("Authorization", "")
        basic = base64.b64encode(f"{USER}:{KEY}".encode()).decode()
        return sent in (f"Bearer {TOKEN}", f"Basic {basic}")

    def do_POST(self) -> None:
        path = urlsplit(self.path).path
        body = self._body()
        service, _, method = path.removeprefix("/api/v1/").partition("/")
        asked = json.loads(body or b"{}")
        self.standin.calls.append((method, asked))
        fault = self.standin.take_fault(method, body.decode())
        if self._broken(fault):
            return
        if not self._known() and method != "IntrospectToken":
            return self._error(401, "Unauthenticated")
        try:
            with self.standin.lock:
                answer = self.standin.answer(method, asked, self.base)
        except Refused as e:
            return self._error(e.status, str(e))
        if fault and fault.kind == "silence-after":
            self.standin.closing.wait(600)
        if fault and fault.kind in ("reset-after", "silence-after"):
            return self._reset()
        if isinstance(answer, str):
            return self._send(302, b"", Location=answer)
        self._send(200, json.dumps(answer).encode())

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        self.standin.served.append(f"GET {url.path}")
        if match := re.fullmatch(r"/api/v1/kernels/logs/stream/([^/]+)/([^/]+)", url.path):
            return self._stream(*match.groups(), parse_qs(url.query))
        if not url.path.startswith("/file/"):
            return self._error(404, "Not found")
        fault = self.standin.take_fault("file", url.path)
        if self._broken(fault):
            return None
        if float(parse_qs(url.query)["until"][0]) < time.time() or (
            fault and fault.kind == "expire"
        ):
            return self._send(403, b"<Error><Code>ExpiredToken</Code></Error>", "application/xml")
        data = (self.standin.folder / unquote(url.path.removeprefix("/file/"))).read_bytes()
        if fault and fault.kind == "error-body":
            return self._error_as_file()
        if fault and fault.kind == "flip":
            data = data[:-1] + bytes([data[-1] ^ 1])
        start, status, extra = 0, 200, {}
        if asked := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start, status = int(asked[1]), 206
            if start >= len(data):
                return self._send(416, b"", Content_Range=f"bytes */{len(data)}")
            extra = {"Content_Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}
        part = data[start:]
        kind = "application/octet-stream"
        if fault and fault.kind == "short":  # less than there is, and the header agrees
            return self._send(status, part[: len(part) // 2], kind, Accept_Ranges="bytes", **extra)
        if fault and fault.kind == "truncate":
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(part)))
            for name, value in extra.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(part[: len(part) // 2])
            self.wfile.flush()
            self.close_connection = True
            return None
        return self._send(status, part, kind, Accept_Ranges="bytes", **extra)

    def _error_as_file(self) -> None:
        self._send(200, json.dumps({"code": 500, "message": "Internal error"}).encode())

    def _stream(self, owner: str, slug: str, query: dict[str, list[str]]) -> None:
        fault = self.standin.take_fault("stream", slug)
        if self._broken(fault):
            return
        label = query.get("versionLabel", [None])[0]
        asked = {"userName": owner, "kernelSlug": slug, "versionLabel": label}
        try:
            version = self.standin._version(asked)
        except Refused as e:
            return self._error(e.status, str(e))
        if version.status in TERMINAL:
            return self._send(200, log_text(version.log).encode())
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        sent = 0
        while True:
            over = version.status in TERMINAL
            for line in version.log[sent:]:
                self.wfile.write(f"data: {json.dumps(line)}\n\n".encode())
                sent += 1
                if fault and fault.kind == "cut" and "epoch 2" in line["data"]:
                    return None  # without its last word
            self.wfile.flush()
            if over:
                self.wfile.write(b"data: END_OF_LOG\n\n")
                return None
            self.standin.closing.wait(0.1)

    def do_PUT(self) -> None:
        token = urlsplit(self.path).path.removeprefix("/upload/")
        self.standin.served.append(f"PUT {token}")
        blob = self.standin.blobs.get(token)
        fault = self.standin.take_fault("upload", blob.name if blob else "")
        if fault and fault.kind == "cut":  # half of it arrives
            size = int(self.headers.get("Content-Length", 0))
            self._keep(blob, self.rfile.read(size // 2))
            return self._reset()
        data = self._body()
        if self._broken(fault):
            return None
        if blob is None or blob.expired or (fault and fault.kind == "expire"):
            if blob:
                blob.expired = True
            return self._send(404, b"", "text/plain")
        have = blob.path.stat().st_size if blob.path.exists() else 0
        said = self.headers.get("Content-Range", "")
        if said.startswith("bytes */"):
            return self._progress(blob, have)
        if match := re.match(r"bytes (\d+)-", said):
            if int(match[1]) != have:
                return self._progress(blob, have)
        elif have:
            blob.path.unlink()
        self._keep(blob, data)
        return self._progress(blob, blob.path.stat().st_size)

    def _keep(self, blob: Blob, data: bytes) -> None:
        with open(blob.path, "ab") as f:
            f.write(data)

    def _progress(self, blob: Blob, have: int) -> None:
        if have == blob.size:
            blob.path.touch()
            return self._send(200, b"{}")
        return self._send(
            308, b"", "text/plain", **({"Range": f"bytes=0-{have - 1}"} if have else {})
        )
