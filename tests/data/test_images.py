"""Pictures keep their meaning: the same pixels from every source, upright, in eight bits, on white."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps, PngImagePlugin
from tiny import tiny_image

from vgs.data.images import Folders, decode_image, image_size, to_rgb

RAMP = np.arange(65536, dtype=np.uint16).reshape(64, 1024)
EIGHT = np.rint(RAMP / 257).astype(np.uint8)  # 0 .. 255


def saved(image: Image.Image, form: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=form, **options)
    return buffer.getvalue()


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def grey(image: Image.Image) -> np.ndarray:
    """[H, W] of an RGB image whose channels are equal."""
    assert image.mode == "RGB"
    pixels = np.asarray(image)
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0]


@pytest.mark.parametrize("form", ["PNG", "JPEG", "TIFF", "WEBP", "MPO"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_stored_orientation_is_applied(form: str, orientation: int) -> None:
    picture = Image.new("RGB", (40, 20), "blue")
    picture.paste("red", (0, 0, 20, 10))  # upper left
    data = saved(picture, form, exif=turned(orientation), **({"lossless": True} if form == "WEBP" else {}))
    image = decode_image(data)
    size = (20, 40) if orientation >= 5 else (40, 20)
    assert image.size == image_size(data) == size
    corners = {1: (0, 0), 2: (1, 0), 3: (1, 1), 4: (0, 1), 5: (0, 0), 6: (1, 0), 7: (1, 1), 8: (0, 1)}
    x, y = corners[orientation]
    for right in (0, 1):
        for low in (0, 1):
            r, _, b = image.getpixel((right * (size[0] - 3) + 1, low * (size[1] - 3) + 1))
            assert (r > 200 > b) if (right, low) == (x, y) else (b > 200 > r)
    assert image.getexif().get(0x0112, 1) == 1
    assert to_rgb(image).tobytes() == image.tobytes(), "it is not turned again"
    opened = Image.open(io.BytesIO(data))
    assert decode_image(opened).tobytes() == image.tobytes()
    assert image_size(Image.open(io.BytesIO(data))) == size


def test_orientation_behind_the_pixels_of_a_png(tmp_path: Path) -> None:
    data = saved(Image.new("RGB", (40, 20)), "PNG", exif=turned(6))
    start = data.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(data[start : start + 4], "big")
    moved = data[:start] + data[end:-12] + data[start:end] + data[-12:]
    assert decode_image(moved).size == image_size(moved) == (20, 40)
    notes = PngImagePlugin.PngInfo()
    notes.add_text("Comment", "of any kind", zip=True)
    plain = saved(Image.new("RGB", (40, 20)), "PNG", pnginfo=notes)
    assert decode_image(plain).size == image_size(plain) == (40, 20)
    orientation = '<rdf:Description tiff:Orientation="6"/>'
    notes.add_itxt("XML:com.adobe.xmp", f'<x:xmpmeta xmlns:x="adobe:ns:meta/">{orientation}</x:xmpmeta>')
    described = saved(Image.new("RGB", (40, 20)), "PNG", pnginfo=notes)
    assert decode_image(described).size == image_size(described) == (20, 40)


def test_a_header_is_enough_for_the_size() -> None:
    for form in ("PNG", "JPEG"):
        noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8))
        data = saved(noise, form)
        assert image_size(data[: len(data) // 2]) == (400, 300)
        with pytest.raises(OSError, match="truncated"):
            decode_image(data[: len(data) // 2])


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_sixteen_bits_of_grey(form: str) -> None:
    data = saved(Image.fromarray(RAMP), form)
    assert Image.open(io.BytesIO(data)).mode.startswith("I")
    assert np.array_equal(grey(decode_image(data)), EIGHT)


def test_deep_integers_and_floats() -> None:
    for values, expected in (
        (RAMP.astype(np.int32), EIGHT),
        (EIGHT.astype(np.int32), EIGHT),
        (RAMP.astype(np.int32) * 1000 - 5, EIGHT),
        ((RAMP / 65535).astype(np.float32), EIGHT),
        ((RAMP / 65535 * 12.5 - 3).astype(np.float32), EIGHT),
    ):
        found = grey(decode_image(saved(Image.fromarray(values), "TIFF")))
        assert np.abs(found.astype(int) - expected).max() <= (values.dtype == np.float32)
    half = np.full((4, 4), 0.5, dtype=np.float32)
    assert set(grey(to_rgb(Image.fromarray(half))).flat) == {128}
    holes = np.array([[0, np.nan, 0.25, 1]], dtype=np.float32)
    assert grey(to_rgb(Image.fromarray(holes))).tolist() == [[0, 0, 64, 255]]
    assert grey(to_rgb(Image.fromarray(RAMP.astype(">u2")))).tolist() == EIGHT.tolist()


def _drawing(mode: str) -> bytes:
    """A black stroke on transparent paper that is black itself."""
    alpha = Image.new("L", (8, 8), 0)
    alpha.paste(255, (0, 0, 8, 4))
    black = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    black.putalpha(alpha)
    if mode in ("RGBA", "LA"):
        return saved(black.convert(mode), "PNG")
    if mode == "WEBP":
        return saved(black, "WEBP", lossless=True)
    if mode == "palette":
        return saved(black.quantize(4), "PNG")
    indexed = Image.new("P", (8, 8), 1)
    indexed.putpalette([0, 0, 0, 0, 0, 0])
    indexed.paste(0, (0, 0, 8, 4))
    if mode == "GIF":
        return saved(indexed, "GIF", transparency=1)
    if mode == "P":
        return saved(indexed, "PNG", transparency=1)
    if mode == "tRNS16":
        values = np.full((8, 8), 7, dtype=np.uint16)
        values[:4] = 0
        return saved(Image.fromarray(values), "PNG", transparency=7)
    values = Image.new(mode, (8, 8), 1 if mode == "L" else (1, 1, 1))
    values.paste(0 if mode == "L" else (0, 0, 0), (0, 0, 8, 4))
    return saved(values, "PNG", transparency=1 if mode == "L" else (1, 1, 1))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "WEBP", "palette", "P", "GIF", "L", "RGB", "tRNS16"])
def test_transparent_paper_is_white(mode: str) -> None:
    found = grey(decode_image(_drawing(mode)))
    assert set(found[:4].flat) == {0}
    assert set(found[4:].flat) == {255}


def test_half_transparent_is_mixed_with_white() -> None:
    assert decode_image(Image.new("RGBA", (2, 2), (255, 0, 0, 128))).getpixel((0, 0)) == (255, 127, 127)
    assert decode_image(Image.new("La", (2, 2), (0, 128))).getpixel((0, 0)) == (127, 127, 127)


def test_other_colours() -> None:
    red = Image.new("RGB", (8, 8), "red")
    for form in ("JPEG", "TIFF"):
        assert decode_image(saved(red.convert("CMYK"), form)).getpixel((4, 4))[0] > 240
    assert decode_image(saved(Image.new("1", (8, 8), 1), "PNG")).getpixel((0, 0)) == (255, 255, 255)
    assert decode_image(red.convert("HSV")).getpixel((0, 0)) == (255, 0, 0)
    lab = Image.merge("LAB", [Image.new("L", (2, 2), value) for value in (255, 128, 128)])
    assert min(decode_image(lab).getpixel((0, 0))) > 250, "L* of 100 is white"


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG"])
def test_the_first_frame_of_an_animation(form: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("white", "black", "blue")]
    data = saved(frames[0], form, save_all=True, append_images=frames[1:])
    assert decode_image(data).getpixel((4, 4)) == (255, 255, 255)
    later = Image.open(io.BytesIO(data))
    later.seek(2)
    assert decode_image(later).getpixel((4, 4)) == (255, 255, 255)


def test_the_same_pixels_from_every_source(tmp_path: Path, web) -> None:
    """A photo that is turned, has a name with a space, and is asked for in every way that a row can."""
    data = saved(tiny_image(3, width=48), "JPEG", exif=turned(6))
    (tmp_path / "my photo.jpg").write_bytes(data)
    (web.folder / "photo.jpg").write_bytes(data)
    url = f"{web.url}/photo.jpg"
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    sources = [
        "my photo.jpg",
        str(tmp_path / "my photo.jpg"),
        (tmp_path / "my photo.jpg").as_uri(),
        tmp_path / "my photo.jpg",
        data,
        bytearray(data),
        {"bytes": data, "path": "elsewhere.jpg"},
        {"bytes": None, "path": "my photo.jpg"},
        url,
        {"url": url},
        {"bytes": None, "path": url},
        f"data:image/jpeg;base64,{base64.b64encode(data).decode()}",
        base64.b64encode(data).decode(),
        Image.open(io.BytesIO(data)),
        expected,
    ]
    for source in sources:
        image = decode_image(source, tmp_path)
        assert image.tobytes() == expected.tobytes(), source
        assert image_size(source, tmp_path) == image.size == (32, 48)
    assert web.asked == ["/photo.jpg"], "one request, kept on disk"


def test_what_is_no_picture_is_said(tmp_path: Path, web) -> None:
    (tmp_path / "notes.jpg").write_text("no picture")
    (tmp_path / "phone.jpg").write_bytes(b"\x00\x00\x00\x18ftypheic" + bytes(64))
    for value, says in (
        ("notes.jpg", "notes.jpg is no picture that Pillow can read"),
        ("phone.jpg", "phone.jpg is a HEIC picture"),
        ("missing.jpg", "no such file: 'missing.jpg'"),
        (b"", "0 bytes is no picture"),
        (7, "got int"),
        ({"bytes": None, "path": None}, "expected one of the keys bytes, path or url"),
        (f"{web.url}/missing.jpg", "404"),
        ("data:image/png;base64,AAA", "is not base64"),
        ("http://127.0.0.1:9/closed.png", "refused"),
    ):
        with pytest.raises((OSError, ValueError, TypeError), match=says):
            decode_image(value, tmp_path)


def test_rows_from_the_hub_stay_within_their_cache(tmp_path: Path) -> None:
    inside, secret = tmp_path / "cache", tmp_path / "secret.png"
    inside.mkdir()
    tiny_image(0).save(secret)
    tiny_image(1).save(inside / "own.png")
    (inside / "link.png").symlink_to(secret)
    hub = Folders(only_inside=(inside,))
    assert decode_image(str(inside / "own.png"), hub).size == (32, 32)
    for path in (
        str(secret),
        secret.as_uri(),
        str(inside / ".." / "secret.png"),
        str(inside / "link.png"),
        "secret.png",
    ):
        with pytest.raises(ValueError, match="cannot open files of this machine"):
            decode_image(path, hub)
        with pytest.raises(ValueError, match="cannot open files of this machine"):
            decode_image({"bytes": None, "path": path}, hub)
