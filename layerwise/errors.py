"""Every error that a user can meet, and the exit status that each one ends a command with.

    LayerwiseError                     1   the command failed
    ├── UsageError (ValueError)        2   asked for something that does not exist or cannot be
    │   └── RecipeError                2   … in a recipe or in --set
    ├── WillNotFit                     3   memory or disk too small, found before anything was lost
    ├── Unpredictable                  1   peak memory cannot be predicted, so a budget cannot be enforced
    ├── NotReady                       1   an earlier stage, cache or file is missing, stale or unfinished
    ├── Diverged                       1   the loss became NaN or infinite
    ├── DamagedData                   65   a file is not what it was when it was written
    ├── RunLocked                     73   another process holds the run
    ├── StoppedEarly                  75   interrupted, everything saved, resumable
    └── ProcessLost                   75   another process of the same training ended; resumable

A message says what was asked, what was found and what to do. `assert` is for our own mistakes.
"""

from __future__ import annotations


class LayerwiseError(Exception):
    """Root of the tree; `exit_code` is what the command line ends with."""

    exit_code: int = 1


class UsageError(LayerwiseError, ValueError):
    exit_code = 2


class RecipeError(UsageError):
    pass


class WillNotFit(LayerwiseError):
    exit_code = 3


class Unpredictable(LayerwiseError):
    pass


class NotReady(LayerwiseError):
    pass


class Diverged(LayerwiseError):
    def __init__(self, message: str, module: int | None = None, loss: float = float("nan")) -> None:
        """`module`: whose `loss` it is, if it is one module's."""
        super().__init__(message)
        self.module, self.loss = module, loss


class DamagedData(LayerwiseError):
    exit_code = 65


class RunLocked(LayerwiseError):
    exit_code = 73


class StoppedEarly(LayerwiseError):
    exit_code = 75


class ProcessLost(LayerwiseError):
    exit_code = 75


def in_one_line(error: BaseException) -> str:
    """Type and message of an error that code of somebody else raised."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
