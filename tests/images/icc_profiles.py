"""ICC profiles written by hand, and the conversion to sRGB in plain numpy that they describe."""

from __future__ import annotations

import struct

import numpy as np

# Colorants (red, green, blue as columns of X, Y, Z) adapted to D50, as the published profiles have them.
SRGB = ((0.43607, 0.38515, 0.14307), (0.22249, 0.71687, 0.06061), (0.01392, 0.09708, 0.71410))
ADOBE = ((0.60974, 0.20528, 0.14919), (0.31111, 0.62567, 0.06322), (0.01947, 0.06087, 0.74457))
DISPLAY_P3 = ((0.51512, 0.29198, 0.15710), (0.24120, 0.69225, 0.06657), (-0.00105, 0.04189, 0.78407))
SRGB_CURVE = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
WHITE = (0.9642, 1.0, 0.8249)

Curve = float | tuple[float, ...]


def fixed(*values: float) -> bytes:
    return struct.pack(f">{len(values)}i", *(round(value * 65536) for value in values))


def curve(given: Curve) -> bytes:
    if isinstance(given, tuple):
        return b"para\0\0\0\0\0\3\0\0" + fixed(*given)
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(given * 256))


def profile(space: bytes, tags: dict[bytes, bytes], kind: bytes = b"mntr", pcs: bytes = b"XYZ ") -> bytes:
    tags = {b"desc": b"desc" + bytes(8) + b"\1\0" + bytes(80), b"wtpt": b"XYZ \0\0\0\0" + fixed(*WHITE), **tags}
    at = 128 + 4 + 12 * len(tags)
    table, body = struct.pack(">I", len(tags)), b""
    for name, content in tags.items():
        content += b"\0" * (-len(content) % 4)
        table += name + struct.pack(">II", at + len(body), len(content))
        body += content
    header = struct.pack(
        ">I4sI4s4s4s12s4s", at + len(body), b"\0" * 4, 0x02400000, kind, space, pcs, bytes(12), b"acsp"
    )
    header = header.ljust(68, b"\0") + fixed(*WHITE)
    return header.ljust(128, b"\0") + table + body


def matrix(colorants: tuple[tuple[float, ...], ...], tone: Curve, more: dict[bytes, bytes] | None = None) -> bytes:
    tags = dict(more or {})
    for name, column in zip((b"r", b"g", b"b"), zip(*colorants, strict=True), strict=True):
        tags[name + b"XYZ"] = b"XYZ \0\0\0\0" + fixed(*column)
        tags[name + b"TRC"] = curve(tone)
    return profile(b"RGB ", tags)


def grey(tone: Curve) -> bytes:
    return profile(b"GRAY", {b"kTRC": curve(tone)})


def inks() -> bytes:
    """CMYK of a press that prints no colours: L* is 100 without ink, and falls in proportion to black."""
    linear = bytes(range(256))
    grid = b""
    for node in range(16):
        cyan, magenta, yellow, black = (node >> bit & 1 for bit in (3, 2, 1, 0))
        light = (1 - black) * (1 - (cyan + magenta + yellow) / 4)
        grid += bytes((round(255 * light), 128, 128))
    head = b"mft1\0\0\0\0\4\3\2\0" + fixed(1, 0, 0, 0, 1, 0, 0, 0, 1)
    return profile(b"CMYK", {b"A2B0": head + linear * 4 + grid + linear * 3}, b"prtr", b"Lab ")


def linear(samples: np.ndarray, tone: Curve) -> np.ndarray:
    """Light of samples from 0 to 1."""
    if isinstance(tone, tuple):
        gamma, a, b, c, d = tone
        return np.where(samples >= d, (a * samples + b) ** gamma, c * samples)
    return samples**tone


def encoded(light: np.ndarray) -> np.ndarray:
    """sRGB bytes of linear light, rounded and clipped."""
    light = np.clip(light, 0, 1)
    values = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    return (values * 255).round().astype(int)


def to_srgb(samples: np.ndarray, colorants: tuple[tuple[float, ...], ...], tone: Curve) -> np.ndarray:
    """Bytes ``(..., 3)`` in the space of :func:`matrix` as sRGB bytes."""
    light = linear(samples / 255, tone) @ np.asarray(colorants).T @ np.linalg.inv(np.asarray(SRGB)).T
    return encoded(light)
