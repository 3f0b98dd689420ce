"""Decode steps over tensors at fixed addresses, so that a GPU can replay each step as a CUDA graph.

Knows sequences, pages, the model and its sampler; no requests and no output processors. A launch returns before the
device is done, and the next launch may take the tokens that this one samples without the host having seen them. There
is one graph for each bucket of batch sizes and each kind of sampling, of which one is to leave the logits to the host,
all in one memory pool. Where no graph can be captured, and on a CPU, the same step runs eagerly.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..device import cuda
from ..kernels.attention_metadata import DecodeMetadata, StepMetadata
from ..model.kimi_vl import KimiVL
from . import sampling
from .decoder import FusedDecoder
from .faults import Broken
from .kv_cache import PagedCache
from .sampling import Sampling

log = logging.getLogger(__name__)
VARIABLE = "KIMI_VL_GRAPHS"

Action = Callable[[], None]


@dataclass(frozen=True)
class DecodeInput:
    """One sequence of a decode step.

    ``token`` is at ``position`` (None: the token that the last launch sampled at this place of the batch), and its
    keys go to the last of ``pages``. The next token is sampled by ``sampling`` with the uniform random ``number``
    from the ids below ``limit``.
    """

    token: int | None
    position: int
    pages: list[int]
    sampling: Sampling
    number: float
    limit: int


@dataclass(frozen=True)
class Launched:
    """A decode step under way for B sequences."""

    results: Tensor  # (2, B) int64 on the host, complete once the event has happened
    event: torch.cuda.Event | None

    def read(self) -> tuple[list[int], list[bool]]:
        """The sampled tokens, and whether each sequence's logits are finite. Synchronises with the device."""
        if self.event is not None:
            self.event.synchronize()
        tokens, finite = self.results.tolist()
        return tokens, [bool(value) for value in finite]


def wanted() -> bool:
    """What the variable KIMI_VL_GRAPHS says: 0 turns graphs off. Raises ValueError for anything but 0 and 1."""
    value = os.environ.get(VARIABLE) or "1"
    if value not in ("0", "1"):
        raise ValueError(f"{VARIABLE} is 0 or 1, not {value!r}; change it")
    return value == "1"


def buckets(most: int) -> list[int]:
    """The batch sizes that get a graph, up to ``most``: a batch is padded to the next one."""
    sizes = [1, 2, 4, 8, 16, 24, 32, 48, 64, 96]
    return [*(size for size in sizes if size < most), *range(128, most, 64), most]


# The first dimension of the input tensor, all 8 bytes wide: integers, then float64.
_TOKEN, _POSITION, _SLOT, _SEQ_LEN, _TOP_K, _LIMIT, _INTEGERS = range(7)
_TEMPERATURE, _TOP_P, _NUMBER, _FLOATS = range(4)


