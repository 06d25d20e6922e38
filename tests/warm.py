"""Processes that begin with their libraries imported: a parent imports them once and forks a child for each command.

`run` and `Popen` are those of subprocess, for commands of this Python: `-c PROGRAM`, `-m MODULE`, with `-W` before
them. Kernels of Jupyter begin in the same way, whoever asks for them: a kernelspec on JUPYTER_PATH says so. A child
is a process like any other, with its own environment, folder, streams, signals and exit code; what it does not do
again is the import of `LIBRARIES`. No module of mlkit is among these: what is tested is imported anew. The parents are shared by all workers of a test run, begun when they are first asked for, and end with it.
"""

import atexit
import contextlib
import fcntl
import gc
import importlib
import json
import os
import random
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
import warnings
from pathlib import Path
from typing import Any

COUNTED = "COVERAGE_PROCESS_CONFIG"  # the variable that says that lines are counted, and how
FOLDER = "WARM_FOLDER"  # the variable that names where the parents of this test run listen
LIBRARIES = {
    "light": "fastapi httptools httpx multiprocessing.spawn numpy onnxruntime PIL.Image "
    "prometheus_client pydantic_settings rich.progress starlette.middleware.cors tokenizers "
    "typer uvicorn uvloop",
    "heavy": "debugpy fastai.tabular.all fastai.text.all fastai.vision.all fastapi "
    "IPython.core.interactiveshell jupyter_client.session matplotlib.pyplot nbdev.test "
    "onnx.parser onnxruntime onnxscript.function_libs.torch_lib.ops onnxscript.optimizer "
    "pandas pydantic_settings rich.progress safetensors.torch sklearn.datasets "
    "sklearn.ensemble sklearn.linear_model sklearn.model_selection sklearn.tree timm "
    "tokenizers torch._dynamo torch.export typer uvicorn",
}


def begin() -> None:
    "Let parents be begun by this process and by those that inherit its environment."
    os.environ[FOLDER] = tempfile.mkdtemp(prefix="warm-")
    folder = Path(os.environ[FOLDER])
    (folder / "owner").write_text(str(os.getpid()))
    _name_kernel(folder)


def _name_kernel(folder: Path) -> None:
    "Let whoever inherits the environment of this process find a kernel that is a child of the parent there."
    (folder / "kernels/python3").mkdir(parents=True)
    command = [sys.executable, "-I", __file__, "kernel", folder, "{connection_file}"]
    spec = {"argv": list(map(str, command)), "display_name": "Python 3", "language": "python"}
    (folder / "kernels/python3/kernel.json").write_text(json.dumps(spec))
    paths = [str(folder), *filter(None, [os.environ.get("JUPYTER_PATH")])]
    os.environ["JUPYTER_PATH"] = os.pathsep.join(paths)


def seat(folder: str) -> None:
    "Let the kernel that this process begins be a fork of it as it is now: of its network, its packages, its variables."
    Path(folder, "owner").write_text(str(os.getpid()))
    _name_kernel(Path(folder))
    if os.fork() == 0:
        nothing = os.open(os.devnull, os.O_RDWR)
        for number in range(3):
            os.dup2(nothing, number)
        _listen(f"{folder}/heavy.socket", list(warnings.filters))


def end() -> None:
    "End the parents; their children stay."
    folder = Path(os.environ.pop(FOLDER))
    for said in folder.glob("*.pid"):
        os.kill(int(said.read_text()), signal.SIGKILL)
    shutil.rmtree(folder)


