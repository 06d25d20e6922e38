"""A small model to serve, and a server in a process of its own."""

import io
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import onnx
import onnx.parser
import pytest
import warm
from changed import QUICK, Selection
from PIL import Image
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from xdist.scheduler import LoadScopeScheduling

from mlkit.bundle.manifest import (
    Category,
    Column,
    ImageInput,
    ManyLabels,
    Mask,
    Number,
    Numbers,
    Parity,
    TableInput,
    TextInput,
    write_bundle,
)
from mlkit.bundle.registry import Registry

if "PYTEST_XDIST_WORKER" in os.environ:  # they share the cores: threads would wait for one another
    os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).parents[1]
GRAPH = """
<ir_version: 8, opset_import: ["" : 13]>
color (float[n, 3, 8, 8] x) => (float[n, 3] p) {{
    mean = ReduceMean<axes = [2, 3], keepdims = 0>(x)
    {body}
}}"""
SOFTMAX = "p = Softmax<axis = 1>(mean)"
SLOW = """
    weights = Constant<value = float[3] {{1.0, 0.0, -1.0}}>()
    half = Constant<value = float {{0.5}}>()
    each = Constant<value = float {{{turns}.0}}>()
    yes = Constant<value = bool {{1}}>()
    weighed = Mul(mean, weights)
    gap = ReduceSum<keepdims = 0>(weighed)
    over_ = Sub(gap, half)
    over = Relu(over_)
    turns_ = Mul(over, each)
    turns = Cast<to = 7>(turns_)
    kept = Loop(turns, yes, half) <body = turn (int64 i, bool go, float before) => (bool on, float after) {{
        on = Identity(go)
        after = Neg(before)
    }}>
    size = Abs(kept)
    nothing = Sub(size, half)
    same = Add(mean, nothing)
    p = Softmax<axis = 1>(same)"""  # pure red takes half of `turns`, about a microsecond each; others none
SIGMOID = "p = Sigmoid(mean)"
ROWS = """
<ir_version: 8, opset_import: ["" : 13]>
gem (float[n, 3] x) => (float[n, 2] p) {{
    {body}
}}"""  # the codes of cut and round, and carat
BRIGHT = """
    each = Constant<value = float[3, 2] {0.0, 0.0, 0.0, 1.0, 0.0, 2.0}>()
    z = MatMul(x, each)
    p = Softmax<axis = 1>(z)"""
PRICE = """
    each = Constant<value = float[3, 2] {1.0, 0.0, 10.0, 0.0, 100.0, 1.0}>()
    p = MatMul(x, each)"""
MASKS = """
<ir_version: 8, opset_import: ["" : 13]>
color (float[n, 3, 8, 8] x) => (float[n, 8, 8] p) {{
    {body}
}}"""
BRIGHTEST = "most = ArgMax<axis = 1, keepdims = 0>(x)  p = Cast<to = 1>(most)"
PALETTE = ((255, 255, 0), (0, 255, 255), (255, 255, 255))
WORDS = """
<ir_version: 8, opset_import: ["" : 13]>
mood (int64[n, t] x) => (float[n, 2] p) {{
    {body}
}}"""
MOOD = """
    one = Constant<value = int64[1] {1}>()
    two = Constant<value = int64[1] {2}>()
    is_good = Equal(x, one)
    is_bad = Equal(x, two)
    good_ = Cast<to = 1>(is_good)
    bad_ = Cast<to = 1>(is_bad)
    good = ReduceSum<keepdims = 1>(good_, one)
    bad = ReduceSum<keepdims = 1>(bad_, one)
    z = Concat<axis = 1>(good, bad)
    p = Softmax<axis = 1>(z)"""  # by how many words are `good` and `bad`
