"""Where picture and text meet: the whole network on MindSpore, its weights from a folder or from chance, generation."""
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
import torch
from mindspore import Parameter, Tensor, nn, ops

from .. import parameters
from ..engine import sampling
from ..errors import CheckpointError, UserError
from ..model.config import Config
from ..model.vision import Grid
from ..weights.loader import checkpoint_layout, read_tensor
from ..weights.shards import Expected, opened, read_headers
from . import language, vision
from .inputs import Batch, read
from .layers import Weights, from_torch, linear

log = logging.getLogger(__name__)


def usable_dtype(dtype: Any) -> Any:
    """``dtype``, or float32 in the place of bfloat16 on a CPU, for which MindSpore has few operators."""
    if dtype not in (ms.float32, ms.float16, ms.bfloat16):
        raise UserError("E_BACKEND", f"the dtype is {dtype!r}; it must be mindspore.bfloat16, float16 or float32.")
    if dtype == ms.bfloat16 and ms.get_context("device_target") == "CPU":
        log.warning("bfloat16 becomes float32: MindSpore does not compute with it on a CPU")
        return ms.float32
    return dtype


def load(directory: str | Path, config: Config, dtype: Any) -> dict[str, Parameter]:
    """The weights of a checkpoint with ``config`` by their names, read one at a time; raises as
    :func:`kimi_vl.weights.loader.load`."""
    if config.quantization is not None:
        raise CheckpointError("quantization_config is there; MindSpore takes floating-point weights alone")
    expected, found = {name: Expected(slot.shape) for name, slot in checkpoint_layout(config).items()}, {}
    for file, header in read_headers(Path(directory), expected).items():
        with opened(Path(directory) / file) as shard:
            for name, stored in header.items():
                found[name] = _parameter(name, from_torch(read_tensor(shard, stored), _dtype(name, dtype)))
    return found


def start(config: Config, dtype: Any) -> dict[str, Parameter]:
    """Weights as before training, by ``mindspore.set_seed``: norms of one, biases of zero, else normal values."""
    generator, found = torch.Generator().manual_seed(int(np.random.randint(2**62))), {}
    for name, slot in checkpoint_layout(config).items():
        values = torch.zeros(slot.shape) if name.endswith("bias") else torch.ones(slot.shape)
        values = values.normal_(std=0.02, generator=generator) if len(slot.shape) > 1 else values
        found[name] = _parameter(name, from_torch(values, _dtype(name, dtype)))
    return found


def _dtype(name: str, dtype: Any) -> Any:
    return ms.float32 if name.endswith("e_score_correction_bias") else dtype


def _parameter(name: str, values: Tensor) -> Parameter:
    return Parameter(values, name=name, requires_grad=False)


class KimiVLForConditionalGeneration(nn.Cell):
    """The network for inference. Parameters have the names and shapes of the checkpoint; ``config`` is the caller's,
    ``network`` the same as this package reads it, ``generation_config`` says where sequences end."""

    def __init__(self, config: Any, network: Config, weights: dict[str, Parameter], generation_config: Any):
        super().__init__(auto_prefix=False)
        if ms.get_context("device_target") == "CPU":  # launching asynchronously takes longer than what it overlaps with
            ms.runtime.launch_blocking()
        for name, values in weights.items():
            self.insert_param_to_cell(name, values, check_name_contain_dot=False)
        self.config, self.network, self.generation_config = config, network, generation_config
        self._weights = Weights(weights)
        self._embeddings = weights["language_model.model.embed_tokens.weight"]
        self.dtype = self._embeddings.dtype

    def construct(
        self, input_ids: Any, attention_mask: Any = None, pixel_values: Any = None, image_grid_hws: Any = None
    ) -> Tensor:
        """float32 logits (B, S, vocab_size) of every token, with padding at the left wherever it was."""
        return self._logits(
            self._states(read(self.network, input_ids, attention_mask, pixel_values, image_grid_hws), {})
        )

    def encode_images(self, pixel_values: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Vectors (T, H) that take the place of the placeholders of all images, in order."""
        pixels, config = pixel_values.astype(self.dtype), self.network.vision_config
        groups = vision.vision_tower(self._weights / "vision_tower", config, pixels, grids)
        return vision.projector(self._weights / "multi_modal_projector", groups)

    def _states(self, batch: Batch, cache: language.KVCache) -> Tensor:
        """Final states (B, S, H) of the batch's tokens, which join the cache."""
        embeddings = ops.gather(self._embeddings, Tensor(batch.ids), 0)
        if batch.pixel_values is not None:  # without images a placeholder is an ordinary token
            images = self.encode_images(batch.pixel_values, batch.grids)  # (T, H)
            slots = batch.ids == self.network.media_placeholder_token_id
            source = np.arange(slots.size, dtype=np.int32).reshape(slots.shape)
            source[slots] = slots.size + np.arange(slots.sum())  # behind all embeddings come the images
            embeddings = ops.gather(ops.cat((embeddings.reshape(slots.size, -1), images)), Tensor(source), 0)
        weights, config = self._weights / "language_model.model", self.network.text_config
        return language.decoder(weights, config, embeddings, batch.valid, cache)

    def _logits(self, states: Tensor) -> Tensor:
        return linear(self._weights / "language_model.lm_head", states).astype(ms.float32)

    def generate(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        pixel_values: Any = None,
        image_grid_hws: Any = None,
        *,
        max_new_tokens: int = 512,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        **others: Any,
    ) -> Tensor:
        """``input_ids`` (B, S) with what follows, (B, S + new tokens), an ended sequence filled with padding.

        Without ``do_sample`` the likeliest tokens. Sequence i of a batch draws from ``seed`` + i; None takes one from
        NumPy, which ``mindspore.set_seed`` seeds. The rest is as in transformers, and what it has besides is refused.
        """
        for name in (name for name in others if name != "use_cache" and others[name] is not None):
            raise UserError("E_PARAMETER", f"{name} is not supported on MindSpore; leave it out.")
        batch = read(self.network, input_ids, attention_mask, pixel_values, image_grid_hws)
        config, count = self.network.text_config, len(batch.ids)
        if (room := config.max_position_embeddings - batch.ids.shape[1]) < 1:
            raise UserError("E_PROMPT_TOO_LONG", "the prompt and its images do not fit the context; shorten either.")
        limit = parameters.integer("max_new_tokens", max_new_tokens, 1, room)
        seed = np.random.randint(2**62) if seed is None else seed
        first = sampling.Sampling(temperature if do_sample else 0, top_p, top_k, seed)
        samplings = [replace(first, seed=first.seed + index) for index in range(count)]
        named = self.generation_config.eos_token_id if eos_token_id is None else eos_token_id
        eos = [named] if isinstance(named, int) else list(named)

        cache: language.KVCache = {}
        new = np.zeros((count, 0), np.int32)
        while new.shape[1] < limit and not np.isin(new, eos).any(1).all():
            logits = torch.from_numpy(self._logits(self._states(batch, cache)[:, -1]).asnumpy())  # (B, V)
            own = zip(logits, samplings, batch.valid.sum(1).tolist(), strict=True)
            tokens = np.asarray([sampling.sample_one(v, s, sampling.uniform(s.seed, at)) for v, s, at in own], np.int32)
            tokens[np.isin(new, eos).any(1)] = self.generation_config.pad_token_id
            new = np.concatenate((new, tokens[:, None]), axis=1)
            batch = Batch(tokens[:, None], np.pad(batch.valid, ((0, 0), (0, 1)), constant_values=True))
        return Tensor(np.concatenate((input_ids.asnumpy(), new), axis=1).astype(input_ids.asnumpy().dtype))
