"""Kimi-VL for Hugging Face transformers."""

from .modeling import KimiVLConfig, KimiVLForConditionalGeneration, KimiVLProcessor, KimiVLTextConfig

__all__ = ["KimiVLConfig", "KimiVLForConditionalGeneration", "KimiVLProcessor", "KimiVLTextConfig"]
