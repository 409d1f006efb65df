"""Speech-like sound by rule: a voice, a string of phones, and the waveform (after Klatt 1980, "Software for a
cascade/parallel formant synthesizer").

A pulse train and noise pass through filters that follow the phones: resonances of the vocal tract for what is voiced
or breathed, bands of noise for fricatives and bursts. Targets glide into each other, so that phones colour their
neighbours. Voices differ in pitch, length of the vocal tract, timbre, rate and accent. No person speaks; nothing here
is a recording.

Letters: F frames of 4 ms, S samples, K bins of the spectrum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

RATE = 16_000  # Hz
STEP = 64  # samples from frame to frame
FRAME = 256  # samples that a frame shapes
BINS = np.fft.rfftfreq(2 * FRAME, 1 / RATE)  # Hz


@dataclass(frozen=True)
class Phone:
    """How a phone sounds in a vocal tract of 17.5 cm. Levels are amplitudes, 1 that of a vowel's voicing."""

    name: str
    formants: tuple[float, float, float]
    """Hz: the resonances, or where those of the neighbours bend to."""
    seconds: tuple[float, float]
    """Shortest and longest."""
    voice: float = 0.0
    breath: float = 0.0
    """Noise through the resonances."""
    hiss: float = 0.0
    """Noise in a band of its own."""
    band: tuple[float, float] = (4000.0, 0.5)
    """Middle of that band in Hz, and its width in octaves."""
    stop: bool = False
    """A closure, and then a burst of the hiss and the breath."""


def _vowel(name: str, *formants: float) -> Phone:
    return Phone(name, (formants[0], formants[1], formants[2]), (0.07, 0.18), voice=1.0)


SILENCE = Phone("SIL", (500, 1500, 2500), (0.05, 0.2))
# Vowels: averages over men of Peterson & Barney (1952), "Control methods used in a study of the vowels".
VOWELS = (
    _vowel("IY", 270, 2290, 3010),
    _vowel("IH", 390, 1990, 2550),
    _vowel("EH", 530, 1840, 2480),
    _vowel("AE", 660, 1720, 2410),
    _vowel("AA", 730, 1090, 2440),
    _vowel("AO", 570, 840, 2410),
    _vowel("UH", 440, 1020, 2240),
    _vowel("UW", 300, 870, 2240),
    _vowel("AH", 640, 1190, 2390),
    _vowel("ER", 490, 1350, 1690),
)
GLIDES = (
    Phone("L", (360, 1100, 2800), (0.05, 0.1), voice=0.6),
    Phone("R", (350, 1060, 1380), (0.05, 0.1), voice=0.6),
    Phone("W", (300, 610, 2200), (0.05, 0.1), voice=0.6),
    Phone("Y", (260, 2070, 3020), (0.05, 0.1), voice=0.6),
)
NASALS = (
    Phone("M", (250, 950, 2200), (0.05, 0.11), voice=0.35),
    Phone("N", (250, 1600, 2600), (0.05, 0.11), voice=0.35),
    Phone("NG", (250, 2200, 2700), (0.05, 0.11), voice=0.35),
)
FRICATIVES = (
    Phone("S", (320, 1700, 2600), (0.07, 0.15), hiss=0.5, band=(6200, 0.45)),
    Phone("SH", (300, 1850, 2500), (0.07, 0.15), hiss=0.5, band=(3400, 0.55)),
    Phone("F", (340, 1100, 2100), (0.06, 0.13), hiss=0.14, band=(4500, 1.6)),
    Phone("TH", (320, 1350, 2550), (0.06, 0.13), hiss=0.14, band=(6800, 0.9)),
    Phone("Z", (300, 1700, 2600), (0.06, 0.12), voice=0.25, hiss=0.3, band=(6200, 0.45)),
    Phone("V", (300, 1100, 2100), (0.05, 0.1), voice=0.3, hiss=0.08, band=(4500, 1.6)),
    Phone("HH", (500, 1500, 2500), (0.05, 0.1), breath=0.35),
)
STOPS = (
    Phone("P", (350, 900, 2100), (0.07, 0.13), breath=0.25, hiss=0.25, band=(1000, 1.2), stop=True),
    Phone("T", (350, 1750, 2650), (0.07, 0.13), breath=0.25, hiss=0.55, band=(5000, 0.8), stop=True),
    Phone("K", (350, 1950, 2350), (0.07, 0.13), breath=0.25, hiss=0.5, band=(2200, 0.5), stop=True),
    Phone("B", (280, 900, 2100), (0.05, 0.1), voice=0.12, hiss=0.15, band=(900, 1.2), stop=True),
    Phone("D", (280, 1750, 2650), (0.05, 0.1), voice=0.12, hiss=0.3, band=(4500, 0.8), stop=True),
    Phone("G", (280, 1950, 2350), (0.05, 0.1), voice=0.12, hiss=0.3, band=(2000, 0.5), stop=True),
)
PHONES = (SILENCE, *VOWELS, *GLIDES, *NASALS, *FRICATIVES, *STOPS)
"""A phone's number is its place here."""


