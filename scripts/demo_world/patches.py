"""The first phase of the training: the vision tower learns what each patch of a picture shows, and where that is."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from demo_world import labels, pictures, printing, scenes, soups
from kimi_vl.media.images import ImageOptions, preprocess

CLASSES = (len(pictures.KINDS), len(pictures.COLOURS), pictures.MAX_ORDER + 1)
CLASS_WEIGHTS = (1.0, 0.5, 0.5)
GROUND_WEIGHT = 0.2  # ground fills most patches: it counts less than what there is to see
TENS, ONES = 11, 10  # digits of a hundredth from 0 to 100
DIGIT_WEIGHT, VALUE_WEIGHT = 0.5, 40.0
VALUE_SCALE, TENS_SCALE, ONES_SCALE = 0.1, 3.0, 10.0
"""Of what is read: a step of the optimizer moves a number by less than it is to be exact, and the logits of its digits,
which tell close numbers apart, by more."""


class PatchReader(nn.Module):
    """Training aid, thrown away afterwards: reads what a patch shows from its vector.

    Kind, colour and order are classes. The place of an object is read twice: as numbers, which teach the tower to
    measure, and digit by digit, which is the form that the decoder has to write: the tens, then the ones of these tens.
    """

    def __init__(self, width: int):
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(width, classes) for classes in CLASSES)
        self.tens_head = nn.Linear(width, labels.PLACES * TENS)
        self.ones_head = nn.Linear(width, labels.PLACES * ONES)
        self.ones_of_tens_head = nn.Parameter(torch.zeros(labels.PLACES, TENS, ONES))
        self.value_head = nn.Linear(width, labels.PLACES)

    def loss(self, groups: Tensor, wanted: Tensor) -> tuple[Tensor, dict[str, float]]:
        """Loss and figures for vectors (T, 4, C) and their labels (T, 4, 3 + PLACES)."""
        vectors, wanted = groups.flatten(0, 1), wanted.flatten(0, 1)
        loss = vectors.new_zeros((), dtype=torch.float32)
        for head, target, weight in zip(self.heads, wanted[:, :3].unbind(1), CLASS_WEIGHTS, strict=True):
            weights = torch.where(target == 0, GROUND_WEIGHT, 1.0)
            losses = F.cross_entropy(head(vectors).float(), target, reduction="none")
            loss = loss + weight * (losses * weights).sum() / weights.sum()
        seen = wanted[:, 0] > 0
        kinds = self.heads[0](vectors[seen]).argmax(-1) == wanted[seen, 0]
        figures = {"patches right": kinds.float().mean().item()}
        placed = wanted[:, 3] != labels.NOWHERE
        if placed.any():
            more, near = self.place_loss(vectors[placed], wanted[placed, 3:])
            loss, figures["places near"] = loss + more, near
        return loss, figures

    def place_loss(self, vectors: Tensor, places: Tensor) -> tuple[Tensor, float]:
        """Loss for vectors (N, C) of objects' patches and their ``places`` (N, PLACES), and the share of numbers that
        are at most one hundredth off."""
        tens = TENS_SCALE * self.tens_head(vectors).float().unflatten(1, (labels.PLACES, TENS))
        ones = ONES_SCALE * self.ones_head(vectors).float().unflatten(1, (labels.PLACES, ONES))
        values = VALUE_SCALE * self.value_head(vectors).float()
        tens_loss = F.cross_entropy(tens.flatten(0, 1), (places // 10).flatten())
        ones_loss = F.cross_entropy((ones + self.of_tens(places // 10)).flatten(0, 1), (places % 10).flatten())
        measured = F.smooth_l1_loss(values, places / 100, beta=0.005)
        read = tens.argmax(-1)  # (N, PLACES)
        read = 10 * read + (ones + self.of_tens(read)).argmax(-1)
        near = ((read - places).abs() <= 1).float().mean().item()
        return DIGIT_WEIGHT * (tens_loss + ones_loss) + VALUE_WEIGHT * measured, near

    def of_tens(self, tens: Tensor) -> Tensor:
        """What the tens (N, PLACES) say about the ones: logits (N, PLACES, ONES)."""
        return ONES_SCALE * self.ones_of_tens_head[torch.arange(labels.PLACES, device=tens.device), tens]


def merged_labels(picture: pictures.Picture) -> Tensor:
    """Labels of a picture's patches in the order of the vision tower's output: (T, 4, 3 + PLACES)."""
    shown = torch.from_numpy(labels.patch_labels(picture))  # (rows, columns, 3 + PLACES)
    rows, columns, kinds = shown.shape
    tiles = shown.view(rows // 2, 2, columns // 2, 2, kinds).transpose(1, 2)
    return tiles.reshape(-1, 4, kinds)


@dataclass
class PictureBatch:
    """Pictures of one size with their labels."""

    pixel_values: Tensor  # (P, 3, 14, 14)
    grids: list[tuple[int, int]]
    labels: Tensor  # (T, 4, 3 + PLACES)


class PictureBatches(torch.utils.data.Dataset):
    """Soups of glyphs and shapes, sums, scenes; all pictures of a batch have one size. Item k depends on k alone."""

    def __init__(self, seed: int, count: int, patches: int, options: ImageOptions, begin: int = 0):
        self.seed, self.count, self.patches, self.options, self.begin = seed, count, patches, options, begin
        self.fonts = printing.find_fonts()

    def __len__(self) -> int:
        return self.count - self.begin

    def __getitem__(self, index: int) -> PictureBatch:
        index += self.begin
        rng = random.Random(f"{self.seed} pictures {index}")
        high = 364 if index < self.count * 3 // 4 else 448
        size = pictures.wide_size(rng, high) if rng.random() < 0.6 else pictures.picture_size(rng, high=high)
        of_one = math.ceil(size[0] / 28) * math.ceil(size[1] / 28) * 4
        drawn = [self.draw(rng, size) for _ in range(max(2, round(self.patches / of_one)))]
        encoded = [preprocess(picture.image, self.options) for picture in drawn]
        return PictureBatch(
            torch.cat([torch.from_numpy(patches) for patches, _ in encoded]),
            [grid for _, grid in encoded],
            torch.cat([merged_labels(picture) for picture in drawn]),
        )

    def draw(self, rng: random.Random, size: tuple[int, int]) -> pictures.Picture:
        chance = rng.random()
        if chance < 0.1:
            return soups.draw_soup(rng, self.fonts, size=size)
        if chance < 0.35:
            return soups.draw_lines(rng, self.fonts, size)
        if chance < 0.7:
            a, op, b = rng.randrange(100), rng.choice("+-"), rng.randrange(100)
            if rng.random() < 0.65:
                return printing.draw_typed_sum(rng, self.fonts, a, op, b, size)
            return printing.draw_sum(rng, self.fonts, a, op, b, size=size, wide=rng.random() < 0.5)
        count = min(rng.choice((1, 1, 2, 3, 3, 4, 5, 6)), min(size) // 50)  # that many fit
        looks = [(rng.choice(pictures.COLOURS[1:]), rng.choice(pictures.SHAPES)) for _ in range(count)]
        return scenes.draw_scene(rng, looks, size=size, wide=rng.random() < 0.5)
