"""What the tests on MindSpore share: the demo in both frameworks, and conversations as tensors of either."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mindspore as ms  # pyright: ignore[reportMissingImports]
import numpy as np
import pytest
import torch

from kimi_vl import KimiVLForConditionalGeneration
from kimi_vl.model.generation import Prompt

DEMO = Path(__file__).parents[2] / "kimi_vl" / "demo"

ms.runtime.launch_blocking()  # an error is raised where it is made
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def demo() -> Any:
    """The demo on MindSpore."""
    return KimiVLForConditionalGeneration.from_pretrained(DEMO, mindspore_dtype=ms.float32)


def inputs_of(prompts: Sequence[Prompt], side: str = "left", width: int = 0) -> dict[str, Any]:
    """Prompts as a batch of MindSpore tensors, padded with zeros at a side, to ``width`` at least."""
    width = max(width, *(len(prompt.ids) for prompt in prompts))
    ids, mask = np.zeros((2, len(prompts), width), np.int32)
    for row, prompt in enumerate(prompts):
        place = slice(width - len(prompt.ids), None) if side == "left" else slice(len(prompt.ids))
        ids[row, place], mask[row, place] = prompt.ids, 1
    found = {"input_ids": ms.Tensor(ids), "attention_mask": ms.Tensor(mask)}
    pixels = [prompt.pixel_values.numpy() for prompt in prompts if prompt.pixel_values is not None]
    if pixels:
        grids = np.asarray([grid for prompt in prompts for grid in prompt.grids], np.int32)
        found |= {"pixel_values": ms.Tensor(np.concatenate(pixels)), "image_grid_hws": ms.Tensor(grids)}
    return found
