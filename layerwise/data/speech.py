"""Any folder of recordings, a sub-folder for each speaker; and how the recordings of any corpus become splits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from pydantic import Field

from layerwise.data.dataset import IntArray, Split, Splits
from layerwise.data.recordings import RATE, SHORTEST, Recording, Sound, Utterances, Windows, examine
from layerwise.data.settings import DatasetSettings
from layerwise.errors import DamagedData, NotReady, UsageError
from layerwise.progress import SILENT, Progress
from layerwise.seeding import numpy_generator
from layerwise.settings.base import JsonValue, Shape, free
from layerwise.settings.units import counted

SUFFIXES = (".flac", ".wav", ".ogg")


class SpeechSettings(DatasetSettings):
    """What the datasets of recordings have in common."""

    window: int = Field(
        20_480, ge=SHORTEST, le=2**24, description="samples at 16 kHz in the window of a recording that training sees"
    )
    validation: float = Field(
        0.05, gt=0, lt=1, description="fraction of the training recordings held out for validation"
    )
    unreadable: int = free(
        10,
        ge=0,
        le=10**9,
        description="damaged recordings or alignments that are tolerated; they are listed and left out",
    )
    recordings: int | None = Field(
        None, ge=4, le=10**9, description="number of training recordings; the test is shrunk in proportion; null: all"
    )
    mean: float = Field(-0.00068, description="mean of the waveform (-1 to 1), which is subtracted")
    std: float = Field(0.0630, gt=0, description="standard deviation of the waveform, which it is divided by")

    def expects(self) -> tuple[Shape, dict[str, int]]:
        return (1, self.window), {}

    def of_files(self, files: Sequence[Path], progress: Progress = SILENT) -> Split:
        """Whole recordings, as probes see them."""
        recordings, bad = examine({str(path): (path, "") for path in files}, len(files), progress=progress)
        if bad:
            raise DamagedData("; ".join(bad[:5]) + ("; …" if bad[5:] else ""))
        return Utterances(recordings, None, None, Sound(self.mean, self.std))

    def preprocessing(self) -> dict[str, JsonValue]:
        return {
            "kind": "recording",
            "decode": "values from -1 to 1, channels averaged",
            "rate_hz": RATE,
            "resample": "torchaudio.functional.resample with its defaults",
            "length": "the whole recording",
            "subtract_mean": self.mean,
            "divide_by_std": self.std,
        }


class Speech(SpeechSettings):
    """FLAC, WAV or Ogg Vorbis below `--data-dir`, at any rate and with any number of channels.

    The speaker is the first folder on the way to a recording. Hidden files and folders are passed by.
    """

    test: float = Field(0.2, gt=0, lt=1, description="fraction of each speaker's recordings that tests the probe")

    def heeds(self) -> frozenset[str]:
        return frozenset({"data_dir"})

    def open(self, data_dir: Path | None, *, download: bool, seed: int, progress: Progress = SILENT) -> Splits:
        needs = "the recipe needs a folder of recordings, with one sub-folder for each speaker"
        if data_dir is None:
            raise UsageError(f"{needs}: say which with --data-dir DIR")
        if not data_dir.is_dir():
            raise NotReady(f"{data_dir} is not a folder: {needs}")
        files = {}
        for path in sorted(data_dir.rglob("*")):
            place = path.relative_to(data_dir)
            hidden = any(part.startswith(".") for part in place.parts)
            if path.suffix.lower() in SUFFIXES and not hidden and path.is_file():
                files[place.as_posix()] = (path, place.parts[0] if len(place.parts) > 1 else "")
        if not files:
            raise NotReady(f"{data_dir} holds no recordings ({', '.join(SUFFIXES)})")
        recordings, bad = examine(files, self.unreadable, progress=progress)
        notes = [f"left out: {line}" for line in bad]
        if (loose := sum(not recording.speaker for recording in recordings)) not in (0, len(recordings)):
            lying = counted(loose, "recording")
            notes.append(f"in {data_dir} itself, in no speaker's folder: {lying}, counted as one more speaker")
        train, test = divide(recordings, self.test)
        return arrange(self, train, test, None, {}, seed, notes)


def divide(recordings: Sequence[Recording], part: float) -> tuple[list[Recording], list[Recording]]:
    """A part of each speaker's recordings, chosen once and for all, and the others before it."""
    by_speaker: dict[str, list[Recording]] = {}
    for recording in recordings:
        by_speaker.setdefault(recording.speaker, []).append(recording)
    judged = set()
    for speaker, own in by_speaker.items():
        order = numpy_generator(0, "test", speaker).permutation(len(own))
        judged |= {own[index].id for index in order[: min(max(round(len(own) * part), 1), len(own) - 1)]}
    return [r for r in recordings if r.id not in judged], [r for r in recordings if r.id in judged]


