"""The gate and the spares: who may run now, and which idle processes there are.

Time is a number that the tests set; processes are objects that do as they are told.
"""
from __future__ import annotations

import contextlib
import dataclasses
import itertools
import threading
import weakref
from typing import Any

import pytest

from clock import FakeClock
from project import load_script
from waiting import eventually

ocp = load_script("ocp_server.py")


def config(**changes: object) -> Any:
    """The settings, with these changed."""
    return dataclasses.replace(ocp.Config(), **changes)


# -- the gate -----------------------------------------------------------------


class FakeClient:
    """A client in line. Each look at it takes `glance_s`; after `patience` looks it has left."""

    def __init__(self, clock: FakeClock, glance_s: float = 0.0, patience: int = 1_000) -> None:
        self._clock = clock
        self._glance_s = glance_s
        self._patience = patience

    def fileno(self) -> int:
        """Nothing here selects."""
        raise NotImplementedError

    def gone(self) -> bool:
        """Whether it has left."""
        self._clock.advance(self._glance_s)
        self._patience -= 1
        return self._patience < 0

    def listens(self) -> bool:
        """Its end can be seen."""
        return True


class Door:
    """A gate with a clock, and requests that come to it."""

    def __init__(self, running: int = 1, waiting: int = 1) -> None:
        self.clock = FakeClock()
        self.config = config(max_concurrent=running, max_queue=waiting, queue_retry_after_s=7)
        self.gate = ocp.Gate(self.config)
        self.client = FakeClient(self.clock)

    def __repr__(self) -> str:
        return repr(self.gate)

    def watch(self, client: Any = None, tick_s: float = 0, deadline_s: float = 60) -> Any:
        """What a request of this door looks out for."""
        return ocp.WaitLimits(client or self.client, self.clock() + deadline_s, tick_s)

    def enter(self, stack: contextlib.ExitStack, watch: Any = None, name: str = "a") -> list[Any]:
        """Lets one request in, which stays until the stack ends; its events while it waited."""
        slot = stack.enter_context(self.gate.slot(ocp.Caller(name)))
        return list(slot.wait(watch or self.watch(), self.clock))

    def line_up(self, stack: contextlib.ExitStack, name: str = "a", most: int = 0) -> Any:
        """Puts a request of a caller into the line; its slot."""
        caller = ocp.Caller(name, max_concurrent=most)
        slot = stack.enter_context(self.gate.slot(caller))
        self.gate.join(slot)
        return slot


def runs(*slots: Any) -> list[bool]:
    """Which of them may run."""
    return [slot.runs for slot in slots]


def test_a_gate_begins_empty() -> None:
    assert repr(Door()) == "<gate running=0 waiting=0 refused=0>"


def test_a_request_runs_until_its_block_ends() -> None:
    door = Door()

    with contextlib.ExitStack() as stack:
        door.enter(stack)
        assert repr(door) == "<gate running=1 waiting=0 refused=0>"

    assert repr(door) == "<gate running=0 waiting=0 refused=0>"


def test_a_request_that_fails_frees_its_place_too() -> None:
    door = Door()

    with pytest.raises(ZeroDivisionError), contextlib.ExitStack() as stack:
        door.enter(stack)
        raise ZeroDivisionError

    assert repr(door) == "<gate running=0 waiting=0 refused=0>"


def test_a_slot_that_was_never_used_holds_nothing() -> None:
    door = Door()

    with door.gate.slot(ocp.Caller("a")):
        assert repr(door) == "<gate running=0 waiting=0 refused=0>"

    assert repr(door) == "<gate running=0 waiting=0 refused=0>"


def test_so_many_requests_run_at_a_time_and_no_more() -> None:
    door = Door(running=3)

    with contextlib.ExitStack() as stack:
        for _ in range(3):
            assert door.enter(stack) == []
        assert not door.line_up(stack).runs
        assert repr(door) == "<gate running=3 waiting=1 refused=0>"


