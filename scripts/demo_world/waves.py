"""Places as waves: the form in which vectors tell where an object is.

A number from 0 to 100 becomes the cosine and the sine of an angle at each of two wavelengths. The long one tells the
tens; the short one the ones, to whoever knows whether the tens are even, also where the tens change. All are of one
size, so that a hundredth is a large step, and the mean over several tokens of an object is close to its place.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from demo_world import labels

LENGTHS = (125.0, 20.0)  # hundredths
WAVES = 2 * len(LENGTHS) * labels.PLACES


def waves(places: Tensor) -> Tensor:
    """Of ``places`` (N, PLACES) in hundredths: (N, WAVES), float32, each from -1 to 1; the longer ones first."""
    angles = [2 * math.pi / length * places.float() for length in LENGTHS]
    return torch.cat([wave(angle) for angle in angles for wave in (torch.cos, torch.sin)], dim=1)


def read(values: Tensor) -> Tensor:
    """The places (N, PLACES) whose waves are most like ``values`` (N, WAVES)."""
    every = torch.arange(101, device=values.device)
    known = of_numbers(waves(every[:, None].expand(-1, labels.PLACES)))
    return torch.einsum("npf,kpf->npk", of_numbers(values.float()), known).argmax(-1)


def of_numbers(values: Tensor) -> Tensor:
    """Waves (N, WAVES) by the number that they are of: (N, PLACES, WAVES / PLACES)."""
    return values.unflatten(1, (-1, labels.PLACES)).transpose(1, 2)


def near(values: Tensor, places: Tensor) -> float:
    """The share of numbers that are read at most one hundredth off."""
    return ((read(values) - places).abs() <= 1).float().mean().item()
