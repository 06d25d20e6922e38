"""What a fleet can meet, and the tests of test_api.py and test_serve.py that begin a server each: `pytest tests/whole_fleet.py`, five minutes, by hand."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import test_api
import test_fleet
import test_serve
from conftest import Server, make_bundle
from test_serve import (  # noqa: F401
    LIME,
    OTHER,
    RED,
    SOFTMAX,
    ask,
    crowd,
    metric,
    slow,
    test_a_version_that_cannot_be_taken_in_is_named,
    test_a_version_that_is_asked_for_is_the_one_that_answers,
    test_bodies_have_a_budget_together,
    test_keys,
    test_nobody_is_left_standing_at_the_door,
    test_slow_and_endless_headers_are_cut_off,
    test_the_excess_is_told_to_come_again,
    test_trailers_without_end_are_cut_off,
    test_what_takes_too_long_keeps_its_place_until_it_ends,
    until,
)

from mlkit.bundle.manifest import Golden

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Ray Serve's own
server, start = test_fleet.server, test_fleet.start
http, local = test_api.http, test_api.local
globals().update({name: getattr(test_api, name) for name in test_fleet.OF_ITS_OWN})


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
    with (
        start("ray.target_requests=1", "ray.max_workers=3", root=root) as door,
        crowd(door, 6) as said,
    ):
        until(lambda: 3 in replicas(), 120)  # one of them on the node that will be lost
        raylet = lost.all_processes["raylet"][0].process.pid
        workers = Path(f"/proc/{raylet}/task/{raylet}/children").read_text().split()
        for pid in [*map(int, workers), raylet]:  # all of a node ends at once
            os.kill(pid, signal.SIGKILL)
        cluster.remove_node(lost, allow_graceful=False)
        until(lambda: 3 not in replicas())
        before = len(said)
        until(lambda: len(said) > before + 200)
        answers = [getattr(r, "status_code", r) for r in said]
        door.process.kill()
    assert set(answers) == {200}
    assert "a replica was lost" in door.log.read_text()
    there = len(replicas())
    with start():  # the next door removes what the killed one left
        until(lambda: len(replicas()) == there)


def test_a_replica_that_hangs_is_replaced(start: Callable, model_of: Callable) -> None:
    settings = ("api.predict_seconds=1", "api.engine=onnxruntime")
    with start(*settings, root=model_of(slow(2_000_000_000)).root) as server:
        assert ask(server).status_code == 504
        assert ask(server, LIME).status_code == 504
        until(lambda: ask(server, LIME).is_success)


def test_a_second_signal_ends_it(start: Callable, model_of: Callable) -> None:
    test_serve.test_a_second_signal_ends_it(1, start, model_of)