def test_the_line_is_first_come_first_served() -> None:
    door = Door(running=1, waiting=3)

    with contextlib.ExitStack() as others, contextlib.ExitStack() as runner:
        door.enter(runner)
        first, second = door.line_up(others), door.line_up(others)
        runner.close()
        assert runs(first, second) == [True, False]


def test_leaving_the_line_lets_the_next_one_move_up() -> None:
    door = Door(running=1, waiting=3)

    with contextlib.ExitStack() as others, contextlib.ExitStack() as quitter:
        runner = door.line_up(others)
        door.line_up(quitter)
        last = door.line_up(others)
        quitter.close()
        door.gate.release(runner)
        assert last.runs


def test_a_full_line_turns_requests_away_and_says_when_to_come_back() -> None:
    door = Door(running=1, waiting=1)

    with contextlib.ExitStack() as stack:
        door.enter(stack)
        door.line_up(stack)
        with pytest.raises(ocp.QueueFull) as caught:
            door.enter(stack)
        assert repr(door) == "<gate running=1 waiting=1 refused=1>"

    assert caught.value.headers() == {"Retry-After": "7"}


@pytest.mark.parametrize(("running", "waiting"), [(1, 0), (2, 1), (3, 5)])
def test_a_burst_may_fill_every_place_and_the_whole_line(running: int, waiting: int) -> None:
    door = Door(running, waiting)

    with contextlib.ExitStack() as stack:
        slots = [door.line_up(stack) for _ in range(running + waiting)]
        with pytest.raises(ocp.QueueFull):
            door.enter(stack)
        assert runs(*slots) == [True] * running + [False] * waiting
        assert repr(door) == f"<gate running={running} waiting={waiting} refused=1>"


def test_a_request_that_was_turned_away_leaves_nothing_behind() -> None:
    door = Door(running=1, waiting=0)

    with contextlib.ExitStack() as stack:
        door.enter(stack)
        with pytest.raises(ocp.QueueFull), contextlib.ExitStack() as other:
            door.enter(other)

    assert repr(door) == "<gate running=0 waiting=0 refused=1>"


def test_without_a_line_requests_still_run() -> None:
    door = Door(running=2, waiting=0)

    with contextlib.ExitStack() as stack:
        door.enter(stack)
        door.enter(stack)
        assert repr(door) == "<gate running=2 waiting=0 refused=0>"


def test_a_client_that_leaves_the_line_is_noticed() -> None:
    door = Door()
    leaver = FakeClient(door.clock, patience=0)

    with contextlib.ExitStack() as stack:
        door.enter(stack)
        with pytest.raises(ocp.ClientGone), contextlib.ExitStack() as other:
            door.enter(other, door.watch(leaver))
        assert repr(door) == "<gate running=1 waiting=0 refused=0>"


def test_waiting_ends_at_the_deadline() -> None:
    door = Door()
    client = FakeClient(door.clock, glance_s=31)

    with contextlib.ExitStack() as stack:
        door.enter(stack)
        with pytest.raises(ocp.UpstreamTimeout), contextlib.ExitStack() as other:
            door.enter(other, door.watch(client, deadline_s=30))
        assert repr(door) == "<gate running=1 waiting=0 refused=0>"


def test_a_waiting_request_ticks_once_in_a_heartbeat() -> None:
    door = Door()
    client = FakeClient(door.clock, glance_s=8)
    began_s = door.clock()

    with contextlib.ExitStack() as stack:
        door.enter(stack)
        slot = stack.enter_context(door.gate.slot(ocp.Caller("a")))
        waiting = slot.wait(door.watch(client, tick_s=15, deadline_s=600), door.clock)
        ticks = [(tick, door.clock() - began_s) for tick in itertools.islice(waiting, 2)]

    assert ticks == [(ocp.Tick(), 16), (ocp.Tick(), 32)]