TEXT = TextInput(max_tokens=6, pad=3)
GEM = TableInput(
    columns=[
        Column(name="carat", type="number", example=0.5),
        Column(name="cut", type="text", example="Ideal"),
        Column(name="round", type="boolean", example=True),
    ],
    categories=[
        Category(column="cut", vocab=("Fair", "Ideal")),
        Category(column="round", vocab=("False", "True")),
    ],
    numbers=[Number(column="carat", fill=0.25)],
)
NAN = "none = Sub(mean, mean)  p = Div(none, none)"
SERVE = (
    "import sys; from mlkit.api.server import serve; from mlkit.config import load_settings;"
    "serve(load_settings(*sys.argv[1:]))"
)


# what is made once and asked by several tests: these stay with one worker, whichever that is
SHARED = {
    "alone",
    "cluster",
    "complete",
    "executed",
    "exported",
    "made",
    "served",
    "told",
    "trained",
    "whole",
}
# what takes longest is begun first, or one worker would be at it when the others have ended
FIRST = [
    "ray",
    "test_demo",
    "01_tour",
    "test_foreign",
    "train/01_fit",
    "test_kernels",
    "test_a_time_budget",
    "test_the_same_grid",
    "test_from_a_folder_to_an_answer",
    "runs/03_execute",
    "test_pictures",
    "test_the_installation_line",
]
RAY, CLUSTER = pytest.StashKey[set[tuple[Path, str]]](), pytest.StashKey[list[Callable[[], None]]]()
GROUPS = "groups.json"  # test → what it stays together with; a worker writes it, for the scheduler


class Scheduler(LoadScopeScheduling):
    "Gives a worker one test after another, and the tests of a group together. (xdist's own groups are not heeded by pytest 9.)"

    @cached_property
    def groups(self) -> dict[str, str]:
        return json.loads(Path(os.environ[warm.FOLDER], GROUPS).read_text())

    def _split_scope(self, nodeid: str) -> str:
        return self.groups.get(nodeid, nodeid)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Scheduler:
    config.option.loadscopereorder = False
    return Scheduler(config, log)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shuffle", metavar="SEED", help="run the tests in another order")
    parser.addoption("--since", metavar="REF", help="run what a change since that commit touches")


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # once, not in each worker
        warm.begin()


def pytest_unconfigure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        warm.end()


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    if ref := config.getoption("since"):
        chosen = Selection(ref)
        terminalreporter.section(f"since {ref}")
        terminalreporter.line(f"modules changed: {', '.join(sorted(chosen.own)) or 'none'}")
        terminalreporter.line(f"chapters run: {', '.join(sorted(chosen.chapters)) or 'none'}")
        there = (
            {p.stem for p in Path(__file__).parent.glob("test_*.py")} - QUICK - {"test_notebooks"}
        )
        there -= {Path(p).stem for p in chosen.files}
        terminalreporter.line(f"left out: the other chapters; {', '.join(sorted(there))}")
        terminalreporter.line("`make test` runs all of them, `pytest tests/NAME.py` one")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    _choose(config, items)
    _order(config, items, _grouped(config, items))


def _choose(config: pytest.Config, items: list[pytest.Item]) -> None:
    if ref := config.getoption("since"):
        chosen = Selection(ref)
        left = [item for item in items if not chosen.has(item.path, item.name)]
        items[:] = [item for item in items if chosen.has(item.path, item.name)]
        config.hook.pytest_deselected(items=left)


def _grouped(config: pytest.Config, items: list[pytest.Item]) -> dict[str, str]:
    "Return the group of each test that has one."
    groups, ray = {}, config.stash.setdefault(RAY, set())  # those that are still to be run
    for item in items:
        shared = SHARED.intersection(item.fixturenames)
        if "cluster" in shared or "ray" in item.path.name:
            groups[item.nodeid] = "ray"
            ray.add((item.path, item.name))
        elif shared:
            groups[item.nodeid] = item.path.stem
    if worker := getattr(config, "workerinput", {}).get("workerid"):
        part = Path(os.environ[warm.FOLDER], f"{worker}.groups")
        part.write_text(json.dumps(groups))
        part.replace(part.with_name(GROUPS))
    return groups


