"""One answer on its way to several who asked for the same: joining, following, leaving."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
import queue
import random
import select
import threading
import time
import weakref
from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from clock import FakeClock
from processes import descriptors
from project import load_script
from waiting import eventually, in_parallel

ocp = load_script("ocp_server.py")


# ---------------------------------------------------------------------------
# Flights, without a server
# ---------------------------------------------------------------------------

class Someone:
    """A follower's client. It leaves after so many looks at it."""

    def __init__(self, patience: int = 10_000) -> None:
        self._patience = patience

    def fileno(self) -> int:
        """Nothing here selects."""
        raise NotImplementedError

    def gone(self) -> bool:
        self._patience -= 1
        return self._patience < 0

    def listens(self) -> bool:
        return True


def said(*texts: str) -> list[Any]:
    """The events of an answer as far as it has come."""
    began = [ocp.Started("msg_1", "claude-sonnet-5", ocp.NO_USAGE),
             ocp.BlockStarted(0, {"type": "text", "text": ""})]
    return [(0, event) for event in (*began, *(ocp.Delta(0, "text", text) for text in texts))]


END = (0, ocp.Finished("end_turn", None, ocp.NO_USAGE))


@pytest.fixture
def cache() -> Any:
    return ocp.Cache()


CONFIG = dataclasses.replace(ocp.Config(), cache_ttl_ms=60_000)


@pytest.fixture
def flight(cache: Any) -> Iterator[Any]:
    """A flight that somebody has just missed the cache for."""
    place = cache.lookup("a", 60)
    yield place.flight
    cache.settle(place.flight, (), CONFIG)


def landed(flight: Any, events: Iterable[Any], error: Any = None) -> None:
    """The flight gets these, and is over."""
    for event in events:
        flight.add(event)
    flight.end(error)


def followed(flight: Any, client: Any = None, tick_s: float = 0, step_s: float = 0) -> Any:
    """What a follower gets, without the pauses."""
    choices = flight.follow(client or Someone(), tick_s, FakeClock(step_s=step_s))
    return (choice for choice in choices if not isinstance(choice[1], ocp.Pause))


def test_a_pause_follows_the_events_that_came_together(flight: Any) -> None:
    choices = flight.follow(Someone(), 0, FakeClock())

    together = said("Hello ", "there.")
    for choice in together:
        flight.add(choice)
    kinds = [type(next(choices)[1]) for _ in range(5)]

    assert kinds == [*(type(event) for _, event in together), ocp.Pause]
    landed(flight, [END])
    assert [type(event) for _, event in choices] == [ocp.Finished, ocp.Pause]


def test_a_follower_that_comes_late_gets_everything_from_the_start(flight: Any) -> None:
    landed(flight, [*said("Hello ", "there."), END])

    assert list(followed(flight)) == [*said("Hello ", "there."), END]


def test_a_follower_gets_each_event_as_it_comes(flight: Any) -> None:
    events = followed(flight)
    seen = []

    for choice in said("Hello ", "there."):
        flight.add(choice)
        seen.append(next(events))

    assert seen == said("Hello ", "there.")


