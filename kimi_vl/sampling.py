"""From logits to one token: temperature, then top-k, then top-p, then a draw that depends on seed and position alone.

Knows no text and no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from . import parameters

LEAST_TEMPERATURE = 1e-4  # below it the likeliest token is all that is left, and a division by it may not be finite


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; values of other types or outside their bounds raise
    :class:`~kimi_vl.errors.UserError` (E_PARAMETER).

    ``temperature`` 0 (or next to it, or ``top_p`` 0, or ``top_k`` 1) takes the most likely token. ``top_k`` 0 is off.
    The same ``seed`` gives the same draws.
    """

    temperature: float
    top_p: float
    top_k: int
    seed: int

    def __post_init__(self) -> None:
        checked = {
            "temperature": parameters.number("temperature", self.temperature, 0, 2),
            "top_p": parameters.number("top_p", self.top_p, 0, 1),
            "top_k": parameters.integer("top_k", self.top_k, 0, parameters.MAX_TOP_K),
            "seed": parameters.integer("seed", self.seed, 0, parameters.MAX_SEED),
        }
        for name, value in checked.items():  # as Python's own numbers, whatever type they came in
            object.__setattr__(self, name, value)

    @property
    def greedy(self) -> bool:
        return self.temperature < LEAST_TEMPERATURE or self.top_p == 0 or self.top_k == 1

    @property
    def cuts(self) -> bool:
        """Whether only some of the likelier tokens are drawn among."""
        return not self.greedy and (self.top_p < 1 or self.top_k > 0)


def sample(logits: Tensor, sampling: Sampling, position: int) -> int:
    """One token id from float32 ``logits`` (V,); ``position`` counts the tokens drawn before in this request."""
    if sampling.greedy:
        return int(logits.argmax())
    # float64, or the tail of a large vocabulary is lost in rounding
    scores, ids = (logits / sampling.temperature).double(), None
    if sampling.top_k and sampling.top_k < scores.numel():
        scores, ids = scores.topk(sampling.top_k)
    probabilities = scores.softmax(-1)
    if sampling.top_p < 1 and ids is None:
        probabilities, ids = _likeliest(probabilities, sampling.top_p)
    cumulative = probabilities.cumsum(-1)
    if sampling.top_p < 1:
        # the smallest set that reaches top_p: a token belongs if those before it do not reach it
        kept = int((cumulative - probabilities < sampling.top_p).sum())
        cumulative = cumulative[:kept]
    target = uniform(sampling.seed, position) * cumulative[-1]
    index = min(int(torch.searchsorted(cumulative, target, right=True)), cumulative.numel() - 1)
    return index if ids is None else int(ids[index])


def _likeliest(probabilities: Tensor, total: float) -> tuple[Tensor, Tensor]:
    """The largest of ``probabilities`` (V,), falling, and their indices: as many as surely reach ``total``.

    Sorting all of a large vocabulary takes far longer than finding the few that matter.
    """
    for count in (64, 2048):
        if count < probabilities.numel():
            best, ids = probabilities.topk(count)
            if best.sum() > total:
                return best, ids
    return probabilities.sort(descending=True)


def draw(logits: Tensor, samplings: Sequence[Sampling], positions: Sequence[int], limits: Sequence[int]) -> list[int]:
    """One token id for each row of float32 ``logits`` (B, V), of the ids below its limit; see :func:`sample`.

    A row's draw depends on nothing but its own logits, seed and position.
    """
    if logits.is_cuda:
        return draw_together(logits, samplings, positions, limits)
    vocabulary = logits.shape[-1]
    if all(sampling.greedy for sampling in samplings) and all(limit == vocabulary for limit in limits):
        return logits.argmax(-1).tolist()
    rows = zip(logits, samplings, positions, limits, strict=True)
    return [sample(row[:limit], sampling, position) for row, sampling, position, limit in rows]


