"""Decode steps over tensors at fixed addresses, so that a GPU can replay each step as a CUDA graph.

Knows sequences, pages, the model and its sampler; no requests and no output processors. A launch returns before the
device is done, and the next launch may take the tokens that this one samples without the host having seen them. There
is one graph for each bucket of batch sizes and each kind of sampling, all in one memory pool. Where no graph can be
captured, and on a CPU, the same step runs eagerly.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..device import cuda as devices
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
class Row:
    """A sequence's next token: ``token`` (None: the one that the last launch drew in this place) is at ``position``,
    its entry goes to the last of ``pages``, and what follows is drawn with ``number`` from the ids below ``limit``."""

    token: int | None
    position: int
    pages: list[int]
    sampling: Sampling
    number: float
    limit: int


@dataclass(frozen=True)
class Launched:
    """A step under way."""

    results: Tensor  # (2, rows) int64 on the host, filled by the time of the event
    event: torch.cuda.Event | None

    def read(self) -> tuple[list[int], list[bool]]:
        """The sampled tokens, and whether each row's logits were finite. Waits for the device."""
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
    """Numbers of rows that get a graph: rows are filled up to the next one."""
    steps = [1, 2, 4, 8, 16, 24, 32, 48, 64, 96]
    return [*(step for step in steps if step < most), *range(128, most, 64), most]


# Rows of the inputs, all 8 bytes wide: integers, then float64.
_TOKEN, _POSITION, _SLOT, _SEQ_LEN, _TOP_K, _LIMIT, _INTEGERS = range(7)
_TEMPERATURE, _TOP_P, _NUMBER, _FLOATS = range(4)


class StaticDecoder:
    """Decoding steps of at most ``max_num_seqs`` rows over the pages of a cache."""

    def __init__(
        self,
        model: KimiVL,
        decoder: FusedDecoder,
        cache: PagedCache,
        max_num_seqs: int,
        capture: Callable[[Action], Action] | None = None,
    ):
        """``capture`` makes of a step something that repeats it; None calls it plainly."""
        self._model, self._decoder, self._cache = model, decoder, cache
        self._capture = capture
        self._buckets = buckets(max_num_seqs)
        self._replays: dict[tuple[int, str], Action] = {}
        self._failed: set[str] = set()
        device, page_size = cache.entries.device, cache.page_size
        pages = min(-(-model.config.text_config.max_position_embeddings // page_size), cache.entries.shape[1])
        self._inputs = torch.zeros(_INTEGERS + _FLOATS, max_num_seqs, dtype=torch.int64, device=device)
        self._page_table = torch.zeros(max_num_seqs, pages, dtype=torch.int32, device=device)
        self._outputs = torch.zeros(2, max_num_seqs, dtype=torch.int64, device=device)
        # what the device's page table holds of each row: the list it was copied from, and how much of it
        self._shown: list[tuple[list[int] | None, int]] = [(None, 0)] * max_num_seqs
        pinned = device.type == "cuda"
        # two of each, for the step under way and the one after it
        self._staged = [torch.zeros_like(self._inputs, device="cpu", pin_memory=pinned) for _ in range(2)]
        self._results = [torch.zeros_like(self._outputs, device="cpu", pin_memory=pinned) for _ in range(2)]
        self._events: list[torch.cuda.Event | None] = [None, None]
        self._turn = 0

    def prepare(self) -> None:
        """Capture what most requests need, the largest first, so that the others find room in its memory."""
        for count in reversed(self._buckets):
            self._replay(count, "plain")

    @torch.inference_mode()
    def launch(self, rows: Sequence[Row]) -> Launched:
        """Begin a step. At most one other may be under way."""
        self._turn ^= 1
        event = self._events[self._turn]
        if event is not None:
            event.synchronize()  # the buffers of this turn are free then
        count = next(bucket for bucket in self._buckets if bucket >= len(rows))
        kind = "greedy" if all(row.sampling.greedy for row in rows) else "plain"
        if any(row.sampling.cuts for row in rows):
            kind = "cut"
        replay = self._replay(count, kind)
        # the places left do again what the first row does, so that they meet no experts of their own, and write nothing
        results, event = self._results[self._turn], None
        try:
            self._stage([*rows, *[rows[0]] * (count - len(rows))], len(rows))
            replay()
            results.copy_(self._outputs, non_blocking=True)
        finally:  # what was begun reads this turn's buffers, also where the rest failed
            if results.is_pinned():
                event = torch.cuda.Event()
                event.record()
            self._events[self._turn] = event
        return Launched(results[:, : len(rows)], event)

    def _stage(self, rows: Sequence[Row], real: int) -> None:
        size, staged, count = self._cache.page_size, self._staged[self._turn], len(rows)
        slot_mapping = [row.pages[row.position // size] * size + row.position % size for row in rows[:real]]
        integers = [
            [-1 if row.token is None else row.token for row in rows],
            [row.position for row in rows],
            slot_mapping + [-1] * (count - real),
            [row.position + 1 for row in rows],
            [min(row.sampling.top_k, row.limit) for row in rows],  # what an int64 holds, however much was asked for
            [row.limit for row in rows],
        ]
        floats = [
            [0.0 if row.sampling.greedy else row.sampling.temperature for row in rows],
            [row.sampling.top_p for row in rows],
            [row.number for row in rows],
        ]
        staged[:_INTEGERS, :count] = torch.tensor(integers)
        staged[_INTEGERS:, :count] = torch.tensor(floats, dtype=torch.float64).view(torch.int64)
        self._inputs.copy_(staged, non_blocking=True)
        for place, row in enumerate(rows):
            pages, known = self._shown[place]
            if pages is not row.pages or known != len(row.pages):
                begin = known if pages is row.pages else 0
                new = devices.staged(row.pages[begin:], torch.int32, self._page_table.device)
                self._page_table[place, begin : len(row.pages)].copy_(new, non_blocking=True)
                self._shown[place] = (row.pages, len(row.pages))

    def _step(self, count: int, kind: str) -> None:
        """The work of one launch, on tensors that are always the same."""
        token, position, slot, seq_len, top_k, limit = self._inputs[:_INTEGERS, :count]
        temperature, top_p, number = self._inputs[_INTEGERS:, :count].view(torch.float64)
        sampled, finite = self._outputs[:, :count]
        embeddings = self._model.embed(token.where(token >= 0, sampled))  # (B, H)
        decode = DecodeMetadata(self._page_table[:count], seq_len.int(), self._cache.page_size)
        step = StepMetadata(self._cache.entries, position, slot, decode)
        logits = self._decoder.logits(self._decoder.states(embeddings, step))  # (B, V)
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

    def _replay(self, count: int, kind: str) -> Action:
        def plainly() -> None:
            self._step(count, kind)

        if self._capture is None or kind in self._failed:
            return plainly
        if (count, kind) not in self._replays:
            self._inputs.zero_()
            self._inputs[_SLOT] = -1  # capturing runs the step, which is to write nothing
            kept = self._outputs.clone()
            try:
                self._replays[count, kind] = self._capture(plainly)
            except Broken:
                raise
            except Exception as error:
                log.warning("no graphs of steps with %s sampling (%s): they are called", kind, type(error).__name__)
                self._failed.add(kind)
                return plainly
            finally:
                self._outputs.copy_(kept)  # the next step may take its tokens from there
        return self._replays[count, kind]


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
        with devices.current(self._device), torch.inference_mode():
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