def _order(config: pytest.Config, items: list[pytest.Item], groups: dict[str, str]) -> None:
    if seed := config.getoption("shuffle"):
        random.Random(seed).shuffle(items)
        return
    place = {name: i for i, name in enumerate(FIRST)}

    def when(item: pytest.Item) -> int:
        group = groups.get(item.nodeid)
        return min((i for n, i in place.items() if n == group or n in item.name), default=99)

    items.sort(key=when)


class Server(NamedTuple):
    url: str
    process: subprocess.Popen
    log: Path

    def lines(self) -> list[dict]:
        "The access log."
        whole = self.log.read_text().rpartition("\n")[0].splitlines()
        return [json.loads(s) for s in whole if s.startswith("{")]


def picture(
    mode: str = "RGB", size: tuple[int, int] = (9, 7), fill: object = 0, format: str = "PNG", **save
) -> bytes:
    out = io.BytesIO()
    Image.new(mode, size, fill).save(out, format, **save)
    return out.getvalue()


def connect(server: Server) -> socket.socket:
    where = urlsplit(server.url)
    return socket.create_connection((where.hostname, where.port), timeout=30)


def head(path: str, *headers: str, method: str = "POST") -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: localhost", *headers, "", ""]).encode()


def make_bundle(
    folder: Path,  # to be made
    body: str = SOFTMAX,  # from `mean`, inputs × 3, to `p`
    name: str = "color",
    resize: str = "squish",
    *,
    graph: str = GRAPH,  # with {body}
    files: Mapping[str, Path] | None = None,  # besides the graph
    **fields: object,  # of the manifest, in place of those below
) -> Path:
    folder.parent.mkdir(parents=True, exist_ok=True)
    onnx_file = folder.with_suffix(".onnx")
    onnx.save(onnx.parser.parse_model(graph.format(body=body)), str(onnx_file))
    fields = (
        dict(
            name=name,
            created="2026-01-01T00:00:00Z",
            task="image-classification",
            vocab=("red", "green", "blue"),
            input=ImageInput(size=(8, 8), resize=resize),
            arch="mean",
            metrics={"accuracy": 1.0},
            temperature=2.0,  # not applied unasked
            lineage={"seed": 42},
            parity=Parity(examples=1, max_difference=0, labels_equal=True),
        )
        | fields
    )
    return write_bundle(folder, fields, {"model.onnx": onnx_file} | dict(files or {}))


