"""LibriSpeech (Panayotov et al. 2015): read English at 16 kHz, by many speakers; and the phone labels that CPC's
authors made for it.

`--data-dir` holds `LibriSpeech/SUBSET/SPEAKER/CHAPTER/SPEAKER-CHAPTER-UTTERANCE.flac`, as the archive unpacks; any
folder in that layout will do. The labels and lists of Oord et al. (2018) lie beside it, or in its `labels`: a line
`UTTERANCE id id …` for each utterance, an id every 160 samples; and an utterance a line for training and test.
"""

from __future__ import annotations

import shlex
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field

from layerwise.data.dataset import IntArray, Splits
from layerwise.data.download import Archive, discard, fetch, unpack
from layerwise.data.recordings import RATE, Recording, examine, require_few
from layerwise.data.speech import SpeechSettings, arrange, divide
from layerwise.errors import DamagedData, NotReady, UsageError
from layerwise.progress import SILENT, Progress
from layerwise.settings.base import Shape, labelled_only
from layerwise.settings.units import counted

Subset = Literal[
    "train-clean-100", "train-clean-360", "train-other-500", "dev-clean", "dev-other", "test-clean", "test-other"
]
PHONES, SPEAKERS = 41, 251  # of train-clean-100
FOLDER = "LibriSpeech"
ARCHIVE = Archive(
    urls=("https://www.openslr.org/resources/12/train-clean-100.tar.gz",),
    size=6_387_309_499,
    # As torchaudio and, with this size, TensorFlow Datasets state it.
    sha256="d4ddd1d5a6ab303066f14971d768ee43278a5f2a0aa43dc716b0e64ecbbbf6e2",
    unpacked=6_700_000_000,
)
LABELS = (
    "CPC's authors publish converted_aligned_phones.txt, train_split.txt and test_split.txt for train-clean-100: "
    "the README of github.com/facebookresearch/CPC_audio says where"
)


class LibriSpeech(SpeechSettings):
    """Read speech with known speakers and, where their files are given, phones."""

    subset: Subset = Field("train-clean-100", description="part of LibriSpeech: the folder of this name is read")
    alignments: str = labelled_only(
        "converted_aligned_phones.txt", description="file with the phones of each utterance"
    )
    train_list: str = Field("train_split.txt", description="file with the utterances to train on")
    test_list: str = labelled_only("test_split.txt", description="file with the utterances that test the probes")
    phones: int = Field(PHONES, ge=2, le=10**5, description="classes of phones")

    def expects(self) -> tuple[Shape, dict[str, int]]:
        return (1, self.window), {"speaker": SPEAKERS, "phone": self.phones}

    def open(self, data_dir: Path | None, *, download: bool, seed: int, progress: Progress = SILENT) -> Splits:
        folder = find_files(data_dir, self.subset, download=download, progress=progress)
        assert data_dir is not None
        files: dict[str, tuple[Path, str]] = {}
        for recording in sorted(folder.glob("*/*/*.flac")):
            if recording.name.startswith("."):
                continue
            name = recording.stem
            if name in files:
                raise DamagedData(
                    f"{files[name][0]} and {recording} are both named {name}, and labels and lists go by that name: an "
                    "utterance is in LibriSpeech once. Remove one of the two"
                )
            files[name] = (recording, recording.parts[-3])
        if not files:
            raise NotReady(f"{folder} holds no recordings SPEAKER/CHAPTER/*.flac")
        lists, notes = {}, []
        for name in (self.train_list, self.test_list):
            if (path := find_labels(data_dir, name)) is not None:
                lists[name] = read_list(path)
        if len(lists) == 2:
            files, lines = _listed(files, lists)
            notes += lines
        recordings, bad = examine(files, self.unreadable, _as_published, progress)
        if len(lists) == 2:
            train, test = ([r for r in recordings if r.id in set(listed)] for listed in lists.values())
        else:
            train, test = divide(recordings, 0.2)
            notes.append(
                f"a fifth of each speaker's utterances is the test, since {self.train_list} and {self.test_list} "
                f"are not both in {data_dir}. {LABELS}"
            )
        phones = None
        if (path := find_labels(data_dir, self.alignments)) is not None:
            phones, wrong, strange = read_alignments(path, recordings, self.phones)
            require_few(bad + wrong, self.unreadable, len(files))
            bad += wrong
            silent = sum(recording.id not in phones for recording in recordings)
            if strange or silent:
                notes.append(
                    f"{path} has {counted(strange, 'line')} for utterances that are not used here, and none for "
                    f"{silent} that are"
                )
        else:
            notes.append(f"there is no phone task, since {self.alignments} is not in {data_dir}. {LABELS}")
        notes += [f"left out: {line}" for line in bad]
        return arrange(self, train, test, phones, {} if phones is None else {"phone": self.phones}, seed, notes)


