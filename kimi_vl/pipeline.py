"""Messages and images to events: the one place that knows both text and tensors.

A request is checked whole before anything is computed. Thinking that reaches its budget is closed here, so that
there is always room for an answer.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from . import chat, images, loader, weights
from .errors import UserError
from .events import Answer, ClosedBy, Done, Event, FinishReason, Reasoning, Usage
from .generation import Prompt, Session
from .images import ImageOptions
from .model import KimiVL
from .sampling import Sampling, sample
from .tokenizer import TextStream, Tokenizer

ImageSource = bytes | str | Path | Image.Image
MAX_LENGTH_TOKENS = 131_072


def load(model: str = "auto", device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Pipeline:
    """A pipeline for ``model``: a published name, ``demo``, ``auto``, or a directory (see :mod:`kimi_vl.weights`).

    ``device`` None takes a CUDA GPU if there is one; ``dtype`` None is bfloat16 there and float32 on a CPU. Raises
    :class:`~kimi_vl.errors.CheckpointError` naming what is wrong with the files.
    """
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    directory = weights.resolve(model, has_gpu=chosen.type == "cuda")
    network = loader.load(
        directory, dtype=dtype or (torch.bfloat16 if chosen.type == "cuda" else torch.float32), device=chosen
    )
    return Pipeline(
        network,
        Tokenizer.from_directory(directory),
        ImageOptions.from_directory(directory),
        thinks="instruct" not in f"{model} {directory}".lower(),
    )


class Pipeline:
    """A loaded model with its tokenizer. Requests do not share state, so threads may run them side by side."""

    def __init__(self, model: KimiVL, tokenizer: Tokenizer, image_options: ImageOptions, thinks: bool = True):
        self.model = model
        self.tokenizer = tokenizer
        self.image_options = image_options
        self.thinks = thinks

    def stream(
        self,
        messages: Sequence[chat.Message],
        images: Sequence[ImageSource] = (),
        *,
        temperature: float = 0.6,
        top_p: float = 1.0,
        top_k: int = 0,
        max_length_tokens: int = 8192,
        thinking_budget: int | None = None,
        stop_sequences: Sequence[str] = (),
        seed: int | None = None,
    ) -> Generator[Event, None, None]:
        """Events of one request: :class:`Reasoning` and :class:`Answer` pieces as they come, then :class:`Done`.

        ``messages`` have the chat form; image parts take ``images`` (bytes, paths or PIL images) in order. The
        request is checked at once, by this call: :class:`UserError` says what the caller should change. Closing
        the iterator frees everything at once.
        """
        sampling = Sampling(temperature, top_p, top_k, secrets.randbelow(2**31) if seed is None else seed)
        if not 1 <= max_length_tokens <= MAX_LENGTH_TOKENS:
            raise UserError("E_PARAMETER", f"max_length_tokens must be from 1 to {MAX_LENGTH_TOKENS}; change it.")
        if thinking_budget is not None and thinking_budget < 0:
            raise UserError("E_PARAMETER", "thinking_budget must be at least 0; change it.")
        prompt = self._prompt(messages, images)
        context = self.model.config.text_config.max_position_embeddings
        room = min(max_length_tokens, context - len(prompt.ids))
        if room < 1:
            raise UserError(
                "E_PROMPT_TOO_LONG",
                f"the prompt takes {len(prompt.ids)} tokens of {context}; shorten it or send fewer images.",
            )
        return self._generate(prompt, sampling, room, thinking_budget, tuple(filter(None, stop_sequences)))

    def complete(self, messages: Sequence[chat.Message], images: Sequence[ImageSource] = (), **params: Any) -> Done:
        """The summary of a whole request; parameters as for :meth:`stream`."""
        for event in self.stream(messages, images, **params):
            if isinstance(event, Done):
                return event
        raise AssertionError("a request ends with Done")

    def _prompt(self, messages: Sequence[chat.Message], sources: Sequence[ImageSource]) -> Prompt:
        if len(sources) > images.MAX_IMAGES:
            raise UserError("E_TOO_MANY_IMAGES", f"a request may have {images.MAX_IMAGES} images; send fewer.")
        if not messages:
            raise UserError("E_PROMPT_EMPTY", "the conversation is empty; send a message.")
        patches, grids = [], []
        for source in sources:
            pixels, grid = images.preprocess(images.load(source, self.image_options), self.image_options)
            patches.append(pixels)
            grids.append(grid)
        counts = [rows * columns // 4 for rows, columns in grids]
        ids = chat.encode(self.tokenizer, chat.without_earlier_thinking(messages), counts)
        return Prompt(ids, torch.from_numpy(np.concatenate(patches)) if patches else None, grids)

    def _generate(
        self,
        prompt: Prompt,
        sampling: Sampling,
        room: int,
        thinking_budget: int | None,
        stop_sequences: tuple[str, ...],
    ) -> Generator[Event, None, None]:
        began = time.monotonic()
        text = _OutputText(self.tokenizer, stop_sequences)
        steer = _Steering(self.tokenizer, self.thinks, room, thinking_budget)
        session = Session(self.model, [prompt], room)
        finish_reason: FinishReason = "length"
        first_token_at = None
        count = 0
        while count < room:
            token = steer.forced()
            if token is None:
                silent = steer.closed_by != "none" and not text.answer.strip()
                token = self._draw(session.logits[0], sampling, count, must_speak=silent)
                if token in self.tokenizer.stop_ids and text.splitter.section == "reasoning":
                    steer.close()  # a turn that would end inside the thinking is led to its answer
                    continue
            count += 1
            first_token_at = first_token_at or time.monotonic()
            if token in self.tokenizer.stop_ids:
                finish_reason = "stop"
                break
            yield from text.push(token)
            steer.saw(text.splitter.section)
            if text.stopped:
                finish_reason = "stop_sequence"
                break
            if count < room:
                session.step([token])
        if not text.stopped:
            yield from text.finish()
        elapsed = time.monotonic() - (first_token_at or began)
        yield Done(
            reasoning=text.reasoning,
            answer=text.answer,
            finish_reason=finish_reason,
            thinking_closed_by=steer.closed_by,
            usage=Usage(
                input_tokens=len(prompt.ids),
                image_tokens=sum(rows * columns // 4 for rows, columns in prompt.grids),
                output_tokens=count,
                reasoning_tokens=steer.reasoning_tokens,
            ),
            seed=sampling.seed,
            time_to_first_token=(first_token_at or began) - began,
            tokens_per_second=(count - 1) / elapsed if count > 1 and elapsed > 0 else 0.0,
        )

    def _draw(self, logits: Tensor, sampling: Sampling, count: int, must_speak: bool) -> int:
        """The next token; ``must_speak`` rules out what has no text, so that an answer is never empty."""
        if not bool(torch.isfinite(logits).all()):
            raise RuntimeError("the model produced a value that is not finite")
        if must_speak:
            logits = logits.clone()
            logits[self.tokenizer.num_ranks :] = float("-inf")
        return sample(logits, sampling, count)


class _Steering:
    """Keeps thinking inside its budget: says when tokens are put there instead of drawn, and counts."""

    def __init__(self, tokenizer: Tokenizer, thinks: bool, room: int, budget: int | None):
        self._closer = tokenizer.encode(chat.THINK_CLOSE)
        self._queue: list[int] = []
        self._closing = False
        self._inside = 0  # tokens after the opening marker
        self.closed_by: ClosedBy = "none"
        self.reasoning_tokens = 0
        longest = max(0, room - min(1024, room // 4) - len(self._closer))
        self._budget = longest if budget is None else min(budget, longest)
        if thinks and budget == 0:
            self.close()
            self._queue = tokenizer.encode(chat.THINK_OPEN) + self._queue

    def forced(self) -> int | None:
        """The next token where it is not drawn."""
        return self._queue.pop(0) if self._queue else None

    def close(self) -> None:
        """End the thinking now."""
        self._queue, self._closing = list(self._closer), True

    def saw(self, section: chat.Section | None) -> None:
        """One token was added, after which the text is in ``section`` (None while that is not known)."""
        if section == "answer":
            if self._inside or self._closing:
                if self.closed_by == "none":
                    self.reasoning_tokens += 1
                    self.closed_by = "budget" if self._closing else "model"
            else:
                self.reasoning_tokens = 0  # what came so far only looked like an opening marker
            return
        self.reasoning_tokens += 1
        self._inside += section == "reasoning"
        if self._inside >= max(1, self._budget) and not self._closing:
            self.close()


class _OutputText:
    """Tokens to events: complete characters, split into thinking and answer, cut at stop sequences."""

    def __init__(self, tokenizer: Tokenizer, stop_sequences: tuple[str, ...]):
        self._stream = TextStream(tokenizer)
        self.splitter = chat.ThinkingSplitter()
        self._stops = stop_sequences
        self._held = ""
        self.reasoning = ""
        self.answer = ""
        self.stopped = False

    def push(self, token: int) -> list[Event]:
        return self._events(self.splitter.push(self._stream.push(token)), last=False)

    def finish(self) -> list[Event]:
        pieces = self.splitter.push(self._stream.finish()) + self.splitter.finish()
        return self._events(pieces, last=True)

    def _events(self, pieces: list[tuple[chat.Section, str]], last: bool) -> list[Event]:
        events: list[Event] = []
        for section, piece in pieces:
            if section == "reasoning":
                self.reasoning += piece
                events.append(Reasoning(piece))
            else:
                self._held += piece
        ready = self._ready(last)
        if ready:
            self.answer += ready
            events.append(Answer(ready))
        return events

    def _ready(self, last: bool) -> str:
        """What may leave of the held answer: not a stop sequence, nor what may yet become one."""
        found = [at for at in (self._held.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self.stopped = True
            ready, self._held = self._held[: min(found)], ""
            return ready
        keep = 0 if last else max((chat.overlap(self._held, stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        ready, self._held = self._held[:cut], self._held[cut:]
        return ready