def _connect(kind: str) -> socket.socket:
    "Return a connection to the parent of that kind, which is begun if there is none."
    folder = Path(os.environ[FOLDER])
    address = folder / f"{kind}.socket"
    with open(folder / f"{kind}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not address.exists():
            command = [sys.executable, "-W", "ignore", __file__, kind, address]
            with open(folder / f"{kind}.log", "w") as log:
                pipes = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
                env = {k: v for k, v in os.environ.items() if k != COUNTED}
                started = subprocess.Popen(command, start_new_session=True, env=env, **pipes)
            (folder / f"{kind}.pid").write_text(str(started.pid))
            while not address.exists():
                if started.poll() is not None:
                    raise RuntimeError((folder / f"{kind}.log").read_text())
                time.sleep(0.02)
            started.returncode = 0  # nobody waits for it
    one = socket.socket(socket.AF_UNIX)
    one.connect(str(address))
    return one


class Popen(subprocess.Popen):
    "A child of a warm parent; `kind` says of which, `tied` whether it is killed when this process ends."

    def __init__(self, args: Any, *, kind: str = "heavy", tied: bool = False, **options: Any):
        self.kind, self.tied = kind, tied
        super().__init__(args, **options)

    def _execute_child(  # what subprocess calls when the pipes are made
        self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo,
        creationflags, shell, p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite,
        restore_signals, gid, gids, uid, umask, start_new_session, process_group=-1,
    ) -> None:  # fmt: skip
        asked = _asked([os.fspath(a) for a in args]) | {
            "cwd": os.fspath(cwd or os.getcwd()),
            "env": dict(os.environ if env is None else env),
            "session": start_new_session,
            "tied": self.tied,
        }
        inherited = zip((p2cread, c2pwrite, errwrite), (0, 1, 2), strict=True)
        streams = [own if pipe == -1 else pipe for pipe, own in inherited]
        self.parent = _connect(self.kind)
        told = json.dumps(asked).encode()
        socket.send_fds(self.parent, [len(told).to_bytes(8, "little")], streams)
        self.parent.sendall(told)
        self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)
        self._child_created = True
        self.pid = int.from_bytes(self.parent.recv(8, socket.MSG_WAITALL), "little")

    def _internal_poll(self, *args: Any, **options: Any) -> int | None:
        return self._ended(0)

    def _wait(self, timeout: float | None) -> int:
        if self._ended(timeout) is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode

    def _ended(self, timeout: float | None) -> int | None:
        if self.returncode is None and select.select([self.parent], [], [], timeout)[0]:
            said = self.parent.recv(8, socket.MSG_WAITALL)
            self.parent.close()
            self.returncode = (
                int.from_bytes(said, "little", signed=True) if said else -signal.SIGKILL
            )
        return self.returncode


def run(
    *args: Any,
    input: Any = None,
    capture_output: bool = False,
    timeout: float | None = None,
    check: bool = False,
    **options: Any,
) -> subprocess.CompletedProcess:
    "Do what `subprocess.run` does."
    if input is not None:
        options["stdin"] = subprocess.PIPE
    if capture_output:
        options["stdout"] = options["stderr"] = subprocess.PIPE
    with Popen(*args, **options) as process:
        try:
            out, errors = process.communicate(input, timeout)
        except BaseException:
            process.kill()
            raise
    done = subprocess.CompletedProcess(process.args, process.returncode, out, errors)
    if check:
        done.check_returncode()
    return done


def _kernel(folder: str, file: str, *more: str) -> int:
    "Be, for whoever began this process, the kernel that a child of the parent is: signals pass, and both end together."
    os.environ[FOLDER] = folder
    os.environ.setdefault("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", file, *more]
    began, kernel = os.getppid(), Popen(command, tied=True)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda n, _: os.kill(kernel.pid, n))
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return kernel.wait(1)
        if os.getppid() != began:
            return 1


def _asked(args: list[str]) -> dict[str, Any]:
    rest, filters = args[1:], []
    while rest[0] == "-W":
        filters, rest = [*filters, rest[1]], rest[2:]
    if rest[0] not in ("-c", "-m"):
        raise ValueError(f"{rest[0]}: -c and -m can be said, and -W before them")
    return {
        "python": args[0],
        "filters": filters,
        "how": rest[0],
        "what": rest[1],
        "words": rest[2:],
    }


# ---------------------------------------------------------------- the parent


def _parent(kind: str, address: str) -> None:
    usual = list(warnings.filters)
    for name in LIBRARIES[kind].split():
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # what is there is not touched again, so the children share it
    _listen(address, usual)


def _listen(
    address: str,  # of the socket, beside a file that says whose this process is
    usual: list,  # the filters of warnings that a new process has
) -> None:
    "Fork for each that asks, until the owner is gone; a child becomes what was asked."
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    owner = int(Path(address).with_name("owner").read_text())
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address + ".new")
        listener.listen(128)
        os.rename(address + ".new", address)
        while True:
            if not select.select([listener], [], [], 1)[0]:
                try:
                    os.kill(owner, 0)
                except ProcessLookupError:
                    os._exit(0)
                continue
            caller, _ = listener.accept()
            if os.fork() == 0:
                break
            caller.close()
    asked = _in_between(caller)
    _prepare(asked, usual)
    _leave(_done(asked))


def _in_between(caller: socket.socket) -> dict[str, Any]:
    "Fork once more, and tell the caller what became of it; return in the child."
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    length, streams, _, _ = socket.recv_fds(caller, 8, 3)
    left, told = int.from_bytes(length, "little"), b""
    while len(told) < left:
        told += caller.recv(left - len(told))
    asked = json.loads(told)
    child = os.fork()
    if child == 0:
        caller.close()
        for number, stream in enumerate(streams):
            os.dup2(stream, number + 100)
            os.close(stream)
        for number in range(3):
            os.dup2(number + 100, number)
            os.close(number + 100)
        return asked
    for stream in streams:
        os.close(stream)
    for number in range(3):
        os.close(number)
    try:
        caller.send(child.to_bytes(8, "little"))
        ended = os.pidfd_open(child)
        if asked["tied"] and ended not in select.select([ended, caller], [], [])[0]:
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        caller.send(os.waitstatus_to_exitcode(status).to_bytes(8, "little", signed=True))
    finally:
        os._exit(0)


