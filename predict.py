"""The Cog predictors: inputs to a chat, the model's events to text, errors and metrics.

Cog reads the signature of `predict` without importing this file and ignores what it cannot read as a literal, so every
default, bound and description is a literal (`scripts/cog_local/schema.py` refuses anything else).

Annotations are not strings, as `from __future__ import annotations` would make them: Cog resolves them for every
request, and would compile all of them each time.
"""

import contextlib
import dataclasses
import json
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from cog import BasePredictor, CancelationException, ConcatenateIterator, Input, Path, concurrent, streaming

import kimi_vl
from kimi_vl import annotate, parameters
from kimi_vl.cog_streaming import Streams, on_cancel
from kimi_vl.errors import UserError
from kimi_vl.events import Answer, Done, Event, Reasoning
from kimi_vl.media import data_url, kinds
from kimi_vl.text import grammar
from kimi_vl.text.grounding import grounding_of

if TYPE_CHECKING:
    from PIL.Image import Image

    from kimi_vl.pipeline import Pipeline

DEFAULT_MAX_LENGTH_TOKENS = 8192
"""The default of `max_length_tokens` again: a value that differs from it was given by the caller."""

CHUNK_SECONDS = 0.07
"""Text is collected for this long, since Cog sends the whole output to a webhook with every chunk."""

DEFAULT_DEADLINE_S = 1800.0
"""The default deadline of a request (KIMI_VL_DEADLINE_S)."""

MARKERS = {"text": ("◁think▷", "◁/think▷"), "think_tags": ("<think>", "</think>")}

LINE_ENDS = {ord(end): f"\\u{ord(end):04x}" for end in "\x85\u2028\u2029"}
"""Characters that are valid in JSON, but end a line for many readers, such as Python's `str.splitlines`."""

INTERNAL_ERROR = (
    "E_INTERNAL: the model failed on this request; try again, and report it with its log if that fails too."
)

Message = dict[str, Any]


class Inputs:
    """The inputs of both predictors. Cog resolves `Inputs.name` for a class at the top level of the same file."""

    prompt = Input(default="", description="What to ask. Required unless an image or messages is given.")
    image = Input(
        default=None,
        description="An image: PNG, JPEG, WebP, GIF, BMP or TIFF, up to 32 MiB and 40 million pixels.",
    )
    top_p = Input(
        default=1.0,
        ge=0,
        le=1,
        description="Sample from the likeliest tokens up to this total probability.",
    )
    temperature = Input(
        default=0.6,
        ge=0,
        le=2,
        description="Randomness of the sampling. 0 always takes the likeliest token.",
    )
    max_length_tokens = Input(
        default=8192, ge=1, le=131072, description="The most tokens to generate, thinking included."
    )
    images = Input(default=[], description="More images, after the one in image. Up to 64 in all.")
    system_prompt = Input(default="", description="Replaces the default system message.")
    messages = Input(
        default=[],
        description="A conversation in the OpenAI chat form, instead of prompt and system_prompt. An image part holds a data URL, or is a bare {type: image} that takes the next of image and images; parts of type video and file do the same for videos and documents.",  # noqa: E501
    )
    thinking_budget = Input(
        default=None,
        ge=0,
        description="The most tokens to think with before the answer. 0 answers without thinking. If left out, the thinking leaves room for an answer.",  # noqa: E501
    )
    top_k = Input(default=0, ge=0, description="Sample from this many of the likeliest tokens. 0 is off.")
    stop_sequences = Input(
        default="",
        description="Comma-separated texts that end the answer and are not part of it. Spaces around each are ignored.",
    )
    seed = Input(default=None, description="Seed of the sampling. If left out, one is drawn.")
    output_format = Input(
        default="text",
        choices=["text", "think_tags", "answer", "json", "grounding", "grounding_image"],
        description="text: thinking between the markers of the model, then the answer. think_tags: the same with think tags. answer: the answer alone. json: one JSON object per line. grounding: one JSON object with the boxes and points that the answer names, in pixels. grounding_image: the same, with each image and what was found drawn on it.",  # noqa: E501
    )
    video = Input(default=None, description="A video: MP4, MOV, MKV, WebM or AVI, up to 100 MiB.")
    document = Input(default=None, description="A PDF document without a password, up to 100 MiB.")
    fps = Input(default=1.0, ge=0, le=60, description="Frames of a video that are taken a second, above 0.")
    max_frames = Input(
        default=64,
        ge=1,
        le=512,
        description="The most frames that are taken of a video, evenly spread where there would be more.",
    )
    start = Input(default=0.0, ge=0, description="Seconds of the video before the first frame that is taken.")
    end = Input(default=None, ge=0, description="The second of the video at which no more frames are taken.")
    pages = Input(
        default="", description="The pages of the document, as in 1-3,7. Empty is all of them, which may be 120."
    )
    json_schema = Input(
        default="",
        description="A JSON schema, as text, that the answer fits; the thinking before it is free. Empty is none.",
    )
    max_tokens = Input(default=None, description="Another name of max_length_tokens.", deprecated=True)
    max_new_tokens = Input(default=None, description="Another name of max_length_tokens.", deprecated=True)