@dataclass(frozen=True)
class Voice:
    """What makes a speaker."""

    pitch: float
    """Hz, mean."""
    tract: float
    """Length of the vocal tract, 1 being 17.5 cm; resonances lie that much lower."""
    tilt: float
    """dB an octave that the source falls beyond the usual 6."""
    breathiness: float
    """Noise beside the voicing, amplitude."""
    damping: float
    """Of the resonances' bandwidths."""
    upper: tuple[float, float]
    """Hz: the fourth and fifth resonance."""
    melody: float
    """Range of the pitch, octaves."""
    rate: float
    """Of speaking; 2 halves every phone."""
    accent: Array
    """(len(PHONES), 3) factors on the formants."""


def draw_voice(draw: np.random.Generator) -> Voice:
    """A voice at random: a deep one tends to have a long vocal tract."""
    depth = draw.uniform()
    return Voice(
        pitch=float(95 * 2 ** (1.15 * depth + draw.normal(0, 0.12))),
        tract=float(1.14 - 0.26 * depth + draw.normal(0, 0.03)),
        tilt=float(draw.uniform(-2, 4)),
        breathiness=float(draw.uniform(0.01, 0.12)),
        damping=float(draw.uniform(0.8, 1.5)),
        upper=(float(draw.uniform(3250, 3850)), float(draw.uniform(4200, 4900))),
        melody=float(draw.uniform(0.15, 0.45)),
        rate=float(draw.uniform(0.85, 1.25)),
        accent=np.exp(draw.normal(0, 0.04, (len(PHONES), 3))),
    )


def durations(phones: Sequence[int], voice: Voice, draw: np.random.Generator) -> npt.NDArray[np.int64]:
    """Samples of each phone."""
    low, high = (np.array([PHONES[phone].seconds[end] for phone in phones]) for end in (0, 1))
    seconds: Array = (low + (high - low) * draw.beta(2, 3, len(low))) / voice.rate
    return np.round(RATE * seconds).astype(np.int64)


