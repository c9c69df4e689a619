"""opened: pixels as transformers' processors see them, or one message that says what is wrong."""

import errno
import io
import os
import socket

import numpy as np
import pytest
from PIL import Image, ImageOps
from transformers.image_transforms import convert_to_rgb
from transformers.image_utils import load_image

from dpofast.data.formats import BadRow
from dpofast.data.images.decode import opened

COLOURS = np.random.default_rng(0).integers(0, 256, (12, 20, 4), dtype=np.uint8)
RGBA = Image.fromarray(COLOURS)
RGB = Image.fromarray(COLOURS[..., :3].copy())


def encoded(picture, kind="PNG", **options):
    """A picture as a file's bytes."""
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def frames():
    """Three pictures; new ones, since PIL leaves a format's settings in a picture that it saves."""
    return [Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue")]


def pixels(image):
    """What opened makes of an image, as an array."""
    picture = opened(image)
    assert picture.mode == "RGB"
    return np.array(picture)


def palette_with_hole():
    """A palette picture of which one colour is transparent."""
    picture = RGB.convert("P")
    picture.info["transparency"] = picture.getpixel((0, 0))
    return picture


MODES = {
    **{mode: RGB.convert(mode) for mode in ("1", "L", "P", "RGB", "CMYK", "YCbCr", "HSV")},
    **{mode: RGBA.convert(mode) for mode in ("LA", "PA", "RGBA")},
    "P with transparency": palette_with_hole(),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_is_what_a_processor_sees(mode):
    np.testing.assert_array_equal(pixels(MODES[mode]), convert_to_rgb(MODES[mode], return_numpy=True))


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_transparency_is_laid_over_white(kind):
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    alpha = COLOURS[..., 3:] / 255
    want = COLOURS[..., :3] * alpha + 255 * (1 - alpha)
    assert np.abs(pixels(encoded(RGBA, kind, **options)) - want).max() <= 1


def test_transparent_colours_of_a_palette_and_of_rgb_are_white(tmp_path):
    path = tmp_path / "p.gif"
    palette_with_hole().save(path)
    assert (pixels(path)[0, 0] == 255).all()
    png = encoded(RGB, transparency=tuple(map(int, COLOURS[3, 4, :3])))
    got = pixels(png)
    assert (got[3, 4] == 255).all()
    others = np.any(COLOURS[..., :3] != COLOURS[3, 4, :3], axis=-1)
    np.testing.assert_array_equal(got[others], COLOURS[..., :3][others])


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bits_are_scaled_to_8(kind):
    values = np.array([[0, 255, 256, 32768, 65535]], dtype=np.uint16)
    want = np.repeat(np.array([[[0], [0], [1], [128], [255]]]), 3, axis=-1)
    np.testing.assert_array_equal(pixels(encoded(Image.fromarray(values), kind)), want)
    assert pixels(b"P5 2 1 65535\n\x00\xff\xff\xff").tolist() == [[[0] * 3, [255] * 3]]


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pixels_of_32_bits_are_refused(mode):
    with pytest.raises(BadRow, match=f"an image has pixels of 32 bits: mode '{mode}' does not say"):
        opened(Image.new(mode, (2, 2)))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_once(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "turned.png"
    RGB.save(path, exif=exif)
    want = np.array(load_image(str(path)))
    assert (want.shape == (20, 12, 3)) == (orientation >= 5)
    np.testing.assert_array_equal(pixels(path), want)
    with Image.open(path) as given:
        np.testing.assert_array_equal(pixels(given), want)
        np.testing.assert_array_equal(np.array(ImageOps.exif_transpose(given)), want)  # `given` is left as it was


def test_every_form_of_one_image(tmp_path):
    path = tmp_path / "one.png"
    RGB.save(path)
    data = path.read_bytes()
    forms = [RGB, path, str(path), data, bytearray(data), memoryview(data), {"bytes": data, "path": None}]
    forms += [{"bytes": None, "path": str(path)}, {"bytes": data, "path": "no such file.jpg"}, {"path": str(path)}]
    for form in forms:
        np.testing.assert_array_equal(pixels(form), COLOURS[..., :3])


@pytest.mark.parametrize("size", [(1, 1), (10000, 3), (3, 10000)])
def test_odd_sizes_are_left_to_the_processor(size):
    assert opened(encoded(Image.new("RGB", size))).size == size


def test_single_frames_of_formats_that_can_hold_several():
    for kind in ("GIF", "WEBP", "TIFF"):
        assert opened(encoded(frames()[0], kind)).size == (8, 8)


def test_a_photo_with_a_preview_is_its_first_picture():
    preview, _, whole = frames()
    photo = encoded(whole, "MPO", save_all=True, append_images=[preview])
    red, _, blue = opened(photo).getpixel((4, 4))
    assert blue > 250 and red < 5


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_several_frames_are_refused(tmp_path, kind):
    path = tmp_path / "moving"
    first, *others = frames()
    first.save(path, kind, save_all=True, append_images=others)
    for form in (path, path.read_bytes()):
        with pytest.raises(BadRow, match=rf"an image has several frames: .* is a {kind} of 3 frames: save the one"):
            opened(form)
    with Image.open(path) as picture, pytest.raises(BadRow, match="an image has several frames: a PIL image"):
        opened(picture)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF"])
@pytest.mark.parametrize("left", [0.5, 0.9])
def test_truncated_files_name_the_file(tmp_path, kind, left):
    noise = Image.fromarray(np.random.default_rng(1).integers(0, 256, (60, 60, 3), dtype=np.uint8))
    data = encoded(noise, kind)
    path = tmp_path / "cut"
    path.write_bytes(data[: int(len(data) * left)])
    with pytest.raises(BadRow, match="(an image is damaged|not an image): .*cut: ") as caught:
        opened(path)
    assert caught.value.reason in ("an image is damaged", "not an image") and not caught.value.fatal
    with pytest.raises(BadRow, match=f"{path.stat().st_size} bytes: "):
        opened(path.read_bytes())


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_every_beginning_of_a_file_is_read_or_refused():
    for kind in ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"):
        data = encoded(RGB, kind)
        for length in range(0, len(data), 7):
            try:
                assert opened(data[:length]).size == RGB.size
            except BadRow:
                continue


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_damaged_bytes_are_read_or_refused():
    random = np.random.default_rng(2)
    for kind in ("JPEG", "PNG", "GIF", "WEBP", "TIFF"):
        data = np.frombuffer(encoded(RGB, kind), dtype=np.uint8)
        for _ in range(40):
            hit = data.copy()
            hit[random.integers(0, len(data), 6)] = random.integers(0, 256, 6)
            try:
                opened(hit.tobytes())
            except BadRow as problem:
                assert problem.reason.startswith(("an image", "not an image"))


REFUSED = {
    "an image file is missing: .*nope.png'": "nope.png",
    "an image is not a regular file: .* is a folder": ".",
    "an image is a URL: download it first .*https://x.y/z.png": "https://x.y/z.png",
    "an image is a URL: .*hf://": {"bytes": None, "path": "hf://datasets/a/b.png"},
    "an image is a data: URI: decode it": "data:image/png;base64,iVBORw0KGgo=",
    "an image is empty: its bytes are of length 0": b"",
    "not an image: 11 bytes: PIL knows no format that begins with b'hello world'": b"hello world",
    "not an image: expected a PIL image, a path, encoded bytes .* got int 3": 3,
    "not an image: expected a PIL image, .* got NoneType None": None,
    "not an image: expected a PIL image, .* got dict {}": {},
    "not an image: expected a PIL image, .* got dict {'url': 'x'}": {"url": "x"},
    "not an image: expected a PIL image, .* got ndarray": np.zeros((2, 2, 3), np.uint8),
    "not an image: expected a PIL image, .* got list": ["a.png"],
    r"not an image: .* \(not base64\) or null in \"bytes\", got str": {
        "bytes": "iVBORw0KGgo=",
        "path": None,
    },
    'not an image: expected a path in "path", got int': {"bytes": None, "path": 3},
    "an image has neither bytes nor a path: both are null": {"bytes": None, "path": None},
    "an image's path is empty": "",
    "an image file cannot be read: .*File name too long": "a" * 5000,
    "an image file cannot be read: .*null byte": "a\0b",
    "an image has no pixels: a PIL image is of 0 x 3 pixels": Image.new("RGB", (0, 3)),
}


@pytest.mark.parametrize(("message", "image"), REFUSED.items(), ids=range(len(REFUSED)))
def test_refused(message, image):
    with pytest.raises(BadRow, match=f"^{message}") as caught:
        opened(image)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    assert caught.value.reason == str(caught.value)[: len(caught.value.reason)]


def test_an_empty_file_and_a_text_file(tmp_path):
    (tmp_path / "empty.png").touch()
    (tmp_path / "page.png").write_text("<!DOCTYPE html>")
    with pytest.raises(BadRow, match=r"an image is empty: .*empty\.png has length 0"):
        opened(tmp_path / "empty.png")
    with pytest.raises(BadRow, match=r"not an image: .*page\.png: PIL knows no format that begins with b'<!DOC"):
        opened(tmp_path / "page.png")


def test_what_would_block_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
        for path in (tmp_path / "pipe", tmp_path / "socket", "/dev/zero"):
            with pytest.raises(BadRow, match="an image is not a regular file: .* is a pipe, a device or a socket"):
                opened(path)


def test_a_file_without_permission(tmp_path, monkeypatch):
    RGB.save(tmp_path / "mine.png")

    def denied(path):  # as root, who reads every file, is not
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Image, "open", denied)
    with pytest.raises(BadRow, match=r"an image file cannot be read: .*mine\.png: Permission denied"):
        opened(tmp_path / "mine.png")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decompression_bombs_are_refused_before_they_are_decoded(monkeypatch):
    data = encoded(Image.new("1", (100, 100)))
    for most in (9_999, 4_999):  # PIL warns of the first and refuses the second
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", most)
        with pytest.raises(BadRow, match="an image is too large: .*(100 x 100|10000) pixels"):
            opened(data)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    assert opened(data).size == (100, 100)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert opened(data).size == (100, 100)


@pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")
def test_a_warning_that_is_an_error_is_a_bad_row_too(monkeypatch):
    data = encoded(Image.new("1", (100, 100)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 9_999)
    with pytest.raises(BadRow, match="an image is too large"):
        opened(data)


def test_files_are_closed(tmp_path):
    def descriptors():
        return len(os.listdir("/proc/self/fd"))

    RGB.save(tmp_path / "one.png")
    first, *others = frames()
    first.save(tmp_path / "moving.gif", save_all=True, append_images=others)
    (tmp_path / "cut.png").write_bytes(encoded(RGB)[:200])
    before = descriptors()
    held = [opened(tmp_path / "one.png") for _ in range(3)]
    for name in ("moving.gif", "cut.png"):
        with pytest.raises(BadRow) as caught:
            opened(tmp_path / name)
        held.append(caught)
    assert descriptors() == before
