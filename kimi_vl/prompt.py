"""Messages, images, videos and documents to a prompt: token ids, and the patches of what is shown.

Knows what of a request the model reads, and checks all of it before anything is computed. Knows nothing of how the
answer is made: no sampling, no KV cache.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from . import attachments, parameters
from .attachments import ReadingOptions, Share
from .engine.requests import Patches
from .errors import UserError
from .events import MediaUse
from .media import kinds
from .media.images import MAX_IMAGES, ImageOptions, Plan, load, plan, preprocess, sent_size
from .media.sources import FileSource
from .text import chat
from .text.messages import ImagePart, Message, Turn, asked_image, asks_something, read
from .text.tokenizer import Tokenizer

Messages = Sequence[Message | Turn]
ImageSource = bytes | bytearray | str | Path | Image.Image
Images = Iterable[ImageSource] | ImageSource | None
Files = Sequence[FileSource] | FileSource | None


@dataclass(frozen=True)
class Prompt:
    """A request as the engine takes it; ``prefill`` is what the answer begins with, where it is to be continued."""

    ids: list[int]
    patches: list[Patches]
    prefill: str | None
    media: tuple[MediaUse, ...]
    image_sizes: tuple[tuple[int, int], ...]
    asked_image: int | None
    began: float
    """When the request came, by :func:`time.monotonic`."""


class PromptReader:
    """Reads requests for a model of ``context`` tokens."""

    def __init__(self, tokenizer: Tokenizer, image_options: ImageOptions, context: int):
        self.tokenizer, self.image_options, self._context = tokenizer, image_options, context

    def read(
        self,
        messages: Messages,
        images: Images = (),
        *,
        videos: Files = (),
        documents: Files = (),
        max_length_tokens: int = 8192,
        decode: bool = True,
        **reading: Any,
    ) -> Prompt:
        """A request as the engine takes it. Without ``decode`` there are no patches, and images are among the media.

        ``max_length_tokens`` of the context are kept free where there are files, which have the rest of it; ``reading``
        are the fields of :class:`~kimi_vl.attachments.ReadingOptions`. Raises :class:`UserError`.
        """
        began, sources, options = time.monotonic(), image_list(images), ReadingOptions(**reading)
        max_length_tokens = parameters.integer("max_length_tokens", max_length_tokens, 1, parameters.MAX_LENGTH_TOKENS)
        turns = read(messages)
        prefill = chat.assistant_prefill(turns)
        continues = prefill is not None
        last = len(turns) - continues
        turns = [*chat.without_earlier_thinking(turns[:last]), *turns[last:]]
        if not asks_something(turns):
            raise UserError("E_PROMPT_EMPTY", "nothing is asked; give a prompt or a message with a text or an image.")
        parts = [part for turn in turns for part in turn.images]
        if max(len(parts), len(sources)) > MAX_IMAGES:
            raise UserError("E_TOO_MANY_IMAGES", f"a request may have {MAX_IMAGES} images; send fewer.")
        video_files = attachments.file_list("videos", videos, "E_VIDEO_SOURCE")
        document_files = attachments.file_list("documents", documents, "E_DOCUMENT_SOURCE")
        found, asked = image_sources(parts, sources), asked_image(turns)

        def encode(turns: Sequence[Turn]) -> list[int]:
            counts = [part.source.tokens for turn in turns for part in turn.images]
            return chat.encode(self.tokenizer, turns, counts, limit=self._context, continue_final_message=continues)

        with attachments.opened(turns, video_files, document_files, options, self.image_options) as files:
            seen, sizes = [], []
            for source in found:  # one at a time in memory
                image = load(source, self.image_options)
                sizes.append(sent_size(image))
                seen.append(self._seen(image, decode))
                del image
            turns = attachments.with_images(turns, seen)
            shares: list[Share] = []
            if files:
                others = len(encode(attachments.expanded(turns, [()] * len(files))))
                room = self._context - min(max_length_tokens, self._context // 4) - others
                shares = attachments.share(files, room, self._label_tokens, self.image_options)
            shown = [
                [(at, self._seen(one, decode)) for at, one in (file.read(share.sizes) if decode else share.blanks())]
                for file, share in zip(files, shares, strict=True)
            ]
        shares = [share.of(pictures, self._label_tokens) for share, pictures in zip(shares, shown, strict=True)]
        media = attachments.uses(turns, shares, self._label_tokens(""), self.image_options.patch_size)
        turns = attachments.expanded(
            turns,
            [
                [(label, seen) for label, (_, seen) in zip(share.labels, pictures, strict=True)]
                for share, pictures in zip(shares, shown, strict=True)
            ],
        )
        patches = [part.source for turn in turns for part in turn.images]
        return Prompt(encode(turns), patches, prefill, tuple(media), tuple(sizes), asked, began)

    def _seen(self, picture: Image.Image, decode: bool) -> Patches | Plan:
        """An image as the engine takes it, or how large that would be."""
        if not decode:
            return plan(*picture.size, self.image_options)
        return Patches(*preprocess(picture, self.image_options))

    def _label_tokens(self, label: str) -> int:
        """What an image costs beside its own tokens, with a text before it."""
        encode = self.tokenizer.encode
        return len(encode(label)) + len(encode(chat.IMAGE_SLOT_TEXT)) + chat.IMAGE_SLOT_CONTROLS


def image_list(images: Images) -> list[ImageSource]:
    """``images`` as a list: a single one is not taken apart into its letters or bytes, and None is none of them.

    Raises :class:`UserError` (E_IMAGE_SOURCE) for what is no image. A number above all: opened as a file it would be
    one that this process has open already, and closed after that.
    """
    if images is None:
        return []
    if isinstance(images, ImageSource):
        return [images]
    if isinstance(images, Iterable) and not isinstance(images, Mapping):
        found = list(images)
        if all(isinstance(image, ImageSource) for image in found):
            return found
    raise UserError("E_IMAGE_SOURCE", "images must be a list of bytes, paths, data URLs or Pillow images; change it.")


def image_sources(parts: Sequence[ImagePart], beside: Sequence[ImageSource]) -> list[ImageSource]:
    """An image for each part, the bare ones taking those beside the messages in order.

    A text in a part is a data URL, or refused: others than the one who runs this program may have written it, so
    that nothing it names is fetched or opened. Raises :class:`UserError` (E_IMAGE_SOURCE, E_MESSAGES_INVALID).
    """
    return attachments.matched(parts, beside, kinds.IMAGE, ImageSource)
