"""A small synthetic corpus in LibriSpeech's layout: known speakers, known phones, nothing to download, nobody
speaking.

Sentences of invented words, the same words for all speakers, are spoken by rule (`formants.py`), each through a room
of its own: a random gain, a random colouring of the spectrum, and noise. Everything is drawn from the corpus's seed.
It exercises what LibriSpeech would, in minutes; an accuracy on it says nothing about real speech.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated

import numpy as np
import numpy.typing as npt
import soundfile
from pydantic import Field, model_validator

from layerwise.data.dataset import Splits
from layerwise.data.formants import (
    GLIDES,
    NASALS,
    PHONES,
    RATE,
    VOWELS,
    Array,
    Voice,
    draw_voice,
    durations,
    synthesise,
)
from layerwise.data.librispeech import FOLDER, LibriSpeech
from layerwise.data.recordings import HOP, SPAN
from layerwise.data.seen import user_cache
from layerwise.data.speech import SpeechSettings
from layerwise.progress import SILENT, Progress
from layerwise.seeding import numpy_generator
from layerwise.settings.base import Shape

VERSION = 1  # of the sound: another one makes another corpus
SUBSET = "train-clean-100"
CHAPTER = 1
NOTE = (
    "the corpus `voices` is synthetic: formant synthesis by rule, no person speaks, "
    "and its accuracies say nothing about real speech"
)
Decibel = Annotated[float, Field(ge=-60, le=100)]
INDEX = {phone.name: number for number, phone in enumerate(PHONES)}


class Voices(SpeechSettings):
    """Made where it is missing, below `--data-dir` or in the user's cache directory."""

    speakers: int = Field(24, ge=2, le=1000, description="number of speakers")
    utterances: int = Field(20, ge=5, le=1000, description="utterances of each speaker; a fifth of them is the test")
    words: int = Field(5, ge=1, le=1000, description="words in an utterance")
    lexicon: int = Field(200, ge=2, le=10**5, description="words in the vocabulary")
    noise: tuple[Decibel, Decibel] = Field(
        (18.0, 22.0), description="dB: smallest and largest ratio of speech to noise"
    )
    corpus_seed: int = Field(0, ge=0, lt=2**32, description="seed of everything drawn to make the corpus")

    @model_validator(mode="after")
    def _least_before_most(self) -> Voices:
        if self.noise[0] > self.noise[1]:
            raise ValueError(f"noise {self.noise} must be the least ratio and then the most")
        return self

    def heeds(self) -> frozenset[str]:
        return frozenset({"data_dir"})

    def expects(self) -> tuple[Shape, dict[str, int]]:
        return (1, self.window), {"speaker": self.speakers, "phone": len(PHONES)}

    def open(self, data_dir: Path | None, *, download: bool, seed: int, progress: Progress = SILENT) -> Splits:
        folder = (data_dir or user_cache()) / f"voices-{self._digest()}"
        if not folder.is_dir():
            self._make(folder, progress)
        shared = {name: getattr(self, name) for name in SpeechSettings.model_fields}
        corpus = LibriSpeech(**shared, phones=len(PHONES))
        splits = corpus.open(folder, download=False, seed=seed, progress=progress)
        return Splits(**{**vars(splits), "notes": (f"{NOTE} ({folder})", *splits.notes)})

    def _digest(self) -> str:
        made_from = {
            name: getattr(self, name) for name in ("speakers", "utterances", "words", "lexicon", "noise", "corpus_seed")
        }
        return hashlib.sha256(json.dumps([VERSION, made_from], sort_keys=True).encode()).hexdigest()[:12]

    def _make(self, folder: Path, progress: Progress) -> None:
        """The whole corpus, in a folder that appears when all of it is there."""
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _scratch(folder.with_name(f".{folder.name}.making"), progress) as made:
            if folder.is_dir():  # another process made it meanwhile
                return
            self._fill(made, progress)
            made.replace(folder)

    def _fill(self, made: Path, progress: Progress) -> None:
        lexicon = make_lexicon(self.lexicon, numpy_generator(self.corpus_seed, "lexicon"))
        progress.begin("make the corpus `voices`", self.speakers * self.utterances, "utterances")
        lines: dict[str, list[str]] = {"phones": [], "train": [], "test": []}
        for speaker in range(1, self.speakers + 1):
            voice = draw_voice(numpy_generator(self.corpus_seed, "voice", speaker))
            chapter = made / FOLDER / SUBSET / str(speaker) / str(CHAPTER)
            chapter.mkdir(parents=True)
            transcript = []
            for number in range(self.utterances):
                name = f"{speaker}-{CHAPTER}-{number:04d}"
                draw = numpy_generator(self.corpus_seed, "utterance", speaker, number)
                text, wave, labels = utter(voice, lexicon, self.words, self.noise, draw)
                soundfile.write(chapter / f"{name}.flac", wave, RATE, "PCM_16")
                transcript.append(f"{name} {text}")
                lines["phones"].append(f"{name} {' '.join(map(str, labels))}")
                lines["test" if number % 5 == 4 else "train"].append(name)
                progress.advance(1, 1, "")
            _write(chapter / f"{speaker}-{CHAPTER}.trans.txt", transcript)
        _write(made / "converted_aligned_phones.txt", lines["phones"])
        _write(made / "train_split.txt", lines["train"])
        _write(made / "test_split.txt", lines["test"])
        _write(made / "phones.txt", [f"{number} {phone.name}" for number, phone in enumerate(PHONES)])
        _write(made / "README.txt", [f"{NOTE[0].upper()}{NOTE[1:]}.", json.dumps(self.identity())])
        progress.end()


