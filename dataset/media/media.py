"""Reads images and resizes frames: upright, 8-bit RGB, at the size that is trained on."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from dataset.buckets import Size, plan_crop
from dataset.media.profiles import PictureColour, converted, picture_colour
from modules.errors import DataError
from modules.files import file_fingerprint
from modules.path_kinds import file_problem

with contextlib.suppress(ImportError):  # HEIC, as phones write it
    import pillow_heif

    pillow_heif.register_heif_opener()
with contextlib.suppress(ImportError):
    import pillow_jxl  # noqa: F401  # pyright: ignore[reportMissingImports]  # registers JPEG XL where installed

Frame = NDArray[np.uint8]
"""[H, W, 3], RGB."""

MAX_PIXELS = 2**27
"""Larger pictures are refused before they are decoded (134 million pixels, 400 MB as RGB)."""

UNREADABLE = "cannot be opened"
DAMAGED = "damaged"
TOO_LARGE = "too large"
NO_MEMORY = "does not fit in memory"
CHANGED = "changed while it was read"

_LIMIT = f"the limit is {MAX_PIXELS / 1e6:.0f} million pixels"
_ORIENTATION = 0x0112  # EXIF tag
# What a PNG with an orientation holds: EXIF, XMP (which may be compressed), or ImageMagick's form of either.
_PNG_ORIENTATION_MARKS = (b"eXIf", b"XML:com.adobe.xmp", b"Raw profile type")
# Only these decoders are let near a file, whatever its name: some of Pillow's others start programs.
_FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "BMP", "AVIF", "GIF", "TIFF", "HEIF", "JXL")
_PLUGINS = {".jxl": ("JXL", "JPEG XL", "pillow-jxl-plugin")} | dict.fromkeys(
    (".heic", ".heif", ".hif"), ("HEIF", "HEIC", "pillow-heif")
)
"""Extension -> Pillow's name of the format, ours, and the package that reads it."""
_ANIMATED_FORMATS = ("PNG", "WEBP", "AVIF", "GIF", "TIFF")
"""In other formats further pictures are previews of the first."""
_OPENCV_NO_MEMORY = -4  # cv2.Error.StsNoMem


class MediaError(DataError):
    """An image or video that cannot be used; the kind of reason is separate from the detail."""

    def __init__(self, path: Path, reason: str, detail: str) -> None:
        super().__init__(f"{path}: {reason} ({detail})")
        self.reason = reason
        self.detail = detail


def refuse_irregular(path: Path) -> None:
    """Refuse pipes, sockets and devices, whose opening or reading may never end.

    Raises:
        MediaError: the path leads to no regular file.
    """
    problem = file_problem(path)
    if problem is not None:
        raise MediaError(path, UNREADABLE, problem)


def check_pixel_count(path: Path, size: Size) -> None:
    """Refuse images that are too large to decode.

    Raises:
        MediaError: the picture has more than MAX_PIXELS pixels.
    """
    if size[0] * size[1] > MAX_PIXELS:
        raise MediaError(path, TOO_LARGE, f"{size[0]}x{size[1]}, {_LIMIT}")


def check_resized_pixel_count(path: Path, source: Size, target: Size) -> None:
    """Refuse sources with an aspect ratio so extreme that the resized image is too large.

    Raises:
        MediaError: the source, scaled for `resize_and_crop`, has more than MAX_PIXELS pixels.
    """
    width, height = plan_crop(source, target).resized
    if width * height > MAX_PIXELS:
        detail = f"{source[0]}x{source[1]} would be scaled to {width}x{height} before it is cropped, {_LIMIT}"
        raise MediaError(path, TOO_LARGE, detail)


@contextlib.contextmanager
def memory_errors(path: Path) -> Iterator[None]:
    """Turn an out-of-memory error for one file into an error about that file.

    Raises:
        MediaError: Python, numpy or OpenCV could not allocate memory.
    """
    try:
        yield
    except MemoryError as error:
        raise MediaError(path, NO_MEMORY, "close other programs, or make the file smaller") from error
    except cv2.error as error:
        reason = NO_MEMORY if error.code == _OPENCV_NO_MEMORY else DAMAGED
        raise MediaError(path, reason, f"OpenCV: {error.err}") from error


@contextlib.contextmanager
def decoder_errors(path: Path, reason: str) -> Iterator[None]:
    """Turn whatever a decoder raises for the bytes of a file into an error about that file.

    Decoders answer broken bytes with any kind of exception: Pillow's with OSError, SyntaxError, ValueError,
    EOFError, struct.error, RuntimeError (libavif) and more. Only the decoder's own call belongs inside.

    Raises:
        MediaError: with this reason. What `memory_errors` handles passes.
    """
    try:
        yield
    except (MediaError, MemoryError, cv2.error):
        raise
    except Exception as error:
        raise MediaError(path, reason, decoder_message(path, error)) from error


def decoder_message(path: Path, error: Exception) -> str:
    """One line on a decoder's error, without the folder that the file lies in."""
    if path.is_file() and path.stat().st_size == 0:
        return "the file is empty"
    if isinstance(error, OSError) and error.strerror:  # str(error) would carry the folder into the index
        return error.strerror
    lines = str(error).replace(str(path), path.name).splitlines()
    return (lines[0] if lines else "") or type(error).__name__


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageInfo:
    """Properties of an image, from its header."""

    size: Size
    """(width, height) after EXIF rotation."""
    colour: PictureColour

    @property
    def treatment(self) -> str:
        """Names the conversion of its colours in a cache's fingerprint; "" for sRGB."""
        return "" if self.colour.is_target else "-to-srgb"


