"""Which type a model is computed in, and which form of its weights fits a device beside a KV cache, by the memory
plan of the engine.

``KIMI_VL_QUANTIZE`` is ``none`` (the default), ``int8``, ``float8``, ``int4``, ``int4-g128`` or ``auto``, which takes
the first of none, int8 and int4 that leaves a cache of ``WANTED`` tokens.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass

import torch

from . import kernels
from .device import cuda, memory
from .engine.engine import EngineOptions
from .engine.kv_cache import cache_bytes
from .model.config import Config
from .quantization.scheme import FORMS
from .weights import loader

VARIABLE = "KIMI_VL_QUANTIZE"
WANTED = 32_768  # tokens of KV cache
GIB = 2**30
LARGE = GIB  # bytes of bfloat16 weights, above which reading them is what a step costs
_AUTOMATIC = (None, "int8", "int4")
_CPU_SHARE = 0.9  # of the memory that is available; the rest is for steps

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Placement:
    """A model's weights in a ``form`` (None: floating-point) on a device: bytes of them, and how many tokens the KV
    cache beside them holds, all requests together."""

    form: str | None
    weights: int
    tokens: int


def choose_dtype(config: Config, device: torch.device) -> torch.dtype:
    """bfloat16 on a GPU, and on a CPU for a large model that native kernels compute; else float32.

    A small model is fast enough in float32, which rounds nothing; PyTorch has fast bfloat16 on few CPUs.
    """
    if device.type == "cuda":
        return torch.bfloat16
    large = weight_bytes(config, torch.bfloat16, None) > LARGE
    return torch.bfloat16 if large and not kernels.missing_native() else torch.float32


def weight_bytes(config: Config, dtype: torch.dtype, form: str | None) -> int:
    """Bytes of a loaded model's weights. Raises :class:`CheckpointError` where the form does not fit a width."""
    return sum(parameter.nbytes for parameter in loader.planned_model(config, dtype, form).parameters())


def place(
    config: Config, dtype: torch.dtype, form: str | None, kind: str, free: int, options: EngineOptions | None = None
) -> Placement:
    """On a device of a ``kind`` ("cuda" or "cpu") with ``free`` bytes of memory that the model has to itself."""
    options, text, weights = options or EngineOptions(), config.text_config, weight_bytes(config, dtype, form)
    left = max(0, free - weights)
    if kind == "cuda":
        spare = options.cache_bytes or cache_bytes(
            left,
            text,
            dtype,
            sequences=options.max_num_seqs,
            max_num_batched_tokens=options.batched_tokens(kind),
            images=options.embedding_bytes,
        )
    else:
        spare = max(0, int(free * _CPU_SHARE) - weights)
    return Placement(form, weights, options.pages_in(spare, text, dtype) * options.page_size)


def choose(
    config: Config, dtype: torch.dtype, device: torch.device, options: EngineOptions | None = None
) -> str | None:
    """The form that ``KIMI_VL_QUANTIZE`` asks for, None where weights stay as the checkpoint has them.

    Raises ValueError for an unknown one, and RuntimeError with a sentence where a GPU does not have float8 or the
    weights do not fit its memory.
    """
    asked = os.environ.get(VARIABLE) or "none"
    if asked not in ("none", "auto", *FORMS):
        raise ValueError(f"{VARIABLE} is none, auto, {', '.join(FORMS)}, not {asked!r}; change it")
    if asked == "float8" and device.type == "cuda" and not cuda.has_float8(device):
        raise RuntimeError(f"this GPU has no float8, which takes compute capability 8.9; set {VARIABLE}=int8")
    if config.quantization is not None:  # as it is, or refused by the loader
        return None if asked in ("none", "auto") else asked
    free = free_bytes(device)
    if asked == "auto" and free:
        return _automatic(config, dtype, device.type, free, options)
    form = None if asked in ("none", "auto") else asked
    if device.type == "cuda" and free < (needed := weight_bytes(config, dtype, form)):
        raise RuntimeError(
            f"the weights take {needed / GIB:.1f} GiB as {form or dtype} and {free / GIB:.1f} GiB of the GPU's memory "
            f"are free; set {VARIABLE}=auto, which quantises them, or free some"
        )
    return form


def free_bytes(device: torch.device) -> int:
    """Memory for weights and cache; 0 where the system does not say."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else memory.available()


def _automatic(config: Config, dtype: torch.dtype, kind: str, free: int, options: EngineOptions | None) -> str | None:
    wanted = min(WANTED, config.text_config.max_position_embeddings)
    found = [place(config, dtype, _AUTOMATIC[0], kind, free, options)]
    while found[-1].tokens < wanted and len(found) < len(_AUTOMATIC):
        found.append(place(config, dtype, _AUTOMATIC[len(found)], kind, free, options))
    chosen = found[-1]
    log.info(
        "weights as %s: %.1f GiB, with %s tokens of cache in %.1f GiB of free memory",
        chosen.form or "they are", chosen.weights / GIB, f"{chosen.tokens:,}", free / GIB,
    )  # fmt: skip
    return chosen.form
