"""Wrong keys: the answer to each comes later than the one before, in bounded time and memory."""
from __future__ import annotations

from contextlib import ExitStack

import pytest

from clock import FakeClock
from project import load_script

ocp = load_script("ocp_server.py")


class Guesses:
    """What is held back, and how long."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.keys = ocp.WrongKeys(self.clock)

    def wait_s(self, peer: str = "10.0.0.7", max_s: float = 2.0) -> float:
        """The wait after one more wrong key."""
        with self.keys.delay_answer(peer, max_s) as found:
            return float(found)


@pytest.fixture
def guesses() -> Guesses:
    return Guesses()


def test_five_wrong_keys_are_told_at_once_and_then_each_later_than_the_one_before(
    guesses: Guesses
) -> None:
    waits = [guesses.wait_s() for _ in range(13)]

    assert waits == pytest.approx([0, 0, 0, 0, 0, 0.1, 0.2, 0.4, 0.8, 1.6, 2, 2, 2])


def test_a_peer_does_not_wait_for_the_keys_of_another(guesses: Guesses) -> None:
    for _ in range(20):
        guesses.wait_s("10.0.0.7")

    assert guesses.wait_s("10.0.0.8") == 0


def test_a_peer_is_forgiven_when_it_has_been_quiet(guesses: Guesses) -> None:
    for _ in range(20):
        guesses.wait_s()
    guesses.clock.advance(599)
    before = guesses.wait_s()
    guesses.clock.advance(601)

    assert (before, guesses.wait_s()) == (2, 0)


def test_millions_of_wrong_keys_wait_no_longer_than_the_most(guesses: Guesses) -> None:
    for _ in range(5_000):
        assert guesses.wait_s(max_s=60.0) <= 60


def test_without_a_delay_nobody_waits(guesses: Guesses) -> None:
    assert {guesses.wait_s(max_s=0.0) for _ in range(50)} == {0}


def test_of_one_peer_four_wait_at_a_time_and_of_all_thirty_two(guesses: Guesses) -> None:
    peers = [f"10.0.0.{number}" for number in range(20)]
    for peer in peers:
        for _ in range(20):
            guesses.wait_s(peer)

    with ExitStack() as waiting:
        waits = [
            waiting.enter_context(guesses.keys.delay_answer(peer, 2.0))
            for peer in peers for _ in range(6)
        ]

    assert waits[:6] == [2, 2, 2, 2, 0, 0]
    assert sum(wait > 0 for wait in waits) == 32
    assert guesses.wait_s() == 2


def test_whoever_fails_while_waiting_is_not_counted_for_ever(guesses: Guesses) -> None:
    for _ in range(100):
        with pytest.raises(OSError), guesses.keys.delay_answer("10.0.0.7", 2.0):
            raise OSError

    assert guesses.wait_s() == 2


def test_a_thousand_peers_are_remembered_and_the_oldest_forgotten(guesses: Guesses) -> None:
    for _ in range(20):
        guesses.wait_s("old")
    for number in range(1_023):
        guesses.wait_s(f"peer-{number}")
    remembered = guesses.wait_s("old")
    for number in range(5_000):
        guesses.wait_s(f"another-{number}")

    assert (remembered, guesses.wait_s("old")) == (2, 0)


@pytest.mark.parametrize(("address", "group"), [
    ("192.168.1.7", "192.168.1.7"), ("::ffff:192.168.1.7", "192.168.1.7"), ("::1", "::1"),
    ("127.0.0.1", "127.0.0.1"), ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
    ("fe80::1%eth0", "fe80::/64"), ("", ""), ("nonsense", "nonsense"),
])
def test_a_network_of_ipv6_is_one_peer(address: str, group: str) -> None:
    assert ocp.peer_group(address) == group
