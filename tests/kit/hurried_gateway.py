"""ocp_channels.py with shorter pauses, where a test would have to wait for long.

Its arguments are the pauses, such as _DRAIN_S=1, and then those of ocp_channels.py."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import ocp_channels  # noqa: E402


def main(words: list[str]) -> int:
    """Run the gateway with these pauses."""
    pauses = [word for word in words if word.startswith("_")]
    for pause in pauses:
        name, _, seconds = pause.partition("=")
        assert isinstance(getattr(ocp_channels, name), float), name
        setattr(ocp_channels, name, float(seconds))
    return ocp_channels.main(words[len(pauses):], os.environ)
