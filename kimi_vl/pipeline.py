"""Messages and images to events: checks a request, builds its prompt, and hands it to the engine.

Everything that can be wrong with a request is found before anything is computed.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import queue
import secrets
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from typing import Any

import torch
from PIL import Image

from . import kernels, parameters, placement
from .coalescer import Coalescer
from .engine.engine import Engine, EngineOptions, RequestHandle
from .engine.sampling import LogitBias, Sampling
from .engine.warm_up import warm_up
from .errors import UserError
from .events import Done, Estimate, Event, Usage
from .media.images import ImageOptions
from .media.images import load as load_image
from .model.config import Config
from .model.kimi_vl import KimiVL
from .output_processor import Deliver, TextOutputProcessor
from .prompt import Images, Messages, Prompt, PromptReader, image_list, image_sources
from .text.chat import too_long
from .text.grammar import Grammar, GrammarCompiler
from .text.messages import read
from .text.output_text import OutputText
from .text.stop_sequences import StopSequences
from .text.thinking import ThinkingBudget
from .text.tokenizer import Tokenizer
from .weights import loader, resolve

POLL_S = 0.05  # an exception that is raised in a waiting thread from outside is seen this soon


def load(
    model: str = "auto",
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    options: EngineOptions | None = None,
    thinks: bool | None = None,
) -> Pipeline:
    """A pipeline for ``model``: a published name, ``demo``, ``auto``, or a directory (:mod:`kimi_vl.weights.resolve`).

    ``device`` None takes a CUDA GPU if there is one; ``dtype`` None is what :func:`kimi_vl.placement.choose_dtype`
    says, and ``thinks`` None what :func:`kimi_vl.weights.resolve.thinks` knows of the model. Raises
    :class:`~kimi_vl.errors.CheckpointError` naming what is wrong with the files, and RuntimeError where a first
    request, which is made here, fails.
    """
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    directory = resolve.resolve(model, has_gpu=chosen.type == "cuda")
    thinks = resolve.thinks(model, directory) if thinks is None else thinks
    options = options or EngineOptions()
    config = Config.from_directory(directory)
    dtype = dtype or placement.choose_dtype(config, chosen)
    refuse_without_bfloat16(chosen, dtype)
    form = placement.choose(config, dtype, chosen, options)
    planned = loader.planned_model(config, dtype, form, chosen, directory)
    kernels.prepare(chosen, options.use(planned, chosen))
    pipeline = Pipeline(
        loader.load(directory, dtype=dtype, device=chosen, form=form),
        Tokenizer.from_directory(directory),
        ImageOptions.from_directory(directory),
        thinks=thinks,
        options=options,
    )
    warm_up(pipeline.engine)
    return pipeline


def refuse_without_bfloat16(device: torch.device, dtype: torch.dtype) -> None:
    """Raises RuntimeError with a sentence for a GPU that cannot compute in bfloat16, which the weights are made for."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        raise RuntimeError(
            f"this GPU has compute capability {major}.{minor}, which has no bfloat16; use one of 8.0 or later"
        )


