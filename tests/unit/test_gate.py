"""The gate: who may run now. Time is a number that the tests set."""
from __future__ import annotations

import contextlib
import dataclasses
import itertools
import threading
from typing import Any

import pytest

from clock import FakeClock
from depth import by_depth
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


def test_a_limit_of_one_holds_over_many_requests_that_come_at_once() -> None:
    many = by_depth(20, 20, 200)
    door = Door(running=4, waiting=many)
    seen: list[int] = []

    def wait_and_run() -> None:
        with door.gate.slot(ocp.Caller("limited", max_concurrent=1)) as slot:
            list(slot.wait(door.watch(), door.clock))
            seen.append(door.gate.running_by_caller()["limited"])

    threads = [threading.Thread(target=wait_and_run) for _ in range(many)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)

    assert seen == [1] * many
    assert repr(door) == "<gate running=0 waiting=0 refused=0>"


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


def test_a_request_that_waits_for_an_own_tool_leaves_the_place_of_its_caller_only() -> None:
    door = Door(running=3, waiting=5)

    with contextlib.ExitStack() as stack:
        outer = door.line_up(stack, most=1)
        inner = door.line_up(stack, most=1)
        assert runs(outer, inner) == [True, False]
        with outer.lent():
            assert runs(inner) == [True]
            others = [door.line_up(stack, name) for name in ("b", "c")]
            assert runs(*others) == [True, False]
            further = door.line_up(stack, most=1)
            assert not further.runs
        assert not further.runs
        with inner.lent(), outer.lent():
            # The server has no place.
            assert not further.runs


@pytest.mark.parametrize("maximum", [1, 2, 3])
def test_a_server_whose_requests_all_wait_for_own_tools_has_one_place_more(maximum: int) -> None:
    door = Door(running=maximum, waiting=20)

    with contextlib.ExitStack() as stack:
        names = "abcdef"[:maximum]
        slots = [door.line_up(stack, name, most=1) for name in names]
        asked = [door.line_up(stack, name, most=1) for name in names]
        for slot in slots[:-1]:
            stack.enter_context(slot.lent())
        assert not any(runs(*asked))
        with slots[-1].lent():
            assert runs(*asked) == [True] + [False] * (maximum - 1)
            with asked[0].lent():
                assert sum(runs(*asked)) == 1


def test_a_caller_whose_requests_all_wait_for_own_tools_gets_one_place_more() -> None:
    door = Door(running=8, waiting=20)

    with contextlib.ExitStack() as stack:
        slots = [door.line_up(stack, most=2) for _ in range(8)]
        for slot in slots[:2]:
            stack.enter_context(slot.lent())
        assert runs(*slots) == [True] * 3 + [False] * 5
        stack.enter_context(slots[2].lent())
        assert runs(*slots) == [True] * 3 + [False] * 5


def test_a_key_whose_requests_wait_for_own_tools_leaves_the_last_place_to_others() -> None:
    door = Door(running=4, waiting=20)

    with contextlib.ExitStack() as stack:
        caller = ocp.Caller("a", key_id=1)
        slots = [stack.enter_context(door.gate.slot(caller)) for _ in range(5)]
        for slot in slots:
            door.gate.join(slot)
            if slot.runs:
                stack.enter_context(slot.lent())
        assert runs(*slots) == [True] * 3 + [False] * 2
        assert door.line_up(stack, "b").runs
