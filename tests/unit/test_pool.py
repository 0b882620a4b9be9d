"""The process pool: which idle processes there are, and what `plan_pool` makes of them.

Time is a number that the tests set; processes are objects that do as they are told. What a parked
process goes on with is in test_parking.py.
"""
from __future__ import annotations

import dataclasses
import random
import weakref
from typing import Any, NamedTuple

import pytest

from clock import FakeClock
from project import load_script

ocp = load_script("ocp_server.py")

NOW_S = 10_000.0


def config(**changes: object) -> Any:
    """The settings, with these changed."""
    return dataclasses.replace(ocp.Config(), **changes)


class FakeProcess:
    """A process, as far as the pool looks at it."""

    def __init__(self, kind: Any, born_s: float, *, lives: bool = True) -> None:
        """`kind` is a ProcessKind, or for the server's login the name of a model."""
        self.kind = kind
        self.model_id, self.login, self.agent = (
            (kind, ocp.SERVER_LOGIN, None) if isinstance(kind, str) else kind)
        self.born_s = born_s
        self.lives = lives
        #: Whether its end has come, once it was stopped.
        self.ends = True
        self.stops: list[bool] = []
        self.is_primed = False
        self.version = ocp.REWINDS_ALL_SINCE

    def __repr__(self) -> str:
        return f"<{self.model_id}>"

    def alive(self) -> bool:
        """Whether it still runs."""
        return self.lives

    def drain_output(self) -> None:
        """It says nothing."""

    def set_tap(self, tap: object) -> None:
        self.tap = tap

    def stop(self, *, graceful: bool) -> None:
        """Notes how it was asked to go."""
        self.stops.append(graceful)

    def is_gone(self) -> bool:
        """Whether it has ended."""
        return bool(self.stops) and self.ends


# -- the plan, as a table -----------------------------------------------------


def pooled(name: str) -> Any:
    """A process by a short name: the first letter is its state (s, p, x = stopping), the second its
    model; then `!` if it died, and its age in seconds if it is not 10."""
    state = {"s": "spare", "p": "parked", "x": "stopping"}[name[0]]
    age_s = float(name[2:].strip("!") or 10)
    process = FakeProcess(name[1], NOW_S - age_s, lives="!" not in name)
    return ocp.PooledProcess(process, ocp.ProcessState(state), NOW_S - age_s)


class Case(NamedTuple):
    """What is there, and what has to become of it."""

    #: The pool, in its order.
    pool: str
    #: The models in use, the last used first. Their refill is due, or only later (`+0.1`), or not
    #: before the next use (`.`). `-60` = used so long ago.
    uses: str
    stop: str = ""
    start: str = ""
    #: Settings in short: processes per model, of all models, parked ones.
    limits: tuple[int, int, int] = (1, 4, 4)
    may_start: bool = True