def test_a_request_in_line_runs_as_soon_as_another_ends() -> None:
    door = Door()
    ran = threading.Event()

    def wait_and_run() -> None:
        with contextlib.ExitStack() as mine:
            door.enter(mine)
            ran.set()

    with contextlib.ExitStack() as stack:
        door.enter(stack)
        thread = threading.Thread(target=wait_and_run)
        thread.start()
        eventually(lambda: door.gate.waiting == 1)
        assert not ran.is_set()

    thread.join(120)
    assert ran.is_set()
    assert repr(door) == "<gate running=0 waiting=0 refused=0>"


def test_many_requests_at_once_never_exceed_the_limit() -> None:
    door = Door(running=3, waiting=100)
    seen: list[int] = []

    def wait_and_run() -> None:
        with contextlib.ExitStack() as mine:
            door.enter(mine)
            seen.append(door.gate.running)

    threads = [threading.Thread(target=wait_and_run) for _ in range(30)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)

    assert len(seen) == 30
    assert max(seen) <= 3
    assert repr(door) == "<gate running=0 waiting=0 refused=0>"


# -- fairness -----------------------------------------------------------------


def test_callers_take_turns() -> None:
    door = Door(running=1, waiting=20)

    with contextlib.ExitStack() as stack:
        running = door.line_up(stack, "greedy")
        greedy = [door.line_up(stack, "greedy") for _ in range(5)]
        modest = [door.line_up(stack, "modest") for _ in range(2)]
        order = []
        for _ in range(7):
            door.gate.release(running)
            running.runs = False
            running = next(slot for slot in greedy + modest if slot.runs)
            order.append(running.scope)

    assert order == ["greedy", "modest", "greedy", "modest", "greedy", "greedy", "greedy"]


def test_a_caller_who_comes_to_a_full_line_is_served_and_the_longest_line_gives_way() -> None:
    door = Door(running=1, waiting=3)

    with contextlib.ExitStack() as stack:
        door.enter(stack, name="greedy")
        lined = [door.line_up(stack, "greedy") for _ in range(3)]
        door.line_up(stack, "modest")
        assert [bool(slot.refusal) for slot in lined] == [False, False, True]
        assert repr(door) == "<gate running=1 waiting=3 refused=1>"


def test_a_caller_with_the_longest_line_cannot_push_others_out() -> None:
    door = Door(running=1, waiting=2)

    with contextlib.ExitStack() as stack:
        door.enter(stack, name="greedy")
        first = [door.line_up(stack, name) for name in ("greedy", "modest")]
        with pytest.raises(ocp.QueueFull):
            door.enter(stack, name="greedy")
        assert repr(door) == "<gate running=1 waiting=2 refused=1>"
        assert not any(runs(*first))


def test_a_caller_with_a_limit_leaves_places_to_others() -> None:
    door = Door(running=3, waiting=5)

    with contextlib.ExitStack() as stack:
        limited = [door.line_up(stack, "limited", most=1) for _ in range(3)]
        other = door.line_up(stack, "other")
        assert runs(*limited, other) == [True, False, False, True]
        door.gate.release(limited[0])
        assert runs(*limited[1:]) == [True, False]


def test_a_limit_that_is_raised_lets_waiting_requests_run_at_once() -> None:
    door = Door(running=1, waiting=5)

    with contextlib.ExitStack() as stack:
        slots = [door.line_up(stack) for _ in range(4)]
        door.gate.configure(config(max_concurrent=3, max_queue=5))
        assert runs(*slots) == [True, True, True, False]


def test_a_limit_that_is_lowered_is_kept_as_requests_end() -> None:
    door = Door(running=3, waiting=5)

    with contextlib.ExitStack() as stack:
        slots = [door.line_up(stack) for _ in range(4)]
        door.gate.configure(config(max_concurrent=1, max_queue=5))
        door.gate.release(slots[0])
        door.gate.release(slots[1])
        assert not slots[3].runs
        door.gate.release(slots[2])
        assert slots[3].runs