class StaticDecoder:
    """Decode steps of at most ``max_num_seqs`` sequences over the pages of a cache.

    Inputs and outputs are double-buffered on the host, for the step under way and the one after it.
    """

    def __init__(
        self,
        model: KimiVL,
        decoder: FusedDecoder,
        cache: PagedCache,
        max_num_seqs: int,
        capture: Callable[[Action], Action] | None = None,
    ):
        """``capture`` turns a step into an action that repeats it; None runs every step eagerly."""
        self._model, self._decoder, self._cache = model, decoder, cache
        self._capture = capture
        self._buckets = buckets(max_num_seqs)
        self._replays: dict[tuple[int, str], Action] = {}
        self._failed: set[str] = set()
        device, page_size = cache.kv_cache.device, cache.page_size
        pages = min(-(-model.config.text_config.max_position_embeddings // page_size), cache.kv_cache.shape[1])
        self._inputs = torch.zeros(_INTEGERS + _FLOATS, max_num_seqs, dtype=torch.int64, device=device)
        self._page_table = torch.zeros(max_num_seqs, pages, dtype=torch.int32, device=device)
        self._outputs = torch.zeros(2, max_num_seqs, dtype=torch.int64, device=device)
        # the page list that each line of the device's page table was copied from, and how much of it
        self._copied_pages: list[tuple[list[int] | None, int]] = [(None, 0)] * max_num_seqs
        pinned = device.type == "cuda"
        self._host_inputs = [torch.zeros_like(self._inputs, device="cpu", pin_memory=pinned) for _ in range(2)]
        self._host_outputs = [torch.zeros_like(self._outputs, device="cpu", pin_memory=pinned) for _ in range(2)]
        self._logits: Tensor | None = None  # (max_num_seqs, V) float32, made where it is first needed
        self._events: list[torch.cuda.Event | None] = [None, None]
        self._buffer = 0  # which of the two the last launch uses

    @property
    def captures(self) -> bool:
        """Whether steps are captured, and no capture has failed."""
        return self._capture is not None and not self._failed

    def prepare(self) -> None:
        """Capture what most requests need, the largest bucket first, so that the others fit into its memory."""
        for size in reversed(self._buckets):
            self._replay(size, "plain")

    @torch.inference_mode()
    def launch(self, sequences: Sequence[DecodeInput]) -> Launched:
        """Begin a step. At most one other may be under way."""
        kind = "greedy" if all(each.sampling.greedy for each in sequences) else "plain"
        if any(each.sampling.cuts for each in sequences):
            kind = "cut"
        return self._launch(sequences, kind)

    @torch.inference_mode()
    def logits(self, sequences: Sequence[DecodeInput]) -> Tensor:
        """The logits (B, V), float32, of a step that samples nothing; another step overwrites them."""
        if self._logits is None:
            vocabulary = self._model.config.text_config.vocab_size
            self._logits = torch.zeros(self._inputs.shape[1], vocabulary, device=self._inputs.device)
        self._launch(sequences, "logits")
        return self._logits[: len(sequences)]

    def _launch(self, sequences: Sequence[DecodeInput], kind: str) -> Launched:
        self._buffer ^= 1
        event = self._events[self._buffer]
        if event is not None:
            event.synchronize()  # the step before the last has let go of this buffer
        size = next(bucket for bucket in self._buckets if bucket >= len(sequences))
        replay = self._replay(size, kind)
        # padding repeats the first sequence, so that it meets no further experts, and writes nothing
        padded = [*sequences, *[sequences[0]] * (size - len(sequences))]
        results, event = self._host_outputs[self._buffer], None
        try:
            self._copy_inputs(padded, len(sequences))
            replay()
            results.copy_(self._outputs, non_blocking=True)
        finally:  # also after an error, what was begun still reads this buffer
            if results.is_pinned():
                event = torch.cuda.Event()
                event.record()
            self._events[self._buffer] = event
        return Launched(results[:, : len(sequences)], event)

    def _copy_inputs(self, padded: Sequence[DecodeInput], real: int) -> None:
        """Copy the inputs of a padded batch, of which the first ``real`` sequences count, to the device."""
        page_size, host, size = self._cache.page_size, self._host_inputs[self._buffer], len(padded)
        slot_mapping = [
            each.pages[each.position // page_size] * page_size + each.position % page_size for each in padded[:real]
        ]
        integers = [
            [-1 if each.token is None else each.token for each in padded],
            [each.position for each in padded],
            slot_mapping + [-1] * (size - real),
            [each.position + 1 for each in padded],
            [min(each.sampling.top_k, each.limit) for each in padded],  # fits an int64, however large top_k is
            [each.limit for each in padded],
        ]
        floats = [
            [0.0 if each.sampling.greedy else each.sampling.temperature for each in padded],
            [each.sampling.top_p for each in padded],
            [each.number for each in padded],
        ]
        host[:_INTEGERS, :size] = torch.tensor(integers)
        host[_INTEGERS:, :size] = torch.tensor(floats, dtype=torch.float64).view(torch.int64)
        self._inputs.copy_(host, non_blocking=True)
        for index, each in enumerate(padded):
            pages, known = self._copied_pages[index]
            if pages is not each.pages or known != len(each.pages):
                begin = known if pages is each.pages else 0
                new = cuda.staged(each.pages[begin:], torch.int32, self._page_table.device)
                self._page_table[index, begin : len(each.pages)].copy_(new, non_blocking=True)
                self._copied_pages[index] = (each.pages, len(each.pages))

    def _step(self, size: int, kind: str) -> None:
        """What a graph holds: one step of ``size`` sequences, over tensors at fixed addresses."""
        token, position, slot, seq_len, top_k, limit = self._inputs[:_INTEGERS, :size]
        temperature, top_p, number = self._inputs[_INTEGERS:, :size].view(torch.float64)
        sampled, finite = self._outputs[:, :size]
        embeddings = self._model.embed(token.where(token >= 0, sampled))  # (B, H)
        decode = DecodeMetadata(self._page_table[:size], seq_len.int(), self._cache.page_size)
        step = StepMetadata(self._cache.kv_cache, position, slot, decode)
        logits = self._decoder.logits(self._decoder.states(embeddings, step))  # (B, V)
        if kind == "logits":
            assert self._logits is not None
            self._logits[:size].copy_(logits)
            return
        finite.copy_(sampling.finite(logits))
        sampled.copy_(
            sampling.sample_from_tensors(
                logits,
                temperature,
                top_p,
                top_k,
                limit,
                number,
                greedy_only=kind == "greedy",
                cut=kind == "cut",
                rounded=self._model.dtype == torch.bfloat16,
            )
        )

    def _replay(self, size: int, kind: str) -> Action:
        """The action that runs a step: its graph, captured where there is none yet, or the step itself."""

        def eager() -> None:
            self._step(size, kind)

        if self._capture is None or kind in self._failed:
            return eager
        if (size, kind) not in self._replays:
            self._inputs.zero_()
            self._inputs[_SLOT] = -1  # capturing runs the step, which must write nothing
            kept = self._outputs.clone()
            try:
                self._replays[size, kind] = self._capture(eager)
            except Broken:
                raise
            except Exception as error:
                log.warning("no graphs of steps with %s sampling (%s): they are called", kind, type(error).__name__)
                self._failed.add(kind)
                return eager
            finally:
                self._outputs.copy_(kept)  # the next step may take its tokens from there
        return self._replays[size, kind]


class CudaGraphs:
    """Captures actions on a device; their memory is shared, since they never run at once."""

    def __init__(self, device: torch.device):
        self._device = device
        self._stream: torch.cuda.Stream | None = None  # graphs that share memory are captured on the same one
        self._pool: Any = None
        self._torn = False

    def __call__(self, action: Action) -> Action:
        """Raises what the capture raised, after which plain calls are possible, and :class:`Broken` where none are."""
        if self._torn:
            raise RuntimeError("nothing is captured after a capture that CUDA gave up")
        with cuda.current(self._device), torch.inference_mode():
            current = torch.cuda.current_stream(self._device)
            stream = self._stream = self._stream or torch.cuda.Stream(self._device)
            stream.wait_stream(current)
            try:
                with torch.cuda.stream(stream):
                    action()  # compiles kernels and sets up libraries, which a capture may not
            finally:  # what was begun before it failed uses the buffers, too
                current.wait_stream(stream)
            graph, pool = torch.cuda.CUDAGraph(), self._pool or torch.cuda.graph_pool_handle()
            try:
                # the outer context gets the thread off the stream where torch's own does not, as it fails to end
                with (
                    torch.cuda.stream(stream),
                    torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"),
                ):
                    action()
            except Exception:
                self._recover(pool)
                raise
        self._pool = pool
        return graph.replay

    def _recover(self, pool: Any) -> None:
        """Make torch's allocator usable after a capture that failed.

        Where CUDA gives a capture up, ending it raises too, and torch 2.11 leaves its allocator as during a capture: it
        gives no memory back from then on, and fails where it has to.
        """
        device = self._device.index or 0
        try:
            torch._C._cuda_endAllocateToPool(device, pool)
        except Exception:
            pass  # it had ended, as it does where CUDA would go on
        else:
            self._torn, self._pool = True, None  # the allocator of pinned memory cannot be told
            torch._C._cuda_releasePool(device, pool)
        try:
            torch.cuda.synchronize(self._device)
            torch.cuda.empty_cache()
        except Exception as error:
            raise Broken(f"the device is of no use after a failed capture; start again with {VARIABLE}=0") from error
