"""Image embeddings by the digest of the image, so that equal images are encoded once."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor


class EmbeddingCache:
    """At most ``limit`` bytes, or one image; the least recently used is evicted first."""

    def __init__(self, limit: int):
        self._limit = limit
        self._kept: OrderedDict[bytes, Tensor] = OrderedDict()
        self.nbytes = 0

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
