"""What the settings of every dataset answer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from layerwise.errors import UsageError
from layerwise.progress import SILENT, Progress
from layerwise.settings.base import JsonValue, Settings, Shape

if TYPE_CHECKING:
    from pathlib import Path

    from layerwise.data.dataset import Split, Splits


class DatasetSettings(Settings, ABC):
    """Where samples come from and how they are turned into inputs."""

    probed_apart: ClassVar[bool] = False
    """Whether the labelled samples that probes see may come after stages and caches, which then do not hold them."""

    @abstractmethod
    def open(self, data_dir: Path | None, *, download: bool, seed: int, progress: Progress = SILENT) -> Splits:
        """The splits, ready to read; `progress` is told of a download or a long look through the files.

        Raises:
            UsageError: it reads files, and there is no `data_dir`.
            NotReady: files are missing; the message lists them and says how to get them.
            DamagedData: files are there and unreadable.
        """

    def heeds(self) -> frozenset[str]:
        """Which of `data_dir` and `download` mean something to `open`: the others are refused where a user gives
        them.
        """
        return frozenset({"data_dir", "download"})

    def expects(self) -> tuple[Shape, dict[str, int]] | None:
        """Shape of a sample, and number of classes of each task, where the settings alone tell; None where only the
        files do. Lets memory be predicted before there are data.
        """
        return None

    def published_sizes(self) -> dict[str, int] | None:
        """Samples of each split of the dataset as its authors publish it, taken as the settings say; None where only
        the files tell. Lets caches be predicted before there are data.
        """
        return None

    def of_files(self, files: Sequence[Path], progress: Progress = SILENT) -> Split:
        """These files as samples without labels, decoded and preprocessed as in the evaluation view.

        Raises:
            UsageError: the samples of this dataset do not come from files.
            DamagedData: a file cannot be read.
        """
        raise UsageError(
            f"the dataset {type(self).__name__} does not say how a file becomes a sample: preprocess the inputs "
            "yourself and pass them to run.encoder(through=NUMBER)"
        )

    def preprocessing(self) -> dict[str, JsonValue] | None:
        """How `of_files` turns a file into an input, for those who use an exported encoder; None where it cannot."""
        return None
