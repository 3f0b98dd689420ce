"""Grey TIFF images of any sample size: unpacked bytes to grey levels.

Pillow reads some layouts of grey samples wrongly (it ignores that white may be zero, and the range of 12 bits) and
others not at all. So Pillow only unpacks: :mod:`kimi_vl.media.image_files` declares each byte a pixel, and the samples
are read from the bytes here. Knows no files.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

UNSIGNED, SIGNED, FLOAT = 1, 2, 3
ASSOCIATED, UNASSOCIATED = 1, 2
MAX_RAW_BYTES = 170_000_000
"""The most unpacked bytes: 40 million pixels of 32 bits, and tiles that extend past the edge."""
_BAND_BYTES = 2**20


@dataclass(frozen=True)
class GreySamples:
    """The layout of samples in bytes. ``kind`` is UNSIGNED, SIGNED or FLOAT.

    Rows consist of blocks of ``block`` pixels (the width of a tile, or of the picture), each of whole bytes. A pixel
    has ``channels`` samples, the first of them grey; number ``alpha_channel`` is alpha where ``alpha`` says so (0
    where there is none). ``predictor`` is TIFF's: 1 none, 2 differences of samples, 3 of the bytes of floats.
    """

    width: int
    height: int
    bits: int
    kind: int
    channels: int
    block: int
    white_is_zero: bool
    big_endian: bool
    predictor: int = 1
    alpha: int = 0
    alpha_channel: int = 1

    @property
    def block_bytes(self) -> int:
        return -(-self.block * self.channels * self.bits // 8)

    @property
    def row_bytes(self) -> int:
        return -(-self.width // self.block) * self.block_bytes

    def supported(self) -> bool:
        """Whether the meaning of the samples is known. Signed samples have no agreed white level, except those of 32
        bits, which programs without an unsigned type write for 16-bit levels."""
        if self.kind == FLOAT:
            known = self.bits in (16, 32, 64)
        elif self.kind == SIGNED:
            known = self.bits == 32 and not self.white_is_zero
        else:
            known = self.kind == UNSIGNED and (1 <= self.bits <= 16 or self.bits == 32)
        if self.predictor == 2:
            return known and self.bits in (8, 16, 32, 64)
        return known and (self.predictor == 1 or (self.predictor == 3 and self.kind == FLOAT))


def picture(raw: Image.Image, samples: GreySamples, raw_alpha: Image.Image | None = None) -> Image.Image:
    """An image in mode L, or LA, of ``raw`` in mode L, whose pixels are the bytes of the samples.

    ``raw_alpha`` has the alpha samples if they are in a plane of their own. Premultiplied alpha is composed over white.
    Floats range to 1 if none is larger, else to 255; NaN is black.
    """
    bands = range(0, samples.height, max(1, _BAND_BYTES // samples.row_bytes))
    step = bands.step

    def values(source: Image.Image, top: int) -> np.ndarray:
        box = (0, top, samples.row_bytes, min(samples.height, top + step))
        return _values(np.asarray(source.crop(box)), samples)  # (h, W, C)

    white = _white(samples)
    if samples.kind == FLOAT:
        largest = max(np.max(v, initial=0, where=np.isfinite(v)) for v in (values(raw, top)[..., 0] for top in bands))
        white = 1.0 if largest <= 1 else 255.0
    result = Image.new("LA" if samples.alpha == UNASSOCIATED else "L", (samples.width, samples.height))
    for top in bands:
        found = values(raw, top)
        grey = _levels(found[..., 0], white)
        grey = 255 - grey if samples.white_is_zero else grey
        if samples.alpha:
            opacity = values(raw_alpha, top)[..., 0] if raw_alpha else found[..., samples.alpha_channel]
            opacity = _levels(opacity, 1.0 if samples.kind == FLOAT else white)
            if samples.alpha == UNASSOCIATED:
                grey = np.stack([grey, opacity], axis=-1)
            elif not samples.white_is_zero:  # zero is white, and so is what is clear
                grey = np.minimum(grey.astype(np.uint16) + (255 - opacity), 255).astype(np.uint8)
        result.paste(Image.fromarray(grey, mode=result.mode), (0, top))
    return result


def _white(samples: GreySamples) -> float:
    return 65535.0 if samples.kind == SIGNED else float(2**samples.bits - 1)


def _levels(values: np.ndarray, white: float) -> np.ndarray:
    finite = np.nan_to_num(values.astype(np.float64), nan=0.0, posinf=white, neginf=0.0)
    return np.clip(finite * (255 / white), 0, 255).round().astype(np.uint8)


def _values(rows: np.ndarray, samples: GreySamples) -> np.ndarray:
    """Numbers ``(h, W, C)`` of bytes ``(h, row_bytes)``."""
    height = len(rows)
    blocks = rows.reshape(height, -1, samples.block_bytes)  # (h, B, bytes)
    shape = (height, blocks.shape[1], samples.block, samples.channels)
    if samples.bits % 8 == 0:
        found = _whole_bytes(blocks, shape, samples)
    else:
        found = _packed_bits(blocks, shape, samples.bits)
    return found.reshape(height, -1, samples.channels)[:, : samples.width]


def _whole_bytes(blocks: np.ndarray, shape: tuple[int, ...], samples: GreySamples) -> np.ndarray:
    size = samples.bits // 8
    code = {UNSIGNED: "u", SIGNED: "i", FLOAT: "f"}[samples.kind]
    if samples.predictor == 3:
        # the first bytes of all samples, then the second ones, most significant first in any file
        summed = np.cumsum(blocks.reshape(*shape[:2], -1, samples.channels), axis=2, dtype=np.uint8)
        planes = summed.reshape(*shape[:2], size, -1)
        return np.ascontiguousarray(planes.swapaxes(2, 3)).view(f">{code}{size}").reshape(shape)
    order = ">" if samples.big_endian else "<"
    whole = np.ascontiguousarray(blocks).view(f"{order}u{size}").astype(f"u{size}").reshape(shape)
    if samples.predictor == 2:
        whole = np.cumsum(whole, axis=2, dtype=whole.dtype)
    return whole.view(f"{code}{size}")


def _packed_bits(blocks: np.ndarray, shape: tuple[int, ...], bits: int) -> np.ndarray:
    count = shape[2] * shape[3]
    single = np.unpackbits(blocks, axis=-1)[..., : count * bits].reshape(*shape[:2], count, bits)
    found = np.zeros(single.shape[:-1], dtype=np.uint16)
    for place in range(bits):
        found = found << 1 | single[..., place]
    return found.reshape(shape)