@contextmanager
def _scratch(folder: Path, progress: Progress) -> Iterator[Path]:
    """An empty place in `folder`, which is this process's own while the block runs and is gone afterwards. What a
    killed process left in it is removed; a living one is waited for.
    """
    while True:
        folder.mkdir(exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                progress.note(f"another process makes the corpus in {folder}: waiting for it")
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if not _is(folder, descriptor):  # the other process has finished and removed it
                continue
            made = folder / "made"
            try:
                if made.exists():
                    shutil.rmtree(made)
                made.mkdir()
                yield made
            finally:
                shutil.rmtree(made, ignore_errors=True)
                with suppress(OSError):
                    folder.rmdir()
            return
        finally:
            os.close(descriptor)


def _is(folder: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(folder.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _write(path: Path, lines: list[str]) -> None:
    path.write_text("\n".join(lines) + "\n")


def make_lexicon(words: int, draw: np.random.Generator) -> list[list[int]]:
    """Words of one to three syllables: at most a consonant and a glide, a vowel, at most a consonant."""
    vowels, glides, nasals = ([INDEX[phone.name] for phone in kind] for kind in (VOWELS, GLIDES, NASALS))
    consonants = [number for number in range(1, len(PHONES)) if number not in vowels and number not in glides]
    onsets = [number for number in consonants + glides if number != INDEX["NG"]]
    codas = [number for number in consonants + nasals if number != INDEX["HH"]]
    lexicon = []
    for _ in range(words):
        word: list[int] = []
        for _ in range(int(draw.integers(1, 4))):
            if draw.uniform() < 0.85:
                word.append(int(draw.choice(onsets)))
            word.append(int(draw.choice(vowels)))
            if draw.uniform() < 0.4:
                word.append(int(draw.choice(codas)))
        lexicon.append(word)
    return lexicon


def utter(
    voice: Voice, lexicon: list[list[int]], words: int, noise: tuple[float, float], draw: np.random.Generator
) -> tuple[str, npt.NDArray[np.int16], list[int]]:
    """A sentence: its phones by name, the waveform, and a phone number every 160 samples."""
    silence = INDEX["SIL"]
    frequent = 1 / np.arange(2, len(lexicon) + 2)  # as in languages, a few words make most of the speech
    phones = [silence]
    for word in draw.choice(len(lexicon), words, p=frequent / frequent.sum()):
        phones += lexicon[word]
        if draw.uniform() < 0.25:
            phones.append(silence)
    if phones[-1] != silence:
        phones.append(silence)
    lengths = durations(phones, voice, draw)
    wave = _room(synthesise(phones, lengths, voice, draw), noise, draw)
    middles = np.arange((len(wave) - SPAN) // HOP + 1) * HOP + SPAN // 2
    labels = np.array(phones)[np.searchsorted(np.cumsum(lengths), middles, "right")]
    return " ".join(PHONES[phone].name for phone in phones), np.round(32767 * wave).astype(np.int16), labels.tolist()


def _room(wave: Array, noise: tuple[float, float], draw: np.random.Generator) -> Array:
    """The waveform as it was recorded: coloured, with noise that falls by 3 dB an octave, at a random level."""
    spectrum = np.fft.rfft(wave)
    hertz = np.fft.rfftfreq(len(wave), 1 / RATE)
    colour = np.interp(np.log2(np.maximum(hertz, 60)), np.log2([60, 250, 1000, 4000, 8000]), draw.normal(0, 0.7, 5))
    coloured = np.fft.irfft(spectrum * 10 ** (colour / 20), len(wave))
    hiss = np.fft.irfft(np.fft.rfft(draw.normal(0, 1, len(wave))) / np.sqrt(np.maximum(hertz, 60)), len(wave))
    ratio = 10 ** (draw.uniform(*noise) / 20)
    heard = coloured + hiss * (coloured.std() / hiss.std() / ratio)
    gain = min(0.06 * 2 ** draw.uniform(-0.15, 0.15) / heard.std(), 0.99 / np.abs(heard).max())
    return np.asarray(heard * gain)
