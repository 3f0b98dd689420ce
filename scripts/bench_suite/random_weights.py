"""Random weights of a model that counts: after a token it greedily answers the id that follows.

The output head is the embedding moved by one id, and what the layers add to a token's own vector is small beside it. So
anybody's answers can be checked, and sequences that begin with different tokens never meet: to a router their vectors
are independent. Routers have lines of one length and hardly a bias, so that each expert is as likely as another, and
B sequences read some E (1 - (1 - K/E)^B) of a layer's E experts, of which a token takes K.

Weights are quantised as they are made, a tensor at a time, for models that fit no other way.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kimi_vl.model.config import Config
from kimi_vl.quantization import search
from kimi_vl.quantization.scheme import FORMS, Scheme
from kimi_vl.quantization.weight import pack
from kimi_vl.weights import compressed_tensors, loader

_VALUES = 2**24 + 43  # random values at hand; odd, so that tensors beginning at different places of it differ
_STEP = 1_000_003  # of them between the beginnings of two tensors
_GROUP = FORMS["int4"].group
_WIDEST = 4.5  # values of the pool that are larger are clipped in 8 bits
_ADDED = 0.4  # of a vector's length, what attention or an MLP adds to it
_HEAD, _EMBEDDING = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"


def tensors(config: Config, form: str | None) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a checkpoint by its name: bfloat16, or with ``form`` as compressed-tensors has them."""
    pool = _Pool(form)
    plan = loader.Plan(loader.empty_model(config), None, form)
    begins = {name: number * _STEP for number, name in enumerate(plan.slots)}
    begins[_HEAD] = begins[_EMBEDDING] - config.text_config.hidden_size
    for name, slot in plan.slots.items():
        scheme = plan.held.get(name)
        if scheme is None:
            yield name, _scaled(name, pool.values(begins[name], slot.shape))
        else:
            outputs, inputs = slot.shape
            codes, scales = pool.quantized(begins[name], outputs, inputs, scheme)
            scales = (scales * _size(name, inputs)).to(search.SCALES)
            yield from compressed_tensors.as_stored(codes, scales, name, slot.shape).items()


def _scaled(name: str, values: Tensor) -> Tensor:
    """Sizes that keep vectors near length one an element. The router's biases are float32 as published."""
    if name.endswith("e_score_correction_bias"):
        return 0.01 * values.float()
    if values.ndim == 1:
        return 0.1 * values + (1 if name.endswith("weight") else 0)
    if name.endswith("mlp.gate.weight"):
        return torch.nn.functional.normalize(values.float(), dim=1).bfloat16()
    if name == _EMBEDDING:
        return values
    return values * _size(name, values.numel() // len(values))


def _size(name: str, inputs: int) -> float:
    return inputs**-0.5 * (_ADDED if name.endswith(("o_proj.weight", "down_proj.weight")) else 1)


class _Pool:
    """Normal values, and the same ones quantised, to cut tensors from at any place; the end is followed by the
    beginning."""

    def __init__(self, form: str | None):
        normal = torch.randn(_VALUES, generator=torch.Generator().manual_seed(0))
        self._values = normal.bfloat16()
        if form is None:
            return
        step = _WIDEST / 127
        self._bytes = pack((normal / step).round().clamp(-127, 127), 8)
        self._step = torch.tensor(step)
        groups = normal[: _VALUES // _GROUP * _GROUP].view(-1, _GROUP)  # an odd number of them, too
        self._codes, self._scales = search.quantize(groups, FORMS["int4"], "pool")

    def values(self, begin: int, shape: tuple[int, ...]) -> Tensor:
        return _cut(self._values, begin, torch.Size(shape).numel()).reshape(shape)

    def quantized(self, begin: int, outputs: int, inputs: int, scheme: Scheme) -> tuple[Tensor, Tensor]:
        """Codes (O, bytes) and scales (O, G) of a matrix of normal values."""
        if scheme == FORMS["int8"]:
            codes = _cut(self._bytes, begin, outputs * inputs).view(outputs, inputs)
            return codes, self._step.expand(outputs, 1)
        if scheme != FORMS["int4"]:
            raise ValueError(f"random weights are made in int8 or int4, not as {scheme}")
        count = outputs * inputs // _GROUP
        codes, scales = (_cut(pool, begin // _GROUP, count) for pool in (self._codes, self._scales))
        return codes.view(outputs, -1), scales.view(outputs, -1)


def _cut(pool: Tensor, begin: int, count: int) -> Tensor:
    pieces, begin = [], begin % len(pool)
    while count:
        pieces.append(pool[begin : begin + count])
        count, begin = count - len(pieces[-1]), 0
    return torch.cat(pieces)
