"""What a caller hands over, checked before anything is computed and brought to one layout: padding at the left."""
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor

from ..errors import UserError
from ..model.config import Config, num_image_tokens
from ..model.vision import Grid


@dataclass(frozen=True)
class Batch:
    """New tokens (B, S) and the images of all of them; ``valid`` (B, L) is false for padding, in the cache, too."""

    ids: np.ndarray
    valid: np.ndarray
    pixel_values: Tensor | None = None
    grids: Sequence[Grid] = ()


def read(
    config: Config, input_ids: Any, attention_mask: Any = None, pixel_values: Any = None, image_grid_hws: Any = None
) -> Batch:
    """The batch of ``input_ids`` and ``attention_mask`` (B, S), ``pixel_values`` (P, 3, 14, 14) and ``image_grid_hws``
    (n, 2). Raises :class:`UserError` that names the tensor at fault."""
    given = _integers("input_ids", input_ids, ("B", "S"))
    mask = np.ones_like(given) if attention_mask is None else _integers("attention_mask", attention_mask, given.shape)
    sequences = [own[kept != 0] for own, kept in zip(given, mask, strict=True)]
    if not sequences or not all(map(len, sequences)):
        raise UserError("E_PARAMETER", "input_ids has a sequence without tokens; leave it out.")
    if not all(own.min() >= 0 and own.max() < config.text_config.vocab_size for own in sequences):
        raise UserError("E_PARAMETER", "input_ids has an id that is not in the vocabulary; use this model's processor.")
    shape = len(sequences), max(map(len, sequences))
    ids, valid = np.zeros(shape, np.int32), np.zeros(shape, bool)
    for index, own in enumerate(sequences):
        ids[index, -len(own) :], valid[index, -len(own) :] = own, True
    if pixel_values is None and image_grid_hws is None:
        return Batch(ids, valid)
    grids = [(int(height), int(width)) for height, width in _integers("image_grid_hws", image_grid_hws, ("n", 2))]
    if not all(side > 0 and side % 2 == 0 for grid in grids for side in grid):
        raise UserError("E_PARAMETER", "image_grid_hws must be even and above 0; use this model's processor.")
    size = config.vision_config.patch_size
    _check("pixel_values", pixel_values, (sum(height * width for height, width in grids), 3, size, size))
    places, needed = int((ids == config.media_placeholder_token_id).sum()), sum(map(num_image_tokens, grids))
    if places != needed:
        raise UserError("E_PARAMETER", f"input_ids has {places} places for images that take {needed}; change either.")
    return Batch(ids, valid, pixel_values, grids)


def _integers(name: str, value: Any, shape: tuple[int | str, ...]) -> np.ndarray:
    _check(name, value, shape)
    if value.dtype not in (ms.int32, ms.int64, ms.bool_):
        raise UserError("E_PARAMETER", f"{name} must be of mindspore.int32 or int64; convert it.")
    return value.asnumpy()


def _check(name: str, value: Any, shape: tuple[int | str, ...]) -> None:
    """Whether ``value`` is a tensor of MindSpore's and of ``shape``, in which a text stands for any size."""
    if not isinstance(value, Tensor):
        library = type(value).__module__.partition(".")[0].replace("builtins", "Python")
        kind = "missing" if value is None else f"a {library} {type(value).__name__}"
        raise UserError("E_BACKEND", f"{name} is {kind}, and the model is on MindSpore; use mindspore.Tensor(values).")
    if len(value.shape) != len(shape) or any(n not in (m, str(n)) for n, m in zip(shape, value.shape, strict=True)):
        wanted = ", ".join(map(str, shape))
        raise UserError("E_PARAMETER", f"{name} has shape {tuple(value.shape)}; it must be ({wanted}).")
