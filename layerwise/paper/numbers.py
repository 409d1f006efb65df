"""The paper's figures, and which training each of them comes from (Löwe et al. 2019, sections 4.1 and 4.2).

A table's row is a method of `methods.py` with a schedule; a cell is one training of that row, and what is read off it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from layerwise.settings.choices import MethodName, ScheduleName


@dataclass(frozen=True)
class Training:
    """One training of a recipe."""

    method: MethodName
    schedule: ScheduleName = "simultaneous"
    changes: tuple[str, ...] = ()
    """Further overrides of the recipe, as --set takes them."""

    @property
    def key(self) -> str:
        """Names its run: trainings that are the same share one."""
        changes = "".join(f"-{change.replace('=', '-').replace('.', '-')}" for change in self.changes)
        return f"{self.method}-{self.schedule}{changes}"


@dataclass(frozen=True)
class Cell:
    training: Training
    paper: float | None = None
    """Accuracy, %."""
    deviation: float | None = None
    """Standard deviation over the paper's runs, %, where it gives one."""
    features: str | None = None
    """Fixed features to classify instead of the last module's representation."""


@dataclass(frozen=True)
class Row:
    title: str
    cells: Mapping[str, Cell]
    """Task to cell; the empty name stands for the dataset's first task."""
    note: str = ""
    """How the paper's own row differs from what is trained here."""


@dataclass(frozen=True)
class PaperTable:
    title: str
    dataset: str
    """What the paper measured on."""
    recipe: str
    """The recipe that follows it."""
    rows: tuple[Row, ...] = field(default=())


def _vision(title: str, training: Training, paper: float | None, deviation: float | None = None, note: str = "") -> Row:
    return Row(title, {"": Cell(training, paper, deviation)}, note)


GIM = Training("gim")
CPC = Training("cpc")
SUPERVISED = Training("supervised")

TABLE1 = PaperTable(
    "Table 1: accuracy of a linear classifier on the last module's representation",
    "STL-10",
    "stl10",
    (
        _vision(
            "Deep InfoMax", Training("dim"), 78.2, note="the paper's has AlexNet and a hidden layer to classify with"
        ),
        _vision("Predsim", Training("predsim"), 80.8, note="the paper's is a VGG8b, on whole pictures"),
        _vision("Randomly initialized", Training("random"), 27.0),
        _vision("Supervised", SUPERVISED, 71.4),
        _vision("Greedy Supervised", Training("greedy-supervised"), 65.2),
        _vision("CPC", CPC, 80.5, 3.1),
        _vision("Greedy InfoMax (GIM)", GIM, 81.9, 0.3),
        _vision("GIM, iterative", Training("gim", "iterative"), 79.8),
    ),
)


def _audio(title: str, training: Training, phone: float, speaker: float, features: str | None = None) -> Row:
    return Row(
        title,
        {
            "phone": Cell(training, phone, features=features),
            "speaker": Cell(training, speaker, features=features),
        },
    )


def _audio_labelled(title: str, method: MethodName, phone: float, speaker: float) -> Row:
    """Trained on the labels of the task that it is judged on."""
    frames = Training(method, changes=("objective.task=phone", "objective.pooled=false"))
    return Row(
        title,
        {
            "phone": Cell(frames, phone),
            "speaker": Cell(Training(method, changes=("objective.task=speaker",)), speaker),
        },
    )


TABLE3 = PaperTable(
    "Table 3: accuracy of linear classifiers of phones and of speakers",
    "LibriSpeech train-clean-100",
    "librispeech",
    (
        _audio("Randomly initialized", Training("random"), 27.6, 1.9),
        _audio("MFCC features", Training("random"), 39.7, 17.6, features="mfcc"),
        _audio_labelled("Supervised", "supervised", 77.7, 98.9),
        _audio_labelled("Greedy Supervised", "greedy-supervised", 73.4, 98.7),
        _audio("CPC", CPC, 64.9, 99.6),
        _audio("Greedy InfoMax (GIM)", GIM, 62.5, 99.4),
    ),
)

TABLE4 = PaperTable(
    "Table 4: the context module's part",
    "LibriSpeech train-clean-100",
    "librispeech",
    (
        _audio("Greedy InfoMax (GIM)", GIM, 62.5, 99.4),
        _audio("GIM without BPTT", Training("gim", changes=("network.context.bptt=false",)), 55.5, 99.2),
        _audio("GIM without g_ar", Training("gim", changes=("network.context=null",)), 50.8, 99.1),
    ),
)

TABLES = {"table1": TABLE1, "table3": TABLE3, "table4": TABLE4}
