"""Image embeddings by the digest of the image, so that equal images are encoded once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import kernels
from ..model.kimi_vl import KimiVL
from .requests import Patches
from .scheduler import ScheduledChunk


class EmbeddingCache:
    """Encodes images, and keeps at most ``limit`` bytes of them, or one; the least recently used is evicted first."""

    def __init__(self, model: KimiVL, limit: int):
        if model.dtype == torch.bfloat16 and model.device.type == "cpu" and not kernels.multiplies_bfloat16():
            model.widen_vision()  # a picture takes PyTorch four times as long in bfloat16 there
        self._model, self._limit = model, limit
        self._kept: OrderedDict[bytes, Tensor] = OrderedDict()
        self.nbytes = 0

    def features(self, chunk: ScheduledChunk, images: Sequence[Patches]) -> list[Tensor]:
        """The vectors (t, H) of the placeholders among a chunk's tokens; ``images`` are all of its request's."""
        parts = []
        for span, patches in zip(chunk.request.images, images, strict=True):
            begin, end = max(span.begin, chunk.begin), min(span.end, chunk.end)
            if begin < end:
                parts.append(self._embed(patches)[begin - span.begin : end - span.begin])
        return parts

    def _embed(self, patches: Patches) -> Tensor:
        found = self.lookup(patches.digest)
        if found is None:
            pixels = torch.from_numpy(patches.pixel_values).to(self._model.device)
            found = self._model.encode_images(pixels, [patches.grid])
            self.keep(patches.digest, found)
        return found

    def lookup(self, digest: bytes) -> Tensor | None:
        if digest in self._kept:
            self._kept.move_to_end(digest)
        return self._kept.get(digest)

    def keep(self, digest: bytes, vectors: Tensor) -> None:
        """Keep the embeddings (t, H) of an image."""
        self.drop(digest)
        self._kept[digest] = vectors
        self.nbytes += vectors.nbytes
        while self.nbytes > self._limit and len(self._kept) > 1:
            self.drop(next(iter(self._kept)))

    def drop(self, digest: bytes) -> None:
        vectors = self._kept.pop(digest, None)
        if vectors is not None:
            self.nbytes -= vectors.nbytes