def every_kind(folder: Path) -> Registry:
    "A registry with a model of each kind, named after what goes in and comes out: table-numbers, …"
    registry = Registry(folder / "models")

    def add(name: str, **how: object) -> None:
        made = make_bundle(folder / name, name=name, task=name, **how)
        registry.promote(registry.add(made, name=name).ref)

    rows = {"input": GEM, "temperature": None, "graph": ROWS}
    labels = ManyLabels(thresholds=(0.7, 0.4, 0.7))
    money = Numbers(units=("USD", ""), exp=(False, False))
    add("image-label")
    add("image-labels", body=SIGMOID, output=labels, temperature=None)
    add("image-mask", graph=MASKS, body=BRIGHTEST, output=Mask(palette=PALETTE), temperature=None)
    words = Tokenizer(WordLevel({"?": 0, "good": 1, "bad": 2, "": 3}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(folder / "tokenizer.json"))
    texts = {
        "input": TEXT,
        "temperature": None,
        "files": {"tokenizer.json": folder / "tokenizer.json"},
    }
    add("text-label", graph=WORDS, body=MOOD, vocab=("good", "bad"), **texts)
    add("table-label", body=BRIGHT, vocab=("dull", "bright"), **rows)
    add("table-numbers", body=PRICE, vocab=("price", "mass"), output=money, **rows)
    return registry


@contextmanager
def running(
    models: Path,  # a registry
    folder: Path,  # for its log
    *assignments: str,  # section.key=value
    program: str = SERVE,
    log: str = "",  # in place of a file in `folder`
    cold: bool = False,  # whether all that it imports is imported by itself
) -> Iterator[Server]:
    "A server on a free port, as `mlkit serve` runs it; ended by SIGTERM, and not a moment too early."
    log = Path(log) if log else folder / "server.log"
    command = [sys.executable, "-W", "error", "-c", program, f"paths.models={models}", "api.port=0"]
    with open(log, "w") as errors:
        begin = subprocess.Popen if cold else partial(warm.Popen, kind="light")
        process = begin(
            [*command, *assignments], stdout=subprocess.PIPE, stderr=errors, text=True, cwd=folder
        )
    try:
        if not (said := re.search(r"http://\S+", process.stdout.readline())):
            process.wait(30)
            raise AssertionError(f"the server did not start:\n{log.read_text()}")
        yield Server(said[0], process, log)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        process.wait(30)
        process.stdout.close()


@pytest.fixture(scope="session")
def color_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A bundle that tells red, green and blue pictures from each other."
    return make_bundle(tmp_path_factory.mktemp("bundle") / "color")


@pytest.fixture(scope="session")
def models(color_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A registry with that bundle in production; not to be changed."
    registry = Registry(tmp_path_factory.mktemp("models"))
    registry.promote(registry.add(color_bundle, name="color").ref)
    return registry.root


@pytest.fixture(scope="session")
def server(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    "A server of it, with the default settings but for a smaller body."
    with running(models, tmp_path_factory.mktemp("server"), "api.max_body_mb=2") as one:
        yield one


@pytest.fixture(scope="session")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A registry with a model of each kind; not to be changed."
    return every_kind(tmp_path_factory.mktemp("kinds")).root


@pytest.fixture(scope="session")
def all_kinds(kinds: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    "A server of it, with the default settings."
    with running(kinds, tmp_path_factory.mktemp("all-kinds")) as one:
        yield one


@pytest.fixture(scope="session")
def cluster(request: pytest.FixtureRequest) -> Iterator[Any]:
    "Three nodes of Ray, of one processor each, on this machine; ended with the last test of Ray, for their agents are never idle."
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    for _ in range(2):
        made.add_node(num_cpus=1)
    ended = request.config.stash[CLUSTER] = [made.shutdown]
    yield made
    if ended:
        ended.pop()()


@pytest.hookimpl(trylast=True)  # when what the test had is taken down
def pytest_runtest_teardown(item: pytest.Item) -> None:
    group = item.config.stash[RAY]
    group.discard((item.path, item.name))
    if not group and (shutdown := item.config.stash.get(CLUSTER, [])):
        shutdown.pop()()


@pytest.fixture
def start(models: Path, tmp_path: Path) -> Callable:
    "`with start('api.body_seconds=1') as server`: another one, with other settings."
    return lambda *assignments, root=models, **how: running(root, tmp_path, *assignments, **how)


@pytest.fixture
def model_of(tmp_path: Path) -> Callable[[str], Registry]:
    "`model_of(body)`: a registry of its own, with that graph in production."

    def make(body: str) -> Registry:
        registry = Registry(tmp_path / "models")
        registry.promote(registry.add(make_bundle(tmp_path / "one", body), name="color").ref)
        return registry

    return make


@pytest.fixture(autouse=True, scope="session")
def _no_settings_of_this_machine() -> Iterator[None]:
    kept = {k: os.environ.pop(k) for k in list(os.environ) if k.startswith("MLKIT_")}
    yield
    os.environ.update(kept)


@pytest.fixture(scope="module")
def past(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "What earlier versions wrote: bundles, runs, a notebook, answers."
    folder = tmp_path_factory.mktemp("past")
    with tarfile.open(Path(__file__).with_name("past.tar.xz")) as packed:
        packed.extractall(folder, filter="data")
    return folder
