"""The tests of test_api.py and test_serve.py that begin a server each, on Ray: `pytest tests/whole_fleet.py`, four minutes, by hand."""

from collections.abc import Callable

import test_api
import test_fleet
from test_serve import (  # noqa: F401
    LIME,
    ask,
    slow,
    test_a_second_signal_ends_it,
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

server, start = test_fleet.server, test_fleet.start
globals().update({name: getattr(test_api, name) for name in test_fleet.OF_ITS_OWN})


def test_a_replica_that_hangs_is_replaced(start: Callable, model_of: Callable) -> None:
    settings = ("api.predict_seconds=1", "api.engine=onnxruntime")
    with start(*settings, root=model_of(slow(2_000_000_000)).root) as server:
        assert ask(server).status_code == 504
        assert ask(server, LIME).status_code == 504
        until(lambda: ask(server, LIME).is_success)
