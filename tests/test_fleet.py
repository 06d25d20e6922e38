"""`mlkit serve --on ray`: the contract's own suite against replicas on three nodes, and what only a fleet can meet."""

from collections.abc import Callable, Iterator
from inspect import signature
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import SERVE, Server, make_bundle, running
from test_api import *  # noqa: F403 - the same suite
from test_serve import OTHER, RED, SOFTMAX, ask, crowd, metric, slow, until

from mlkit.bundle import Golden

OF_ITS_OWN = [
    n for n, t in list(vars().items()) if n[:5] == "test_" and "start" in signature(t).parameters
]
for name in OF_ITS_OWN:  # each begins a server: whole_fleet.py has them, by hand
    del globals()[name]
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Ray Serve's own
ON_RAY = "import warnings; warnings.resetwarnings();" + SERVE.replace("serve", "fleet", 1).replace(
    "import serve;", "import serve_on_ray as serve;"
)


@pytest.fixture(scope="module")
def replicas(cluster: Any) -> Iterator[Callable[[], list[int]]]:
    "`replicas()`: how many can be asked, for each application of the cluster."
    import ray
    from ray import serve

    def running() -> list[int]:
        models = [a.deployments.get("model") for a in serve.status().applications.values()]
        return [m.replica_states.get("RUNNING", 0) if m else 0 for m in models]

    ray.init(cluster.address, log_to_driver=False, logging_level="ERROR")
    yield running
    ray.shutdown()


@pytest.fixture(scope="session")
def server(
    models: Path, cluster: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    "The server of the suite, which asks replicas."
    folder = tmp_path_factory.mktemp("server")
    more = f"ray.address={cluster.address}", "ray.at_once=1"  # the other processors are for others
    with running(models, folder, "api.max_body_mb=2", *more, program=ON_RAY) as one:
        yield one


@pytest.fixture
def start(models: Path, cluster: Any, tmp_path: Path) -> Callable:
    "`with start('api.body_seconds=1') as server`: another one."

    def begin(*assignments: str, root: Path = models, **how: Any) -> Any:
        address = f"ray.address={cluster.address}"
        return running(root, tmp_path, address, *assignments, **{"program": ON_RAY} | how)

    return begin


def test_nobody_notices_a_promotion(
    start: Callable, model_of: Callable, replicas: Callable, tmp_path: Path
) -> None:
    registry = model_of(SOFTMAX)
    (tmp_path / "0.png").write_bytes(RED)
    golden = Golden(file="golden/0.png", probabilities=(0.0, 0.0, 1.0))
    files = {"golden/0.png": tmp_path / "0.png"}
    other = make_bundle(tmp_path / "three", golden=(golden,), files=files)
    second = registry.add(make_bundle(registry.root.parent / "two", OTHER), name="color")
    with start("api.watch_seconds=0.1", root=registry.root) as server, crowd(server, 2) as said:
        until(lambda: ask(server).json()["version"] == 1)
        there = len(replicas())
        registry.promote(second.ref)
        until(lambda: ask(server).json()["version"] == 2)
        until(lambda: metric(server, 'mlkit_swaps_total{model="color",outcome="swapped"}') == 1)
        until(lambda: len(replicas()) <= there)  # the first version is gone
        registry.promote(
            registry.add(other, name="color").ref
        )  # whose answers are not the export's
        troubles = lambda: httpx.get(f"{server.url}/health/ready").json()["troubles"]  # noqa: E731
        until(troubles)
        assert "color@3 was not taken in: golden/0.png" in troubles()[0]
        until(lambda: len(replicas()) <= there)
    answers = [r.json() for r in said]
    assert {r.status_code for r in said} == {200} and {a["version"] for a in answers} == {1, 2}
    for a in answers:
        assert (a["predictions"][0]["label"] == "red") == (a["version"] == 1), a


def test_a_node_is_lost_under_load_and_then_the_door(
    start: Callable, model_of: Callable, cluster: Any, replicas: Callable, server: Server
) -> None:
    # with the replica of `server` there are as many as processors
    root, lost = model_of(slow(20_000)).root, cluster.add_node(num_cpus=1)
    with start("ray.ongoing=1", "ray.at_once=3", root=root) as door, crowd(door, 6) as said:
        until(lambda: 3 in replicas(), 120)  # one of them on the node that will be lost
        before = len(said)
        cluster.remove_node(lost, allow_graceful=False)
        until(lambda: len(said) > before + 200)
        answers = [getattr(r, "status_code", r) for r in said]
        door.process.kill()
    assert set(answers) == {200}
    assert "a replica was lost" in door.log.read_text()
    there = len(replicas())
    with start():  # the next door removes what the killed one left
        until(lambda: len(replicas()) == there)


def test_what_cannot_be_is_said(models: Path, tmp_path: Path, start: Callable) -> None:
    for words, said in (("ray.cpus=64", "no node has 64 CPU"), ("api.processes=2", "one process")):
        with pytest.raises(AssertionError, match=said), start(words):
            pass
