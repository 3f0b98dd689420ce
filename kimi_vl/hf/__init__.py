"""Kimi-VL for Hugging Face transformers: configuration, model and processor.

The model is assembled from modules that transformers brings and shares no line with
:mod:`kimi_vl.model.kimi_vl`, so it is also a second implementation to compare the first with. Importing this package
registers the classes: ``AutoConfig``, ``AutoModel``, ``AutoModelForCausalLM``, ``AutoModelForImageTextToText`` and
``AutoProcessor`` then open a Kimi-VL folder without running the code that its ``auto_map`` names. Nothing else in
``kimi_vl`` imports transformers.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

from .configuration import KimiVLConfig, KimiVLTextConfig, KimiVLVisionConfig
from .modeling import (
    KimiVLForConditionalGeneration,
    KimiVLModel,
    KimiVLPositionEmbeddings,
    KimiVLPreTrainedModel,
    KimiVLVisionModel,
)
from .processing import KimiVLProcessor, KimiVLTokenizer

__all__ = [
    "KimiVLConfig",
    "KimiVLForConditionalGeneration",
    "KimiVLModel",
    "KimiVLPositionEmbeddings",
    "KimiVLPreTrainedModel",
    "KimiVLProcessor",
    "KimiVLTextConfig",
    "KimiVLTokenizer",
    "KimiVLVisionConfig",
    "KimiVLVisionModel",
]

AutoConfig.register(KimiVLConfig.model_type, KimiVLConfig, exist_ok=True)
for _auto in (AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText):
    _auto.register(KimiVLConfig, KimiVLForConditionalGeneration, exist_ok=True)
AutoProcessor.register(KimiVLConfig, KimiVLProcessor, exist_ok=True)
