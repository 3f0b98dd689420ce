"""Image files to upright sRGB images, and images to patches: the only resize arithmetic of the package.

Knows no model, and of tokens only their number. The rule is that of image_processing_kimi_vl.py and
preprocessor_config.json of the published checkpoints.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

from ..errors import CheckpointError, UserError
from ..model import published
from ..model.config import num_image_tokens
from . import icc, image_files, kinds, sources, tiff_samples

MAX_PIXELS = 40_000_000
MAX_SIDE = 1_000_000
MAX_IMAGES = 64
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
_MAX_GRID = 512  # rows or columns of patches; position encoding is for fewer
_MAX_SCANNED_PIXELS = 32 * MAX_PIXELS  # of all scans of a JPEG: a scan of a few bytes may take 0.1 s
_PART_PIXELS = 2**20


@dataclass(frozen=True)
class ImageOptions:
    """The settings of the image processor that are used."""

    patch_size: int
    in_token_limit: int
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    merge_kernel_size: tuple[int, int] = (2, 2)

    @classmethod
    def from_directory(cls, directory: str | Path) -> ImageOptions:
        """Read ``preprocessor_config.json``, or ``image_processor`` in ``processor_config.json``, where newer
        transformers write it; :class:`CheckpointError` names the file and field at fault."""
        path, values = _processor_settings(Path(directory))
        if values.get("pad_input") is not True:
            raise CheckpointError(f"{path}: pad_input is {values.get('pad_input')!r}; only true is supported")
        if list(values.get("merge_kernel_size", (2, 2))) != [2, 2]:
            raise CheckpointError(f"{path}: merge_kernel_size must be [2, 2]")
        read = {}
        for name in ("patch_size", "in_token_limit"):
            value = values.get(name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise CheckpointError(f"{path}: {name} is {value!r}; it must be a positive integer")
            read[name] = value
        for name in ("image_mean", "image_std"):
            value = values.get(name)
            if not isinstance(value, list) or len(value) != 3 or not all(isinstance(v, int | float) for v in value):
                raise CheckpointError(f"{path}: {name} is {value!r}; it must be three numbers")
            read[name] = tuple(float(v) for v in value)
        return cls(**read)


def _processor_settings(directory: Path) -> tuple[Path, dict[str, Any]]:
    """The settings of the image processor and the file that they are from; two files must agree."""
    found: list[tuple[Path, dict[str, Any]]] = []
    for name in PROCESSOR_FILES:
        path = directory / name
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            continue
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
        except ValueError as error:
            raise CheckpointError(f"{path}: is not JSON ({error})") from None
        if name == "processor_config.json" and isinstance(values, dict):
            values = values.get("image_processor")
            if values is None:
                continue  # older versions write other settings there
        if not isinstance(values, dict):
            raise CheckpointError(f"{path}: has no object with the settings of the image processor")
        try:
            found.append((path, published.image_processor(values)))
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from None
    if not found:
        raise CheckpointError(f"{directory / PROCESSOR_FILES[0]}: cannot be read (No such file or directory)")
    (path, values), (other_path, other) = found[0], found[-1]
    for field in ("pad_input", *(field.name for field in fields(ImageOptions))):
        if field in values and field in other and values[field] != other[field]:
            raise CheckpointError(
                f"{other_path}: {field} is {other[field]!r}, but {path.name} says {values[field]!r}; keep the right one"
            )
    return path, values


@dataclass(frozen=True)
class Plan:
    """How an image is resized and padded: sizes are (width, height) in pixels, the grid (rows, columns) of patches."""

    resized: tuple[int, int]
    padded: tuple[int, int]
    grid: tuple[int, int]

    @property
    def patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def tokens(self) -> int:
        """Placeholders that the image takes in the prompt."""
        return num_image_tokens(self.grid)


def plan(width: int, height: int, options: ImageOptions) -> Plan:
    """The published size rule. Raises ``ValueError`` where the grid reaches 512 rows or columns."""
    patch, limit = options.patch_size, options.in_token_limit
    patches = (width // patch) * (height // patch)
    if patches > limit:
        scale = math.sqrt(limit / patches)
        width, height = int(width * scale), int(height * scale)
    tile_w, tile_h = (patch * merge for merge in reversed(options.merge_kernel_size))
    padded = (-(-width // tile_w) * tile_w, -(-height // tile_h) * tile_h)
    grid = (padded[1] // patch, padded[0] // patch)
    if max(grid) >= _MAX_GRID:
        raise ValueError(f"a grid of {grid[0]} x {grid[1]} patches exceeds the position encoding")
    return Plan((width, height), padded, grid)


def preprocess(image: Image.Image, options: ImageOptions) -> tuple[np.ndarray, tuple[int, int]]:
    """Patches of ``image`` and their grid, as the published image processor makes them.

    Returns float32 ``(rows * columns, 3, patch, patch)`` in row-major order and ``(rows, columns)``, both even.
    Any Pillow mode is taken as it is: resize and padding happen in that mode, before the conversion to RGB.
    """
    chosen = plan(*image.size, options)
    if chosen.resized != image.size:
        image = image.resize(chosen.resized, Image.Resampling.BICUBIC)
    # crop past the border fills with zeros and keeps the palette
    image = image.crop((0, 0, *chosen.padded)).convert("RGB")
    pixels = np.asarray(image, dtype=np.float32) / np.float32(255)  # (H, W, 3)
    mean, std = (np.asarray(values, dtype=np.float32) for values in (options.image_mean, options.image_std))
    pixels = (pixels - mean) / std
    rows, columns = chosen.grid
    patch = options.patch_size
    patches = pixels.reshape(rows, patch, columns, patch, 3).transpose(0, 2, 4, 1, 3)  # (R, C, 3, patch, patch)
    return np.ascontiguousarray(patches).reshape(rows * columns, 3, patch, patch), chosen.grid


_SENT_SIZE = "kimi_vl_sent_size"


def _of_another_format(data: bytes) -> UserError:
    kind = kinds.of(data[: kinds.HEAD_BYTES])
    if kind in (kinds.VIDEO, kinds.DOCUMENT):
        return UserError("E_IMAGE_FORMAT", f"{kind.noun} came as an image; send it as {kind.noun}.")
    return UserError("E_IMAGE_FORMAT", "an image is not a PNG, JPEG, WebP, GIF, BMP or TIFF file; convert it first.")


def load(source: bytes | bytearray | str | Path | Image.Image, options: ImageOptions) -> Image.Image:
    """An upright RGB image that :func:`plan` accepts, from a file's bytes, its path, a data URL or an open image.

    The format is decided by the content, size limits are checked from the header before anything is decoded, the
    first frame is taken, EXIF orientation applied, 16-bit samples scaled to 8, an embedded ICC profile converted to
    sRGB, and then transparency, and what a first frame leaves uncovered, laid over white. An image with a side that
    the model cannot take is made smaller, keeping its shape. Raises :class:`UserError` (E_IMAGE_UNREADABLE,
    E_IMAGE_FORMAT, E_IMAGE_TOO_LARGE).
    """
    if isinstance(source, Image.Image):
        _check_pixels(source)
        with _refusals():
            image = _rgb(source, source.info.get("icc_profile") or b"")
            return _fitted(_upright(image, source.getexif().get(ExifTags.Base.Orientation, 1)), options)
    data = sources.read(source, kinds.IMAGE)
    with _refusals():
        file = image_files.read(data)
        if file is None:
            raise _of_another_format(data)
        del data
        if file.grey is not None:
            return _fitted(_upright(_rgb(_grey(file, file.grey), file.profile), file.orientation), options)
        try:
            opened = Image.open(_Steps(file.data), formats=(file.format,))
        except UnidentifiedImageError:
            if file.format == "TIFF" and file.whole:
                raise image_files.UnsupportedError("samples of this kind") from None
            raise
        _check_pixels(opened)
        if file.scans > 1 and file.scans * opened.width * opened.height > _MAX_SCANNED_PIXELS:
            raise ValueError("too many scans")
        image = _rgb(_decoded(opened, file.animated), file.profile)
        if image is not opened:
            opened.close()  # its memory is needed
        return _fitted(_upright(image, file.orientation), options)


class _Steps(io.BytesIO):
    """A file with a limit of reads: some decoders are Python loops over bytes that the sender chose."""

    left = 500_000

    def read(self, size: int | None = -1) -> bytes:
        self.left -= 1
        if self.left < 0:
            raise OSError("read in too many steps")
        return super().read(size)


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    """Turns every error while an image is read into a :class:`UserError`, and hides warnings."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except UserError:
        raise
    except image_files.UnsupportedError:
        raise UserError(
            "E_IMAGE_FORMAT", "an image keeps its samples in a way that is not read here; save it anew as PNG or JPEG."
        ) from None
    except (Image.DecompressionBombError, MemoryError):
        raise _too_many_pixels() from None
    except Exception:
        raise UserError(
            "E_IMAGE_UNREADABLE",
            "an image is damaged or cut off; send the file again, or save it anew as PNG or JPEG.",
        ) from None


