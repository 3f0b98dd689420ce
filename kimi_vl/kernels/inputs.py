"""Random inputs of the operations, their results in float64, and the error of a result.

Values are scaled so that softmax, router and gates are decisive: with flat ones a wrong kernel would look right.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..quantization.weight import FLOAT8, QuantizedWeight, Weight
from . import REFERENCE, Form, Ops, Widths, reference
from .attention_metadata import DecodeMetadata, PrefillChunk

# The relative error of one rounding: to bfloat16 (8 significant bits) at most 2^-8; for float32, sums of some thousand
# terms in an unknown order, some ten times 2^-24.
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float32: 2.0**-19}

# Of scores far from 0, whose rounding is one of their weights: 1.1 times the above for 5,000 tokens on an H100.
_EXPONENTIALS = ("mla_decode", "mla_prefill")

FLOAT8_SPREAD = 100.0  # the standard deviation of float8 whose codes are equally likely

PUBLISHED = Widths()


@dataclass(frozen=True)
class Call:
    """One call of an operation; ``roundings`` is how often a result is rounded to bfloat16, where that is the dtype.

    Results are what it returns and, with ``written``, that argument after the call.
    """

    op: str
    arguments: tuple[Any, ...]
    roundings: int
    written: int | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def run(self, ops: Ops, **more: Any) -> tuple[Tensor, ...]:
        """The results. The argument that is written to is copied first."""
        arguments = list(self.arguments)
        if self.written is not None:
            arguments[self.written] = arguments[self.written].clone()
        results = getattr(ops, self.op)(*arguments, **self.options, **more)
        results = results if isinstance(results, tuple) else (results,)
        return results if self.written is None else (*results, arguments[self.written])

    def twin(self) -> tuple[Tensor, ...]:
        """The results in float64, of exactly the same inputs."""
        return Call(self.op, _doubled(self.arguments), 0, self.written, self.options).run(REFERENCE)

    def tolerance(self, dtype: torch.dtype) -> float:
        if dtype == torch.bfloat16 and self.roundings:
            return ROUNDING[dtype] * self.roundings
        return ROUNDING[torch.float32] * (2 if self.op in _EXPONENTIALS else 1)


def _doubled(values: Any) -> Any:
    if isinstance(values, Tensor):
        return values.double() if values.is_floating_point() else values
    return tuple(_doubled(value) for value in values) if isinstance(values, tuple) else values


def distance(result: Tensor, wanted: Tensor) -> float:
    """||result - wanted|| / ||wanted||, infinite where anything is not finite; indices have to be equal."""
    if result.shape != wanted.shape:
        return float("inf")
    if not wanted.is_floating_point():
        return 0.0 if torch.equal(result, wanted) else float("inf")
    norm = float(wanted.double().norm())
    value = float((result.double() - wanted.double()).norm()) / (norm or 1.0)
    return value if value == value else float("inf")


def distances(results: Sequence[Tensor], wanted: Sequence[Tensor]) -> list[float]:
    return [distance(*pair) for pair in zip(results, wanted, strict=True)]


def apart(
    call: Call, results: Sequence[Tensor], dtype: torch.dtype, ties: bool = False, wanted: Sequence[Tensor] = ()
) -> float:
    """The error of results against ``wanted``, or against the call in float64, as a multiple of the tolerance.

    Routing is compared with that of the states as the call has stored them, so that their rounding is no error of the
    router. With ``ties``, scores may be closer than float32 can tell, as happens among many tokens.
    """
    twin = wanted or call.twin()
    if call.op != "norm_router":
        return max(distances(results, twin)) / call.tolerance(dtype)
    stored = max(distances(results[:2], twin[:2])) / call.tolerance(dtype)
    router = results[1].double(), *_doubled(call.arguments[4:])
    routed = routed_alike(router, results[2:]) if ties else max(distances(results[2:], reference.router(*router)))
    return max(stored, routed / ROUNDING[torch.float32])


def routed_alike(router: tuple[Any, ...], results: Sequence[Tensor]) -> float:
    """The error of a routing against the router's arguments in float64, where scores may nearly tie.

    The larger of two: how much lower the selected experts score than the best ones, and the error of the weights as
    those of the selected experts.
    """
    topk_ids, topk_weights = results
    states, weight, bias, top_k, scaling = router
    scores = (states @ weight.T).sigmoid()
    biased = scores + bias
    if not bool(((topk_ids >= 0) & (topk_ids < len(weight))).all()) or bool(
        (topk_ids.sort(-1).values.diff(dim=-1) == 0).any()
    ):
        return float("inf")
    worse = float((biased.topk(top_k, dim=-1).values - biased.gather(-1, topk_ids.long())).abs().max())
    own = scores.gather(-1, topk_ids.long())
    return max(worse, distance(topk_weights, own / own.sum(-1, keepdim=True) * scaling))


class Inputs:
    """Draws arguments of operations; a seed gives the same values on the same kind of device."""

    def __init__(
        self,
        widths: Widths = PUBLISHED,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
        seed: int = 0,
        block: Callable[[Weight], Weight] = lambda weight: weight,
    ):
        """``block`` gives weights the layout of a table of operations."""
        self.widths, self.dtype, self.device, self._block = widths, dtype, torch.device(device), block
        self._generator: torch.Generator | None = torch.Generator(self.device).manual_seed(seed)

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        drawn = torch.randn(shape, generator=self._generator, device=self.device, dtype=dtype or self.dtype)
        return drawn.mul_(scale)

    def integers(self, below: int, *shape: int) -> Tensor:
        return torch.randint(below, shape, generator=self._generator, device=self.device, dtype=torch.int32)

    def shuffled(self, count: int) -> Tensor:
        return torch.randperm(count, generator=self._generator, device=self.device).int()

    def add_rms_norm(self, *shape: int, delta: bool = True) -> Call:
        width = self.widths.hidden
        states = self.normal(*shape, width, scale=3)
        added = self.normal(*shape, width) if delta else None
        return Call("add_rms_norm", (states, added, 1 + self.normal(width, scale=0.3), self.widths.eps), 3)

    def norm_router(self, tokens: int) -> Call:
        """Scores cover all of 0 to 1, and the bias is large enough to change which experts are selected."""
        widths = self.widths
        states = self.add_rms_norm(tokens).arguments
        weight = self.normal(widths.experts, widths.hidden, scale=2 * widths.hidden**-0.5)
        bias = self.normal(widths.experts, scale=0.2, dtype=torch.float32)
        return Call("norm_router", (*states, weight, bias, widths.top_k, widths.scaling), roundings=3)

    def choices(self, tokens: int, routing: str = "random") -> tuple[Tensor, Tensor]:
        """``topk_ids`` and ``topk_weights`` (T, K): "random" experts, the "same" for all tokens, or else as many
        distinct ones as there are."""
        experts, top_k = self.widths.experts, self.widths.top_k
        if routing == "random":
            drawn = torch.rand(tokens, experts, generator=self._generator, device=self.device)
            topk_ids = drawn.topk(top_k, dim=-1).indices
        elif routing == "same":
            topk_ids = self.shuffled(experts)[:top_k].expand(tokens, -1)
        else:
            topk_ids = torch.arange(tokens * top_k, device=self.device).view(tokens, top_k) % experts
        topk_weights = torch.rand(tokens, top_k, generator=self._generator, device=self.device) + 0.1
        return topk_ids.int().contiguous(), topk_weights

    def quantized(self, form: Form, *shape: int, scale: float = 1.0) -> QuantizedWeight:
        """Codes that are equally likely, with a standard deviation of about ``scale`` after scaling."""
        kind, group, dtype = form
        *above, inputs = shape
        bits = 4 if kind == "int4" else 8
        codes = self.integers(256, *above, inputs * bits // 8).to(torch.uint8)
        scales = self.normal(*above, inputs // (group or inputs), dtype=torch.float32).mul_(0.2).add_(1)
        spread = (1 << bits) / 12**0.5  # of integers that are equally likely
        if kind == "float8":
            codes = codes.where(codes & 0x7F != 0x7F, 0).view(FLOAT8)  # neither of the two that are NaN
            spread = FLOAT8_SPREAD
        return QuantizedWeight(codes, scales.mul_(scale / spread).to(getattr(torch, dtype)), bits)

    def weight(self, *shape: int, scale: float, form: Form | None = None) -> Weight:
        return self._block(self.quantized(form, *shape, scale=scale) if form else self.normal(*shape, scale=scale))

    def project(self, tokens: int, weight: Weight) -> Call:
        return Call("project", (self.normal(tokens, weight.shape[-1]), weight), roundings=2)

    def experts(self, form: Form | None = None) -> tuple[Weight, Weight]:
        widths = self.widths
        gate_up = self.weight(widths.experts, 2 * widths.inner, widths.hidden, scale=2 * widths.hidden**-0.5, form=form)
        return gate_up, self.weight(widths.experts, widths.hidden, widths.inner, scale=widths.inner**-0.5, form=form)

    def shared_experts(self, form: Form | None = None) -> tuple[Weight, Weight, Weight]:
        widths = self.widths
        gate, up = (
            self.weight(widths.shared, widths.hidden, scale=2 * widths.hidden**-0.5, form=form) for _ in range(2)
        )
        return gate, up, self.weight(widths.hidden, widths.shared, scale=widths.shared**-0.5, form=form)

    def moe(
        self,
        tokens: int,
        routing: str = "random",
        shared: bool = True,
        weights: tuple[tuple[Weight, Weight], tuple[Weight, Weight, Weight]] | None = None,
    ) -> Call:
        """``weights`` of experts and shared experts are used instead of drawing new ones."""
        routed, always = weights or (self.experts(), self.shared_experts() if shared else None)
        states = self.normal(tokens, self.widths.hidden)
        arguments = (states, *self.choices(tokens, routing), *routed, always if shared else None)
        return Call("moe", arguments, roundings=3 if isinstance(routed[0], Tensor) else 4)  # that of the scaled weight

    def mla_prepare(
        self, tokens: int, decoding: int | None = None, unwritten: int = 0, form: Form | None = None
    ) -> Call:
        """The first ``decoding`` of ``tokens`` (None: all) decode; the last ``unwritten`` have no slot. ``to_key`` has
        the strides of the checkpoint's weight, or is quantised in a ``form``."""
        widths = self.widths
        joined = self.normal(tokens, widths.heads * (widths.nope + widths.rope) + widths.rank + widths.rope, scale=2)
        shape, scale = (widths.heads, widths.nope, widths.rank), widths.nope**-0.5
        if form:
            to_key: Weight = self.quantized(form, *shape, scale=scale)
        else:
            to_key = self.normal(*shape, scale=scale).transpose(1, 2)
            if not isinstance(blocked := self._block(to_key.contiguous()), Tensor):
                to_key = blocked
        angles = self.normal(tokens, widths.rope // 2, scale=10, dtype=torch.float32).repeat(1, 2)
        rope = torch.cat((angles.cos(), angles.sin()), dim=-1).to(self.dtype)
        pages = -(-2 * tokens // widths.page_size) + 1
        kv_cache = self.normal(pages, widths.page_size, widths.rank + widths.rope)
        slot_mapping = self.shuffled(pages * widths.page_size)[:tokens].long()
        slot_mapping[tokens - unwritten :] = -1
        weight = 1 + self.normal(widths.rank, scale=0.3)
        arguments = (
            joined, to_key, weight, rope, kv_cache, slot_mapping, widths.latent_eps,
            tokens if decoding is None else decoding,
        )  # fmt: skip
        return Call("mla_prepare", arguments, roundings=3 if form else 2, written=4)  # that of the scaled weight

    def mla_decode(
        self,
        lengths: Sequence[int],
        table_pages: int = 0,
        spare: int = 2,
        common: int = 0,
        form: Form | None = None,
    ) -> Call:
        """Sequences of these lengths with shuffled pages; the first ``common`` pages of each are shared.

        Slots past a sequence's end and the ``spare`` unused pages are NaN; the page table is padded with -1.
        """
        widths, size = self.widths, self.widths.page_size
        needed = [-(-length // size) for length in lengths]
        free = self.shuffled(common + sum(max(0, need - common) for need in needed) + spare).tolist()
        kv_cache = torch.full(
            (len(free), size, widths.rank + widths.rope), float("nan"), dtype=self.dtype, device=self.device
        )
        prefix = [free.pop() for _ in range(common)]
        page_table = torch.full((len(lengths), table_pages or max([1, *needed])), -1, dtype=torch.int32)
        for sequence, (length, need) in enumerate(zip(lengths, needed, strict=True)):
            own = [*prefix[:need], *(free.pop() for _ in range(need - common))]
            page_table[sequence, :need] = torch.tensor(own, dtype=torch.int32)
            for number, page in enumerate(own):
                count = min(size, length - number * size)
                known = kv_cache[page, :count]
                drawn = self.normal(*known.shape)
                kv_cache[page, :count] = torch.where(known.isnan(), drawn, known)
        query = self.normal(len(lengths), widths.heads, widths.rank + widths.rope)
        scale = (
            2 * (widths.rank + widths.rope) ** -0.5
        )  # scores have a standard deviation of about 2, so some tokens dominate
        seq_lens = torch.tensor(lengths, dtype=torch.int32, device=self.device)
        decode = DecodeMetadata(page_table.to(self.device), seq_lens, size)
        return Call("mla_decode", (query, kv_cache, decode, scale, self.to_value(form)), roundings=4 if form else 3)

    def mla_prefill(self, tokens: int, length: int) -> Call:
        """A chunk of the last ``tokens`` of ``length``. Strides are a decoder's, and whatever lies between the values
        that are used, or around them, is NaN."""
        widths, nan = self.widths, float("nan")
        query = self.normal(tokens, widths.heads, widths.nope + widths.rope)
        query[..., widths.nope :] = nan
        latents = self.normal(length, widths.rank + widths.rope)
        latents[:, : widths.rank] = nan
        arguments = (
            self._amid(query, beside=widths.rank + widths.rope)[..., : widths.nope],
            self._amid(self.normal(tokens, widths.heads, widths.rope)),
            self._amid(latents),
            self._amid(self.normal(length, widths.heads, widths.nope + widths.value)),
            PrefillChunk(slice(0, tokens), self.shuffled(-(-length // widths.page_size)).long(), length),
            2 * (widths.nope + widths.rope) ** -0.5,  # as in mla_decode
        )
        return Call("mla_prefill", arguments, roundings=2)

    def _amid(self, values: Tensor, beside: int = 0) -> Tensor:
        """``values`` (n, …) as a part of memory that is NaN before and behind them, and in further columns."""
        rows = values.flatten(1)
        whole = torch.full((len(rows) + 16, rows.shape[1] + beside), float("nan"), dtype=self.dtype, device=self.device)
        return whole[8:-8, : rows.shape[1]].copy_(rows).unflatten(1, values.shape[1:])

    def to_value(self, form: Form | None = None) -> Weight:
        """The weight (N, V, R) out of the latent space."""
        widths = self.widths
        return self.weight(widths.heads, widths.value, widths.rank, scale=widths.rank**-0.5, form=form)


class Unset(Inputs):
    """Inputs of zeros, for calls of which only the launches matter."""

    def __init__(
        self, widths: Widths = PUBLISHED, dtype: torch.dtype = torch.bfloat16, device: torch.device | str = "cpu"
    ):
        super().__init__(widths, dtype, device)

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        return torch.zeros(shape, dtype=dtype or self.dtype, device=self.device)


def with_arguments(call: Call, change: Callable[[list[Any]], None]) -> Call:
    """The same call with some arguments changed."""
    arguments = list(call.arguments)
    change(arguments)
    return Call(call.op, tuple(arguments), call.roundings, call.written, call.options)
