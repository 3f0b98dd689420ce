"""From logits to one token: temperature, then top-k, then top-p, then a random number from seed and position alone.

Before that a bias is added to the logits, and tokens that a constraint rules out are masked; log-probabilities are
those of the logits as the model gave them. Knows no text and no model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .. import parameters
from ..device import cuda
from ..errors import UserError
from .faults import NotFinite

LEAST_TEMPERATURE = 1e-4  # below it only the likeliest token is left, and logits divided by it may overflow


@dataclass(frozen=True)
class Sampling:
    """How tokens are sampled; values of other types or outside their bounds raise
    :class:`~kimi_vl.errors.UserError` (E_PARAMETER).

    ``temperature`` 0 (or next to it, or ``top_p`` 0, or ``top_k`` 1) takes the most likely token. ``top_k`` 0 is off.
    The same ``seed`` gives the same tokens. ``logprobs`` asks for the log-probability of each sampled token, and of so
    many of the likeliest beside it; None is none.
    """

    temperature: float
    top_p: float
    top_k: int
    seed: int
    logprobs: int | None = None

    def __post_init__(self) -> None:
        checked = {
            "temperature": parameters.number("temperature", self.temperature, 0, 2),
            "top_p": parameters.number("top_p", self.top_p, 0, 1),
            "top_k": parameters.integer("top_k", self.top_k, 0, parameters.MAX_TOP_K),
            "seed": parameters.integer("seed", self.seed, 0, parameters.MAX_SEED),
        }
        if self.logprobs is not None:
            checked["logprobs"] = parameters.integer("logprobs", self.logprobs, 0, parameters.MAX_LOGPROBS)
        for name, value in checked.items():  # as Python's own numbers, whatever type they came in
            object.__setattr__(self, name, value)

    @property
    def greedy(self) -> bool:
        return self.temperature < LEAST_TEMPERATURE or self.top_p == 0 or self.top_k == 1

    @property
    def cuts(self) -> bool:
        """Whether top-k or top-p leaves out some tokens."""
        return not self.greedy and (self.top_p < 1 or self.top_k > 0)


class LogitBias:
    """Numbers from -100 to 100 that are added to the logits of some token ids; others, or more than 1,024 of them,
    raise :class:`~kimi_vl.errors.UserError` (E_PARAMETER)."""

    def __init__(self, values: Mapping[int, float]):
        if len(values) > parameters.MAX_BIASED:
            raise UserError("E_PARAMETER", f"logit_bias may have {parameters.MAX_BIASED} tokens; give fewer.")
        self.ids: list[int] = [
            parameters.integer("a token id in logit_bias", token, 0, parameters.MAX_TOP_K) for token in values
        ]
        biases = [
            parameters.number("a value in logit_bias", bias, -parameters.MAX_BIAS, parameters.MAX_BIAS)
            for bias in values.values()
        ]
        self._tensors = torch.tensor(self.ids, dtype=torch.int64), torch.tensor(biases, dtype=torch.float32)

    def add_to(self, logits: Tensor) -> None:
        """Change the logits (V,) of one sequence."""
        if self._tensors[0].device != logits.device:  # once for a request
            self._tensors = self._tensors[0].to(logits.device), self._tensors[1].to(logits.device)
        logits.index_add_(0, *self._tensors)


class Constraint(Protocol):
    """Decides which tokens may follow a sequence, each time anew."""

    @staticmethod
    def fill(constraints: Sequence[Any], masks: np.ndarray) -> None:
        """Say for N sequences which ids may be sampled next: ``masks`` (N, ceil(V / 32)), int32, zero before.

        Bit b of word w stands for id 32 w + b. Changes nothing, so that a step can be repeated.
        """
        ...


@dataclass(frozen=True)
class NextToken:
    """The next token of a sequence: ``forced``, or where that is None a sampled one, whose id is below ``limit``.

    ``number`` is the uniform random number that decides it.
    """

    forced: int | None
    sampling: Sampling
    number: float
    limit: int
    bias: LogitBias | None = None
    constraint: Constraint | None = None


@dataclass(frozen=True)
class Logprobs:
    """Natural logarithms of probabilities: of the sampled token, and of the likeliest ones with their ids, falling."""

    logprob: float
    top: Sequence[tuple[int, float]]


@dataclass(frozen=True)
class Sampled:
    """A token, and its log-probabilities where it was sampled and they were asked for."""

    token: int
    logprobs: Logprobs | None = None


def sample_step(
    logits: Tensor, wanted: Sequence[NextToken | None], rounded: bool = False
) -> list[Sampled | Exception | None]:
    """The next token of each of B sequences from float32 ``logits`` (B, V), or why it has none; None as ``wanted``.

    Batch-invariant; see :func:`sample_batch`.
    """
    found: list[Sampled | Exception | None] = [None] * len(wanted)
    masks = _masks(wanted, logits.shape[-1])  # first: a device may be computing the logits meanwhile
    drawn: dict[bool, list[tuple[int, NextToken]]] = {False: [], True: []}  # by whether their logits are changed
    for index, (each, is_finite) in enumerate(zip(wanted, finite(logits).tolist(), strict=True)):
        if each is not None and not is_finite:
            found[index] = NotFinite()
        elif each is not None and each.forced is not None:
            found[index] = Sampled(each.forced)
        elif each is not None and index in masks and not masks[index].any():
            found[index] = RuntimeError("a constraint leaves no token")
        elif each is not None:
            drawn[index in masks or each.bias is not None].append((index, each))
    for changed, sequences in drawn.items():
        if not sequences:
            continue
        own = logits[[index for index, _ in sequences]] if changed or len(sequences) < len(wanted) else logits
        if changed:
            _change(own, [each.bias for _, each in sequences], [masks.get(index) for index, _ in sequences])
        tokens = sample_batch(
            own,
            [each.sampling for _, each in sequences],
            [each.number for _, each in sequences],
            [each.limit for _, each in sequences],
            rounded=rounded and not changed,  # a bias makes other values of them
        )
        for (index, _), token in zip(sequences, tokens, strict=True):
            found[index] = Sampled(token)
    asked = [
        (index, each, got.token)
        for index, (each, got) in enumerate(zip(wanted, found, strict=True))
        if each is not None and isinstance(got, Sampled) and each.forced is None and each.sampling.logprobs is not None
    ]
    if asked:
        tokens, counts = [token for _, _, token in asked], [each.sampling.logprobs or 0 for _, each, _ in asked]
        for (index, _, token), logprobs in zip(
            asked, logprobs_of(logits[[index for index, _, _ in asked]], tokens, counts), strict=True
        ):
            found[index] = Sampled(token, logprobs)
    return found


def _masks(wanted: Sequence[NextToken | None], vocabulary: int) -> dict[int, np.ndarray]:
    """The masks (ceil(V / 32),) of the sequences that have a constraint, by their index."""
    constraints = {
        index: each.constraint
        for index, each in enumerate(wanted)
        if each is not None and each.forced is None and each.constraint is not None
    }
    if not constraints:
        return {}
    masks = np.zeros((len(constraints), -(-vocabulary // 32)), dtype=np.int32)
    next(iter(constraints.values())).fill(list(constraints.values()), masks)
    return dict(zip(constraints, masks, strict=True))


def _change(logits: Tensor, biases: Sequence[LogitBias | None], masks: Sequence[np.ndarray | None]) -> None:
    """Add biases to the logits (B, V), and make those -inf that are masked."""
    for own, bias in zip(logits, biases, strict=True):
        if bias is not None:
            bias.add_to(own)
    masked = [index for index, mask in enumerate(masks) if mask is not None]
    if masked:
        octets = np.stack([mask for mask in masks if mask is not None]).view(np.uint8)  # (N, V / 8)
        if logits.is_cuda:
            addends = torch.from_numpy(_ADDENDS).to(logits.device)[torch.from_numpy(octets).to(logits.device).int()]
        else:
            addends = torch.from_numpy(_ADDENDS.take(octets, axis=0))  # (N, V / 8, 8)
        logits.index_add_(0, torch.tensor(masked, device=logits.device), addends.flatten(1)[:, : logits.shape[-1]])


_ADDENDS = np.where(np.arange(256)[:, None] >> np.arange(8) & 1, np.float32(0), np.float32("-inf"))
"""What eight bits of a mask add to logits: (256, 8) float32. Ten times as fast on a CPU as filling by a mask."""


def logprobs_of(logits: Tensor, tokens: Sequence[int], counts: Sequence[int]) -> list[Logprobs]:
    """Log-probabilities of a token of each of B sequences with float32 ``logits`` (B, V), and of the ``counts``
    likeliest; of equally likely ones the lower id is first."""
    logprobs = logits.log_softmax(-1)
    chosen = logprobs.gather(-1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0].tolist()
    # always as many: which of equally likely ones are found must not depend on what another sequence asks for
    values, ids = logprobs.topk(min(parameters.MAX_LOGPROBS, logprobs.shape[-1]))
    found = []
    for own, top, at, count in zip(chosen, values.tolist(), ids.tolist(), counts, strict=True):
        ranked = sorted(zip(at, top, strict=True), key=lambda pair: (-pair[1], pair[0]))
        found.append(Logprobs(own, ranked[:count]))
    return found


def sample_one(logits: Tensor, sampling: Sampling, number: float) -> int:
    """One token id from float32 ``logits`` (V,), of which -inf is never sampled, by a uniform random ``number``."""
    if sampling.greedy:
        return int(logits.argmax())
    # float64, or the tail of a large vocabulary is lost in rounding
    scores, ids = (logits / sampling.temperature).double(), None
    if sampling.top_k and sampling.top_k < scores.numel():
        scores, ids = _best(scores, sampling.top_k)
    probabilities = scores.softmax(-1)
    if sampling.top_p < 1 and ids is None:
        probabilities, ids = _likeliest(probabilities, sampling.top_p)
    cumulative = probabilities.cumsum(-1)
    if sampling.top_p < 1:
        # the smallest set that reaches top_p: a token belongs if those before it do not reach it
        kept = int((cumulative - probabilities < sampling.top_p).sum())
        cumulative = cumulative[:kept]
    target = number * cumulative[-1]
    index = min(int(torch.searchsorted(cumulative, target, right=True)), cumulative.numel() - 1)
    return index if ids is None else int(ids[index])


def _best(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` largest of ``values`` (V,), falling, and their indices; of equal ones the first, in order."""
    best, ids = values.topk(min(count + 1, values.numel()))
    if count < len(best) and best[count - 1] == best[count]:  # which of the equal ones these are is left to chance
        above, equal = (values > best[count]).nonzero()[:, 0], (values == best[count]).nonzero()[:, 0]
        ids = torch.cat((above, equal))
    ids = ids[:count].sort().values
    best, order = values[ids].sort(descending=True, stable=True)
    return best, ids[order]


