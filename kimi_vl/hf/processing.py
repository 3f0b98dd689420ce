"""The processor: conversations and images to the tensors that the model takes, and ids back to text."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import snapshot_download
from PIL import Image
from transformers import BatchFeature

from ..media import data_url
from ..media.images import ImageOptions, preprocess
from ..model.config import num_image_tokens
from ..text import chat
from ..text.messages import read
from ..text.tokenizer import Tokenizer

_FILES = (
    "tiktoken.model",
    "tokenizer_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "chat_template.jinja",
)


class KimiVLTokenizer(Tokenizer):
    """:class:`kimi_vl.text.tokenizer.Tokenizer` with the names that callers of Hugging Face tokenizers use."""

    padding_side = "left"

    @property
    def bos_token_id(self) -> int:
        return self.bos_id

    @property
    def eos_token_id(self) -> int:
        return self.eos_id

    @property
    def pad_token_id(self) -> int:
        return self.pad_id

    @property
    def vocab_size(self) -> int:
        return self.num_ranks

    def __len__(self) -> int:
        return self.size

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> Any:
        """Ids of special tokens by name."""
        return self.special[tokens] if isinstance(tokens, str) else [self.special[token] for token in tokens]

    def decode(self, ids: Any, skip_special: bool = False, *, skip_special_tokens: bool = False, **ignored: Any) -> str:
        """The text of ids in a list, an array or a tensor (or of one id); see :meth:`Tokenizer.decode`."""
        return super().decode(_ids(ids), skip_special=skip_special or skip_special_tokens)

    def batch_decode(self, rows: Iterable[Any], skip_special_tokens: bool = False, **ignored: Any) -> list[str]:
        """The text of each row of ids."""
        return [self.decode(row, skip_special_tokens=skip_special_tokens) for row in rows]


class KimiVLProcessor:
    """Text and images to the tensors that the model takes, and ids back to text.

    As in the published processor the rendered text is the interface: control tokens in it are control tokens,
    wherever they come from. (:func:`kimi_vl.text.chat.encode` keeps text of users apart.)
    """

    def __init__(self, tokenizer: Any, options: ImageOptions, source: Path | None = None):
        self.tokenizer: KimiVLTokenizer = tokenizer
        self.options = options
        self._source = source

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> KimiVLProcessor:
        """Read a folder, or the same files from the Hub (``revision``, ``cache_dir``, ``token``,
        ``local_files_only`` and ``force_download`` are understood). No code of the folder is run."""
        folder = Path(pretrained_model_name_or_path)
        if not folder.is_dir():
            known = ("revision", "cache_dir", "token", "local_files_only", "force_download")
            choice = {name: kwargs[name] for name in known if kwargs.get(name) is not None}
            name = str(pretrained_model_name_or_path)
            folder = Path(snapshot_download(name, allow_patterns=list(_FILES), **choice))
        return cls(KimiVLTokenizer.from_directory(folder), ImageOptions.from_directory(folder), folder)

    def save_pretrained(self, save_directory: str | Path, **ignored: Any) -> None:
        """Copy the files this was read from."""
        if self._source is None:
            raise ValueError("this processor was not read from a folder, so there is nothing to copy")
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        for name in _FILES:
            if (self._source / name).exists() and not (Path(save_directory) / name).exists():
                shutil.copyfile(self._source / name, Path(save_directory) / name)

    def apply_chat_template(
        self,
        conversation: Sequence[Any],
        add_generation_prompt: bool = False,
        tokenize: bool = False,
        **kwargs: Any,
    ) -> Any:
        """The conversation as text; a list of conversations gives a list. With ``tokenize`` the tensors of
        :meth:`__call__`, where the image parts must hold their images (Pillow images, arrays, paths or data
        URLs)."""
        several = len(conversation) > 0 and not isinstance(conversation[0], Mapping)
        rows = list(conversation) if several else [conversation]
        texts = [chat.render(messages, add_generation_prompt) for messages in rows]
        if not tokenize:
            return texts if several else texts[0]
        images = [part.source for messages in rows for turn in read(messages) for part in turn.images]
        return self(text=texts, images=images, return_tensors=kwargs.get("return_tensors"))

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        return_tensors: str | None = None,
        padding: bool | str = True,
        truncation: bool = False,
        max_length: int | None = None,
        **ignored: Any,
    ) -> BatchFeature:
        """One rendered text or several, and the images of all of them in order.

        Gives ``input_ids`` and ``attention_mask`` ``(B, S)``, padded at the left, and with images
        ``pixel_values`` ``(sum of P, 3, 14, 14)`` and ``image_grid_hws`` ``(n, 2)``, rows and columns.
        ``return_tensors`` is "pt", "np", or None for lists of ids. Each ``<|media_pad|>`` of the text becomes
        as many as its image takes. A prompt is never cut: one longer than ``max_length`` is an error where
        ``truncation`` is asked for.
        """
        if text is None:
            raise ValueError("text is missing; an image goes with a text that has its place")
        if return_tensors not in (None, "pt", "np"):
            raise ValueError(f"return_tensors is {return_tensors!r}; it must be 'pt', 'np' or None")
        pictures = [preprocess(_image(image), self.options) for image in _flat(images)]
        counts = [num_image_tokens(grid, self.options.merge_kernel_size) for _, grid in pictures]
        rows = self._encode([text] if isinstance(text, str) else list(text), counts)
        longest = max((len(row) for row in rows), default=0)
        if truncation and max_length is not None and longest > max_length:
            raise ValueError(f"a prompt of {longest} tokens exceeds max_length {max_length}; it is never cut")
        width = max_length if padding == "max_length" and max_length is not None else longest
        lacking = [max(0, width - len(row)) if padding else 0 for row in rows]
        data: dict[str, Any] = {
            "input_ids": [[self.tokenizer.pad_id] * n + row for n, row in zip(lacking, rows, strict=True)],
            "attention_mask": [[0] * n + [1] * len(row) for n, row in zip(lacking, rows, strict=True)],
        }
        if return_tensors is not None:
            data = {name: np.asarray(value, dtype=np.int64) for name, value in data.items()}
        if pictures:
            data["pixel_values"] = np.concatenate([patches for patches, _ in pictures])
            data["image_grid_hws"] = np.asarray([grid for _, grid in pictures], dtype=np.int64)
        if return_tensors == "pt":
            data = {name: torch.from_numpy(value) for name, value in data.items()}
        return BatchFeature(data)

    def decode(self, ids: Any, skip_special_tokens: bool = False, **ignored: Any) -> str:
        """The text of a row of ids."""
        return self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def batch_decode(self, rows: Iterable[Any], skip_special_tokens: bool = False, **ignored: Any) -> list[str]:
        """The text of each row of ids."""
        return self.tokenizer.batch_decode(rows, skip_special_tokens=skip_special_tokens)

    def _encode(self, texts: list[str], counts: list[int]) -> list[list[int]]:
        """Ids of each text; the k-th placeholder of all of them becomes ``counts[k]``."""
        pad = self.tokenizer.media_pad_id
        encoded = [self.tokenizer.encode(text, allow_special=True) for text in texts]
        if not counts:
            return encoded  # a lone placeholder is then an ordinary token
        places = sum(row.count(pad) for row in encoded)
        if places != len(counts):
            raise ValueError(f"the text has {places} places for images ({chat.MEDIA_PAD}), {len(counts)} came")
        left = iter(counts)
        return [[i for t in row for i in ([pad] * next(left) if t == pad else [t])] for row in encoded]


def _ids(ids: Any) -> list[int]:
    values = ids.tolist() if hasattr(ids, "tolist") else ids
    return [values] if isinstance(values, int) else [int(value) for value in values]


def _flat(images: Any) -> list[Any]:
    if images is None:
        return []
    if isinstance(images, list | tuple):
        return [image for item in images for image in _flat(item)]
    return [images]


def _image(source: Any) -> Image.Image:
    """A Pillow image in the mode it has: the published processor converts after its resize."""
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, np.ndarray):
        return Image.fromarray(source)
    if isinstance(source, str) and data_url.is_data_url(source):
        source = io.BytesIO(data_url.decode(source))
    if isinstance(source, io.BytesIO) or (isinstance(source, str | Path) and Path(source).is_file()):
        with Image.open(source) as opened:
            opened.load()
            return opened
    raise ValueError(
        "an image must be a Pillow image, an array of bytes (H, W, 3), the path of a file or a data URL of one"
    )
