"""Fixtures for tests of the contract with the real claude."""

from __future__ import annotations

from rig_fixtures import claude, rig, shared_rig

__all__ = ["claude", "rig", "shared_rig"]