def _decoded(opened: ImageFile.ImageFile, animated: bool) -> Image.Image:
    """The first frame. WebP is decoded without Pillow's method, which holds four copies at once."""
    decoder = getattr(opened, "_decoder", None)
    if opened.format != "WEBP" or decoder is None:
        opened.load()
        if opened.format == "BMP" and opened.mode == "RGBA" and opened.getchannel("A").getextrema() == (0, 0):
            return opened.convert("RGB")  # clipboards write an empty alpha channel
        return opened
    # frames need not cover the canvas, whatever the header says about alpha
    mode = "RGBA" if animated else getattr(opened, "rawmode", opened.mode)
    opened._decoder = None  # pyright: ignore[reportAttributeAccessIssue]
    pixels, _ = decoder.get_next()
    del decoder
    return Image.frombuffer(mode, opened.size, pixels, "raw", mode, 0, 1)


def _grey(file: image_files.ImageFile, samples: tiff_samples.GreySamples) -> Image.Image:
    """A grey TIFF: Pillow unpacks the bytes, and their meaning is applied here."""
    _check_size(samples.width, samples.height)
    if samples.row_bytes * samples.height > tiff_samples.MAX_RAW_BYTES:
        raise UserError("E_IMAGE_TOO_LARGE", "an image has too many bits a pixel for its size; save it as PNG or JPEG.")
    raw, *alpha = [
        _decoded(Image.open(_Steps(data), formats=("TIFF",)), animated=False)
        for data in (file.data, file.alpha)
        if data
    ]
    return tiff_samples.picture(raw, samples, *alpha)