class Predictor(BasePredictor):
    """Streams text; Cog runs one request at a time."""

    def setup(self) -> None:
        """Loads the model that KIMI_VL_MODEL names."""
        self.pipeline = load_model()

    def healthcheck(self) -> bool:
        """Whether the model can still answer; Cog reports UNHEALTHY when this is false."""
        return self.pipeline.healthy()

    @streaming
    def predict(
        self,
        prompt: str = Inputs.prompt,
        image: Path | None = Inputs.image,
        top_p: float = Inputs.top_p,
        temperature: float = Inputs.temperature,
        max_length_tokens: int = Inputs.max_length_tokens,
        images: list[Path] = Inputs.images,
        system_prompt: str = Inputs.system_prompt,
        messages: list[dict] = Inputs.messages,
        thinking_budget: int | None = Inputs.thinking_budget,
        top_k: int = Inputs.top_k,
        stop_sequences: str = Inputs.stop_sequences,
        seed: int | None = Inputs.seed,
        output_format: str = Inputs.output_format,
        video: Path | None = Inputs.video,
        document: Path | None = Inputs.document,
        fps: float = Inputs.fps,
        max_frames: int = Inputs.max_frames,
        start: float = Inputs.start,
        end: float | None = Inputs.end,
        pages: str = Inputs.pages,
        json_schema: str = Inputs.json_schema,
        max_tokens: int | None = Inputs.max_tokens,
        max_new_tokens: int | None = Inputs.max_new_tokens,
    ) -> ConcatenateIterator[str]:  # pyright: ignore[reportInvalidTypeForm]
        """Answers one request, piece by piece."""
        yield from answer(self, locals())  # pyright: ignore[reportReturnType]


class ConcurrentPredictor(BasePredictor):
    """Streams text of many concurrent requests (cog.concurrent.yaml): see `kimi_vl/cog_streaming.py`."""

    def __init__(self) -> None:
        self.streams = Streams(CancelationException)

    async def setup(self) -> None:
        """Loads the model that KIMI_VL_MODEL names."""
        await self.streams.try_out()
        if not self.streams.streaming:
            print("setup: this Cog does not let many requests stream at a time; each answer is sent whole", flush=True)
        self.pipeline = load_model()

    def healthcheck(self) -> bool:
        """Whether the model can still answer; Cog reports UNHEALTHY when this is false."""
        return self.pipeline.healthy()

    @streaming
    @concurrent(max=32)
    async def predict(
        self,
        prompt: str = Inputs.prompt,
        image: Path | None = Inputs.image,
        top_p: float = Inputs.top_p,
        temperature: float = Inputs.temperature,
        max_length_tokens: int = Inputs.max_length_tokens,
        images: list[Path] = Inputs.images,
        system_prompt: str = Inputs.system_prompt,
        messages: list[dict] = Inputs.messages,
        thinking_budget: int | None = Inputs.thinking_budget,
        top_k: int = Inputs.top_k,
        stop_sequences: str = Inputs.stop_sequences,
        seed: int | None = Inputs.seed,
        output_format: str = Inputs.output_format,
        video: Path | None = Inputs.video,
        document: Path | None = Inputs.document,
        fps: float = Inputs.fps,
        max_frames: int = Inputs.max_frames,
        start: float = Inputs.start,
        end: float | None = Inputs.end,
        pages: str = Inputs.pages,
        json_schema: str = Inputs.json_schema,
        max_tokens: int | None = Inputs.max_tokens,
        max_new_tokens: int | None = Inputs.max_new_tokens,
    ) -> ConcatenateIterator[str]:  # pyright: ignore[reportInvalidTypeForm]
        """Answers one of many requests, piece by piece."""
        return await self.streams.run(answer(self, locals()))  # pyright: ignore[reportReturnType]


def load_model() -> "Pipeline":
    """The model that KIMI_VL_MODEL names, with its loading in the log."""
    started = time.monotonic()
    data_url.install()
    logging.basicConfig(level=logging.INFO, format="setup: %(message)s", stream=sys.stdout)
    print("setup: loading the model", flush=True)
    try:
        _deadline()  # an invalid value fails now and not in a request
        pipeline = kimi_vl.load(model=os.environ.get("KIMI_VL_MODEL") or "thinking")
    except Exception:
        # Cog keeps only the type and the message of this exception, and ends the process so soon that without a
        # pause the traceback would not reach its log.
        traceback.print_exc()
        time.sleep(0.3)
        raise
    print(f"setup: ready after {time.monotonic() - started:.1f} s", flush=True)
    return pipeline