# -- the spares ---------------------------------------------------------------


class FakeProcess:
    """A process, as far as spares look at it."""

    def __init__(self, model_id: str, born_s: float) -> None:
        self.model_id = model_id
        self.born_s = born_s
        self.lives = True
        #: Whether its end has come, once it was dismissed.
        self.ends = True
        self.dismissed: list[bool] = []

    def __repr__(self) -> str:
        return f"<{self.model_id}>"

    def alive(self) -> bool:
        """Whether it still runs."""
        return self.lives

    def stop(self, *, graceful: bool) -> None:
        """Notes how it was asked to go."""
        self.dismissed.append(graceful)

    def is_gone(self) -> bool:
        """Whether it has ended."""
        return bool(self.dismissed) and self.ends


class Stable:
    """Spares with a clock and a spawn that notes what it starts."""

    def __init__(self, **settings: object) -> None:
        self.clock = FakeClock()
        self.started: list[FakeProcess] = []
        self.failure: Exception | None = None
        self.spares = ocp.Spares(self._spawn, self.clock)
        self.config = config(**{"warm_processes": 1, "warm_total": 4, **settings})

    def __repr__(self) -> str:
        return repr(self.spares)

    def _spawn(self, model_id: str) -> FakeProcess:
        if self.failure is not None:
            raise self.failure
        self.started.append(FakeProcess(model_id, self.clock()))
        return self.started[-1]

    def want(self, *model_ids: str) -> None:
        """These models are in use, one after the other."""
        for model_id in model_ids:
            self.spares.mark_used(model_id)
            self.clock.advance(0.001)

    def tend(self, after_s: float = 1.0) -> None:
        """Lets time pass and the housekeeper look around."""
        self.clock.advance(after_s)
        self.spares.tend(self.config)

    def plan(self, after_s: float = 0.0) -> tuple[list[Any], list[str]]:
        """What the housekeeper would do."""
        self.clock.advance(after_s)
        retire, grow = self.spares.plan(self.config)
        return retire, grow


def warm(*model_ids: str, **settings: object) -> Stable:
    """A stable in which each of these models has a spare."""
    stable = Stable(**settings)
    stable.want(*model_ids)
    stable.tend()
    return stable


def test_spares_begin_empty() -> None:
    stable = Stable()

    assert repr(stable) == "<spares none stopping=0>"
    assert stable.plan() == ([], [])


def test_a_model_that_nobody_wanted_gets_no_spare() -> None:
    stable = Stable()

    stable.tend()

    assert stable.started == []


def test_a_wanted_model_gets_its_spares() -> None:
    stable = warm("a", "b", warm_processes=2)

    assert repr(stable) == "<spares a=2, b=2 stopping=0>"


def test_a_taken_spare_is_the_caller_s_alone() -> None:
    stable = warm("a")

    process, was_waiting = stable.spares.take("a")

    assert (process, was_waiting) == (stable.started[0], True)
    assert repr(stable) == "<spares none stopping=0>"


def test_the_spare_that_has_waited_longest_is_taken_first() -> None:
    stable = warm("a", warm_processes=2)

    taken = [stable.spares.take("a")[0] for _ in range(2)]

    assert taken == stable.started


def test_without_a_spare_a_process_is_started() -> None:
    stable = warm("a")

    process, was_waiting = stable.spares.take("b")

    assert (process.model_id, was_waiting) == ("b", False)
    assert repr(stable) == "<spares a=1 stopping=0>"


def test_a_failure_to_start_is_told_to_the_taker() -> None:
    stable = Stable()
    stable.failure = ocp.ClaudeMissing("Not there.")

    with pytest.raises(ocp.ClaudeMissing):
        stable.spares.take("a")