PLANS = {
    "nothing": Case("", ""),
    "a model in use": Case("", "a", start="a"),
    "two of each": Case("", "a b", start="a a b b", limits=(2, 9, 4)),
    "a model still in use": Case("", "a-60", start="a"),
    "a model out of use": Case("", "a-61"),
    "a place for a model in use": Case("sb", "a b-61", stop="sb", start="a", limits=(1, 1, 4)),
    "a full stock": Case("sa sb", "a b"),
    "the missing one": Case("sa", "a", start="a", limits=(2, 4, 4)),
    "a refill that is not due": Case("", "a+0.1"),
    "a refill due now": Case("", "a+0", start="a"),
    "a refill that nobody asked for": Case("", "a."),
    "a place that nobody asked for": Case("sb sb9", "b a.", stop="sb9", limits=(1, 2, 4)),
    "starts are paused": Case("", "a", may_start=False),
    "a dead spare": Case("sa!", "a", stop="sa!", start="a"),
    "a dead spare in a pause": Case("sa!", "a", stop="sa!", may_start=False),
    "a spare just young enough": Case("sa60", "a"),
    "a spare too old": Case("sa61", "a", stop="sa61", start="a"),
    "a spare too old, out of use": Case("sa61", "", stop="sa61"),
    "a spare out of use": Case("sa", ""),
    "no spares wanted": Case("sa sb", "a b", stop="sa sb", limits=(0, 4, 4)),
    "no spares wanted in all": Case("sa sb", "a b", stop="sa sb", limits=(1, 0, 4)),
    "too many of a model": Case("sa sa9 sb", "a b", stop="sa9"),
    "too many in all": Case("sa sb sc", "c b a", stop="sa", limits=(1, 2, 4)),
    "too many in all, in a pause": Case(
        "sa sb sc", "c b a", stop="sa", limits=(1, 2, 4), may_start=False),
    "places go to those used last": Case("", "c b a", start="c c b", limits=(2, 3, 4)),
    "a place is taken from the least used": Case(
        "sa sb", "c b a", stop="sa", start="c", limits=(1, 2, 4)),
    "a place is taken from one out of use": Case(
        "sa sb", "c b", stop="sa", start="c", limits=(1, 2, 4)),
    "no place is taken before it is needed": Case("sa sb", "c+0.1 b a", limits=(1, 2, 4)),
    "no place is taken in a pause": Case(
        "sa sb", "c b a", limits=(1, 2, 4), may_start=False),
    "a place that another one waits for is kept": Case("sb", "c+0.1 b a", limits=(1, 2, 4)),
    "no place is taken from one used later": Case("sb", "b a", limits=(1, 1, 4)),
    "the oldest is stopped last": Case(
        "sa sa9 sb", "b a", stop="sa9", start="b", limits=(2, 3, 4)),
    "parked ones": Case("pa pb", ""),
    "a parked one just young enough": Case("pa600", ""),
    "a parked one too old": Case("pa601 pb", "", stop="pa601"),
    "a dead parked one": Case("pa! pb", "", stop="pa!"),
    "too many parked": Case("pa pb pc", "", stop="pa", limits=(1, 4, 2)),
    "the dead take no place": Case("pa pb pc!", "", stop="pc!", limits=(1, 4, 2)),
    "no parking": Case("pa pb", "", stop="pa pb", limits=(1, 4, 0)),
    "parked ones are no spares": Case("pa", "a", start="a"),
    "spares and parked ones have limits of their own": Case(
        "sa pa pb", "a", stop="pa", limits=(1, 1, 1)),
    "stopping ones are left alone": Case("xa xa! xa9999", "a", start="a", limits=(1, 1, 0)),
}


def uses_of(text: str) -> dict[str, Any]:
    """The uses of these models, each a second before the one before."""
    found = {}
    for place, word in enumerate(text.split()):
        wait_s = float("inf") if "." in word[1:2] else float(word[2:]) if "+" in word else 0.0
        age_s = float(word[2:]) if "-" in word else place
        found[word[0]] = ocp.KindUse(NOW_S - age_s, NOW_S + wait_s)
    return found


@pytest.mark.parametrize("case", PLANS.values(), ids=PLANS)
def test_the_plan(case: Case) -> None:
    per_model, total, parked = case.limits
    settings = config(
        warm_processes=per_model, warm_total=total, parked_processes=parked,
        warm_idle_ms=60_000, session_ttl_ms=600_000,
    )
    names = case.pool.split()
    processes = [pooled(name) for name in names]
    before, uses = list(processes), uses_of(case.uses)

    found = ocp.plan_pool(processes, uses, settings, NOW_S, may_start=case.may_start)

    stopped = [names[processes.index(process)] for process in found.stop]
    assert (sorted(stopped), found.start) == (sorted(case.stop.split()), case.start.split())
    assert (processes, uses) == (before, uses_of(case.uses))