def synthesise(phones: Sequence[int], lengths: npt.NDArray[np.int64], voice: Voice, draw: np.random.Generator) -> Array:
    """(sum of lengths,) waveform, with a loudest sample of about 1."""
    samples = int(lengths.sum())
    count = samples // STEP + FRAME // STEP + 1
    tracks = _tracks(phones, lengths, voice, count)
    pulses = _pulses(samples + FRAME, voice, draw)
    noise = draw.normal(0, 1, samples + FRAME + count * STEP)

    resonances = _resonances(tracks.formants, voice)
    # The fall of the glottal source, less what the lips give back; they give nothing back at 0 Hz.
    source = np.where(BINS < 40, 0, (np.maximum(BINS, 40) / 500) ** (-(6 + voice.tilt) / 6.02))
    voiced = resonances * source * tracks.voice[:, None]
    breathed = resonances * (tracks.breath + voice.breathiness * tracks.voice)[:, None]
    octaves = np.log2(np.maximum(BINS, 60)[None] / (tracks.band / voice.tract**0.5)[:, None])
    hissed = np.exp(-0.5 * (octaves / tracks.width[:, None]) ** 2) * tracks.hiss[:, None]
    wave = _filtered(pulses, voiced) + _filtered(noise[: len(pulses)], 0.03 * breathed + 0.35 * hissed)
    wave = wave[FRAME // 2 : FRAME // 2 + samples]
    return wave / max(float(np.abs(wave).max()), 1e-9)


@dataclass(frozen=True)
class _Tracks:
    """What changes from frame to frame, each (F,) or (F, 3)."""

    formants: Array
    voice: Array
    breath: Array
    hiss: Array
    band: Array
    width: Array


def _tracks(phones: Sequence[int], lengths: npt.NDArray[np.int64], voice: Voice, count: int) -> _Tracks:
    formants = np.zeros((count, 3))
    levels = np.zeros((count, 3))  # voice, breath, hiss
    band, width = np.full(count, 4000.0), np.full(count, 1.0)
    ends = np.cumsum(lengths)
    for number, begin, end in zip(phones, ends - lengths, ends, strict=True):
        phone = PHONES[number]
        first, last = int(begin) // STEP, max(int(end) // STEP, int(begin) // STEP + 1)
        if end == ends[-1]:
            last = count
        formants[first:last] = np.array(phone.formants) * voice.accent[number] / voice.tract
        band[first:last], width[first:last] = phone.band
        if not phone.stop:
            levels[first:last] = phone.voice, phone.breath, phone.hiss
            continue
        burst = first + int(0.6 * (last - first))
        levels[first:burst, 0] = phone.voice
        levels[burst : burst + 4, 2] = phone.hiss
        levels[burst + 1 : last, 1] = phone.breath
    formants = _smooth(formants, 17)
    levels = _smooth(levels, 5)
    return _Tracks(formants, levels[:, 0], levels[:, 1], levels[:, 2], band, width)


def _smooth(tracks: Array, frames: int) -> Array:
    """Each column averaged over so many frames, an odd number, with a Hann weight."""
    weights = np.hanning(frames + 2)[1:-1]
    padded = np.pad(tracks, ((frames // 2, frames // 2), (0, 0)), mode="edge")
    return np.stack([np.convolve(column, weights / weights.sum(), "valid") for column in padded.T], 1)


def _pulses(samples: int, voice: Voice, draw: np.random.Generator) -> Array:
    """A pulse each period, of the same energy a second at any pitch; the pitch falls in an utterance, and wavers."""
    time = np.linspace(0, 1, samples)
    knots = draw.normal(0, voice.melody / 2, max(samples // 4000, 2) + 1)
    wavering = (
        np.interp(time, np.linspace(0, 1, len(knots)), knots)
        + draw.normal(0, 0.01, samples // 400 + 1).repeat(400)[:samples]
    )
    pitch = voice.pitch * 2 ** (voice.melody * (0.4 - time) + wavering)
    phase = np.cumsum(pitch / RATE)
    pulses = np.zeros(samples)
    starts = np.flatnonzero(np.diff(np.floor(phase), prepend=0) > 0)
    pulses[starts] = np.sqrt(RATE / pitch[starts]) / 10
    return pulses


def _resonances(formants: Array, voice: Voice) -> Array:
    """(F, K) gain of the vocal tract: five resonances one after another."""
    upper = np.broadcast_to(np.array(voice.upper) / voice.tract, (len(formants), 2))
    centres = np.concatenate([formants, upper], 1)[:, :, None]
    widths = voice.damping * np.array([70.0, 90.0, 130.0, 220.0, 300.0])[None, :, None]
    gains: Array = centres**2 / np.sqrt((centres**2 - BINS**2) ** 2 + (widths * BINS) ** 2)
    product: Array = gains.prod(1)
    return product


def _filtered(sound: Array, gains: Array) -> Array:
    """The sound, frame by frame multiplied by (F, K) gains and put together again."""
    count = len(gains)
    window = np.sqrt(np.hanning(FRAME + 1)[:-1])
    padded = np.concatenate([sound, np.zeros(max(0, (count - 1) * STEP + FRAME - len(sound)))])
    frames = np.lib.stride_tricks.sliding_window_view(padded, FRAME)[: count * STEP : STEP][:count] * window
    shaped = np.fft.irfft(np.fft.rfft(frames, 2 * FRAME) * gains)[:, :FRAME] * window
    parts = shaped.reshape(count, FRAME // STEP, STEP)
    wave = np.zeros((count + FRAME // STEP, STEP))
    for part in range(FRAME // STEP):
        wave[part : part + count] += parts[:, part]
    return wave.reshape(-1) * (STEP / (FRAME / 2))