def arrange(
    settings: SpeechSettings,
    train: Sequence[Recording],
    test: Sequence[Recording],
    phones: Mapping[str, IntArray] | None,
    classes: Mapping[str, int],
    seed: int,
    notes: Sequence[str] = (),
) -> Splits:
    """The splits of a corpus: windows to train on and to validate with, whole utterances to probe with.

    Args:
        phones: id to labels; None where the corpus has none.
        classes: of the phones, where the corpus has them.

    Raises:
        NotReady: there are too few recordings.
    """
    notes, sound = list(notes), Sound(settings.mean, settings.std)
    if settings.recordings is not None:
        share = settings.recordings / max(len(train), 1)
        train, test = _some(train, settings.recordings), _some(test, max(round(len(test) * share), 1))
    if phones is not None and not all(any(recording.id in phones for recording in side) for side in (train, test)):
        phones, classes = None, {}
        notes.append("there is no phone task, since no utterance of training, or none of the test, has labels")
    speakers = sorted({recording.speaker for recording in [*train, *test]})
    known = len(speakers) > 1
    unheard = {recording.speaker for recording in test} - {recording.speaker for recording in train}
    if known and unheard:
        notes.append(
            f"{len(unheard)} of the test's speakers are not among those trained on: the speaker probe cannot name them"
        )

    def voices(chosen: Sequence[Recording]) -> IntArray | None:
        return np.array([speakers.index(recording.speaker) for recording in chosen], np.int64) if known else None

    def windows(chosen: Sequence[Recording]) -> Windows:
        return Windows(chosen, voices(chosen), phones, sound, window=settings.window, seed=seed)

    long = [recording for recording in train if recording.samples >= settings.window]
    if len(long) < len(train):
        some = ", ".join(recording.id for recording in train if recording.samples < settings.window)
        notes.append(
            f"shorter than a window of {settings.window} samples, and so not seen by stages: "
            f"{counted(len(train) - len(long), 'recording')} ({_short(some)})"
        )
    if len(long) < 2:
        raise NotReady(
            f"stages need two recordings of at least {settings.window / RATE:.2f} s to train on, and there are "
            f"{len(long)}: "
            "add recordings, or shorten dataset.window"
        )
    held = min(max(round(len(long) * settings.validation), 1), len(long) - 1)
    order = numpy_generator(0, "validation").permutation(len(long))
    tasks = {**({"speaker": len(speakers)} if known else {}), **classes}
    labelled = bool(tasks) and bool(test)
    return Splits(
        train=windows([long[index] for index in np.sort(order[held:])]),
        validation=windows([long[index] for index in np.sort(order[:held])]),
        probe=Utterances(train, voices(train), phones, sound) if labelled else None,
        test=Utterances(test, voices(test), phones, sound) if labelled else None,
        classes=tasks if labelled else {},
        notes=tuple(notes),
    )


def _some(recordings: Sequence[Recording], count: int) -> list[Recording]:
    """So many of them, in their order, the same for every seed of the training."""
    order = numpy_generator(0, "recordings").permutation(len(recordings))[:count]
    return [recordings[index] for index in np.sort(order)]


def _short(text: str) -> str:
    return text if len(text) <= 200 else text[:200] + "…"