def test_every_start_is_counted() -> None:
    stable = warm("a")
    stable.spares.take("b")

    assert stable.spares.spawned == 2


def test_a_spare_that_died_is_passed_over_for_a_living_one() -> None:
    stable = warm("a", warm_processes=2)
    stable.started[0].lives = False

    process, was_waiting = stable.spares.take("a")

    assert (process, was_waiting) == (stable.started[1], True)
    assert repr(stable) == "<spares none stopping=1>"


def test_when_all_spares_died_a_process_is_started() -> None:
    stable = warm("a")
    stable.started[0].lives = False

    process, was_waiting = stable.spares.take("a")

    assert (process, was_waiting) == (stable.started[1], False)
    assert stable.started[0].dismissed


def test_a_refill_waits_a_moment_after_a_take() -> None:
    stable = warm("a")
    stable.spares.mark_used("a")
    stable.spares.take("a")

    at_once = stable.plan()[1]
    soon = stable.plan(after_s=0.1)[1]
    later = stable.plan(after_s=0.15)[1]

    assert (at_once, soon, later) == ([], [], ["a"])


def test_later_takes_do_not_put_a_refill_off() -> None:
    stable = Stable()
    grown = 0

    for _ in range(20):
        stable.want("a")
        stable.spares.take("a")
        grown += len(stable.plan(after_s=0.15)[1])

    assert grown >= 5


def test_a_full_stock_is_not_refilled() -> None:
    assert warm("a").plan() == ([], [])


def test_the_cap_over_all_models_favours_those_wanted_last() -> None:
    stable = Stable(warm_processes=2, warm_total=3)
    stable.want("a", "b", "c")

    _, grow = stable.plan(after_s=1)

    assert grow == ["c", "c", "b"]


def test_the_cap_counts_what_waits_already() -> None:
    stable = warm("a", warm_processes=2, warm_total=2)
    stable.clock.advance(10)
    stable.started[0].lives = False

    assert stable.plan() == (stable.started[:1], ["a"])


def test_a_model_that_is_wanted_now_gets_the_place_of_the_one_wanted_longest_ago() -> None:
    stable = warm("a", "b", warm_total=2)
    stable.want("c")

    retire, grow = stable.plan(after_s=1)

    assert ([process.model_id for process in retire], grow) == (["a"], ["c"])
    assert repr(stable) == "<spares b=1 stopping=0>"


def test_no_model_takes_the_place_of_one_that_was_wanted_later() -> None:
    stable = Stable(warm_total=1)
    stable.want("a", "b")
    stable.tend()

    stable.tend()

    assert [process.model_id for process in stable.started] == ["b"]
    assert repr(stable) == "<spares b=1 stopping=0>"


@pytest.mark.parametrize("settings", [{"warm_processes": 0}, {"warm_total": 0}])
def test_spares_can_be_switched_off(settings: dict[str, int]) -> None:
    assert warm("a", **settings).started == []


def test_an_old_spare_is_retired() -> None:
    stable = warm("a", warm_idle_ms=60_000)

    kept, _ = stable.plan(after_s=60)
    retired, _ = stable.plan(after_s=1)

    assert (kept, retired) == ([], stable.started)
    assert repr(stable) == "<spares none stopping=0>"


def test_a_model_out_of_use_is_not_refilled() -> None:
    stable = warm("a", warm_idle_ms=60_000)

    stable.tend(after_s=62)

    assert repr(stable) == "<spares none stopping=0>"
    assert len(stable.started) == 1


def test_a_model_in_use_gets_a_fresh_spare_for_an_old_one() -> None:
    stable = warm("a", warm_idle_ms=60_000)
    stable.clock.advance(50)
    stable.want("a")

    stable.tend(after_s=12)

    assert stable.started[0].dismissed == [False]
    assert repr(stable) == "<spares a=1 stopping=0>"


