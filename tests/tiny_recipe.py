"""A recipe that trains in seconds, for tests of commands."""

from tests.conftest import TINY as recipe

__all__ = ["recipe"]