@pytest.mark.parametrize("seed", range(20))
def test_every_plan_keeps_the_limits_and_leaves_nothing_to_do(seed: int) -> None:
    source = random.Random(seed)
    for _ in range(50):
        settings = config(
            warm_processes=source.randint(0, 3), warm_total=source.randint(0, 5),
            parked_processes=source.randint(0, 3), warm_idle_ms=60_000, session_ttl_ms=600_000,
        )
        names = [source.choice("spx") + source.choice("abcd") + source.choice(["", "!", "61"])
                 for _ in range(source.randint(0, 9))]
        processes = [pooled(name) for name in names]
        uses = uses_of(" ".join(source.sample("abcd", source.randint(0, 4))))

        found = ocp.plan_pool(processes, uses, settings, NOW_S)

        left = [process for process in processes if process not in found.stop]
        left += [pooled(f"s{model_id}0") for model_id in found.start]
        spares = [p for p in left if p.state is ocp.ProcessState.SPARE]
        parked = [p for p in left if p.state is ocp.ProcessState.PARKED]
        assert len(spares) <= settings.warm_total
        assert len(parked) <= settings.parked_processes
        assert all([p.process.model_id for p in spares].count(model_id) <= settings.warm_processes
                   for model_id in "abcd")
        assert all(process.process.alive() for process in spares + parked)
        assert ocp.plan_pool(left, uses, settings, NOW_S) == ([], [])


# -- the pool -----------------------------------------------------------------


class Stable:
    """A pool with a clock, and a start that notes what it starts."""

    def __init__(self, **settings: object) -> None:
        self.clock = FakeClock()
        self.started: list[FakeProcess] = []
        self.failure: Exception | None = None
        self.pool = ocp.ProcessPool(self._start, self.clock)
        self.config = config(**{"warm_processes": 1, "warm_total": 4, **settings})

    def __repr__(self) -> str:
        return repr(self.pool)

    def _start(self, kind: Any) -> FakeProcess:
        if self.failure is not None:
            raise self.failure
        self.started.append(FakeProcess(kind, self.clock()))
        return self.started[-1]

    def want(self, *kinds: Any) -> None:
        """These kinds are in use, one after the other."""
        for kind in kinds:
            self.pool.mark_used(kind)
            self.clock.advance(0.001)

    def take(self, kind: Any) -> FakeProcess:
        """A process for a request: a spare, or a new one."""
        self.pool.mark_used(kind)
        taken: FakeProcess = self.pool.take_spare(kind) or self.pool.start(kind)
        return taken

    def tend(self, after_s: float = 1.0) -> None:
        """Lets time pass and the housekeeper look around."""
        self.clock.advance(after_s)
        self.pool.tend(self.config)
        self.pool.refill(self.config)

    def starts(self, after_s: float) -> int:
        """How many processes the housekeeper starts after this time."""
        before = self.pool.spawned
        self.tend(after_s)
        return int(self.pool.spawned - before)

    def has_work_soon(self) -> bool:
        """Whether the housekeeper should be back soon."""
        return bool(self.pool.has_work_soon(self.config))


def warm(*kinds: Any, **settings: object) -> Stable:
    """A stable in which each of these kinds has a spare."""
    stable = Stable(**settings)
    stable.want(*kinds)
    stable.tend()
    return stable


def test_the_pool_begins_empty() -> None:
    stable = Stable()

    stable.tend()

    assert repr(stable) == "<pool no spares parked=0 stopping=0>"
    assert stable.started == []


def test_a_wanted_model_gets_its_spares() -> None:
    stable = warm("a", "b", warm_processes=2)

    assert stable.pool.spares() == {"a": 2, "b": 2}
    assert repr(stable) == "<pool a=2, b=2 parked=0 stopping=0>"


def test_a_taken_spare_is_the_caller_s_alone() -> None:
    stable = warm("a")

    assert stable.pool.take_spare("a") is stable.started[0]
    assert stable.pool.take_spare("a") is None
    assert stable.pool.spares() == {}


