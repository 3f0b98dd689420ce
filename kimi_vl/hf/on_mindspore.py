"""The published names on MindSpore: the type of the dtype that a caller hands over says which framework runs."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from transformers import GenerationConfig

from .. import mindspore
from ..errors import UserError
from ..model.config import Config
from ..weights import resolve
from .configuration import KimiVLConfig, complete_generation_config

log = logging.getLogger(__name__)

_DTYPE_NAMES = ("mindspore_dtype", "torch_dtype", "dtype")
_ATTENTION = ("eager", "sdpa", "flash_attention_2")


def wanted(options: dict[str, Any]) -> bool:
    """Whether the options of ``from_pretrained`` or ``_from_config`` ask for MindSpore."""
    return "mindspore_dtype" in options or any(_is_mindspore(options.get(name)) for name in _DTYPE_NAMES)


def refuse_tensors(inputs: dict[str, Any]) -> None:
    """Raises :class:`UserError` (E_BACKEND) where an input of a PyTorch model is a tensor of MindSpore's."""
    for name in (name for name, value in inputs.items() if _is_mindspore(value)):
        raise UserError("E_BACKEND", f"{name} is a MindSpore tensor, but the model is on PyTorch; use torch.Tensor.")


def from_pretrained(name: Any, *, revision: str | None = None, cache_dir: Any = None, **options: Any) -> Any:
    """The model of a folder, of a repository of the Hub, or of another name that :func:`resolve` knows."""
    dtype = _dtype(options)
    cache = cache_dir or os.environ.get("KIMI_VL_CACHE") or constants.HF_HUB_CACHE  # as for the processor's files
    folder = resolve.resolve(f"{name}@{revision}" if revision else str(name), has_gpu=False, cache=cache)
    config = options.pop("config", None) or KimiVLConfig.from_pretrained(folder)
    return _model(config, dtype, options, folder)


def from_config(config: Any, **options: Any) -> Any:
    """A model whose weights are drawn as before training."""
    return _model(config, _dtype(options), options, None)


def _model(config: Any, dtype: Any, options: dict[str, Any], folder: Path | None) -> Any:
    attention = options.pop("attn_implementation", None) or getattr(config, "_attn_implementation", None)
    if attention not in (None, *_ATTENTION):
        raise UserError("E_PARAMETER", f"attn_implementation must be one of {', '.join(_ATTENTION)}; change it.")
    options.pop("trust_remote_code", None)  # no code of the folder is run, whatever this says
    for name in options:
        raise UserError("E_PARAMETER", f"{name} is not supported on MindSpore; leave it out.")
    network = Config.from_dict(config.to_dict())
    from ..mindspore import model

    dtype = model.usable_dtype(dtype)
    if attention == "flash_attention_2":
        log.info("attention is computed as GEMMs over blocks of queries, in the place of flash_attention_2")
    weights = model.load(folder, network, dtype) if folder else model.start(network, dtype)
    generation_config = GenerationConfig()
    if folder and (folder / "generation_config.json").exists():
        generation_config = GenerationConfig.from_pretrained(folder)
    complete_generation_config(generation_config, config)
    return model.KimiVLForConditionalGeneration(config, network, weights, generation_config)


def _dtype(options: dict[str, Any]) -> Any:
    """The dtype that is taken out of ``options``; MindSpore works if this returns."""
    given = {name: options.pop(name) for name in _DTYPE_NAMES if name in options}
    for name, value in given.items():
        if not _is_mindspore(value):
            told = "is a dtype of PyTorch's" if type(value).__module__ == "torch" else "is no dtype of MindSpore's"
            raise UserError("E_BACKEND", f"{name} {told}; hand over mindspore_dtype=mindspore.bfloat16 alone.")
    if len(set(given.values())) > 1:
        raise UserError("E_BACKEND", f"{' and '.join(given)} differ; hand over mindspore_dtype alone.")
    mindspore.require()
    return next(iter(given.values()))


def _is_mindspore(value: Any) -> bool:
    return type(value).__module__.partition(".")[0] == "mindspore"
