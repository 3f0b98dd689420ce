"""One request before the first: an image and a few tokens, as every other request goes through the engine.

What fails on this machine for every request (a kernel that cannot be launched, memory that is not there) fails here,
before the model is reported as ready.
"""

from __future__ import annotations

import logging
import time

import numpy as np

from .engine import Engine, Patches
from .requests import CountingOutputProcessor
from .sampling import Sampling

LIMIT_S = 600.0
_TOKENS = 3  # the first comes with the prompt, the others of decoding steps

log = logging.getLogger(__name__)


def warm_up(engine: Engine, seconds: float = LIMIT_S) -> None:
    """Raises RuntimeError with a sentence that says what to do, and closes the engine, where the request fails."""
    began = time.monotonic()
    config = engine.model.config
    height, width = config.vision_config.merge_kernel_size
    side = config.vision_config.patch_size
    image = Patches(np.zeros((4 * height * width, 3, side, side), np.float32), (2 * height, 2 * width))
    processor = CountingOutputProcessor(_TOKENS, Sampling(1, 1, 0, 0))
    engine.submit([1, *[config.media_placeholder_token_id] * image.tokens, 2], [image], _TOKENS, processor)
    if not processor.over.wait(seconds):
        reason = f"is not done after {seconds:g} s"
    elif processor.error is not None:
        reason = f"fails ({type(processor.error).__name__})"
    else:
        log.info("a first request took %.2f s", time.monotonic() - began)
        return
    engine.close(wait=False)
    remedy = ""
    if engine.model.device.type == "cuda":
        remedy = "; try again with KIMI_VL_KERNELS=torch, or use a GPU with more memory"
    raise RuntimeError(f"the model cannot serve on this machine: a first request {reason}{remedy}") from processor.error
