"""The words that a recipe chooses from. They lie apart from it so that `--help` can list them at once: what they are
imported from imports nothing.
"""

from __future__ import annotations

from typing import Literal

MethodName = Literal["gim", "cpc", "supervised", "greedy-supervised", "predsim", "dim", "greedy-dim", "random"]
"""The ways to train a network; methods.py says what each one changes."""
ScheduleName = Literal["iterative", "simultaneous", "pipelined"]
"""One module after another; all in each step; or so by several processes, of which each has some of the modules."""
TOGETHER = ("simultaneous", "pipelined")
"""The schedules in which modules are trained together."""
FeedName = Literal["cache", "recompute"]
"""What the stages above the first read: a cache, or the dataset through the frozen modules."""
TrackerName = Literal["tensorboard", "wandb", "trackio"]
