"""Pictures from wherever a row keeps them, as RGB that shows what a person sees.

``to_rgb`` is the one way to eight bits in three channels:

* stored orientation (EXIF, XMP) is applied; of an animation the first frame counts;
* 16-bit grey is divided by 257 (65,535 is white); 32-bit integers within 0..255 stay, within 0..65,535 count as 16-bit,
  others and floats outside of [0, 1] are stretched from their smallest to their largest value; floats in [0, 1] are
  multiplied by 255;
* what is transparent (alpha channel, transparent colour, palette) lies on white paper, as serving engines have it.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import os
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, unquote_to_bytes

import datasets
import numpy as np
from PIL import Image, ImageCms, ImageOps

ORIENTATION = 0x0112  # EXIF tag; 5 to 8 swap width and height
DEEP_GREY = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")
BASE64_STARTS = ("/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR")  # JPEG, PNG, GIF, WebP, as tables of benchmarks hold them
HEIC_BRANDS = (b"heic", b"heix", b"hevc", b"mif1", b"msf1")
URL_TIMEOUT = 30.0  # seconds without an answer


@dataclass(frozen=True)
class Folders:
    """Where the paths of rows may lead.

    Attributes:
        roots: folders that relative paths start from; the first in which the file exists counts.
        only_inside: where given, files outside of these folders are not opened (rows that come from the hub).
    """

    roots: tuple[Path, ...] = (Path(),)
    only_inside: tuple[Path, ...] | None = None

    def find(self, name: str) -> Path:
        """The file of a path or a ``file://`` URL in a row.

        Raises:
            ValueError: the rows came from the hub, and the path leads elsewhere.
            FileNotFoundError: no such file.
        """
        path = Path(unquote(name.removeprefix("file://"))) if name.startswith("file://") else Path(name).expanduser()
        if self.only_inside is not None:
            path = path.resolve()
            if not any(path.is_relative_to(folder.resolve()) for folder in self.only_inside):
                raise ValueError(f"{name!r} is a path, and rows from the hub cannot open files of this machine")
        found = next((root / path for root in self.roots if (root / path).is_file()), None)
        if found is None:
            raise FileNotFoundError(f"no such file: {name!r}, looked for in {self.roots[0].absolute()}")
        return found


def _stretched(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Values as bytes, ``low`` black and ``high`` white."""
    scaled = (values.astype(np.float64) - low) * (255 / (high - low))
    return np.rint(np.clip(scaled, 0, 255)).astype(np.uint8)


def _deep_grey(image: Image.Image) -> Image.Image:
    """8-bit grey from 16-bit, 32-bit or float grey; a transparent value becomes white."""
    values = np.asarray(image)
    if image.mode.startswith("I;16"):
        low, high = 0.0, 65535.0
    else:
        finite = values[np.isfinite(values)]
        low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
        ranges = ((0.0, 1.0),) if image.mode == "F" else ((0.0, 255.0), (0.0, 65535.0))
        low, high = next((r for r in ranges if r[0] <= low and high <= r[1]), (low, high if high > low else low + 1))
        values = np.nan_to_num(values, nan=low, posinf=high, neginf=low)
    grey = _stretched(values, low, high)
    if isinstance(paper := image.info.get("transparency"), int):
        grey = np.where(values == paper, np.uint8(255), grey)
    return Image.fromarray(grey, mode="L")


def to_rgb(image: Image.Image) -> Image.Image:
    """A picture of any mode as upright RGB, see the head of this module."""
    if getattr(image, "is_animated", False) and image.tell() != 0:
        image.seek(0)
    image = ImageOps.exif_transpose(image)
    if image.mode in DEEP_GREY:
        return _deep_grey(image).convert("RGB")
    if image.mode == "La":
        image = image.convert("LA")
    if image.has_transparency_data or image.mode in ("RGBA", "LA", "PA", "RGBa"):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode == "LAB":
        profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(image, *profiles, outputMode="RGB")
    return image.convert("RGB")


