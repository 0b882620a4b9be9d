"""Values that no platform should send, in the place of those that it does."""

from __future__ import annotations

import random
from typing import Any

JUNK: tuple[Any, ...] = (
    None, 0, -1, True, "", "text", [], [1], {}, {"id": "x"}, 10 ** 30, [None], [{}])


def mutated(value: Any, chance: random.Random) -> Any:
    """A value of which some part is something else."""
    if chance.random() < 0.12:
        return chance.choice(JUNK)
    if isinstance(value, dict):
        return {key: mutated(each, chance) for key, each in value.items()
                if chance.random() > 0.05}
    return [mutated(each, chance) for each in value] if isinstance(value, list) else value