def _prepare(asked: dict[str, Any], usual: list) -> None:
    "Make of this process what Python would make of a new one."
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if asked["session"]:
        os.setsid()
    os.environ.clear()
    os.environ.update(asked["env"])
    os.chdir(asked["cwd"])
    if COUNTED in os.environ:
        importlib.import_module("coverage").process_startup()
    sys.stdin = sys.__stdin__ = open(0, closefd=False)
    sys.stdout = sys.__stdout__ = open(1, "w", closefd=False)
    sys.stderr = sys.__stderr__ = open(2, "w", 1, errors="backslashreplace", closefd=False)
    added = warnings.filters[: len(warnings.filters) - len(usual)]
    sys.warnoptions[:] = [
        *filter(None, os.environ.get("PYTHONWARNINGS", "").split(",")),
        *asked["filters"],
    ]
    warnings.resetwarnings()
    warnings.filters[:] = usual[1:]  # Python's own, without the `-W ignore` of the parent
    warnings._processoptions(sys.warnoptions)
    warnings.filters[:0] = added
    random.seed()
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()
    if asked["what"] == "ipykernel_launcher":
        _see_a_notebook()
    if (
        "torch" in sys.modules
    ):  # as if nothing had been drawn: each process begins with the same seed
        sys.modules["torch"].manual_seed(sys.modules["torch"].initial_seed())
    if asked["python"] != sys.executable:
        _become(asked["python"])
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    own = asked["cwd"] if asked["how"] == "-m" else ""
    sys.path[:] = [own, *(p for p in paths if p and p not in sys.path), *sys.path[1:]]
    importlib.invalidate_caches()


def _see_a_notebook() -> None:
    "Make good what libraries look for once, when they are imported: whether this is a notebook."
    if "matplotlib" in sys.modules:
        sys.modules["matplotlib"].rcParams["backend"] = os.environ["MPLBACKEND"]
        sys.modules.pop("matplotlib_inline.backend_inline", None)
    bars = vars(sys.modules.get("fastprogress.fastprogress", types))
    there = {
        "master_bar": bars.get("NBMasterBar"),
        "progress_bar": bars.get("NBProgressBar"),
        **dict.fromkeys(("IN_IPYTHON", "IN_JUPYTER", "IN_NOTEBOOK"), True),
    }
    for module in list(sys.modules.values()):
        for name in there.keys() & vars(module).keys():
            setattr(module, name, there[name])


def _become(python: str) -> None:
    "Find modules where another interpreter of this version, which has the same libraries, finds them."
    program = "import json, sys; print(json.dumps([sys.prefix, sys.path]))"
    done = subprocess.run([python, "-c", program], check=True, capture_output=True)
    sys.prefix, sys.path[:] = json.loads(done.stdout)
    sys.exec_prefix, sys.executable = sys.prefix, python
    sys.meta_path[:] = [
        f for f in sys.meta_path if "__editable__" not in getattr(f, "__module__", "")
    ]


def _done(asked: dict[str, Any]) -> int:
    "Run what was asked for; return the exit code."
    sys.argv = ["-c", *asked["words"]]
    try:
        if asked["how"] == "-m":
            sys.argv[0] = asked["what"]
            runpy.run_module(asked["what"], run_name="__main__", alter_sys=True)
        else:
            main = sys.modules["__main__"] = types.ModuleType("__main__")
            main.__dict__["__builtins__"] = __builtins__
            exec(compile(asked["what"], "<string>", "exec"), main.__dict__)
    except SystemExit as e:
        if e.code is None or isinstance(e.code, int):
            return e.code or 0
        print(e.code, file=sys.stderr)
        return 1
    except BaseException as e:
        if isinstance(e, KeyboardInterrupt):
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        traceback.print_exception(e)
        return -signal.SIGINT if isinstance(e, KeyboardInterrupt) else 1
    return 0


def _leave(code: int) -> None:
    "End as Python does, but for taking its modules down: to touch all that is shared would take longer than most commands."
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            code = code or 120
    if code < 0:
        os.kill(os.getpid(), -code)
    os._exit(code & 0xFF)


if __name__ == "__main__":
    if sys.argv[1] == "kernel":
        sys.exit(_kernel(*sys.argv[2:]))
    _parent(*sys.argv[1:])