def _likeliest(probabilities: Tensor, total: float) -> tuple[Tensor, Tensor]:
    """The largest of ``probabilities`` (V,), falling, and their indices: as many as surely reach ``total``.

    Sorting all of a large vocabulary takes far longer than finding the few that matter.
    """
    for count in (64, 2048):
        if count < probabilities.numel():
            best, ids = _best(probabilities, count)
            if best.sum() > total:
                return best, ids
    return probabilities.sort(descending=True, stable=True)


def sample_batch(
    logits: Tensor,
    samplings: Sequence[Sampling],
    numbers: Sequence[float],
    limits: Sequence[int],
    rounded: bool = False,
) -> list[int]:
    """One token id for each sequence from float32 ``logits`` (B, V), below its limit; see :func:`sample_one`.

    Batch-invariant: a sequence's token depends on its own logits and random number alone. ``rounded`` says that all
    logits are bfloat16 values, which saves time on a GPU.
    """
    if logits.is_cuda:
        return sample_batch_on_device(logits, samplings, numbers, limits, rounded)
    vocabulary = logits.shape[-1]
    if all(sampling.greedy for sampling in samplings) and all(limit == vocabulary for limit in limits):
        return logits.argmax(-1).tolist()
    sequences = zip(logits, samplings, numbers, limits, strict=True)
    return [sample_one(own[:limit], sampling, number) for own, sampling, number, limit in sequences]