def test_a_follower_that_waits_is_woken_at_once(
    flight: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The next look of its own would come too late for each of the events.
    monkeypatch.setattr(ocp, "_CLIENT_POLL_S", 600)
    heard: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def follow() -> None:
        for choice in followed(flight):
            heard.put(choice)

    reader = threading.Thread(target=follow, daemon=True)
    reader.start()
    for choice in (*said(*"0123456789"), END):
        flight.add(choice)
        assert heard.get(timeout=25) == choice
    flight.end(None)
    reader.join(25)

    assert not reader.is_alive()


def test_the_failure_of_a_flight_reaches_its_followers_behind_what_was_said(flight: Any) -> None:
    landed(flight, said("Half "), ocp.Overloaded("Overloaded"))
    heard = []

    with pytest.raises(ocp.Overloaded):
        for choice in followed(flight):
            heard.append(choice)

    assert heard == said("Half ")


def test_a_follower_in_silence_gets_ticks_if_it_wants_them(flight: Any) -> None:
    events = followed(flight, tick_s=15, step_s=20)

    assert [next(events), next(events)] == [(0, ocp.Tick())] * 2


def test_an_event_puts_off_the_next_tick(flight: Any) -> None:
    events = followed(flight, tick_s=50, step_s=20)
    flight.add(said()[0])
    first = next(events)
    flight.add(said()[1])

    assert [first, next(events)] == said()


def test_a_follower_that_left_is_told_nothing_more(flight: Any) -> None:
    flight.add(said()[0])
    events = followed(flight, Someone(patience=0), step_s=1)

    assert next(events) == said()[0]
    with pytest.raises(ocp.ClientGone):
        next(events)


def test_a_follower_that_comes_after_a_new_start_is_spared_the_old_one(flight: Any) -> None:
    voided = [*said("Half "), (0, ocp.Restarted())]

    landed(flight, [*voided, *said("Whole."), END])

    texts = [event.text for _, event in followed(flight) if isinstance(event, ocp.Delta)]
    assert texts == ["Whole."]


def test_the_second_to_ask_shares_and_the_last_to_leave_ends_the_flight(cache: Any) -> None:
    first, second = cache.lookup("a", 60), cache.lookup("a", 60)

    cache.unfollow(first.flight)
    before = first.flight.client.gone()
    cache.unfollow(second.flight)

    assert (first.status, second.status, second.flight is first.flight) == ("miss", "shared", True)
    assert (before, first.flight.client.gone()) == (False, True)
    assert select.select([first.flight.client], [], [], 0)[0], "nothing wakes the producer"
    cache.settle(first.flight, (), CONFIG)


def test_nobody_joins_a_flight_that_everybody_left(cache: Any) -> None:
    left = cache.lookup("a", 60).flight
    cache.unfollow(left)

    place = cache.lookup("a", 60)

    assert place.status == "miss" and place.flight is not left
    for each in (left, place.flight):
        cache.settle(each, (), CONFIG)


def test_the_end_of_a_flight_that_was_left_does_not_end_the_next_one(cache: Any) -> None:
    left = cache.lookup("a", 60).flight
    cache.unfollow(left)
    place = cache.lookup("a", 60)

    cache.settle(left, (), CONFIG)

    third = cache.lookup("a", 60)
    assert (third.status, third.flight is place.flight) == ("shared", True)
    assert repr(cache) == "<cache kept=0 flights=1>"
    cache.settle(place.flight, (), CONFIG)


def test_the_stats_count_who_waits(cache: Any) -> None:
    flights = [cache.lookup(key, 60).flight for key in ("a", "a", "a", "b")]

    stats = cache.stats()

    assert (stats["inflight"], stats["requesters"]) == (2, 4)
    assert (stats["misses"], stats["shared"]) == (2, 2)
    for each in (flights[0], flights[3]):
        cache.settle(each, (), CONFIG)


def test_flights_keep_no_descriptors(cache: Any) -> None:
    before = descriptors(os.getpid())

    for number in range(50):
        flight = cache.lookup(str(number), 60).flight
        if number % 2:
            cache.unfollow(flight)
        cache.settle(flight, (), CONFIG)

    assert descriptors(os.getpid()) == before


def test_any_number_of_threads_joins_and_leaves_without_a_lost_flight(cache: Any) -> None:
    dice = random.Random(4_711)
    pauses = [[dice.random() / 2_000 for _ in range(40)] for _ in range(8)]
    lost: list[str] = []

    def produce(flight: Any) -> None:
        time.sleep(0.000_3)
        for choice in (*said("Hello."), END):
            flight.add(choice)
        cache.settle(flight, (), CONFIG)
        flight.end(None)

    def come_and_go(times: list[float]) -> None:
        for pause_s in times:
            place = cache.lookup("a", 60)
            if place.status == "miss":
                threading.Thread(target=produce, args=(place.flight,)).start()
            time.sleep(pause_s)
            stays = pause_s * 4_000 % 1 < 0.7
            if stays and END not in place.flight.follow(Someone(), 0, time.monotonic):
                lost.append("an answer")
            cache.unfollow(place.flight)

    in_parallel([lambda times=times: come_and_go(times) for times in pauses])  # type: ignore[misc]

    assert lost == []
    eventually(lambda: repr(cache) == "<cache kept=0 flights=0>")


# ---------------------------------------------------------------------------
# The jobs of a flight
# ---------------------------------------------------------------------------

def test_a_request_is_not_kept_by_the_job_that_has_produced_its_answer() -> None:
    models = ocp.Models(ocp.BUILTIN_MODELS)
    turn = ocp.Turn(models.find("sonnet"), "", [ocp.Message("user", "Hi")], ocp.Options())
    app = SimpleNamespace(
        cache=ocp.Cache(), ledger=SimpleNamespace(release=lambda reservation: None))
    requests, config = ocp.Requests(app), ocp.Config()
    requests._produced = lambda job: contextlib.nullcontext(iter(()))
    requests._record = lambda job, failure=None: None
    job = ocp.Job(turn, ocp.Caller("laptop"), Someone(), "req_1", "chat", 0.0)
    flight = ocp.Flight("key")
    gc.disable()
    try:
        requests._start_producer(job, flight, config)
        eventually(lambda: flight._is_over)
        left = weakref.ref(job)
        del job
        assert eventually(lambda: left() is None)
    finally:
        gc.enable()