def test_the_spare_that_has_waited_longest_is_taken_first() -> None:
    stable = warm("a", warm_processes=2)

    assert [stable.pool.take_spare("a") for _ in range(2)] == stable.started


def test_no_spare_of_another_model_is_taken() -> None:
    stable = warm("a")

    assert stable.pool.take_spare("b") is None
    assert stable.pool.spares() == {"a": 1}


def test_a_failure_to_start_is_told_to_the_taker() -> None:
    stable = Stable()
    stable.failure = ocp.ClaudeMissing("Not there.")

    with pytest.raises(ocp.ClaudeMissing):
        stable.pool.start("a")

    assert stable.pool.spawned == 0


def test_every_start_is_counted() -> None:
    stable = warm("a")
    stable.pool.start("b")

    assert stable.pool.spawned == 2


def test_a_spare_that_died_is_passed_over_for_a_living_one() -> None:
    stable = warm("a", warm_processes=2)
    stable.started[0].lives = False

    taken = stable.pool.take_spare("a")
    stable.pool.tend(stable.config)

    assert taken is stable.started[1]
    assert stable.started[0].stops == [False]


def test_when_all_spares_died_there_is_none() -> None:
    stable = warm("a")
    stable.started[0].lives = False

    assert stable.pool.take_spare("a") is None


def test_a_refill_waits_a_moment_after_a_take() -> None:
    stable = warm("a")
    stable.take("a")

    assert [stable.starts(after_s) for after_s in (0.0, 0.1, 0.15)] == [0, 0, 1]


def test_later_takes_do_not_put_a_refill_off() -> None:
    stable = Stable()
    refills = 0

    for _ in range(20):
        stable.take("a")
        refills += stable.starts(after_s=0.15)

    assert refills >= 5


def test_a_spare_that_died_is_replaced_without_a_use() -> None:
    stable = warm("a")
    stable.clock.advance(10)
    stable.started[0].lives = False

    assert stable.starts(after_s=0.0) == 1


def test_a_model_out_of_use_is_not_refilled() -> None:
    stable = warm("a", warm_idle_ms=60_000)

    stable.tend(after_s=62)

    assert repr(stable) == "<pool no spares parked=0 stopping=0>"
    assert len(stable.started) == 1


def test_a_model_in_use_gets_a_fresh_spare_for_an_old_one() -> None:
    stable = warm("a", warm_idle_ms=60_000)
    stable.clock.advance(50)
    stable.want("a")

    stable.tend(after_s=12)

    assert stable.started[0].stops == [False]
    assert stable.pool.spares() == {"a": 1}


def test_limits_that_change_are_applied() -> None:
    stable = warm("a", warm_processes=2)
    stable.config = config(warm_processes=1)
    stable.tend()
    fewer = stable.pool.spares()
    stable.config = config(warm_processes=3)
    stable.want("a")
    stable.tend()

    assert (fewer, stable.pool.spares()) == ({"a": 1}, {"a": 3})


def test_a_spare_that_died_young_stops_the_refill_for_a_while() -> None:
    stable = warm("a")
    stable.started[0].lives = False

    at_once = stable.starts(after_s=0.0)
    stable.want("a")

    assert (at_once, stable.starts(after_s=29), stable.starts(after_s=2)) == (0, 0, 1)
    assert stable.started[0].stops == [False]


def test_a_spare_that_cannot_be_started_stops_the_refill_for_a_while() -> None:
    stable = Stable()
    stable.want("a")
    stable.failure = ocp.ClaudeMissing("Not there.")
    with pytest.raises(ocp.ClaudeMissing):
        stable.tend()

    stable.failure = None

    assert (stable.starts(after_s=29), stable.starts(after_s=2)) == (0, 1)


def test_a_failed_refill_keeps_the_spares_that_were_started() -> None:
    stable = warm("a", warm_processes=2)
    stable.take("a")
    stable.failure = ocp.ClaudeMissing("Not there.")

    with pytest.raises(ocp.ClaudeMissing):
        stable.tend()

    assert stable.pool.spares() == {"a": 1}


