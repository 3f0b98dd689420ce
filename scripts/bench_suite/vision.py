"""`scripts/bench vision`: milliseconds of a picture through vision tower and projector, beside the GEMM ceiling.

Random weights at the published widths. Pictures are named by their patches; four of them make a token.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch

from kimi_vl.kernels import flash_attention
from kimi_vl.model.config import Config, num_image_tokens

from . import checkpoint, kernels, ladder


def operations(config: Config, side: int) -> float:
    """Multiplications and additions of one picture of ``side`` by ``side`` patches."""
    vision, hidden = config.vision_config, config.text_config.hidden_size
    width, patches = vision.hidden_size, side * side
    block = 8 * width * width + 4 * width * vision.intermediate_size + 4 * patches * width
    embedding = 2 * 3 * vision.patch_size**2 * width
    merged = 4 * width
    return patches * (vision.num_hidden_layers * block + embedding) + patches / 4 * 2 * merged * (merged + hidden)


def main(arguments: list[str]) -> int:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="scripts/bench vision")
    parser.add_argument("--blocks", type=int, default=0, help="vision blocks (default: all 27 on a GPU, 3 on a CPU)")
    parser.add_argument("--sides", type=int, nargs="*", help="patches on a side, even")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--divide", type=int, default=1, help="divide the published widths, for a quick look")
    args = parser.parse_args(arguments)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    sides = args.sides or ([16, 32, 64, 128] if device.type == "cuda" else [16, 32])
    if any(side < 2 or side % 2 for side in sides):
        parser.error("--sides must be even")
    values = checkpoint.divided(args.divide, 1, args.blocks or (27 if device.type == "cuda" else 3))
    config = Config.from_dict(checkpoint.with_vocabulary(values, 512))
    model, where = ladder.random_model(config, device, dtype), kernels.machine(device)
    attention = "flash_attn" if flash_attention.usable(torch.empty(0, dtype=dtype, device=device)) else "torch"
    vision = config.vision_config
    print(
        f"{vision.num_hidden_layers} of 27 blocks, widths / {args.divide}, {args.dtype}, attention by {attention}; "
        f"{where.name}: bfloat16 product {where.operations_per_second / 1e12:.2f} TFLOP/s\n\n"
        "| patches | tokens | ms | TFLOP | TFLOP/s | of GEMM |\n|---|---|---|---|---|---|"
    )
    results: list[dict[str, Any]] = []
    for side in sides:
        pixels = torch.rand(side * side, 3, vision.patch_size, vision.patch_size, device=device) * 2 - 1
        with torch.inference_mode():
            took = kernels.seconds(lambda pixels=pixels, side=side: model.encode_images(pixels, [(side, side)]), device)
        work = operations(config, side)
        result = {
            "patches": side * side,
            "tokens": num_image_tokens((side, side)),
            "milliseconds": round(took * 1e3, 3),
            "tflop": round(work / 1e12, 4),
            "tflop_per_s": round(work / took / 1e12, 3),
            "percent_of_gemm": round(100 * work / took / where.operations_per_second, 1),
        }
        results.append(result)
        cells = [str(value) for value in result.values()]
        print("| " + " | ".join(cells) + " % |", flush=True)
    summary = {
        "bench": "vision",
        "machine": where.name,
        "device": args.device,
        "dtype": args.dtype,
        "blocks": vision.num_hidden_layers,
        "divide": args.divide,
        "attention": attention,
        "torch": torch.__version__,
        "gemm_tflop_per_s": round(where.operations_per_second / 1e12, 2),
        "results": results,
    }
    print(json.dumps(summary))
    return 0
