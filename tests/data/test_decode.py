from __future__ import annotations

import contextlib
import io
import subprocess
import zlib
from typing import Any

import numpy as np
import PIL
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, features

from layerwise.data.decode import FORMATS, ORIENTATION, Unreadable, decode, window


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def pixels(content: bytes, *, grayscale: bool = False, **options: Any) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.asarray(decode(content, grayscale=grayscale, max_pixels=options.pop("max_pixels", 10_000), **options))


ARROW = np.zeros((3, 5, 3), np.uint8)
ARROW[0, :3] = (255, 0, 0)  # a red bar from the upper left corner
ARROW[1:, 0] = (0, 0, 255)  # and a blue one down from it


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_comes_upright(orientation: int) -> None:
    stored = {
        1: ARROW,
        2: ARROW[:, ::-1],
        3: ARROW[::-1, ::-1],
        4: ARROW[::-1],
        5: ARROW.transpose(1, 0, 2),
        6: np.rot90(ARROW, 1),
        7: ARROW[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(ARROW, -1),
    }[orientation]
    tags = Image.Exif()
    tags[ORIENTATION] = orientation

    content = encoded(Image.fromarray(np.ascontiguousarray(stored)), exif=tags)

    assert np.array_equal(pixels(content), ARROW)


@pytest.mark.parametrize("orientation", [0, 9, 77])
def test_an_orientation_that_does_not_exist_is_passed_by(orientation: int) -> None:
    tags = Image.Exif()
    tags[ORIENTATION] = orientation
    assert np.array_equal(pixels(encoded(Image.fromarray(ARROW), exif=tags)), ARROW)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_metadata_beside_sound_pixels() -> None:
    jpeg = encoded(Image.fromarray(ARROW), "JPEG", exif=b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\xff\xff rubbish")
    assert pixels(jpeg).shape == ARROW.shape


def test_sixteen_bits_keep_their_high_half() -> None:
    levels = np.array([[0, 255, 256, 32768, 65535]], np.uint16)
    assert pixels(encoded(Image.fromarray(levels)), grayscale=True).tolist() == [[0, 0, 1, 128, 255]]
    assert pixels(encoded(Image.fromarray(levels), "TIFF")).tolist() == [[[v] * 3 for v in (0, 0, 1, 128, 255)]]


def test_what_has_no_8_bit_meaning_is_refused() -> None:
    for levels, reason in (
        (np.array([[0.5]], np.float32), "floating-point"),
        (np.array([[70000]], np.int32), "32 bits"),
        (np.array([[-1]], np.int32), "32 bits"),
    ):
        with pytest.raises(Unreadable, match=reason):
            pixels(encoded(Image.fromarray(levels), "TIFF"))


def test_transparent_parts_are_white() -> None:
    rgba = np.array([[[10, 20, 30, 255], [10, 20, 30, 0], [0, 0, 0, 128]]], np.uint8)
    wanted = [[10, 20, 30], [255, 255, 255], [127, 127, 127]]
    assert pixels(encoded(Image.fromarray(rgba)))[0].tolist() == wanted
    grey = Image.fromarray(rgba[:, :, [0, 3]])
    assert pixels(encoded(grey), grayscale=True)[0].tolist() == [10, 255, 127]

    palette = Image.new("P", (2, 1))
    palette.putpalette([200, 0, 0, 0, 200, 0])
    palette.putdata([0, 1])
    assert pixels(encoded(palette))[0].tolist() == [[200, 0, 0], [0, 200, 0]]
    assert pixels(encoded(palette, transparency=1))[0].tolist() == [[200, 0, 0], [255, 255, 255]]


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "CMYK", "YCbCr", "P"])
def test_other_ways_to_write_white(mode: str) -> None:
    if mode == "YCbCr" and int(PIL.__version__.split(".")[0]) < 13:
        pytest.skip("Pillow before 13 cannot read the YCbCr pictures that it writes")
    white = {"CMYK": (0, 0, 0, 0), "YCbCr": (255, 128, 128)}.get(mode, "white")
    content = encoded(Image.new(mode, (2, 2), white), "TIFF" if mode in ("CMYK", "YCbCr") else "PNG")
    assert (pixels(content) == 255).all()
    assert (pixels(content, grayscale=True) == 255).all()