def test_dropping_stops_spares_gracefully_and_parked_processes_at_once() -> None:
    stable = warm("a")
    (spare,), parked = list(stable.started), stable.pool.start("b")
    stable.pool.park(parked, ocp.NO_CONVERSATION)

    stable.pool.drop()

    assert (spare.stops, parked.stops) == ([True], [False])
    assert repr(stable) == "<pool no spares parked=0 stopping=2>"


def test_a_process_that_was_at_work_when_all_were_dropped_becomes_no_spare() -> None:
    stable = warm("a")
    process = stable.take("a")
    stable.pool.drop()

    stable.pool.put_spare(process)

    assert (stable.pool.spares(), process.stops) == ({}, [True])


# ---------------------------------------------------------------------------
# Several logins
# ---------------------------------------------------------------------------

OWNERS, ANNAS = ocp.ProcessKind("a"), ocp.ProcessKind("a", ocp.Login("token-of-anna"))


def test_a_spare_serves_its_own_login_only() -> None:
    stable = warm(OWNERS, ANNAS, warm_total=8)
    owners, annas = sorted(stable.started, key=lambda process: process.login != ocp.SERVER_LOGIN)

    assert stable.pool.spares() == {"a": 2}
    assert (stable.pool.take_spare(ANNAS), stable.pool.take_spare(ANNAS)) == (annas, None)
    assert stable.pool.take_any_spare() is owners
    assert stable.pool.take_any_spare() is None


def test_all_logins_share_the_places_of_spares() -> None:
    kinds = [ocp.ProcessKind("a", ocp.Login(f"token-{number}")) for number in range(5)]
    stable = warm(*kinds, warm_total=3)

    assert stable.pool.spares() == {"a": 3}
    # Those that were used last have them.
    assert [stable.pool.spares_of(kind.login) for kind in kinds] == [0, 0, 1, 1, 1]


def test_dropping_a_login_leaves_the_others_alone() -> None:
    stable = warm(OWNERS, ANNAS)
    annas_at_work, owners_at_work = stable.take(ANNAS), stable.take(OWNERS)
    stable.tend()

    stable.pool.drop(ANNAS.login)
    stable.pool.put_spare(annas_at_work)
    stable.pool.put_spare(owners_at_work)

    assert annas_at_work.stops == [True]
    assert owners_at_work.stops == []
    assert stable.pool.spares_of(ANNAS.login) == 0
    stable.tend()
    assert stable.pool.spares_of(ANNAS.login) == 1


def test_no_spare_is_started_for_a_login_that_is_over() -> None:
    stable = warm(OWNERS, ANNAS)

    stable.pool.drop(ANNAS.login, is_over=True)
    stable.tend()

    assert (stable.pool.spares_of(ANNAS.login), stable.pool.spares()) == (0, {"a": 1})


def test_dropped_spares_are_replaced_after_a_moment() -> None:
    stable = warm("a")
    stable.pool.drop()

    assert [stable.starts(after_s) for after_s in (0.1, 0.15)] == [0, 1]
    assert stable.pool.spares() == {"a": 1}


@pytest.mark.parametrize("graceful", [True, False])
def test_a_stopped_process_is_seen_to_its_end(graceful: bool) -> None:
    stable = warm("a")
    process = stable.take("a")
    process.ends = False

    stable.pool.stop(process, graceful=graceful)
    stable.pool.reap()
    still_there = stable.pool.stopping
    process.ends = True
    stable.pool.reap()

    assert process.stops == [graceful]
    assert (still_there, stable.pool.stopping) == (1, 0)


def test_nothing_is_kept_of_a_process_that_is_gone() -> None:
    stable = warm("a")
    process = stable.take("a")
    stable.pool.stop(process, graceful=False)
    stable.pool.reap()
    stable.started.clear()
    trace = weakref.ref(process)

    del process

    assert trace() is None


