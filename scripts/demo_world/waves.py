"""Places as waves: the form in which vectors tell where an object is.

A number from 0 to 100 becomes the cosine and the sine of an angle at each of several wavelengths. The longest tells the
tens, and the shortest the ones; that between tells the ones to whoever knows whether the tens are even, also where the
tens change. All are of one size, so that a hundredth is a large step, and the mean over several tokens of an object is
close to its place.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from demo_world import labels

LENGTHS = (125.0, 20.0, 10.0)  # hundredths
OF_ONE_LENGTH = 2 * labels.PLACES
WAVES = len(LENGTHS) * OF_ONE_LENGTH


def waves(places: Tensor) -> Tensor:
    """Of ``places`` (N, PLACES) in hundredths: (N, WAVES), float32, each from -1 to 1; OF_ONE_LENGTH, longest first."""
    angles = [2 * math.pi / length * places.float() for length in LENGTHS]
    return torch.cat([wave(angle) for angle in angles for wave in (torch.cos, torch.sin)], dim=1)


def read(values: Tensor) -> Tensor:
    """The places (N, PLACES) whose waves are most like ``values`` (N, F), of the longest wavelengths or all."""
    every = torch.arange(101, device=values.device)
    known = waves(every[:, None].expand(-1, labels.PLACES))[:, : values.shape[1]]
    known, own = (each.float().unflatten(1, (-1, labels.PLACES)) for each in (known, values))  # (…, 2 lengths, PLACES)
    return torch.einsum("nfp,kfp->npk", own, known).argmax(-1)


def near(values: Tensor, places: Tensor) -> float:
    """The share of numbers that are read at most one hundredth off."""
    return ((read(values) - places).abs() <= 1).float().mean().item()