def answer(predictor: Predictor | ConcurrentPredictor, inputs: dict[str, Any]) -> Generator[str, None, None]:
    """The text of one request, piece by piece; `inputs` has every input by its name."""
    with only_promised_errors():
        videos, documents = (
            [] if inputs[name] is None else [_file(inputs[name], kind)]
            for name, kind in (("video", kinds.VIDEO), ("document", kinds.DOCUMENT))
        )
        chat, chat_images = build_chat(
            inputs["prompt"],
            inputs["system_prompt"],
            inputs["messages"],
            inputs["image"],
            inputs["images"],
            [*({"type": "video"} for _ in videos), *({"type": "document"} for _ in documents)],
        )
        events = predictor.pipeline.stream(
            chat,
            chat_images,
            videos=videos,
            documents=documents,
            grammar=grammar.json_schema(inputs["json_schema"]) if inputs["json_schema"] else None,
            **{name: inputs[name] for name in ("fps", "max_frames", "start", "end", "pages")},
            temperature=inputs["temperature"],
            top_p=inputs["top_p"],
            top_k=inputs["top_k"],
            max_length_tokens=_token_limit(inputs["max_length_tokens"], inputs["max_tokens"], inputs["max_new_tokens"]),
            thinking_budget=inputs["thinking_budget"],
            stop_sequences=_split_stop_sequences(inputs["stop_sequences"]),
            seed=inputs["seed"],
            deadline=_deadline(),
            interval=CHUNK_SECONDS,
        )
        # cancelling raises inside the loop, and closing the stream stops the model
        with contextlib.closing(events):
            on_cancel(events.interrupt)
            yield from format_events(
                _recorded(predictor, events),
                inputs["output_format"],
                lambda: predictor.pipeline.pictures(chat, chat_images),
            )


