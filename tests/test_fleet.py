"""`mlkit serve --on ray`: the contract's own suite against replicas on three nodes, and what cannot be. The rest, which takes longer, is in whole_fleet.py."""

from collections.abc import Callable, Iterator
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
from conftest import SERVE, Server, running
from test_api import *  # noqa: F403 - the same suite

OF_ITS_OWN = [
    n for n, t in list(vars().items()) if n[:5] == "test_" and "start" in signature(t).parameters
]
for name in OF_ITS_OWN:  # each begins a server: whole_fleet.py has them, by hand
    del globals()[name]
ON_RAY = "import warnings; warnings.resetwarnings();" + SERVE.replace(
    "mlkit.api.server import serve;", "mlkit.cluster.serve import serve_on_ray as serve;"
)


@pytest.fixture(scope="module")
def server(
    models: Path, cluster: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    "The server of the suite, which asks replicas."
    folder = tmp_path_factory.mktemp("server")
    more = (
        f"ray.address={cluster.address}",
        "ray.max_workers=1",
    )  # the other processors are for others
    with running(models, folder, "api.max_body_mb=2", *more, program=ON_RAY) as one:
        yield one


@pytest.fixture
def start(models: Path, cluster: Any, tmp_path: Path) -> Callable:
    "`with start('api.body_seconds=1') as server`: another one."

    def begin(*assignments: str, root: Path = models, **how: Any) -> Any:
        address = f"ray.address={cluster.address}"
        return running(root, tmp_path, address, *assignments, **{"program": ON_RAY} | how)

    return begin


def test_what_cannot_be_is_said(models: Path, tmp_path: Path, start: Callable) -> None:
    for words, said in (("ray.cpus=64", "no node has 64 CPU"), ("api.processes=2", "one process")):
        with pytest.raises(AssertionError, match=said), start(words):
            pass
