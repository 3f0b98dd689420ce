"""MoonViT and the projector: packed patches of any number of images to vectors as wide as the decoder."""
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import mindspore as ms
import torch
from mindspore import Tensor, ops

from ..model import vision as arithmetic
from ..model.config import VisionConfig
from ..model.vision import Grid
from .layers import Weights, attention, from_torch, gemm, in_blocks, layer_norm, linear, rotate

# Shapes: P patches of all images together, N heads, D head dim, C hidden_size, T = P / 4 merged tokens.
EPS = arithmetic.LAYER_NORM_EPS


def vision_tower(weights: Weights, config: VisionConfig, pixel_values: Tensor, grids: Sequence[Grid]) -> Tensor:
    """``pixel_values`` (P, 3, 14, 14) and the grids of the images to groups of four neighbours (T, 4, C)."""
    states = patch_embed(weights / "patch_embed", pixel_values, grids)  # (P, C)
    angles = arithmetic.rope_angles(grids, config.head_dim, torch.device("cpu")).unsqueeze(1)  # (P, 1, D/2)
    rope = [from_torch(table, ms.float32) for table in (angles.cos(), angles.sin())]
    lengths = [rows * columns for rows, columns in grids]
    for layer in range(config.num_hidden_layers):
        states = block(weights / f"encoder.blocks.{layer}", states, rope, lengths, config.num_attention_heads)
    return merge(layer_norm(weights / "encoder.final_layernorm", states, EPS), grids, config.merge_kernel_size)


def patch_embed(weights: Weights, pixel_values: Tensor, grids: Sequence[Grid]) -> Tensor:
    """Pixels of each patch to C values, plus a learned position that is resized to each image's grid."""
    # a convolution whose stride is its kernel is one GEMM over flattened patches
    projection = weights / "proj"
    kernel = projection["weight"].reshape(projection["weight"].shape[0], -1)
    patches = gemm(pixel_values.reshape(pixel_values.shape[0], -1), kernel) + projection["bias"]  # (P, C)
    resized = {grid: resize(weights["pos_emb.weight"], grid) for grid in set(grids)}
    return patches + ops.cat([resized[grid] for grid in grids])


def resize(table: Tensor, grid: Grid) -> Tensor:
    """The position table (height, width, C) resized bicubically to a grid: (rows * columns, C)."""
    height, width, channels = table.shape
    if grid == (height, width):
        return table.reshape(-1, channels)
    by_row = table.astype(ms.float32).reshape(height, -1).swapaxes(0, 1)  # (width * C, height)
    tall = gemm(resize_weights(height, grid[0]), by_row).reshape(-1, width, channels)  # (rows, width, C)
    by_column = tall.swapaxes(1, 2).reshape(-1, width)  # (rows * C, width)
    both = gemm(by_column, resize_weights(width, grid[1])).reshape(grid[0], channels, -1)  # (rows, C, columns)
    return both.swapaxes(1, 2).reshape(-1, channels).astype(table.dtype)


def resize_weights(before: int, after: int) -> Tensor:
    """The matrix (after, before), float32, that resizes an axis of a position table: the unit vectors, resized."""
    return from_torch(arithmetic.resize(torch.eye(before).unsqueeze(1), (after, 1)), ms.float32)


def block(weights: Weights, states: Tensor, rope: list[Tensor], lengths: list[int], num_heads: int) -> Tensor:
    """One pre-norm transformer layer (P, C)."""
    qkv = linear(weights / "wqkv", layer_norm(weights / "norm0", states, EPS))
    query, key, value = ops.unbind(qkv.reshape(qkv.shape[0], 3, num_heads, -1), 1)  # (P, N, D) each
    query, key = (rotate(each.astype(ms.float32), *rope).astype(value.dtype) for each in (query, key))
    states = states + linear(weights / "wo", attend(query, key, value, lengths))
    return states + in_blocks(partial(mlp, weights / "mlp"), layer_norm(weights / "norm1", states, EPS))


def attend(query: Tensor, key: Tensor, value: Tensor, lengths: list[int]) -> Tensor:
    """Heads side by side (P, C): full attention inside each image of so many patches, and none between images."""
    by_image = (ops.split(each.swapaxes(0, 1).expand_dims(0), lengths, axis=2) for each in (query, key, value))
    heads = [attention(*own, scale=query.shape[-1] ** -0.5) for own in zip(*by_image, strict=True)]  # (1, N, P_i, D)
    return ops.cat(heads, axis=2)[0].swapaxes(0, 1).reshape(query.shape[0], -1)


def mlp(weights: Weights, states: Tensor) -> Tensor:
    """Two linear maps with the GELU that a hyperbolic tangent approximates: (P, C) to (P, C)."""
    x = linear(weights / "fc0", states)
    # (1 + tanh(u)) / 2 is sigmoid(2 u), and MindSpore's tanh on a CPU is off by up to 1e-4
    gelu = x * ops.sigmoid((8 / torch.pi) ** 0.5 * (x + 0.044715 * x * x * x))
    return linear(weights / "fc1", gelu)


def merge(states: Tensor, grids: Sequence[Grid], kernel: tuple[int, int]) -> Tensor:
    """Group neighbouring patches (P, C) of each image, row-major inside and over the groups: (T, 4, C)."""
    (height, width), images = kernel, ops.split(states, [rows * columns for rows, columns in grids])
    tiles = [
        image.reshape(rows // height, height, columns // width, width, -1).swapaxes(1, 2)
        for image, (rows, columns) in zip(images, grids, strict=True)
    ]
    return ops.cat([tile.reshape(-1, height * width, states.shape[-1]) for tile in tiles])


def projector(weights: Weights, groups: Tensor) -> Tensor:
    """LayerNorm over each patch, then two linear maps with an exact GELU: (T, 4, C) to (T, hidden_size)."""
    merged = layer_norm(weights / "pre_norm", groups, EPS).reshape(groups.shape[0], -1)  # (T, 4 C)
    return linear(weights / "linear_2", ops.gelu(linear(weights / "linear_1", merged)))