def _as_published(rate: int, channels: int) -> str | None:
    if (rate, channels) == (RATE, 1):
        return None
    return f"has {channels} channels at {rate} Hz, and LibriSpeech one at {RATE} (the recipe `speech` takes any)"


def find_files(data_dir: Path | None, subset: str, *, download: bool, progress: Progress) -> Path:
    """The folder of the subset, fetched first where that is asked for.

    Raises:
        NotReady: it is missing; the message says how to get it.
        UsageError: there is no `data_dir`, or a download was asked for that is not offered.
    """
    if download and data_dir is None:
        raise UsageError("--download fetches LibriSpeech train-clean-100 (5.9 GiB): name a folder with --data-dir DIR")
    if download and subset not in ARCHIVE.name:
        raise UsageError(
            f"--download fetches train-clean-100 alone, and dataset.subset is {subset}: "
            "fetch it from www.openslr.org/12"
        )
    shown = data_dir or Path("DIR")
    expected = shown / FOLDER / subset
    if data_dir is not None:
        for folder in (expected, data_dir / subset, data_dir):
            if folder.name == subset and folder.is_dir():
                return folder
        if download:
            archive = fetch(ARCHIVE, data_dir, progress)
            unpack(archive, data_dir, progress)
            discard(archive)
            return expected
    offer = (
        f"Either add --download --data-dir {shlex.quote(str(shown))}, which fetches 5.9 GiB, or fetch"
        if subset in ARCHIVE.name
        else "Fetch"
    )
    offer += f" https://www.openslr.org/resources/12/{subset}.tar.gz and unpack it in {shown}"
    if data_dir is None:
        raise UsageError(f"the recipe needs LibriSpeech, and no --data-dir was given. {offer}")
    raise NotReady(f"there is no folder {expected}. {offer}")


def find_labels(data_dir: Path, name: str) -> Path | None:
    """A file of labels, by its path or beside the recordings."""
    places = (data_dir / name, data_dir / "labels" / name, data_dir / FOLDER / name, data_dir.parent / name)
    return next((path for path in places if path.is_file()), None)


def _listed(
    files: Mapping[str, tuple[Path, str]], lists: Mapping[str, list[str]]
) -> tuple[dict[str, tuple[Path, str]], list[str]]:
    """The files that the lists name, and a note on those that they miss.

    Raises:
        NotReady: the lists share utterances, or name none that is there.
    """
    (train_name, train), (test_name, test) = lists.items()
    if shared := sorted(set(train) & set(test)):
        raise NotReady(
            f"{train_name} and {test_name} both name {', '.join(shared[:3])}: test utterances must not be trained on"
        )
    notes = []
    for name, listed in lists.items():
        here = sum(utterance in files for utterance in listed)
        if here == 0:
            raise NotReady(
                f"none of the {len(listed)} utterances of {name} is among the {len(files)} recordings: "
                "choose other lists, or another dataset.subset"
            )
        if here < len(listed):
            notes.append(f"{here} of the {len(listed)} utterances of {name} are here")
    wanted = {*train, *test}
    return {name: file for name, file in files.items() if name in wanted}, notes


def read_list(path: Path) -> list[str]:
    """The utterances that a file names.

    Raises:
        DamagedData: it is no text.
    """
    try:
        return path.read_text("utf-8").split()
    except UnicodeDecodeError as error:
        raise DamagedData(f"{path} is not a list of utterances: {error}") from error


def read_alignments(
    path: Path, recordings: Collection[Recording], classes: int
) -> tuple[dict[str, IntArray], list[str], int]:
    """Phones of the recordings, by id; a line for each bad alignment; and how many belong to no recording."""
    wanted = {recording.id: recording for recording in recordings}
    found: dict[str, IntArray] = {}
    bad, strange = [], 0
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            name, _, rest = line.strip().partition(" ")
            if not name:
                continue
            if (recording := wanted.get(name)) is None:
                strange += 1
                continue
            where = f"{path}, line {number} ({name})"
            try:
                labels = np.array(rest.split(), np.int64)
            except (ValueError, OverflowError):
                bad.append(f"{where} contains something other than whole numbers")
                continue
            if name in found:
                bad.append(f"{where} labels the utterance again")
            elif not recording.labels - 1 <= len(labels) <= recording.labels:
                bad.append(f"{where} has {len(labels)} labels, and {recording.samples} samples have {recording.labels}")
            elif labels.min() < 0 or labels.max() >= classes:
                bad.append(
                    f"{where} has labels from {labels.min()} to {labels.max()}, and there are {classes} classes "
                    "(dataset.phones)"
                )
            else:
                found[name] = labels
    return found, bad, strange
