"""Overlap scheduling: a decode step is launched before the host reads the tokens of the step before it.

While the device computes step n + 1, the host reads the tokens of step n, hands them to the output processors and
plans step n + 2, so that the device does not stand idle in between::

    host     launch 1   launch 2   read 1, commit 1   launch 3   read 2, commit 2   launch 4   ...
    device              step 1 ............   step 2 ...................   step 3 .................

*Assumed* when step n + 1 is launched, for every request: the token that step n samples follows the sequence as it is,
and the token after it is sampled by the same rules. Step n + 1 takes that token on the device; the host has not seen
it.

*Discarded* where commit n finds the assumption wrong (another token was forced or put in its place, the request ended,
failed or was cancelled, its rules changed): that request's part of step n + 1. Its position is not marked as computed,
and what is computed there instead overwrites its keys. The other requests' parts of the step count.

*Not overlapped* is a step after which some part was discarded, new requests came, or a request is to end: the loop
finishes the step in flight, and the engine plans anew. Nor is one of whose requests the host must see the logits (for
log-probabilities, a bias, or a constraint, which depends on the last token): it runs over the same static buffers, and
all its tokens are sampled by the host. Nothing here but a read synchronises with the device.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from .cuda_graphs import DecodeInput, Launched, StaticDecoder
from .faults import Failed, Faults, NotFinite
from .requests import ActiveRequests
from .sampling import Sampled
from .scheduler import ScheduledChunk, Scheduler

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class InFlightStep:
    """A decode step under way, and for each request the id below which it samples."""

    launched: Launched
    limits: Sequence[int]


class OverlappedDecoding:
    """Decodes for as long as every running request does nothing else. For the engine's thread."""

    def __init__(
        self,
        decoder: StaticDecoder,
        scheduler: Scheduler,
        requests: ActiveRequests,
        faults: Faults,
        *,
        begin_step: Callable[[Sequence[ScheduledChunk]], None],
        interrupted: Callable[[], bool],
    ):
        """``begin_step`` is called before each launch; ``interrupted`` says whether there is something else to do."""
        self._decoder, self._scheduler, self._requests, self._faults = decoder, scheduler, requests, faults
        self._begin_step, self._interrupted = begin_step, interrupted

    def samples(self, chunks: Sequence[ScheduledChunk]) -> bool:
        """Whether the device can sample the next token of every request; the host has to for one that wants
        log-probabilities, or whose logits are changed."""
        limits = self._faults.attempt(self._limits, chunks)
        return isinstance(limits, Failed) or None not in limits  # what failed fails again where it ends its request

    def logits(self, chunks: Sequence[ScheduledChunk]) -> Tensor:
        """Float32 logits (B, V) of ``chunks``, of one token each, until the next step begins. Nothing is overlapped."""
        return self._decoder.logits(self._inputs(chunks, [0] * len(chunks), 0))

    def _limits(self, chunks: Sequence[ScheduledChunk]) -> list[int | None]:
        return [self._requests.device_limit(self._requests.handles[chunk.request]) for chunk in chunks]

    def run(self, chunks: Sequence[ScheduledChunk]) -> Sequence[ScheduledChunk]:
        """Compute ``chunks``, of one token each, and decode steps after them until something else is to be done.

        Returns the chunks whose step failed, to be computed as an ordinary step; none where all went well.
        """
        step = self._faults.attempt(self._launch, chunks, 0)
        if isinstance(step, Failed):
            log.warning("a decoding step failed (%s); it is tried another way", step.kind)
            return chunks
        valid = [True] * len(chunks)  # whether the step in flight counts for each request
        while step is not None:
            following, next_step = [], None
            if all(valid) and not self._interrupted():
                following = self._scheduler.plan_overlapped(chunks)
            if following:
                next_step = self._faults.attempt(self._launch, following, 1)
                if isinstance(next_step, Failed):
                    log.warning("a decoding step could not begin early (%s)", next_step.kind)
                    next_step = None
            sampled = self._faults.attempt(step.launched.read)
            if isinstance(sampled, Failed):
                log.warning("a decoding step could not be read (%s); it is tried another way", sampled.kind)
                return [chunk for chunk, counts in zip(chunks, valid, strict=True) if counts]
            valid = [
                valid[index] and self._commit(chunk, token, finite, next_step and next_step.limits[index])
                for index, (chunk, token, finite) in enumerate(zip(chunks, *sampled, strict=True))
            ]
            chunks, step = following, next_step
        return []

    def _launch(self, chunks: Sequence[ScheduledChunk], unread: int) -> InFlightStep:
        """Begin a step; ``unread`` is how many sampled tokens of each request the host has not read yet."""
        self._begin_step(chunks)
        limits = [limit or 0 for limit in self._limits(chunks)]  # none is None here
        return InFlightStep(self._decoder.launch(self._inputs(chunks, limits, unread)), limits)

    def _inputs(self, chunks: Sequence[ScheduledChunk], limits: Sequence[int], unread: int) -> list[DecodeInput]:
        handles = [self._requests.handles[chunk.request] for chunk in chunks]
        return [
            DecodeInput(
                None if unread else chunk.request.ids[-1],
                chunk.begin,
                chunk.request.pages,
                handle.sampling,
                handle.number(handle.num_output_tokens + unread),
                limit,
            )
            for chunk, handle, limit in zip(chunks, handles, limits, strict=True)
        ]

    def _commit(self, chunk: ScheduledChunk, sampled: int, finite: bool, limit: int | None) -> bool:
        """Take in what a step computed and sampled for a request.

        Returns whether the next step counts for it, which was launched with the sampled token and samples below
        ``limit``.
        """
        request, requests = chunk.request, self._requests
        handle = requests.handles[request]
        self._scheduler.computed(chunk)
        if not finite:
            requests.fail(request, NotFinite())
            return False
        asked = requests.ask(handle, lambda: requests.next_token(handle))
        if asked is None:
            return False
        self._faults.success()
        requests.accept(handle, Sampled(sampled if asked.forced is None else asked.forced))
        if request not in requests.handles or request.ids[-1] != sampled:
            return False
        return requests.ask(handle, lambda: requests.device_limit(handle)) == limit
