"""Kimi-VL for serving: ``kimi_vl.load()`` gives a pipeline from messages and images to thinking and an answer.

Importing this package is quick: torch comes with the first ``load``, transformers only with the Hugging Face classes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .errors import CheckpointError, UserError
from .events import Answer, Done, Estimate, Event, MediaUse, Reasoning, Usage

if TYPE_CHECKING:
    from .hf import KimiVLConfig, KimiVLForConditionalGeneration, KimiVLProcessor
    from .pipeline import Pipeline, load
    from .text.grounding import Finding, Grounding, grounding

__version__ = "0.1.0"
__all__ = [
    "Answer",
    "CheckpointError",
    "Done",
    "Estimate",
    "Event",
    "Finding",
    "Grounding",
    "KimiVLConfig",
    "KimiVLForConditionalGeneration",
    "KimiVLProcessor",
    "MediaUse",
    "Pipeline",
    "Reasoning",
    "Usage",
    "UserError",
    "grounding",
    "load",
]

_LAZY = {
    "Finding": "text.grounding",
    "Grounding": "text.grounding",
    "KimiVLConfig": "hf",
    "KimiVLForConditionalGeneration": "hf",
    "KimiVLProcessor": "hf",
    "Pipeline": "pipeline",
    "grounding": "text.grounding",
    "load": "pipeline",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_LAZY[name]}", __name__), name)