@contextlib.contextmanager
def only_promised_errors() -> Iterator[None]:
    """Passes a :class:`UserError` on, and turns any other error into E_INTERNAL; the log has no text of the request."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        _log_error(error)
        raise RuntimeError(INTERNAL_ERROR) from None


def _recorded(predictor: BasePredictor, events: Iterable[Event]) -> Iterator[Event]:
    for event in events:
        if isinstance(event, Done):
            for name, value in metrics(event).items():
                predictor.record_metric(name, value)
        yield event


def _deadline() -> float:
    """Seconds that a request may take."""
    given = os.environ.get("KIMI_VL_DEADLINE_S") or str(DEFAULT_DEADLINE_S)
    try:
        seconds = float(given)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise ValueError(f"KIMI_VL_DEADLINE_S must be a number of seconds above 0, not {given!r}")
    return seconds


# From inputs to a chat


def build_chat(
    prompt: str,
    system_prompt: str,
    messages: list[Message],
    image: Any,
    images: list[Any],
    others: Sequence[Message] = (),
) -> tuple[list[Message], list[Any]]:
    """The conversation, and the images that its bare image parts take, in order; both are checked by the pipeline.

    An image is a Path that Cog wrote, or the bytes of a data URL that Cog did not read. ``others`` are the bare parts
    of a video and a document.
    """
    files = [_file(value, kinds.IMAGE) for value in ([] if image is None else [image]) + list(images or [])]
    if messages:
        if prompt or system_prompt:
            raise UserError(
                "E_PARAMETER", "give either messages or prompt and system_prompt, and leave the other empty."
            )
        return messages, files
    content: list[Message] = [*({"type": "image"} for _ in files), *others]
    chat: list[Message] = [{"role": "user", "content": [*content, {"type": "text", "text": prompt}]}]
    if system_prompt:
        chat.insert(0, {"role": "system", "content": system_prompt})
    return chat, files


def _file(value: Any, kind: kinds.Kind) -> Path | bytes:
    """Refuses what Cog has not fetched: it passes strings such as "/etc/hostname" and "DATA:…" on unchanged."""
    if isinstance(value, str) and data_url.is_data_url(value):
        return data_url.decode(value, kind)
    if not isinstance(value, Path):
        raise UserError(kind.source, f"give {kind.noun} as a file upload, an http or https URL, or a data URL.")
    return value


def _token_limit(max_length_tokens: Any, max_tokens: Any, max_new_tokens: Any) -> int:
    """The limit of new tokens, which has three names."""
    limit = parameters.integer("max_length_tokens", max_length_tokens, 1, parameters.MAX_LENGTH_TOKENS)
    given = {
        parameters.integer(name, value, 1, parameters.MAX_LENGTH_TOKENS)
        for name, value in (("max_tokens", max_tokens), ("max_new_tokens", max_new_tokens))
        if value is not None
    }
    if given and limit != DEFAULT_MAX_LENGTH_TOKENS:
        given.add(limit)
    if len(given) > 1:
        raise UserError(
            "E_PARAMETER",
            "max_length_tokens, max_tokens and max_new_tokens are one limit; give one of them.",
        )
    return given.pop() if given else limit


def _split_stop_sequences(text: str) -> tuple[str, ...]:
    """Only spaces are trimmed, since a newline may be a stop sequence."""
    return tuple(stripped for piece in text.split(",") if (stripped := piece.strip(" ")))


# From events to text


def format_events(
    events: Iterable[Reasoning | Answer | Done], output_format: str, pictures: "Callable[[], list[Image]]" = list
) -> Iterator[str]:
    """The text of the events in the form that `output_format` names; `pictures` gives the images to draw on."""
    if output_format == "json":
        return _json_lines(events)
    if output_format == "answer":
        return (event.text for event in events if isinstance(event, Answer))
    if output_format == "grounding":
        return _grounding_line(events)
    if output_format == "grounding_image":
        return _grounding_line(events, pictures)
    if output_format in MARKERS:
        return _marked_text(events, *MARKERS[output_format])
    raise UserError(
        "E_PARAMETER", "output_format must be one of text, think_tags, answer, json, grounding, grounding_image."
    )


def _marked_text(events: Iterable[Reasoning | Answer | Done], opener: str, closer: str) -> Iterator[str]:
    """The thinking between two markers, then the answer; without thinking no markers."""
    thinking = False
    for event in events:
        if isinstance(event, Reasoning):
            yield event.text if thinking else opener + event.text
            thinking = True
            continue
        prefix = closer if thinking else ""
        thinking = False
        text = prefix + event.text if isinstance(event, Answer) else prefix
        if text:
            yield text


def _json_lines(events: Iterable[Reasoning | Answer | Done]) -> Iterator[str]:
    for event in events:
        if isinstance(event, Done):
            line: dict[str, Any] = {
                "type": "done",
                "reasoning": event.reasoning,
                "answer": event.answer,
                "finish_reason": event.finish_reason,
                "usage": dataclasses.asdict(event.usage),
                "seed": event.seed,
            }
            if event.media:
                line["media"] = [dataclasses.asdict(use) for use in event.media]
            if event.image_sizes or event.media:
                line["grounding"] = grounding_of(event).to_dict()
        else:
            line = {"type": "reasoning" if isinstance(event, Reasoning) else "answer", "text": event.text}
        yield json.dumps(line, ensure_ascii=False).translate(LINE_ENDS) + "\n"


def _grounding_line(events: Iterable[Event], pictures: "Callable[[], list[Image]] | None" = None) -> Iterator[str]:
    """One JSON object: the answer, the places that it names, and what was found drawn on each of `pictures`."""
    for event in events:
        if isinstance(event, Done):
            found = grounding_of(event)
            line: dict[str, Any] = {
                "answer": event.answer,
                "finish_reason": event.finish_reason,
                **found.to_dict(),
            }
            if pictures is not None:
                drawn = (annotate.with_findings(each, found, index) for index, each in enumerate(pictures()))
                line["images"] = [annotate.data_url(each) for each in drawn]
            yield json.dumps(line, ensure_ascii=False).translate(LINE_ENDS) + "\n"


def metrics(done: Done) -> dict[str, Any]:
    """The metrics of a prediction. Cog refuses None, so missing values are left out."""
    values = {
        "input_token_count": done.usage.input_tokens,
        "image_token_count": done.usage.image_tokens,
        "output_token_count": done.usage.output_tokens,
        "reasoning_token_count": done.usage.reasoning_tokens,
        "finish_reason": done.finish_reason,
        "thinking_closed_by": done.thinking_closed_by,
        "time_to_first_token": done.time_to_first_token,
        "tokens_per_second": done.tokens_per_second,
        "seed": done.seed,
        "media": [{**dataclasses.asdict(use), "taken": list(use.taken)} for use in done.media] or None,
    }
    return {name: value for name, value in values.items() if value is not None}


def _log_error(error: BaseException) -> None:
    """Prints where an error and its causes were raised, without messages, which may quote the caller's text."""
    seen: BaseException | None = error
    while seen is not None:
        print(f"error: {type(seen).__name__}", file=sys.stderr)
        for frame in traceback.extract_tb(seen.__traceback__):
            print(f"  {frame.filename}:{frame.lineno} in {frame.name}", file=sys.stderr)
        seen = seen.__cause__ or seen.__context__
