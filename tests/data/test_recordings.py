"""Recordings: windows of them at any rate, whole ones, and every kind of damage."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import soundfile

from layerwise.data.dataset import UNKNOWN
from layerwise.data.librispeech import LibriSpeech
from layerwise.data.recordings import Sound, Utterances, Windows, examine
from layerwise.data.speech import Speech
from layerwise.errors import DamagedData, NotReady, UsageError

WINDOW = 4_000  # samples


def tone(seconds, hertz=440.0, rate=16_000, seed=0):
    time = np.arange(round(seconds * rate)) / rate
    noise = np.random.default_rng(seed).normal(0, 0.05, len(time))
    return (0.3 * np.sin(2 * np.pi * hertz * time) + noise).astype(np.float32)


def corpus(folder, speakers=3, each=5, seconds=0.5):
    """A small one in LibriSpeech's layout; returns the ids."""
    names = []
    for speaker in range(1, speakers + 1):
        chapter = folder / "LibriSpeech" / "train-clean-100" / str(speaker) / "7"
        chapter.mkdir(parents=True)
        for number in range(each):
            names.append(f"{speaker}-7-{number:04d}")
            wave = tone(seconds + 0.05 * number, 200 * speaker, seed=10 * speaker + number)
            soundfile.write(chapter / f"{names[-1]}.flac", wave, 16_000, "PCM_16")
    return names


def path_of(folder, name):
    speaker, chapter, _ = name.split("-")
    return folder / "LibriSpeech" / "train-clean-100" / speaker / chapter / f"{name}.flac"