def test_a_spare_that_died_young_stops_the_refill_for_a_while() -> None:
    stable = warm("a")
    stable.started[0].lives = False

    retired, at_once = stable.plan()
    stable.want("a")
    _, soon = stable.plan(after_s=29)
    _, later = stable.plan(after_s=2)

    assert (retired, at_once, soon, later) == (stable.started, [], [], ["a"])


def test_a_spare_that_died_of_old_age_does_not() -> None:
    stable = warm("a")
    stable.clock.advance(10)
    stable.started[0].lives = False

    assert stable.plan() == (stable.started, ["a"])


def test_a_spare_that_cannot_be_started_stops_the_refill_for_a_while() -> None:
    stable = Stable()
    stable.want("a")
    stable.failure = ocp.ClaudeMissing("Not there.")
    with pytest.raises(ocp.ClaudeMissing):
        stable.tend()

    stable.failure = None
    stable.tend(after_s=29)
    soon = len(stable.started)
    stable.tend(after_s=2)

    assert (soon, len(stable.started)) == (0, 1)


def test_a_failed_refill_keeps_the_spares_that_were_started() -> None:
    stable = Stable(warm_processes=2)
    stable.want("a")
    stable.tend()
    stable.want("a")
    stable.spares.take("a")
    stable.failure = ocp.ClaudeMissing("Not there.")

    with pytest.raises(ocp.ClaudeMissing):
        stable.tend()

    assert repr(stable) == "<spares a=1 stopping=0>"


def test_dropping_lets_every_spare_go_kindly() -> None:
    stable = warm("a", "b")

    stable.spares.drop()

    assert [process.dismissed for process in stable.started] == [[True], [True]]
    assert repr(stable) == "<spares none stopping=2>"


def test_dropped_spares_are_replaced_once_their_model_is_wanted_again() -> None:
    stable = warm("a")
    stable.spares.drop()
    stable.want("a")

    stable.tend()

    assert repr(stable) == "<spares a=1 stopping=0>"
    assert len(stable.started) == 2


@pytest.mark.parametrize("graceful", [True, False])
def test_a_dismissed_process_is_seen_to_its_end(graceful: bool) -> None:
    stable = warm("a")
    process, _ = stable.spares.take("a")
    process.ends = False

    stable.spares.stop(process, graceful=graceful)
    still_there = stable.spares.reap()
    process.ends = True
    gone = stable.spares.reap()

    assert process.dismissed == [graceful]
    assert (still_there, gone) == (1, 0)


def test_of_a_borrowed_process_that_was_dismissed_nothing_is_kept() -> None:
    stable = warm("a")
    process = stable.spares.borrow()
    stable.spares.stop(process, graceful=False)
    stable.spares.reap()
    stable.started.clear()
    trace = weakref.ref(process)

    del process

    assert trace() is None


def test_the_housekeeper_is_busy_while_a_process_leaves() -> None:
    stable = warm("a")
    stable.clock.advance(10)
    quiet = stable.spares.has_work_soon()
    stable.spares.drop()

    assert (quiet, stable.spares.has_work_soon()) == (False, True)


def test_the_housekeeper_is_busy_for_a_moment_after_a_take() -> None:
    stable = Stable()
    stable.want("a")
    stable.spares.take("a")
    at_once = stable.spares.has_work_soon()
    stable.tend()

    assert (at_once, stable.spares.has_work_soon()) == (True, False)


def test_the_housekeeper_rests_when_a_refill_came_too_late_for_anybody() -> None:
    stable = Stable()
    stable.want("a")
    # There was no claude for a long time.
    stable.tend(stable.config.warm_idle_ms / 1000 + 1)

    assert (stable.started, stable.spares.has_work_soon()) == ([], False)


def test_closing_ends_everything() -> None:
    stable = warm("a", "b")

    stable.spares.close()

    assert repr(stable) == "<spares none stopping=0>"
    assert all(process.dismissed for process in stable.started)
