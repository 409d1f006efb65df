"""The synthetic corpus: the same from the same seed, labelled where it sounds, different where voices differ."""

from __future__ import annotations

import hashlib
import itertools
import os
import signal

import numpy as np
import pytest
import soundfile
from pydantic import ValidationError

from layerwise.data import voices
from layerwise.data.formants import PHONES, Voice, draw_voice, synthesise
from layerwise.data.voices import INDEX, Voices
from layerwise.seeding import numpy_generator

SMALL = Voices(speakers=3, utterances=5, words=3)


def files(folder):
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def test_the_same_corpus_from_the_same_seed(tmp_path):
    splits = [SMALL.open(tmp_path / name, download=False, seed=seed) for name, seed in (("a", 0), ("b", 1))]
    (one,), (other,) = ((tmp_path / name).iterdir() for name in "ab")
    assert files(one) == files(other)
    assert splits[0].probe.manifest() == splits[1].probe.manifest()
    SMALL.model_copy(update={"corpus_seed": 1}).open(tmp_path / "a", download=False, seed=0)
    assert len(list((tmp_path / "a").iterdir())) == 2


def test_it_is_made_once_and_says_what_it_is(tmp_path):
    first = SMALL.open(tmp_path, download=False, seed=0)
    (folder,) = tmp_path.iterdir()
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    SMALL.open(tmp_path, download=False, seed=0)
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert "is synthetic" in first.notes[0]
    assert "synthetic" in (folder / "README.txt").read_text()
    assert first.classes == {"speaker": 3, "phone": len(PHONES)}


def test_what_a_killed_process_left_is_made_again_and_nothing_stays(tmp_path, monkeypatch):
    whole = SMALL.open(tmp_path / "whole", download=False, seed=0)
    child = os.fork()
    if not child:  # killed between two utterances
        calls = itertools.count()
        made = voices.utter
        monkeypatch.setattr(voices, "utter", lambda *a: made(*a) if next(calls) < 4 else os.kill(os.getpid(), 9))
        SMALL.open(tmp_path / "killed", download=False, seed=0)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    (left,) = (tmp_path / "killed").iterdir()
    assert list(left.rglob("*.flac"))
    again = SMALL.open(tmp_path / "killed", download=False, seed=0)
    assert again.probe.manifest() == whole.probe.manifest()
    assert [path.name for path in (tmp_path / "killed").iterdir()] == [
        path.name for path in (tmp_path / "whole").iterdir()
    ]


def test_several_processes_make_one_corpus(tmp_path):
    children = []
    for _ in range(3):
        child = os.fork()
        if not child:
            try:
                SMALL.open(tmp_path, download=False, seed=0)
                os._exit(0)
            finally:
                os._exit(1)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    assert len(list(tmp_path.iterdir())) == 1


def test_the_labels_say_where_it_is_silent(tmp_path):
    """Frames labelled silence are quieter than vowels, in each utterance: the alignment is not off."""
    splits = SMALL.open(tmp_path, download=False, seed=0)
    vowels = [number for number, phone in enumerate(PHONES) if phone.voice == 1]
    for index in range(len(splits.probe)):
        wave = splits.probe.batch(np.array([index]), None)[0, 0].numpy()
        phones = splits.probe.labels_of(np.array([index]), None)["phone"][0]
        power = np.array([(wave[160 * i : 160 * i + 400] ** 2).mean() for i in range(len(phones))])
        assert np.median(power[phones == INDEX["SIL"]]) < 0.5 * np.median(power[np.isin(phones, vowels)])


def spectrum(phone, voice):
    lengths = np.array([8000])
    wave = synthesise([INDEX[phone]], lengths, voice, numpy_generator(0, "x"))
    assert len(wave) == 8000
    return np.abs(np.fft.rfft(wave * np.hanning(len(wave)))) ** 2, np.fft.rfftfreq(8000, 1 / 16_000)


def steady(pitch=120.0, tract=1.0):
    return Voice(pitch, tract, 0.0, 0.01, 1.0, (3500, 4500), 0.0, 1.0, np.ones((len(PHONES), 3)))


def test_resonances_follow_the_vowel_and_the_length_of_the_tract():
    """The strongest band between 600 and 1,700 Hz is the vowel's resonance; a longer tract lowers it."""

    def peak(phone, tract, low, high):
        power, hertz = spectrum(phone, steady(tract=tract))
        smooth = np.convolve(power, np.hanning(121), "same")
        chosen = (hertz > low) & (hertz < high)
        return hertz[chosen][np.argmax(smooth[chosen])]

    assert abs(peak("AA", 1.0, 600, 1700) - 730) < 130
    assert abs(peak("IY", 1.0, 1500, 3300) - 2290) < 200
    assert peak("IY", 1.15, 1500, 3300) < peak("IY", 0.9, 1500, 3300) - 200


def test_the_pitch_is_the_voices():
    power, hertz = spectrum("AH", steady(pitch=150.0))
    low = (hertz > 80) & (hertz < 400)
    strongest = hertz[low][np.argsort(power[low])[-6:]]
    assert all(min(abs(h - 150 * n) for n in (1, 2)) < 8 for h in strongest)


def test_hiss_is_high_and_a_stop_is_silent_before_its_burst():
    power, hertz = spectrum("S", steady())
    assert power[hertz > 4000].sum() > 20 * power[hertz < 4000].sum()
    wave = synthesise(
        [INDEX["AA"], INDEX["T"], INDEX["AA"]], np.array([3200, 2400, 3200]), steady(), numpy_generator(0)
    )
    closure, burst = wave[3600:4400], wave[4650:5100]
    assert closure.std() < 0.1 * burst.std()


def test_voices_differ():
    drawn = [draw_voice(numpy_generator(0, n)) for n in range(50)]
    assert max(v.pitch for v in drawn) > 1.6 * min(v.pitch for v in drawn)
    assert np.corrcoef([v.pitch for v in drawn], [v.tract for v in drawn])[0, 1] < -0.5


def test_it_is_read_speech_in_librispeechs_layout(tmp_path):
    SMALL.open(tmp_path, download=False, seed=0)
    (folder,) = tmp_path.iterdir()
    flac = sorted(folder.glob("LibriSpeech/train-clean-100/*/*/*.flac"))
    assert len(flac) == 15
    assert {(soundfile.info(path).samplerate, soundfile.info(path).channels) for path in flac} == {(16_000, 1)}
    transcript = (flac[0].parent / "1-1.trans.txt").read_text().split("\n")
    assert transcript[0].startswith("1-1-0000 SIL ")


@pytest.mark.parametrize("noise", [(30, 10), (1e9, 1e9), (-1e9, 0)])
def test_a_noise_that_cannot_be_is_refused(noise):
    with pytest.raises(ValidationError, match="noise"):
        Voices(noise=noise)