def label(folder, names, extra="", lengths=None):
    """Alignments (phone = place modulo 41) and lists: every fifth utterance is the test."""
    lines = []
    for name in names:
        count = (lengths or {}).get(name, (soundfile.info(path_of(folder, name)).frames - 400) // 160 + 1)
        lines.append(f"{name} {' '.join(str(i % 41) for i in range(count))}")
    (folder / "converted_aligned_phones.txt").write_text("\n".join(lines) + "\n" + extra)
    (folder / "train_split.txt").write_text("\n".join(n for i, n in enumerate(names) if i % 5 != 4) + "\n")
    (folder / "test_split.txt").write_text("\n".join(n for i, n in enumerate(names) if i % 5 == 4) + "\n")


def opened(folder, seed=0, **fields):
    return LibriSpeech(window=WINDOW, **fields).open(folder, download=False, seed=seed)


def test_two_files_of_one_name_are_refused_with_both(tmp_path):
    names = corpus(tmp_path)
    twin = tmp_path / "LibriSpeech/train-clean-100/9/7" / f"{names[0]}.flac"
    twin.parent.mkdir(parents=True)
    twin.write_bytes(path_of(tmp_path, names[0]).read_bytes())
    with pytest.raises(DamagedData, match=rf"1/7/{names[0]}\.flac and .*9/7/{names[0]}\.flac are both named"):
        opened(tmp_path)


def test_a_corpus_with_labels(tmp_path):
    names = corpus(tmp_path)
    label(tmp_path, names)
    splits = opened(tmp_path, validation=0.2)
    assert {name: len(split) for name, split in splits.named().items()} == {
        "train": 10,
        "validation": 2,
        "probe": 12,
        "test": 3,
    }
    assert splits.classes == {"speaker": 3, "phone": 41}
    assert not splits.notes
    assert set(splits.test.ids) == {"1-7-0004", "2-7-0004", "3-7-0004"}
    assert splits.test.sample_shape == (1, None)
    whole = splits.test.batch(np.array([1]), None)
    assert whole.shape == (1, 1, 11_200)
    labels = splits.test.labels_of(np.array([1]), None)
    assert labels["speaker"].tolist() == [1]
    assert labels["phone"].tolist() == [[i % 41 for i in range(68)]]
    assert splits.test.longest == 11_200


def test_a_window_is_a_part_of_the_recording_with_its_labels(tmp_path):
    names = corpus(tmp_path)
    label(tmp_path, names)
    splits = opened(tmp_path)
    train, probe = splits.train, splits.probe
    index = np.array([3])
    places = set()
    for view in [*range(12), None]:
        window = train.batch(index, view)[0, 0].numpy()
        whole = probe.batch(np.array([probe.ids.index(train.ids[3])]), None)[0, 0].numpy()
        begins = [b for b in range(0, len(whole) - WINDOW + 1, 160) if np.array_equal(whole[b : b + WINDOW], window)]
        assert len(begins) == 1
        places.add(begins[0])
        phones = train.labels_of(index, view)["phone"][0]
        assert phones.tolist() == [(begins[0] // 160 + i) % 41 for i in range((WINDOW - 400) // 160 + 1)]
    assert len(places) > 4
    again = opened(tmp_path).train.batch(index, 5)
    assert np.array_equal(again, train.batch(index, 5))
    assert not all(
        np.array_equal(opened(tmp_path, seed=1).train.batch(index, v), train.batch(index, v)) for v in range(4)
    )


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 44_100, 48_000])
def test_a_window_at_another_rate_is_that_part_of_the_whole(tmp_path, rate):
    path = tmp_path / "a.wav"
    soundfile.write(path, tone(1.0, 300, rate), rate, "PCM_16")
    (recording,), bad = examine({"a": (path, "x")}, 0)
    assert not bad
    assert recording.samples == 16_000
    whole = recording.read()
    assert len(whole) == 16_000
    for begin, count in [(0, 4000), (160, 4000), (4_800, 1), (12_000, 4_000), (15_999, 1), (7_777, 100)]:
        np.testing.assert_allclose(recording.read(begin, count), whole[begin : begin + count], atol=2e-6)
    spectrum = np.abs(np.fft.rfft(whole))
    assert np.argmax(spectrum) == 300  # Hz, as a second has 16,000 samples now


def test_stereo_is_averaged_where_any_recording_is_taken(tmp_path):
    for speaker, sign in (("a", 1), ("b", -1)):
        (tmp_path / speaker).mkdir()
        for number in range(3):
            left = tone(0.5, seed=number)
            soundfile.write(tmp_path / speaker / f"{number}.wav", np.stack([left, sign * left], 1), 16_000, "FLOAT")
    splits = Speech(window=WINDOW, mean=0, std=1).open(tmp_path, download=False, seed=0)
    assert splits.classes == {"speaker": 2}
    split = splits.probe
    for index, name in enumerate(split.ids):
        wave = split.batch(np.array([index]), None)
        assert (wave.abs().max() == 0) == name.startswith("b/")  # the two channels cancel
    assert set(splits.test.ids) | set(split.ids) == {f"{s}/{n}.wav" for s in "ab" for n in range(3)}
    assert not set(splits.test.ids) & set(split.ids)


def damage(kind, path):
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_bytes(b"no sound at all\n" * 100)
    elif kind == "stereo":
        soundfile.write(path, np.stack([tone(0.5), tone(0.5)], 1), 16_000)
    elif kind == "44.1 kHz":
        soundfile.write(path, tone(0.5, rate=44_100), 44_100)
    elif kind == "no samples":
        soundfile.write(path, np.zeros(0, np.float32), 16_000, format="WAV")
    elif kind == "short":
        soundfile.write(path, tone(0.05), 16_000)


REASONS = {
    "truncated": "cannot be read|is cut short",
    "empty": "is empty",
    "text": "cannot be read",
    "stereo": "has 2 channels at 16000 Hz, and LibriSpeech one",
    "44.1 kHz": "has 1 channels at 44100 Hz, and LibriSpeech one",
    "no samples": "holds no samples",
    "short": "lasts 50 ms, less than 100",
}


@pytest.mark.parametrize("kind", REASONS)
def test_a_recording_that_cannot_be_used_is_named_and_left_out_up_to_a_limit(tmp_path, kind):
    names = corpus(tmp_path)
    label(tmp_path, names)
    before = opened(tmp_path).probe.manifest()
    damage(kind, path_of(tmp_path, names[1]))
    splits = opened(tmp_path, unreadable=1)
    (note,) = [note for note in splits.notes if note.startswith("left out: ")]
    assert str(path_of(tmp_path, names[1])) in note
    assert any(reason in note for reason in REASONS[kind].split("|"))
    assert names[1] not in [*splits.train.ids, *splits.validation.ids, *splits.probe.ids, *splits.test.ids]
    assert splits.probe.manifest() != before
    with pytest.raises(DamagedData, match=r"1 of 15 .* dataset.unreadable tolerates 0: .*1-7-0001"):
        opened(tmp_path, unreadable=0)


def test_no_flipped_byte_goes_unnoticed(tmp_path):
    """It is refused, or it changes the manifest, on which every stage and cache rests."""
    path = tmp_path / "a.flac"
    soundfile.write(path, tone(0.3), 16_000, "PCM_16")
    content = path.read_bytes()

    def manifest(recordings):
        return Utterances(recordings, None, None, Sound(0, 1)).manifest()

    good = manifest(examine({"a": (path, "x")}, 0)[0])
    refused = 0
    for place in range(0, len(content), max(len(content) // 150, 1)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 0x10]) + content[place + 1 :])
        recordings, bad = examine({"a": (path, "x")}, 1)
        refused += len(bad)
        assert bad or manifest(recordings) != good
    assert refused > 100


def test_a_file_that_changes_after_it_was_opened_is_named(tmp_path):
    corpus(tmp_path)
    splits = opened(tmp_path)
    path = path_of(tmp_path, splits.probe.ids[0])
    damage("truncated", path)
    with pytest.raises(DamagedData, match=path.name):
        splits.probe.batch(np.array([0]), None)


def test_short_recordings_are_probed_and_not_trained_on(tmp_path):
    names = corpus(tmp_path)
    soundfile.write(path_of(tmp_path, names[0]), tone(0.2), 16_000)
    label(tmp_path, names)
    splits = opened(tmp_path)
    (note,) = splits.notes
    assert note == (f"shorter than a window of {WINDOW} samples, and so not seen by stages: 1 recording ({names[0]})")
    assert names[0] not in [*splits.train.ids, *splits.validation.ids]
    assert names[0] in splits.probe.ids
    with pytest.raises(
        NotReady, match=r"two recordings of at least 1.28 s .*, and there are 0: .*shorten dataset.window"
    ):
        LibriSpeech().open(tmp_path, download=False, seed=0)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("1-7-0000 1 2 3", "3 labels, and 8000 samples have 48"),
        (f"1-7-0000 {' '.join(['1'] * 49)}", "49 labels, and 8000 samples have 48"),
        (f"1-7-0000 {' '.join(['41'] * 48)}", "labels from 41 to 41, and there are 41 classes"),
        (f"1-7-0000 {' '.join(['-1'] * 48)}", "labels from -1 to -1"),
        ("1-7-0000 a b", "something other than whole numbers"),
        ("1-7-0000", "0 labels"),
    ],
)
def test_an_alignment_that_does_not_fit_is_named_and_its_phones_are_unknown(tmp_path, line, reason):
    names = corpus(tmp_path)
    label(tmp_path, names)
    path = tmp_path / "converted_aligned_phones.txt"
    path.write_text("\n".join([line, *path.read_text().split("\n")[1:]]))
    splits = opened(tmp_path, unreadable=1)
    (note,) = [note for note in splits.notes if note.startswith("left out: ")]
    assert f"{path}, line 1 (1-7-0000)" in note
    assert reason in note
    index = np.array([splits.probe.ids.index("1-7-0000")])
    assert set(splits.probe.labels_of(index, None)["phone"].flatten().tolist()) == {UNKNOWN}
    with pytest.raises(DamagedData, match="line 1"):
        opened(tmp_path, unreadable=0)


def test_an_alignment_of_an_unknown_utterance_is_counted(tmp_path):
    names = corpus(tmp_path)
    label(tmp_path, names, extra="9-9-0009 1 2 3\n")
    splits = opened(tmp_path, unreadable=0)
    assert any("has 1 line for utterances that are not used here, and none for 0" in note for note in splits.notes)


def test_lists_may_name_more_than_there_is_but_not_the_same_twice(tmp_path):
    names = corpus(tmp_path)
    label(tmp_path, names)
    with (tmp_path / "train_split.txt").open("a") as file:
        file.write("8-8-0008\n")
    splits = opened(tmp_path)
    assert "12 of the 13 utterances of train_split.txt are here" in splits.notes
    with (tmp_path / "train_split.txt").open("a") as file:
        file.write(f"{names[4]}\n")
    with pytest.raises(NotReady, match=f"both name {names[4]}: test utterances must not be trained on"):
        opened(tmp_path)
    (tmp_path / "train_split.txt").write_text("8-8-0008\n")
    with pytest.raises(NotReady, match=r"none of the 1 utterances of train_split\.txt"):
        opened(tmp_path)


def test_without_labels_a_note_says_where_they_come_from(tmp_path):
    corpus(tmp_path)
    splits = opened(tmp_path)
    assert splits.classes == {"speaker": 3}
    assert len(splits.test) == 3
    assert sum("github.com/facebookresearch/CPC_audio" in note for note in splits.notes) == 2


def test_missing_recordings_are_one_clear_error(tmp_path):
    with pytest.raises(UsageError, match=r"no --data-dir was given\. Either add --download --data-dir DIR"):
        LibriSpeech().open(None, download=False, seed=0)
    with pytest.raises(NotReady, match=r"no folder .*LibriSpeech/dev-clean\. Fetch https://www.openslr.org"):
        LibriSpeech(subset="dev-clean").open(tmp_path, download=False, seed=0)
    with pytest.raises(UsageError, match="fetches train-clean-100 alone"):
        LibriSpeech(subset="dev-clean").open(tmp_path, download=True, seed=0)
    with pytest.raises(NotReady, match="holds no recordings"):
        Speech().open(tmp_path, download=False, seed=0)


def test_fewer_recordings_are_the_same_for_every_seed(tmp_path):
    label(tmp_path, corpus(tmp_path))
    few = [opened(tmp_path, seed=seed, recordings=6) for seed in (0, 1)]
    assert [len(split) for split in few[0].named().values()] == [5, 1, 6, 2]
    assert few[0].probe.ids == few[1].probe.ids


def test_windows_need_no_labels(tmp_path):
    path = tmp_path / "a.flac"
    soundfile.write(path, tone(0.5), 16_000)
    recordings, _ = examine({"a": (path, "")}, 0)
    split = Windows(recordings, None, None, Sound(0.5, 2), window=WINDOW, seed=0)
    assert split.labels_of(np.array([0]), 0) == {}
    raw = recordings[0].read(13 * 160, WINDOW)  # the middle one of 26 places
    np.testing.assert_allclose(split.batch(np.array([0]), None)[0, 0], (raw - 0.5) / 2, rtol=1e-6)


def test_labels_of_nothing_that_is_here_are_no_task(tmp_path):
    names = corpus(tmp_path)
    label(tmp_path, names)
    trained_on = [
        line for line in (tmp_path / "converted_aligned_phones.txt").read_text().splitlines() if "-0004 " not in line
    ]
    (tmp_path / "converted_aligned_phones.txt").write_text("\n".join(trained_on) + "\n")
    splits = opened(tmp_path)
    assert splits.classes == {"speaker": 3}
    assert any("no utterance of training, or none of the test, has labels" in note for note in splits.notes)


def test_labels_that_none_of_the_recordings_taken_has_are_no_task(tmp_path):
    names = corpus(tmp_path)
    label(tmp_path, names)
    taken = opened(tmp_path, recordings=4)
    left = [name for name in names if name not in {*taken.probe.ids, *taken.test.ids}]
    path = tmp_path / "converted_aligned_phones.txt"
    path.write_text("\n".join(line for line in path.read_text().splitlines() if line.partition(" ")[0] in left))
    assert opened(tmp_path).classes == {"speaker": 3, "phone": 41}
    assert "phone" not in opened(tmp_path, recordings=4).classes


def test_hidden_files_and_folders_are_no_recordings(tmp_path):
    corpus(tmp_path)
    folder = tmp_path / "LibriSpeech" / "train-clean-100"
    (folder / "1" / "7" / "._1-7-0000.flac").write_bytes(b"\0\5\x16\7" + bytes(4000))  # as macOS leaves them
    (folder / ".trash").mkdir()
    soundfile.write(folder / ".trash" / "a.wav", tone(0.5), 16_000)
    any_folder = Speech(window=WINDOW, unreadable=0).open(folder, download=False, seed=0)
    for splits in (opened(tmp_path, unreadable=0), any_folder):
        assert splits.classes == {"speaker": 3}
        assert len(splits.probe) + len(splits.test) == 15


def test_names_that_are_no_text_are_samples_like_others(tmp_path):
    corpus(tmp_path)
    folder = tmp_path / "LibriSpeech" / "train-clean-100"
    strange = os.fsdecode(bytes(folder / "1" / "caf") + b"\xe9.wav")
    soundfile.write(folder / "1" / "a.wav", tone(0.5), 16_000)
    os.rename(folder / "1" / "a.wav", strange)
    Path(strange.replace("caf", "broken")).write_bytes(b"")
    splits = Speech(window=WINDOW).open(folder, download=False, seed=0)
    assert "1/caf\\xe9.wav" in {*splits.probe.ids, *splits.test.ids}
    for split in splits.named().values():
        split.manifest().encode()
        for index in range(len(split)):
            split.batch(np.array([index]), None)
    (note,) = splits.notes
    assert note.encode().endswith(b"broken\\xe9.wav is empty")


def test_a_recording_in_no_folder_is_told_of(tmp_path):
    corpus(tmp_path)
    folder = tmp_path / "LibriSpeech" / "train-clean-100"
    soundfile.write(folder / "a.wav", tone(0.5), 16_000)
    splits = Speech(window=WINDOW).open(folder, download=False, seed=0)
    assert splits.classes == {"speaker": 4}
    assert splits.notes == (f"in {folder} itself, in no speaker's folder: 1 recording, counted as one more speaker",)


def test_label_files_that_are_no_text_are_named(tmp_path):
    names = corpus(tmp_path)
    label(tmp_path, names, extra=f"{names[0]} 99999999999999999999999\n")
    with (tmp_path / "converted_aligned_phones.txt").open("ab") as file:
        file.write(b"\xff\xfe 1 2 3\n")
    splits = opened(tmp_path)
    assert any("something other than whole numbers" in note for note in splits.notes)
    (tmp_path / "train_split.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DamagedData, match=r"train_split\.txt is not a list of utterances"):
        opened(tmp_path)


def test_a_rate_that_takes_a_filter_of_gigabytes_is_refused(tmp_path):
    names = corpus(tmp_path)
    soundfile.write(path_of(tmp_path, names[0]), tone(0.5, rate=15_991), 15_991, "PCM_16")
    folder = tmp_path / "LibriSpeech" / "train-clean-100"
    splits = Speech(window=WINDOW).open(folder, download=False, seed=0)
    assert any("15991 Hz" in note for note in splits.notes)