def _check_pixels(image: Image.Image) -> None:
    _check_size(*image.size)


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise _too_many_pixels()
    if max(width, height) > MAX_SIDE:
        raise UserError("E_IMAGE_TOO_LARGE", f"an image has a side of more than {MAX_SIDE:,} pixels; crop it.")
    if not width or not height:
        raise UserError("E_IMAGE_UNREADABLE", "an image has no pixels; send another one.")


def _too_many_pixels() -> UserError:
    return UserError(
        "E_IMAGE_TOO_LARGE",
        f"an image has more than {MAX_PIXELS // 1_000_000} million pixels; send a smaller one.",
    )


def _rgb(image: Image.Image, profile: bytes) -> Image.Image:
    """``image`` over white in sRGB; what the first frame of a GIF does not cover is white."""
    read = icc.read(profile) if profile else None
    colours = read if read is not None and read.fits(image.mode) else None
    frame = getattr(image, "dispose_extent", None) if image.format == "GIF" and image.tell() == 0 else None
    if frame is None or frame == (0, 0, *image.size):
        return _opaque(image, colours)
    canvas = Image.new("RGB", image.size, "white")
    canvas.paste(_opaque(image.crop(frame), colours), frame)
    return canvas


def _opaque(image: Image.Image, colours: icc.Profile | None) -> Image.Image:
    """``image`` over white in RGB, band by band, since a second whole image may not fit into memory."""
    if image.mode == "RGB" and "transparency" not in image.info and colours is None:
        return image
    result = Image.new("RGB", image.size)
    width = min(image.width, _PART_PIXELS)
    height = max(1, _PART_PIXELS // width) if width else 1
    for top in range(0, image.height, height):
        for left in range(0, image.width, width):
            box = (left, top, min(image.width, left + width), min(image.height, top + height))
            result.paste(_part_rgb(image.crop(box), colours), box)
    return result


def _part_rgb(image: Image.Image, colours: icc.Profile | None) -> Image.Image:
    alpha: Image.Image | None = None
    if image.mode.startswith("I;16") or image.mode == "I":
        samples = np.asarray(image).astype(np.float64)
        if "transparency" in image.info:
            alpha = Image.fromarray(np.where(samples == image.info["transparency"], 0, 255).astype(np.uint8))
        image = Image.fromarray(np.clip(samples / 257, 0, 255).round().astype(np.uint8))
    elif image.mode == "F":
        samples = np.nan_to_num(np.asarray(image), nan=0.0, posinf=255.0, neginf=0.0)
        image = Image.fromarray(np.clip(samples, 0, 255).round().astype(np.uint8))
    elif image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("LA") if image.mode == "La" else image
        with_alpha = image.convert("RGBA")
        image, alpha = with_alpha.convert("RGB"), with_alpha.getchannel("A")
    image = image.convert("RGB") if colours is None else colours.to_srgb(image)
    if alpha is None:
        return image
    image.putalpha(alpha)
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image).convert("RGB")


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    return image.transpose(_TURNS[orientation]) if orientation in _TURNS else image


def fitted_size(width: int, height: int, options: ImageOptions) -> tuple[int, int]:
    """The size itself, or the largest of its shape that :func:`plan` accepts."""
    longest = (_MAX_GRID - 1) // 2 * 2 * options.patch_size  # the longest side whose padded grid stays below _MAX_GRID
    try:
        plan(width, height, options)
        return width, height
    except ValueError:
        # only the longer side after the published rescale does not fit
        patches = (width // options.patch_size) * (height // options.patch_size)
        shrink = min(1.0, math.sqrt(options.in_token_limit / patches)) if patches else 1.0
        scale = longest / max(width * shrink, height * shrink) * shrink
        return max(1, min(longest, int(width * scale))), max(1, min(longest, int(height * scale)))


def _fitted(image: Image.Image, options: ImageOptions) -> Image.Image:
    size = fitted_size(*image.size, options)
    if size == image.size:
        return image
    fitted = image.resize(size, Image.Resampling.BICUBIC)
    fitted.info[_SENT_SIZE] = image.size
    return fitted


def sent_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) of an image that :func:`load` gave, upright, before it was made smaller."""
    return image.info.get(_SENT_SIZE, image.size)
