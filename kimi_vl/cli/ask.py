"""``kimi-vl ask``: one question, answered on the terminal as it comes; the answer alone where a program reads it."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import logging
import os
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from .. import parameters
from ..errors import UserError
from ..events import Answer, Done, MediaUse, Reasoning
from ..media import kinds
from ..text.grounding import grounding_of
from ..text.stop_sequences import StopSequences

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..pipeline import EventStream

_DIM, _PLAIN, _CLEAR_LINE = "\x1b[2m", "\x1b[0m", "\r\x1b[K"
_MAX_PROMPT = 2**25  # characters read from standard input, which may never end; far more than any context takes
# What a file is taken for whose content does not say it, such as a film of another format: it is refused as what it is.
_BY_SUFFIX = {".pdf": kinds.DOCUMENT} | dict.fromkeys(
    ".3gp .avi .flv .m2ts .m4v .mkv .mov .mp4 .mpeg .mpg .mts .ogv .qt .ts .webm .wmv".split(), kinds.VIDEO
)
# Characters that would steer a terminal, of which text needs only line ends and tabs.
_INERT = {code: "�" for code in [*range(32), 127, *range(128, 160)] if chr(code) not in "\n\t"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", nargs="?", help="the question; - or nothing reads it from standard input")
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="images, videos and PDF documents")
    parser.add_argument("--model", help="as KIMI_VL_MODEL: a published name, demo, auto, a folder, … (auto)")
    parser.add_argument("--system", default="", metavar="TEXT", help="replaces the default system message")
    parser.add_argument(
        "--thinking",
        choices=["show", "hide", "only"],
        help="show it (dimmed on a terminal, and the default there), hide it (the default elsewhere), or it alone",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end instead of text")
    parser.add_argument(
        "--boxes",
        type=Path,
        metavar="PICTURE",
        help="draw the boxes and points of the answer on the image into this file (PNG, JPEG or WebP)",
    )
    parser.add_argument("--estimate", action="store_true", help="print what the question would cost in tokens, as JSON")
    reading = parser.add_argument_group("videos and documents")
    reading.add_argument("--fps", type=float, help="frames of a video a second (1)")
    reading.add_argument("--max-frames", type=int, metavar="N", help="frames of a video at most, evenly spread (64)")
    reading.add_argument("--start", type=float, metavar="SECONDS", help="where frames begin (0)")
    reading.add_argument("--end", type=float, metavar="SECONDS", help="where frames end (the end)")
    reading.add_argument("--pages", metavar="PAGES", help="pages of a document, as in 1-3,7 (all, 120 at most)")
    sampling = parser.add_argument_group("generation")
    sampling.add_argument("--temperature", type=float, default=0.6, help="0 takes the likeliest token (0.6)")
    sampling.add_argument("--top-p", type=float, default=1.0, help="of the likeliest tokens up to this total (1.0)")
    sampling.add_argument("--top-k", type=int, default=0, help="of so many of the likeliest tokens; 0 is off (0)")
    sampling.add_argument("--max-tokens", type=int, default=8192, help="new tokens at most, thinking included (8192)")
    sampling.add_argument("--thinking-budget", type=int, metavar="TOKENS", help="thinking tokens at most; 0 is none")
    sampling.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="ends the answer; may be repeated"
    )
    sampling.add_argument("--seed", type=int, help="the same seed and question give the same answer on a CPU")


def run(arguments: argparse.Namespace) -> int:
    prompt, files = _question(arguments)
    _check(arguments)
    types = [_type(file) for file in files]
    if arguments.boxes is not None:
        _check_boxes(arguments, types)
    _check_reading(arguments, types)
    status = _Status(sys.stderr)
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[_LogToStatus(status)])
    model = arguments.model or os.environ.get("KIMI_VL_MODEL") or "auto"
    chat = [{"role": "user", "content": [*({"type": each} for each in types), {"type": "text", "text": prompt}]}]
    asked: dict[str, Any] = {
        f"{kind}s": [file for file, each in zip(files, types, strict=True) if each == kind]
        for kind in ("image", "video", "document")
    }
    asked |= {name: getattr(arguments, name) for name in ("fps", "max_frames", "start", "end", "pages")}
    asked["max_length_tokens"] = arguments.max_tokens
    if arguments.system:
        chat.insert(0, {"role": "system", "content": arguments.system})
    status.show("loading the model")
    pipeline = _load(model, status)
    try:
        if arguments.estimate:
            found = pipeline.estimate(chat, **asked)
            status.clear()
            shown = dataclasses.asdict(found)
            del shown["ids"]
            print(json.dumps(shown, ensure_ascii=False, indent=2))
            return 0
        prepared = pipeline.prepare(chat, **asked)
        if not arguments.json:
            _say_what_is_missing(files, prepared.media, status)
        events = pipeline.stream(
            prepared,
            temperature=arguments.temperature,
            top_p=arguments.top_p,
            top_k=arguments.top_k,
            max_length_tokens=arguments.max_tokens,
            thinking_budget=arguments.thinking_budget,
            stop_sequences=arguments.stop,
            seed=arguments.seed,
        )
        with closing(events):
            printing = _print_json if arguments.json else functools.partial(_print, thinking=arguments.thinking)
            done = printing(events, status=status)
        if arguments.boxes and done:
            _draw(done, pipeline.pictures(chat, asked["images"]), arguments.boxes, status)
        return 0
    finally:
        status.clear()
        pipeline.close()


def _check(arguments: argparse.Namespace) -> None:
    """Raise :class:`UserError` for parameters that every model refuses, before one is loaded."""
    from ..engine.sampling import Sampling

    Sampling(arguments.temperature, arguments.top_p, arguments.top_k, arguments.seed or 0)
    parameters.token_limits(arguments.max_tokens, arguments.thinking_budget)
    StopSequences(arguments.stop)


def _check_reading(arguments: argparse.Namespace, types: Sequence[str]) -> None:
    """Raise :class:`UserError` where it is said how a kind of files is read and there is none of them."""
    for kind, names in {"video": ("fps", "max_frames", "start", "end"), "document": ("pages",)}.items():
        for name in names if kind not in types else ():
            if getattr(arguments, name) is not None:
                option = f"--{name.replace('_', '-')}"
                raise UserError("E_PARAMETER", f"{option} is for a {kind}; name one after the question.")


def _type(file: Path) -> str:
    """The type of the part that a file is: by its content, or where that is not known, by its name."""
    kind = None
    if not file.is_fifo():  # which can be read only once
        with file.open("rb") as opened:
            kind = kinds.of(opened.read(kinds.HEAD_BYTES))
    kind = kind or _BY_SUFFIX.get(file.suffix.lower())
    return "video" if kind is kinds.VIDEO else "document" if kind is kinds.DOCUMENT else "image"


def _question(arguments: argparse.Namespace) -> tuple[str, list[Path]]:
    """The prompt and the files; raises :class:`UserError` for what can be seen to be wrong without a model."""
    prompt, files = arguments.prompt, arguments.files
    if prompt in (None, "-"):
        if sys.stdin is None or (prompt is None and sys.stdin.isatty()):
            raise UserError("E_PROMPT_EMPTY", 'ask something: kimi-vl ask "What is in the picture?" photo.jpg')
        try:
            prompt = sys.stdin.read(_MAX_PROMPT + 1)
        except UnicodeDecodeError:
            raise UserError("E_PARAMETER", "the question on standard input is not text in UTF-8.") from None
        if len(prompt) > _MAX_PROMPT:
            raise UserError("E_PROMPT_TOO_LONG", "the question on standard input is too long; shorten it.")
    elif not files and Path(prompt).suffix and os.path.isfile(prompt):  # Path.is_file() raises for long names
        raise UserError("E_PROMPT_EMPTY", f'the question comes before the image: kimi-vl ask "What is this?" {prompt}')
    for file in files:
        try:
            if not file.is_fifo():  # whoever writes to a pipe would take this for its reader
                file.open("rb").close()
        except OSError as error:
            raise UserError(
                "E_IMAGE_UNREADABLE", f"{file}: {error.strerror}; name an image, a video or a PDF document."
            ) from None
    return prompt, files


def _load(model: str, status: _Status):
    """The pipeline for ``model``, with one line where the demo stands in for the real one."""
    import torch

    from .. import pipeline

    if model == "auto" and not torch.cuda.is_available():
        status.line("no CUDA GPU found: answering with the demo model, not with Kimi-VL (--model chooses)")
        model = "demo"
    if model == "demo":
        torch.set_num_threads(1)  # matrices as small as the demo's gain nothing from a second thread
    return pipeline.load(model)


def _check_boxes(arguments: argparse.Namespace, types: Sequence[str]) -> None:
    """Raise :class:`UserError` where there will be nothing to draw, or nowhere to draw it."""
    path = arguments.boxes
    if arguments.estimate:
        raise UserError("E_PARAMETER", "--boxes draws what an answer names; leave out --estimate.")
    if arguments.thinking == "only" and not arguments.json:
        raise UserError("E_PARAMETER", "--boxes draws what an answer names; leave out --thinking only.")
    if path.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise UserError("E_PARAMETER", f"--boxes {path}: name a file that ends in .png, .jpg or .webp.")
    if not path.parent.is_dir():
        raise UserError("E_PARAMETER", f"--boxes {path}: there is no folder {path.parent}.")
    if "image" not in types:
        raise UserError("E_PARAMETER", "--boxes draws on an image; name one after the question.")


def _say_what_is_missing(files: Sequence[Path], media: Sequence[MediaUse], status: _Status) -> None:
    """A line for each video of which fewer frames are taken than were asked for."""
    for file, use in zip(files, media, strict=True):
        if use.kind == "video" and len(use.taken) < use.wanted:
            status.line(
                f"{file}: {len(use.taken)} of {use.wanted} frames, {use.width}x{use.height} pixels each; "
                "the others do not fit or are damaged"
            )


def _draw(done: Done, pictures: list[Image], path: Path, status: _Status) -> None:
    """What the answer names, on the first picture into ``path`` and on further ones into numbered files beside it."""
    from .. import annotate

    found = grounding_of(done)
    for number, picture in enumerate(pictures, 1):
        target = path if number == 1 else path.with_stem(f"{path.stem}-{number}")
        try:
            annotate.with_findings(picture, found, number - 1).save(target)
        except OSError as error:
            raise UserError("E_PARAMETER", f"{target}: {error.strerror or 'it cannot be written'}.") from None
    names = (f"{number}: {each.label or each.action or 'unnamed'}" for number, each in enumerate(found.findings, 1))
    status.line(f"{path}: {', '.join(names) or 'the answer names no place'}")


def _print_json(events: EventStream, status: _Status) -> Done | None:
    done = None
    for event in events:
        if isinstance(event, Done):
            done = event
            status.clear()
            summary = dataclasses.asdict(event)
            del summary["logprobs"]  # none are asked for
            if not event.media:
                del summary["media"]
            if event.image_sizes or event.media:
                summary["grounding"] = grounding_of(event).to_dict()
            print(json.dumps(summary, ensure_ascii=False, indent=2))
    return done


def _print(events: EventStream, thinking: str | None, status: _Status) -> Done | None:
    """Pieces as they come. Thinking that is hidden is counted on the terminal instead."""
    out = sys.stdout
    if hasattr(out, "reconfigure"):  # an answer must not fail on what the terminal cannot show
        out.reconfigure(errors="replace")  # pyright: ignore[reportAttributeAccessIssue]
    terminal = out.isatty()
    thinking = thinking or ("show" if terminal else "hide")
    dim, plain = (_DIM, _PLAIN) if terminal and not os.environ.get("NO_COLOR") else ("", "")
    section, last, pieces, done = None, "", 0, None
    try:
        for event in events:
            if isinstance(event, Done):
                done = event
                continue
            if isinstance(event, Reasoning) and thinking == "hide":
                pieces += 1
                status.show(f"thinking ({pieces})")
                continue
            if isinstance(event, Answer) and thinking == "only":
                break
            if type(event) is not section:
                status.clear()
                out.write(dim if isinstance(event, Reasoning) else plain + ("\n\n" if section else ""))
                section = type(event)
            text = event.text.translate(_INERT) if terminal else event.text
            out.write(text)
            out.flush()
            last = text or last
    finally:
        status.clear()
        if section is Reasoning:
            out.write(plain)
        if last and not last.endswith("\n"):
            out.write("\n")
        out.flush()
    return done


class _Status:
    """What is going on, on stderr: one line that is replaced on a terminal, lines elsewhere."""

    def __init__(self, stream: TextIO):
        self._stream = stream
        self._terminal = stream.isatty()
        self._shown = ""
        self._at = float("-inf")

    def show(self, text: str) -> None:
        """Replace what is shown, at most ten times a second; nothing where there is no terminal."""
        if self._terminal and time.monotonic() - self._at > 0.1:
            self._at, self._shown = time.monotonic(), text
            self._stream.write(f"{_CLEAR_LINE}{_DIM}{text}…{_PLAIN}")
            self._stream.flush()

    def line(self, text: str) -> None:
        """A line that stays."""
        self.clear()
        self._stream.write(text.translate(_INERT) + "\n")
        self._stream.flush()

    def clear(self) -> None:
        if self._shown:
            self._stream.write(_CLEAR_LINE)
            self._stream.flush()
            self._shown, self._at = "", float("-inf")


class _LogToStatus(logging.Handler):
    """The package's own progress as status; warnings, and whatever goes to a file, stay as lines."""

    def __init__(self, status: _Status):
        super().__init__()
        self._status = status

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING or (record.name.startswith("kimi_vl") and not sys.stderr.isatty()):
            self._status.line(record.getMessage())
        elif record.name.startswith("kimi_vl"):
            self._status.show(record.getMessage())