def fetch(url: str) -> bytes:
    """What an http(s) URL holds; kept on disk, so that every picture is fetched once.

    Raises:
        OSError: no answer within ``URL_TIMEOUT`` seconds, or an answer that is an error.
    """
    kept = Path(datasets.config.HF_DATASETS_CACHE) / "vgs" / "urls" / hashlib.sha256(url.encode()).hexdigest()
    if not kept.exists():
        request = urllib.request.Request(url, headers={"User-Agent": "Mozilla/5.0 (vgs)"})
        with urllib.request.urlopen(request, timeout=URL_TIMEOUT) as answer:
            data = answer.read()
        kept.parent.mkdir(parents=True, exist_ok=True)
        part = kept.with_name(f"{kept.name}.{os.getpid()}")
        part.write_bytes(data)
        part.replace(kept)
    return kept.read_bytes()


def _data_uri(value: str) -> bytes:
    head, _, body = value.partition(",")
    data = unquote_to_bytes(body)
    return base64.b64decode(data) if head.endswith(";base64") else data


def _content(value: Any, folders: Folders) -> bytes | Path | Image.Image:
    if isinstance(value, dict):
        given = [value[key] for key in ("bytes", "path", "url", "base64") if value.get(key) is not None]
        if not given:
            raise TypeError(f"expected one of the keys bytes, path or url, got {', '.join(value) or 'none'}")
        return _content(given[0], folders)
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value)
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, str):
        if value.startswith(("http://", "https://")):
            return fetch(value)
        try:
            if value.startswith("data:"):
                return _data_uri(value)
            if value.startswith(BASE64_STARTS) and len(value) > 64:
                return base64.b64decode(value)
        except binascii.Error as error:
            raise ValueError(f"{value[:40]}... is not base64: {error}") from error
        return folders.find(value)
    if not isinstance(value, Image.Image):
        raise TypeError(f"expected an image, bytes, a path or a URL, got {type(value).__name__}")
    return value


@contextmanager
def _opened(value: Any, folders: Folders) -> Iterator[Image.Image]:
    content = _content(value, folders)
    if isinstance(content, Image.Image):
        yield content
        return
    try:
        image = Image.open(io.BytesIO(content) if isinstance(content, bytes) else content)
    except Image.UnidentifiedImageError as error:
        name = str(content) if isinstance(content, Path) else f"{len(content)} bytes"
        start = content[:12] if isinstance(content, bytes) else content.read_bytes()[:12]
        if start[4:8] == b"ftyp" and start[8:12] in HEIC_BRANDS:
            raise ValueError(f"{name} is a HEIC picture, which Pillow cannot read: convert it to JPEG") from error
        raise ValueError(f"{name} is no picture that Pillow can read") from error
    with image:
        yield image


def _folders(root: Path | Folders) -> Folders:
    return root if isinstance(root, Folders) else Folders((Path(root),))


def decode_image(value: Any, root: Path | Folders = Path()) -> Image.Image:
    """An RGB image (``to_rgb``) from what a row holds.

    Args:
        value: a PIL image, bytes, ``{"bytes", "path"}`` (or ``{"url"}``), a path, an http(s) URL (fetched once), a data
            URI, or the base64 text of a JPEG, PNG, GIF or WebP.
        root: where relative paths start.

    Raises:
        ValueError, TypeError, OSError: with what is wrong; a truncated file is an OSError.
    """
    with _opened(value, _folders(root)) as image:
        return to_rgb(image)


def image_size(value: Any, root: Path | Folders = Path()) -> tuple[int, int]:
    """Width and height of ``decode_image(value, root)``; reads no more than the header where that suffices."""
    with _opened(value, _folders(root)) as image:
        if image.format == "TIFF":  # Pillow turns these while it loads them, and has not always swapped the size before
            return to_rgb(image).size
        turned = _may_be_turned(image) and image.getexif().get(ORIENTATION, 1) >= 5
        return (image.height, image.width) if turned else image.size


def _may_be_turned(image: Image.Image) -> bool:
    """Whether ``getexif`` can find anything; of a PNG, it would decode the pixels to look behind them."""
    if image.format != "PNG" or image.fp is None:
        return True
    file, place = image.fp, image.fp.tell()
    try:
        file.seek(8)
        while len(head := file.read(8)) == 8:  # length and kind of the next chunk
            length, kind, start = int.from_bytes(head[:4], "big"), head[4:], b""
            if kind in (b"tEXt", b"zTXt", b"iTXt"):
                start = file.read(min(length, 30))
            if kind == b"eXIf" or start.startswith((b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")):
                return True
            file.seek(length - len(start) + 4, io.SEEK_CUR)
        return False
    finally:
        file.seek(place)