def finite(logits: Tensor) -> Tensor:
    """Which rows (B) of ``logits`` (B, V) hold no infinity and no NaN: a sum hides neither, and reads them once."""
    return logits.sum(-1).isfinite()


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) made by a counter-based generator from ``seed`` and ``position`` alone."""
    return uniforms(seed, position, 1)[0]


def uniforms(seed: int, position: int, count: int) -> list[float]:
    """:func:`uniform` of ``count`` positions from ``position`` on, in one go."""
    # each position is a block of four numbers, of which the first is taken
    return np.random.Generator(np.random.Philox(key=seed, counter=position)).random(4 * count)[::4].tolist()


def draw_together(
    logits: Tensor, samplings: Sequence[Sampling], positions: Sequence[int], limits: Sequence[int]
) -> list[int]:
    """The same with as few calls as one row takes, for devices where calls are what costs."""
    if not samplings:
        return []
    floats = [
        [0.0 if sampling.greedy else sampling.temperature for sampling in samplings],
        [sampling.top_p for sampling in samplings],
        [uniform(sampling.seed, position) for sampling, position in zip(samplings, positions, strict=True)],
    ]
    temperature, top_p, numbers = torch.tensor(floats, dtype=torch.float64, device=logits.device)
    # more than there are ids is as good as all of them, and what an int64 cannot hold could not be passed on
    most = logits.shape[-1]
    top_k, below = torch.tensor([[min(sampling.top_k, most) for sampling in samplings], limits], device=logits.device)
    greedy_only, cut = all(s.greedy for s in samplings), any(s.cuts for s in samplings)
    return choose(logits, temperature, top_p, top_k, below, numbers, greedy_only=greedy_only, cut=cut).tolist()


def choose(
    logits: Tensor,
    temperature: Tensor,
    top_p: Tensor,
    top_k: Tensor,
    limits: Tensor,
    numbers: Tensor,
    *,
    greedy_only: bool,
    cut: bool,
) -> Tensor:
    """:func:`draw` for tensors on any device, without asking the host anything: ids (B,) of ``logits`` (B, V).

    Per row: ``temperature`` (0 takes the likeliest), ``top_p``, both float64; ``top_k`` and the limit of ids, int64;
    the uniform number that decides, float64. What the whole batch has no use for is left out: ``greedy_only`` says
    that every temperature is 0, and without ``cut`` no row has a top_p or top_k. Rows of NaN give some valid id.
    """
    scores = logits.masked_fill(torch.arange(logits.shape[-1], device=logits.device) >= limits[:, None], float("-inf"))
    likeliest = scores.argmax(-1)
    if greedy_only:
        return likeliest
    greedy = temperature == 0
    scores = scores / temperature.masked_fill(greedy, 1).float()[:, None]
    chosen = _inverse(scores.double().softmax(-1).cumsum(-1), limits, numbers)
    if cut:
        top_k = limits.where(top_k == 0, torch.minimum(top_k, limits))
        ranked, ids = scores.sort(dim=-1, descending=True)
        ranks = torch.arange(logits.shape[-1], device=logits.device)
        probabilities = ranked.double().masked_fill(ranks >= top_k[:, None], float("-inf")).softmax(-1)
        cumulative = probabilities.cumsum(-1)
        before = cumulative - probabilities
        kept = torch.minimum((before < top_p[:, None]).sum(-1), top_k).where(top_p < 1, top_k)
        among = ids.gather(-1, _inverse(cumulative, kept, numbers)[:, None])[:, 0]
        chosen = among.where((top_p < 1) | (top_k < limits), chosen)
    return likeliest.where(greedy, chosen)


def _inverse(cumulative: Tensor, counts: Tensor, numbers: Tensor) -> Tensor:
    """The index (B,) at which each row of sums (B, V), of which the first ``counts`` matter, passes its number."""
    last = (counts - 1).clamp(min=0)
    target = numbers * cumulative.gather(-1, last[:, None])[:, 0]
    return torch.minimum(torch.searchsorted(cumulative, target[:, None], right=True)[:, 0], last)