class Pipeline:
    """A loaded model with its tokenizer and its engine. Any number of threads may send requests at once."""

    def __init__(
        self,
        model: KimiVL,
        tokenizer: Tokenizer,
        image_options: ImageOptions,
        thinks: bool = True,
        options: EngineOptions | None = None,
    ):
        self.tokenizer = tokenizer
        self.image_options = image_options
        self.thinks = thinks
        self.engine = Engine(model, tokenizer.num_ranks, options)
        self._reader = PromptReader(tokenizer, image_options, self._context)
        self._grammars = GrammarCompiler(tokenizer, model.config.text_config.vocab_size)

    @property
    def model(self) -> KimiVL:
        return self.engine.model

    def healthy(self) -> bool:
        """Whether requests are still served."""
        return self.engine.healthy()

    def close(self) -> None:
        """Take no more requests, and return when those that run are done."""
        self.engine.close()

    def stream(self, messages: Messages | Prompt, images: Images = (), **params: Any) -> EventStream:
        """Events of one request: :class:`Reasoning` and :class:`Answer` pieces as they come, then :class:`Done`.

        ``messages`` have the chat form; image parts take ``images`` (bytes, paths, data URLs or PIL images) in order.
        A single image is a list of one, and None is none. Videos and documents are parts of the messages, or ``videos``
        and ``documents`` (bytes, paths or data URLs) for the bare ones.
        ``params`` are ``temperature`` (0.6), ``top_p`` (1.0), ``top_k`` (0), ``max_length_tokens`` (8192),
        ``thinking_budget`` (None), ``stop_sequences`` (()), ``seed`` (None), ``logprobs`` (None, or how many of the
        likeliest tokens the answer's pieces come with beside the sampled ones, at most 20), ``logit_bias`` (None, or
        token ids to numbers from -100 to 100 that are added to their logits in the answer), ``grammar`` (None, or what
        an answer may look like, of :mod:`kimi_vl.text.grammar`), those of
        :class:`~kimi_vl.attachments.ReadingOptions`, ``deadline`` (seconds, None) and ``interval`` (0.0): for so many
        seconds pieces are joined to one, but for the first; many streams at a time disturb each other less. The request
        is checked at once, by this call: :class:`UserError` says what to change. Closing the stream frees everything.
        """
        events: queue.SimpleQueue[Event | BaseException] = queue.SimpleQueue()
        return EventStream(self.engine, self.submit(messages, images, events.put, **params), events)

    async def astream(
        self, messages: Messages | Prompt, images: Images = (), **params: Any
    ) -> AsyncGenerator[Event, None]:
        """:meth:`stream` for an event loop, which is never held up; images are decoded in another thread."""
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Event | Exception] = asyncio.Queue()

        def deliver(event: Event | Exception) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        submitting = asyncio.ensure_future(asyncio.to_thread(self.submit, messages, images, deliver, **params))
        try:
            handle = await asyncio.shield(submitting)
        except asyncio.CancelledError:
            submitting.add_done_callback(lambda done: done.exception() or self.engine.cancel(done.result()))
            raise
        try:
            while True:
                event = await events.get()
                if isinstance(event, Exception):
                    raise event
                yield event
                if isinstance(event, Done):
                    return
        finally:
            self.engine.cancel(handle)

    def complete(self, messages: Messages | Prompt, images: Images = (), **params: Any) -> Done:
        """The summary of a whole request; parameters as for :meth:`stream`."""
        for event in self.stream(messages, images, **params):
            if isinstance(event, Done):
                return event
        raise AssertionError("a request ends with Done")

    def submit(
        self,
        messages: Messages | Prompt,
        images: Images,
        deliver: Deliver,
        *,
        temperature: float = 0.6,
        top_p: float = 1.0,
        top_k: int = 0,
        max_length_tokens: int = 8192,
        thinking_budget: int | None = None,
        stop_sequences: Sequence[str] | str | None = (),
        seed: int | None = None,
        logprobs: int | None = None,
        logit_bias: Mapping[int, float] | None = None,
        grammar: Grammar | None = None,
        deadline: float | None = None,
        interval: float = 0.0,
        **reading: Any,
    ) -> RequestHandle:
        """Send a request whose events (or error, which ends it) are delivered by the engine's thread.

        ``reading`` are the other parameters of :meth:`prepare`, whose prompt may also stand in place of the messages
        and all of these and of the images: for several answers to one question.
        """
        sampling = Sampling(temperature, top_p, top_k, secrets.randbelow(2**31) if seed is None else seed, logprobs)
        bias = self._logit_bias(logit_bias)
        max_length_tokens, thinking_budget = parameters.token_limits(max_length_tokens, thinking_budget)
        if deadline is not None and deadline != math.inf:
            deadline = parameters.number("deadline", deadline, 0)
        interval = parameters.number("interval", interval, 0)
        stops = StopSequences(parameters.texts("stop_sequences", stop_sequences))
        if grammar is not None:
            if not isinstance(grammar, Grammar):
                raise UserError("E_PARAMETER", "grammar must be one that kimi_vl.text.grammar makes; change it.")
            if stops.any:
                raise UserError("E_PARAMETER", "stop_sequences would cut a structured answer; leave them out.")
        prompt = messages
        if isinstance(prompt, Prompt):
            if given := [*(["images"] if images else []), *reading]:
                raise UserError(
                    "E_PARAMETER", f"a prepared prompt has been read already; leave out {', '.join(given)}."
                )
        else:
            prompt = self.prepare(prompt, images, max_length_tokens=max_length_tokens, **reading)
        ids, patches, context = prompt.ids, prompt.patches, self._context
        max_new_tokens = min(max_length_tokens, context - len(ids))
        if max_new_tokens < 1:
            raise too_long(len(ids), context)
        text = OutputText(self.tokenizer, stops, prompt.prefill or "", logprobs is not None)
        matcher = None
        if grammar is not None:
            if text.splitter.section is None and not self.thinks:
                text.skip_thinking()
            matcher = self._grammars.matcher(grammar, text.prefilled_answer)
        section, structured = text.splitter.section, matcher is not None
        thinking = ThinkingBudget(self.tokenizer, self.thinks, max_new_tokens, thinking_budget, section, structured)
        processor = TextOutputProcessor(
            self.tokenizer,
            sampling,
            thinking,
            text,
            max_new_tokens,
            Usage(len(ids), sum(image.tokens for image in patches), 0, 0),
            prompt.began,
            Coalescer(deliver, interval) if interval else deliver,
            tuple(use for use in prompt.media if use.kind != "image"),
            prompt.image_sizes,
            bias,
            matcher,
            prompt.asked_image,
        )
        return self.engine.submit(
            ids, patches, max_new_tokens, processor, float("inf") if deadline is None else deadline
        )

    def prepare(self, messages: Messages, images: Images = (), **params: Any) -> Prompt:
        """The prompt of a request, its files decoded: what :meth:`submit` takes any number of times.

        ``params`` are those of :meth:`submit` that say what is read: ``videos``, ``documents``, ``max_length_tokens``
        and the fields of :class:`~kimi_vl.attachments.ReadingOptions`. Raises the same :class:`UserError`.
        """
        return self._reader.read(messages, images, **params)

    def estimate(self, messages: Messages, images: Images = (), **params: Any) -> Estimate:
        """What a request would cost, in tokens by part. Nothing is decoded but the images, and the model does nothing.

        The parameters are those of :meth:`prepare`; raises the same :class:`UserError`.
        """
        found = self._reader.read(messages, images, decode=False, **params)
        count = len(found.ids)
        text = count - sum(use.tokens for use in found.media)
        return Estimate(count, text, self._context, found.media, tuple(found.ids))

    def pictures(self, messages: Messages, images: Images = ()) -> list[Image.Image]:
        """The images of a request in order, upright and RGB, to draw on. Raises the same :class:`UserError`."""
        parts = [part for turn in read(messages) for part in turn.images]
        return [load_image(source, self.image_options) for source in image_sources(parts, image_list(images))]

    @property
    def _context(self) -> int:
        return self.model.config.text_config.max_position_embeddings

    def _logit_bias(self, values: Mapping[int, float] | None) -> LogitBias | None:
        """None where nothing is added. Special tokens are refused: they end turns, and have no text."""
        if values is None:
            return None
        if not isinstance(values, Mapping):
            raise UserError("E_PARAMETER", "logit_bias must map token ids to numbers; change it.")
        bias = LogitBias(values)
        if any(token >= self.tokenizer.num_ranks for token in bias.ids):
            raise UserError(
                "E_PARAMETER",
                f"a token id in logit_bias must be below {self.tokenizer.num_ranks}; no special token has a bias.",
                "logit_bias",
            )
        return bias if bias.ids else None


class EventStream(Iterator[Event]):
    """The events of one request as they come; closing it (or dropping it) cancels the request."""

    def __init__(self, engine: Engine, handle: RequestHandle, events: queue.SimpleQueue[Event | BaseException]):
        self._engine, self._handle, self._events = engine, handle, events
        self._over = False

    def __next__(self) -> Event:
        if self._over:
            raise StopIteration
        event = None
        while event is None:
            with contextlib.suppress(queue.Empty):
                event = self._events.get(timeout=POLL_S)
        self._over = isinstance(event, Done | BaseException)
        if isinstance(event, BaseException):
            raise event
        return event

    def interrupt(self, error: BaseException) -> None:
        """Cancel the request from another thread; its reader gets ``error`` after the events so far."""
        self._engine.cancel(self._handle)
        self._events.put(error)

    def close(self) -> None:
        if not self._over:
            self._engine.cancel(self._handle)
            self._over = True

    def __del__(self) -> None:
        self.close()