def test_the_housekeeper_is_busy_while_a_process_leaves() -> None:
    stable = warm("a")
    stable.clock.advance(10)
    quiet = stable.has_work_soon()
    stable.pool.drop()

    assert (quiet, stable.has_work_soon()) == (False, True)


def test_the_housekeeper_is_busy_for_a_moment_after_a_take() -> None:
    stable = Stable()
    stable.take("a")
    at_once = stable.has_work_soon()
    stable.tend()

    assert (at_once, stable.has_work_soon()) == (True, False)


def test_the_housekeeper_rests_while_a_model_has_no_place() -> None:
    stable = warm("a", "b", warm_total=1)

    assert (stable.pool.spares(), stable.has_work_soon()) == ({"b": 1}, False)


def test_the_housekeeper_rests_while_starts_are_paused() -> None:
    stable = warm("a")
    stable.started[0].lives = False
    stable.tend()
    stable.tend()

    assert (stable.starts(after_s=1), stable.has_work_soon()) == (0, False)


def test_the_housekeeper_rests_when_a_refill_came_too_late_for_anybody() -> None:
    stable = Stable()
    stable.want("a")
    # There was no claude for a long time.
    stable.tend(stable.config.warm_idle_ms / 1000 + 1)

    assert (stable.started, stable.has_work_soon()) == ([], False)


def test_closing_ends_everything() -> None:
    stable = warm("a", "b")

    stable.pool.close()

    assert repr(stable) == "<pool no spares parked=0 stopping=0>"
    assert all(process.stops for process in stable.started)


# -- priming ------------------------------------------------------------------


def to_prime(stable: Stable, *, can_prime: bool = True) -> Any:
    return stable.pool.take_to_prime(stable.config, lambda version: can_prime)


def test_a_spare_is_primed_a_second_after_its_start_and_once() -> None:
    stable = warm("a")
    assert to_prime(stable) is None
    stable.clock.advance(1)

    assert to_prime(stable, can_prime=False) is None
    process = to_prime(stable)
    assert process is stable.started[0] and stable.pool.spares() == {}
    process.is_primed = True
    stable.pool.put_spare(process)
    assert to_prime(stable) is None
    assert stable.pool.take_spare("a") is process


def test_a_primed_spare_is_taken_first_but_never_for_an_output_schema() -> None:
    stable = warm("a", warm_processes=2)
    plain, primed = stable.started
    primed.is_primed = True

    assert stable.pool.take_spare("a", has_schema=True) is plain
    assert stable.pool.take_spare("a", has_schema=True) is None
    stable.pool.put_spare(plain)
    assert stable.pool.take_spare("a") is primed
    assert stable.pool.take_spare("a") is plain


def test_a_model_that_was_used_with_an_output_schema_gets_spares_that_stay_as_they_are() -> None:
    stable = warm("a", "b", warm_idle_ms=60_000)
    other, primed = stable.started
    primed.is_primed = other.is_primed = True
    stable.pool.mark_used("a", has_schema=True)
    stable.tend()

    assert primed.stops and not other.stops
    assert stable.pool.spares() == {"a": 1, "b": 1}
    stable.clock.advance(30)
    assert to_prime(stable) is None
    # Uses without one keep the model in use.
    stable.pool.mark_used("a")
    stable.clock.advance(31)
    assert to_prime(stable) is stable.started[2]


def test_after_one_that_could_not_be_primed_none_is_for_a_while() -> None:
    stable = warm("a", warm_idle_ms=3_600_000)
    stable.clock.advance(1)
    stable.pool.stop_unprimed(to_prime(stable))

    assert stable.starts(after_s=1) == 1
    stable.clock.advance(590)
    assert to_prime(stable) is None
    stable.clock.advance(10)
    assert to_prime(stable) is stable.started[1]
