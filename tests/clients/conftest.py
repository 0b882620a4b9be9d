"""Fixtures for tests with real clients."""

from __future__ import annotations

from rig_fixtures import claude, rig, rigs, shared_rig

__all__ = ["claude", "rig", "rigs", "shared_rig"]