def probe_image(path: Path) -> ImageInfo:
    """Read the header of an image.

    Raises:
        MediaError: the file cannot be opened, or is too large to be decoded safely.
    """
    with _open_image(path) as image:
        with decoder_errors(path, DAMAGED):
            orientation = _orientation(path, image)
            colour = picture_colour(path, image)
        width, height = image.size
    return ImageInfo(size=(height, width) if orientation in {5, 6, 7, 8} else (width, height), colour=colour)


def is_animated(path: Path) -> bool:
    """Whether an image file holds several pictures, of which only the first is read.

    Raises:
        MediaError: the file cannot be opened.
    """
    with _open_image(path) as image, decoder_errors(path, DAMAGED):
        return image.format in _ANIMATED_FORMATS and getattr(image, "n_frames", 1) > 1


def read_image(path: Path) -> Frame:
    """Decode an image to sRGB: upright by its EXIF orientation, alpha over white, 16 bits scaled to 8.

    Raises:
        MediaError: the file cannot be opened or decoded in full.
    """
    with _open_image(path) as image, decoder_errors(path, DAMAGED):
        colour = picture_colour(path, image)
        image.load()
        return _to_rgb(ImageOps.exif_transpose(image), colour)


def _open_image(path: Path) -> Image.Image:
    Image.init()  # fills Image.OPEN
    refuse_irregular(path)
    try:
        known = [name for name in _FORMATS if name in Image.OPEN]
        image = Image.open(path, formats=known)
    except Image.DecompressionBombError as error:
        raise MediaError(path, TOO_LARGE, _LIMIT) from error
    except FileNotFoundError as error:
        raise MediaError(path, UNREADABLE, "no such file") from error
    except MemoryError:
        raise
    except Exception as error:  # any: see decoder_errors
        raise MediaError(path, UNREADABLE, _open_failure(path)) from error
    try:
        check_pixel_count(path, image.size)
    except MediaError:
        image.close()
        raise
    return image


def _open_failure(path: Path) -> str:
    if path.stat().st_size == 0:
        return "the file is empty"
    opener, format_name, package = _PLUGINS.get(path.suffix.lower(), ("", "", ""))
    if package and opener not in Image.OPEN:
        return f"{format_name} needs the package {package}: pip install {package}"
    return "not an image file, or damaged"


def _orientation(path: Path, image: Image.Image) -> int:
    if image.format == "PNG" and "exif" not in image.info:
        # Pillow decodes the whole PNG to look for a late orientation; most have none, which is cheap to see.
        content = path.read_bytes()
        if not any(mark in content for mark in _PNG_ORIENTATION_MARKS):
            return 1
    return image.getexif().get(_ORIENTATION, 1)


def _to_rgb(image: Image.Image, colour: PictureColour) -> Frame:
    if image.mode.startswith("I"):
        image = Image.fromarray(_grey_of_8_bits(np.asarray(image).astype(np.int64)))
    if image.mode == "F":
        raise ValueError("floating point images have no agreed range")
    if image.mode in {"RGBA", "LA", "PA", "La", "RGBa"} or "transparency" in image.info:
        return np.asarray(over_white(converted(image.convert("RGBA"), colour)).convert("RGB")).copy()
    if image.mode not in {"L", "CMYK"}:
        image = image.convert("RGB")
    return np.asarray(converted(image, colour)).copy()


def over_white(rgba: Image.Image) -> Image.Image:
    """Composite an RGBA image with transparency over white; the result is opaque RGBA."""
    return Image.alpha_composite(Image.new("RGBA", rgba.size, (255, 255, 255, 255)), rgba)


def _grey_of_8_bits(values: NDArray[np.int64]) -> NDArray[np.uint8]:
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("more than 16 bits per channel")
    return ((values + 128) // 257).astype(np.uint8)  # 65535 = 255 * 257


def resize_and_crop(frame: Frame, target: Size) -> Frame:
    """Cover `target` (width, height) with the frame and cut out its centre; [H, W, 3] -> [height, width, 3].

    Shrinking averages areas, enlarging uses Lanczos; a frame that has the size already is returned as it is.
    """
    source = (frame.shape[1], frame.shape[0])
    if source == target:
        return frame
    plan = plan_crop(source, target)
    if plan.resized != source:
        frame = resize(frame, plan.resized, enlarges=plan.enlarges)
    x, y = plan.offset
    return np.ascontiguousarray(frame[y : y + target[1], x : x + target[0]])


def resize(frame: Frame, size: Size, *, enlarges: bool) -> Frame:
    """Bring a frame to `size` (width, height), whatever its shape was."""
    if enlarges:
        return np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS))
    return cv2.resize(frame, size, interpolation=cv2.INTER_AREA).astype(np.uint8, copy=False)


def source_fingerprint(path: Path) -> str:
    """Identifies a source file: its size and a hash of its first and last MiB.

    Raises:
        MediaError: the file cannot be read.
    """
    try:
        return file_fingerprint(path)
    except OSError as error:
        raise MediaError(path, UNREADABLE, error.strerror or "read error") from error


def frames_fingerprint(paths: Iterable[Path]) -> str:
    """The same for a folder of frames.

    Raises:
        MediaError: a file cannot be read.
    """
    digest = hashlib.sha256()
    for path in paths:
        digest.update(f"{path.name}\0{source_fingerprint(path)}\0".encode("utf-8", "surrogatepass"))
    return f"folder-{digest.hexdigest()[:32]}"
