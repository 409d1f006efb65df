"""Samples that are recordings of speech, and the paper's way of looking at them (section 4.2).

Training sees a random window of a recording; a probe sees all of it, so its samples differ in length. Recordings are
read with `soundfile`, which decodes only the window that is asked for.

Letters: N recordings, B batch, S samples of a waveform, L labels of a recording, one every 160 samples.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import soundfile
import torch
from torch import Tensor

from layerwise import optional
from layerwise.data.dataset import UNKNOWN, IntArray, Split
from layerwise.data.seen import Facts, Unreadable, legible, look_through
from layerwise.errors import DamagedData
from layerwise.progress import SILENT, Progress
from layerwise.seeding import numpy_generator

RATE = 16_000  # Hz, of everything that a network sees
HOP, SPAN = 160, 400  # samples from label to label, and samples that a label describes
SHORTEST = 1_600  # samples; less is no utterance
MOST_STEPS = 1_000  # phases of a resampling filter: 441 for 44.1 kHz
MARGIN = 160  # samples resampled beside a window, many times the length of the filter

Waveform = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Recording:
    """A file that was decoded from beginning to end without an error."""

    id: str
    path: Path
    speaker: str
    rate: int
    """Hz, of the file."""
    samples: int
    """At 16 kHz."""
    sha256: str
    """Of the file."""

    @property
    def labels(self) -> int:
        """L: labels that describe whole spans of it."""
        return (self.samples - SPAN) // HOP + 1

    def read(self, begin: int = 0, count: int | None = None) -> Waveform:
        """(count,) samples from `begin` on, at 16 kHz, channels averaged; the same numbers as that part of the whole.

        Raises:
            DamagedData: the file cannot be read any more, or has become shorter.
        """
        count = self.samples - begin if count is None else count
        old, new = self.rate // math.gcd(self.rate, RATE), RATE // math.gcd(self.rate, RATE)
        first = 0 if old == new else max(begin - MARGIN, 0) // new * new  # a sample of the file begins with it
        last = begin + count if old == new else begin + count + MARGIN
        try:
            # As bytes, since a name need not be text; what soundfile declares of itself forgets them.
            with soundfile.SoundFile(os.fsencode(self.path)) as file:  # type: ignore[arg-type]
                file.seek(first // new * old)
                frames = file.read(-(-(last - first) * old // new), "float32", always_2d=True)
                values = np.asarray(frames, np.float32).mean(1)
        except (soundfile.SoundFileError, OSError) as error:
            raise DamagedData(f"{legible(self.path)} could be read before, but cannot be read now: {error}") from error
        if old != new:
            functional = optional.torchaudio("recordings at other rates than 16 kHz").functional
            values = functional.resample(torch.from_numpy(values), old, new).numpy()
        window: Waveform = values[begin - first : begin - first + count]
        if len(window) != count:
            raise DamagedData(f"{legible(self.path)} has changed: it no longer has {self.samples} samples at 16 kHz")
        return window


def examine(
    files: Mapping[str, tuple[Path, str]],
    tolerated: int,
    required: Callable[[int, int], str | None] = lambda rate, channels: None,
    progress: Progress = SILENT,
) -> tuple[list[Recording], list[str]]:
    """Decode every file that was not decoded before, and tell good recordings from bad ones.

    Args:
        files: id to path and speaker.
        tolerated: bad files that are only named.
        required: what is wrong with a file of this rate (Hz) and number of channels, if anything.

    Returns:
        The good recordings in the order of `files`, and a line for each bad file.

    Raises:
        DamagedData: more files are bad than are tolerated; the message names them.
    """
    paths = [path for path, _ in files.values()]
    found = look_through(paths, "recordings-1", _look, progress, "look through the recordings", "recordings")
    good: list[Recording] = []
    bad: list[str] = []
    with closing(found):
        for (name, (path, speaker)), facts in zip(files.items(), found, strict=True):
            if isinstance(facts, OSError):
                bad.append(f"{legible(path)} cannot be read: {facts.strerror or facts}")
            elif isinstance(facts, Unreadable):
                bad.append(f"{legible(path)} {facts}")
            elif (wrong := required(facts["rate"], facts["channels"])) is not None:
                bad.append(f"{legible(path)} {wrong}")
            else:
                told = facts["rate"], facts["samples"], facts["sha256"]
                good.append(Recording(legible(name), path, legible(speaker), *told))
    require_few(bad, tolerated, len(files))
    return good, bad


def require_few(bad: Sequence[str], tolerated: int, among: int) -> None:
    """
    Raises:
        DamagedData: more recordings or alignments are bad than are tolerated.
    """
    if len(bad) > tolerated:
        raise DamagedData(
            f"{len(bad)} of {among} recordings or their alignments cannot be used, and dataset.unreadable tolerates "
            f"{tolerated}: "
            f"{'; '.join(bad[:5])}{'; …' if len(bad) > 5 else ''}"
        )


def _look(content: bytes) -> Facts:
    """Rate (Hz), channels, and samples at 16 kHz of a recording that can be decoded from beginning to end."""
    if not content:
        raise Unreadable("is empty")
    try:
        with soundfile.SoundFile(io.BytesIO(content)) as file:
            values = file.read(dtype="float32", always_2d=True)
            announced, rate, channels = file.frames, file.samplerate, file.channels
    except (soundfile.SoundFileError, OSError) as error:
        reason = str(error).rpartition(": ")[2]  # before it stands the address of what holds the bytes
        raise Unreadable(f"cannot be read: {reason.rstrip('.')}") from error
    if not len(values):
        raise Unreadable("holds no samples")
    if len(values) != announced:
        raise Unreadable(f"is cut short: {len(values)} of {announced} samples")
    if max(rate, RATE) // math.gcd(rate, RATE) > MOST_STEPS:
        raise Unreadable(
            f"has {rate} Hz, and resampling it needs a filter of gigabytes to get {RATE} Hz: resample it first"
        )
    if not np.isfinite(values).all():
        raise Unreadable("holds values that are not finite")
    samples = -(-len(values) * RATE // rate)
    if samples < SHORTEST:
        raise Unreadable(f"lasts {1000 * samples / RATE:.0f} ms, less than {1000 * SHORTEST / RATE:.0f}")
    return {"rate": rate, "channels": channels, "samples": samples}


@dataclass(frozen=True)
class Sound:
    """How waveforms are standardised."""

    mean: float
    std: float

    def tensor(self, waveforms: Sequence[Waveform]) -> Tensor:
        """(B, 1, S)."""
        return (torch.from_numpy(np.stack(waveforms)).unsqueeze(1) - self.mean) / self.std


class Recordings(Split):
    """What windows and whole utterances share: who speaks, and which phones."""

    def __init__(
        self,
        recordings: Sequence[Recording],
        speakers: IntArray | None,
        phones: Mapping[str, IntArray] | None,
        sound: Sound,
    ) -> None:
        """
        Args:
            speakers: (N,) labels.
            phones: id to (L,) labels; those of a recording that is not there are unknown. None: there is no such task.
        """
        self.recordings, self.phones, self.sound = recordings, phones, sound
        self.ids = [recording.id for recording in recordings]
        self.labels = {} if speakers is None else {"speaker": speakers}

    def phones_of(self, recording: Recording) -> IntArray:
        """(L,) labels, UNKNOWN where there are none."""
        assert self.phones is not None
        known = self.phones.get(recording.id, ())
        return np.concatenate([known, np.full(recording.labels - len(known), UNKNOWN)]).astype(np.int64)

    def manifest(self) -> str:
        digest = hashlib.sha256()
        for index, recording in enumerate(self.recordings):
            speaker = [int(values[index]) for values in self.labels.values()]
            digest.update(f"{recording.id} {recording.sha256} {speaker}\n".encode())
            if self.phones is not None:
                digest.update(self.phones_of(recording).tobytes())
        return digest.hexdigest()


class Windows(Recordings):
    """A random window in each view, the middle of the recording in the evaluation view."""

    def __init__(
        self,
        recordings: Sequence[Recording],
        speakers: IntArray | None,
        phones: Mapping[str, IntArray] | None,
        sound: Sound,
        *,
        window: int,
        seed: int,
    ) -> None:
        super().__init__(recordings, speakers, phones, sound)
        self.window, self.seed = window, seed
        self.sample_shape = (1, window)

    def batch(self, indices: IntArray, view: int | None) -> Tensor:
        chosen = [self.recordings[int(index)] for index in indices]
        return self.sound.tensor([recording.read(self._begin(recording, view), self.window) for recording in chosen])

    def labels_of(self, indices: IntArray, view: int | None) -> dict[str, IntArray]:
        """Speakers (B,), and the phones of each window (B, L)."""
        labels = super().labels_of(indices, view)
        if self.phones is not None:
            chosen = [self.recordings[int(index)] for index in indices]
            labels["phone"] = np.stack([self._phones(recording, view) for recording in chosen])
        return labels

    def _phones(self, recording: Recording, view: int | None) -> IntArray:
        first = self._begin(recording, view) // HOP
        return self.phones_of(recording)[first : first + (self.window - SPAN) // HOP + 1]

    def _begin(self, recording: Recording, view: int | None) -> int:
        """First sample of the window, a multiple of the labels' distance."""
        places = (recording.samples - self.window) // HOP + 1
        if view is None:
            return places // 2 * HOP
        return int(numpy_generator(self.seed, "view", recording.id, view).integers(places)) * HOP


class Utterances(Recordings):
    """Whole recordings, which differ in length."""

    def __init__(
        self,
        recordings: Sequence[Recording],
        speakers: IntArray | None,
        phones: Mapping[str, IntArray] | None,
        sound: Sound,
    ) -> None:
        super().__init__(recordings, speakers, phones, sound)
        self.sample_shape = (1, None)
        self.lengths = np.array([recording.samples for recording in recordings], np.int64)

    def batch(self, indices: IntArray, view: int | None) -> Tensor:
        assert len(indices) == 1, "recordings of differing length are read one at a time"
        return self.sound.tensor([self.recordings[int(indices[0])].read()])

    def labels_of(self, indices: IntArray, view: int | None) -> dict[str, IntArray]:
        """Speaker (1,), and the phones of the recording (1, L)."""
        labels = super().labels_of(indices, view)
        if self.phones is not None:
            labels["phone"] = np.stack([self.phones_of(self.recordings[int(index)]) for index in indices])
        return labels