@pytest.mark.parametrize("kind", sorted(FORMATS))
def test_every_format_that_is_promised(kind: str) -> None:
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    content = encoded(Image.new("RGB", (16, 16), (200, 40, 90)), kind)
    assert np.abs(pixels(content).astype(int) - (200, 40, 90)).max() < 12


def test_one_pixel() -> None:
    assert pixels(encoded(Image.new("RGB", (1, 1), (1, 2, 3)))).tolist() == [[[1, 2, 3]]]


def test_the_first_of_many_frames() -> None:
    first, second = Image.new("RGB", (4, 4), "red"), Image.new("RGB", (4, 4), "blue")
    content = encoded(first, "GIF", save_all=True, append_images=[second])
    assert pixels(content)[0, 0].tolist() == [255, 0, 0]


def test_a_bomb_is_not_opened() -> None:
    content = encoded(Image.new("1", (2000, 2000)))
    with pytest.raises(Unreadable, match=r"2000 x 2000 pixels, more than dataset.max_pixels = 10,000"):
        pixels(content)
    # The header alone claims 60,000 x 60,000 pixels.
    header = bytearray(encoded(Image.new("L", (1, 1))))
    header[16:24] = (60_000).to_bytes(4) * 2
    header[29:33] = zlib.crc32(header[12:29]).to_bytes(4)
    with pytest.raises(Unreadable, match=r"decompression bomb|exceeds limit"):
        pixels(bytes(header), max_pixels=100)


def test_what_is_no_picture() -> None:
    for content in (b"", b"hello", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"\x89PNG\r\n\x1a\n"):
        with pytest.raises(Unreadable):
            pixels(content)


def test_a_formats_programs_are_not_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """PostScript would be handed to an interpreter."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a program was started")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    monkeypatch.setattr(subprocess, "check_call", refuse)
    content = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
    with pytest.raises(Unreadable, match="no format that is read here"):
        pixels(content)


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 24, 3), np.uint8))
WHOLE = [encoded(NOISE, kind) for kind in ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")]


@pytest.mark.filterwarnings("ignore::UserWarning")
@settings(max_examples=300)
@given(st.sampled_from(WHOLE), st.data())
def test_damage_gives_a_picture_or_a_reason_and_never_another_error(content: bytes, data: st.DataObject) -> None:
    damaged = bytearray(content)
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    damaged = damaged[: data.draw(st.integers(0, len(damaged)))]
    with contextlib.suppress(Unreadable):
        assert decode(bytes(damaged), grayscale=False, max_pixels=10_000).mode == "RGB"


@pytest.mark.parametrize("kind", range(len(WHOLE)))
def test_a_file_cut_in_half_is_noticed(kind: int) -> None:
    with pytest.raises(Unreadable):
        pixels(WHOLE[kind][: len(WHOLE[kind]) // 2])


def test_a_large_jpeg_may_come_smaller_but_not_too_small() -> None:
    content = encoded(Image.new("RGB", (640, 480)), "JPEG")
    options = {"max_pixels": 10**6}
    assert pixels(content, **options).shape == (480, 640, 3)
    assert pixels(content, short_side=100, **options).shape == (120, 160, 3)
    assert pixels(content, short_side=121, **options).shape == (240, 320, 3)
    assert pixels(content, short_side=900, **options).shape == (480, 640, 3)


def test_a_window_is_exact_where_nothing_is_resampled() -> None:
    found = window(NOISE, (3, 5, 11, 13), 8)
    assert np.array_equal(found, np.asarray(NOISE)[5:13, 3:11].transpose(2, 0, 1))


def test_a_window_of_a_scaled_picture_is_that_part_of_it() -> None:
    smooth = Image.fromarray(np.outer(np.arange(64), np.ones(96)).astype(np.uint8) * 4)
    whole = np.asarray(smooth.resize((48, 32), Image.Resampling.BILINEAR)).astype(int)
    part = window(smooth, (16, 16, 48, 48), 16)[0].astype(int)
    assert np.abs(part[1:-1] - whole[9:23, 8:24]).max() <= 1