def finite(logits: Tensor) -> Tensor:
    """Which of B sequences have ``logits`` (B, V) without infinity and NaN: (B,) bool. A sum shows both in one pass."""
    return logits.sum(-1).isfinite()


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) made by a counter-based generator from ``seed`` and ``position`` alone."""
    return uniforms(seed, position, 1)[0]


def uniforms(seed: int, position: int, count: int) -> list[float]:
    """:func:`uniform` for ``count`` positions from ``position`` on, in one call."""
    # each position is a block of four numbers, of which the first is taken
    return np.random.Generator(np.random.Philox(key=seed, counter=position)).random(4 * count)[::4].tolist()


def sample_batch_on_device(
    logits: Tensor,
    samplings: Sequence[Sampling],
    numbers: Sequence[float],
    limits: Sequence[int],
    rounded: bool = False,
) -> list[int]:
    """The same with as many operations for a batch as for one sequence, for GPUs, where launches are what costs.

    One device synchronisation, for the result.
    """
    if not samplings:
        return []
    most = logits.shape[-1]  # more than there are ids is as good as all of them
    given = [
        [0.0 if sampling.greedy else sampling.temperature for sampling in samplings],
        [sampling.top_p for sampling in samplings],
        numbers,
        [min(sampling.top_k, most) for sampling in samplings],
        limits,
    ]
    tensor = cuda.tensor(given, torch.float64, logits.device)
    temperature, top_p, uniform_numbers = tensor[:3]
    top_k, below = tensor[3:].long()  # float64 holds them exactly
    greedy_only, cut = all(s.greedy for s in samplings), any(s.cuts for s in samplings)
    return sample_from_tensors(
        logits, temperature, top_p, top_k, below, uniform_numbers, greedy_only=greedy_only, cut=cut, rounded=rounded
    ).tolist()


_BLOCK = 256  # ids whose probabilities are added up together
_CUT_BATCH = 16  # sequences at a time where top-k or top-p is used, which bounds the memory


def sample_from_tensors(
    logits: Tensor,
    temperature: Tensor,
    top_p: Tensor,
    top_k: Tensor,
    limits: Tensor,
    numbers: Tensor,
    *,
    greedy_only: bool,
    cut: bool,
    rounded: bool = False,
) -> Tensor:
    """:func:`sample_batch` with all inputs as tensors and no device synchronisation: ids (B,) from ``logits`` (B, V).

    For each sequence, all (B,): ``temperature`` (0 takes the likeliest) and ``top_p``, float64; ``top_k`` and
    ``limits`` of ids, int64; ``numbers``, the uniform random numbers, float64. ``greedy_only`` says that every
    temperature is 0; without ``cut`` no sequence has a top_p or top_k, and that computation is left out. ``rounded``
    says that all logits are bfloat16 values, which need not be sorted. Logits of NaN give some valid id.
    """
    if cut and not greedy_only and len(logits) > _CUT_BATCH:
        parts = (each.split(_CUT_BATCH) for each in (logits, temperature, top_p, top_k, limits, numbers))
        options = {"greedy_only": greedy_only, "cut": cut, "rounded": rounded}
        return torch.cat([sample_from_tensors(*part, **options) for part in zip(*parts, strict=True)])
    logits = logits.masked_fill(torch.arange(logits.shape[-1], device=logits.device) >= limits[:, None], float("-inf"))
    likeliest = logits.argmax(-1)
    if greedy_only:
        return likeliest
    greedy = temperature == 0
    temperature = temperature.masked_fill(greedy, 1).float()[:, None]
    scores = logits / temperature
    sampled = _drawn(scores, numbers)
    if cut:
        top_k = limits.where(top_k == 0, torch.minimum(top_k, limits))
        if rounded:
            among = _cut_rounded(logits, temperature, top_p, top_k, numbers)
        else:
            among = _cut_sorted(scores, top_p, top_k, numbers)
        sampled = among.where((top_p < 1) | (top_k < limits), sampled)
    return likeliest.where(greedy, sampled)


def _drawn(scores: Tensor, numbers: Tensor) -> Tensor:
    """Ids (B,) sampled among all of ``scores`` (B, V): first a block of ids, then one of these.

    A scan of the whole vocabulary keeps a GPU busy ten times as long, for it gives each sequence to one multiprocessor.
    """
    weights = scores.double()
    weights.sub_(weights.amax(-1, keepdim=True)).exp_()  # (B, V)
    if missing := -weights.shape[-1] % _BLOCK:  # padding by nothing would copy all of them
        weights = F.pad(weights, (0, missing))
    weights = weights.unflatten(-1, (-1, _BLOCK))  # (B, V / 256, 256)
    sums = weights.sum(-1)
    ends = sums.cumsum(-1)
    target = numbers[:, None] * ends[:, -1:]  # (B, 1)
    block = torch.searchsorted(ends, target, right=True).minimum(_last(sums))
    own = weights.gather(1, block[..., None].expand(-1, -1, _BLOCK))[:, 0]  # (B, 256)
    # not below 0, where ids without any weight are found
    rest = (target - (ends - sums).gather(-1, block)).clamp(min=0)
    index = torch.searchsorted(own.cumsum(-1), rest, right=True).minimum(_last(own))
    return (block * _BLOCK + index)[:, 0]


def _last(weights: Tensor) -> Tensor:
    """The index (B, 1) of the last of ``weights`` (B, N) that is more than 0."""
    return (weights > 0).long().mul(torch.arange(weights.shape[-1], device=weights.device)).amax(-1, keepdim=True)


def _cut_sorted(scores: Tensor, top_p: Tensor, top_k: Tensor, numbers: Tensor) -> Tensor:
    """Ids (B,) sampled among the top-k and top-p of ``scores`` (B, V), by sorting."""
    ranked, ids = scores.sort(dim=-1, descending=True, stable=True)
    ranks = torch.arange(scores.shape[-1], device=scores.device)
    probabilities = ranked.double().masked_fill(ranks >= top_k[:, None], float("-inf")).softmax(-1)
    cumulative = probabilities.cumsum(-1)
    before = cumulative - probabilities
    kept = torch.minimum((before < top_p[:, None]).sum(-1), top_k).where(top_p < 1, top_k)
    return ids.gather(-1, _inverse(cumulative, kept, numbers)[:, None])[:, 0]


def _cut_rounded(logits: Tensor, temperature: Tensor, top_p: Tensor, top_k: Tensor, numbers: Tensor) -> Tensor:
    """The same of ``logits`` (B, V) that are bfloat16 values, to be divided by ``temperature`` (B, 1): without sorting.

    There are 65,536 such values, so a histogram replaces the sort, the greatest value first. All tokens of one value
    are equally likely; among them the order is that of their ids.
    """
    values = _falling_values(logits.device)  # (65536)
    bits = (logits + 0.0).bfloat16().view(torch.int16).int()  # the addition makes a zero of a negative zero
    places = 32767 - bits.where(bits >= 0, bits ^ 32767)  # (B, V), in `values`
    counts = torch.zeros(len(logits), len(values), dtype=torch.int32, device=logits.device)
    counts.scatter_add_(1, places.long(), torch.ones((), dtype=torch.int32, device=logits.device).expand_as(places))
    kept = (top_k[:, None] - counts.cumsum(-1) + counts).clamp(min=0).minimum(counts)  # of each value's tokens
    top = logits.amax(-1, keepdim=True) / temperature
    weights = ((values / temperature).double() - top.double()).exp().where(kept > 0, 0)  # of one token of a value
    shares = weights / (kept * weights).sum(-1, keepdim=True)
    before = (kept * shares).cumsum(-1) - kept * shares
    # a token belongs if those before it do not reach top_p
    fitting = ((top_p[:, None] - before) / shares).ceil().clamp(min=0)
    kept = fitting.minimum(kept).where((top_p[:, None] < 1) & (kept > 0), kept).long()
    cumulative = (kept * shares).cumsum(-1)
    target = numbers[:, None] * cumulative[:, -1:]
    found = torch.searchsorted(cumulative, target, right=True).minimum(_last(kept))  # (B, 1)
    passed = (target - cumulative.gather(-1, found)) / shares.gather(-1, found) + kept.gather(-1, found)
    number = passed.floor().clamp(min=0).minimum(kept.gather(-1, found) - 1)  # among the tokens of the value
    alike = (places == found).cumsum(-1, dtype=torch.int32)  # (B, V)
    return (alike <= number).sum(-1).clamp(max=logits.shape[-1] - 1)


def _falling_values(device: torch.device) -> Tensor:
    """All bfloat16 values in float32, from the greatest to the least, NaN and infinities as the least of all."""
    order = 32767 - torch.arange(1 << 16, device=device)
    bits = order.where(order >= 0, order ^ 32767).to(torch.int16)
    values = bits.view(torch.bfloat16).float()
    return values.masked_fill(~values.isfinite(), float("-inf"))


def _inverse(cumulative: Tensor, counts: Tensor, numbers: Tensor) -> Tensor:
    """The index (B,) where each of ``cumulative`` (B, V), of which the first ``counts`` matter, passes its number."""
    last = (counts - 1).clamp(min=0)
    target = numbers * cumulative.gather(-1, last[:, None])[:, 0]
    return torch.minimum(torch.searchsorted(cumulative, target[:, None], right=True)[:, 0], last)
