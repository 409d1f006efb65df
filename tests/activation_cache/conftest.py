"""Fixtures for the tests of the cache."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(autouse=True, scope="module")
def no_waiting_for_the_disk() -> object:
    """Writes go to the page cache alone: a killed process loses nothing of it, and these tests cut no power."""
    patch = pytest.MonkeyPatch()
    patch.setattr(os, "fsync", lambda descriptor: None)
    yield
    patch.undo()
