"""MoonViT: packed patches of any number of images to merged groups of four feature vectors.

Module and parameter names are those of the checkpoint (``vision_tower.*``). Knows neither text nor files.
Source: Kimi-VL technical report, section 2.1, and the published modeling_kimi_vl.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import flash_attention, sdpa
from .config import VisionConfig

# Shapes: P patches of all images together, N heads, D head dim, C hidden_size, T = P / 4 merged tokens.
Grid = tuple[int, int]  # (rows, columns) of patches, both even
ROPE_THETA = 10000.0
LAYER_NORM_EPS = 1e-5


class PatchEmbed(nn.Module):
    """Pixels of each patch to C values, plus a learned position that is resized to each image's grid."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.proj = nn.Conv2d(3, config.hidden_size, config.patch_size, stride=config.patch_size)
        self.pos_emb = PositionTable(config.init_pos_emb_height, config.init_pos_emb_width, config.hidden_size)

    def forward(self, pixel_values: Tensor, grids: Sequence[Grid]) -> Tensor:
        # a convolution whose stride is its kernel size is one GEMM over flattened patches
        patches = F.linear(pixel_values.flatten(1), self.proj.weight.flatten(1), self.proj.bias)  # (P, C)
        return self.pos_emb(patches, grids)


class PositionTable(nn.Module):
    """A learned table (height, width, C), resized bicubically (a = -0.75, no antialiasing) to a grid."""

    def __init__(self, height: int, width: int, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(height, width, channels))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, patches: Tensor, grids: Sequence[Grid]) -> Tensor:
        resized = {grid: self.resized(grid) for grid in set(grids)}
        return patches + torch.cat([resized[grid] for grid in grids])  # (P, C)

    def resized(self, grid: Grid) -> Tensor:
        return resize(self.weight, grid)


def resize(table: Tensor, grid: Grid) -> Tensor:
    """A table (height, width, C) resized to a grid, as :class:`PositionTable` says: (rows * columns, C)."""
    if grid == tuple(table.shape[:2]):
        return table.flatten(0, 1)
    planes = table.permute(2, 0, 1).unsqueeze(0)  # (1, C, height, width)
    planes = F.interpolate(planes, size=grid, mode="bicubic", align_corners=False)
    return planes.squeeze(0).permute(1, 2, 0).flatten(0, 1)


def rope_angles(grids: Sequence[Grid], head_dim: int, device: torch.device) -> Tensor:
    """Rotation angles, float32 ``(P, head_dim / 2)``: even pairs turn with the column, odd pairs with the row."""
    exponents = torch.arange(0, head_dim, 4, device=device, dtype=torch.float32) / head_dim
    frequencies = 1.0 / ROPE_THETA**exponents  # (D/4)
    angles = []
    for rows, columns in grids:
        y = torch.arange(rows, device=device, dtype=torch.float32).outer(frequencies)  # (rows, D/4)
        x = torch.arange(columns, device=device, dtype=torch.float32).outer(frequencies)  # (columns, D/4)
        x, y = x.expand(rows, -1, -1), y.unsqueeze(1).expand(-1, columns, -1)  # (rows, columns, D/4)
        angles.append(torch.stack((x, y), dim=-1).reshape(rows * columns, head_dim // 2))
    return torch.cat(angles)


def apply_rope_interleaved(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate adjacent pairs of components of ``states`` (P, N, D) in float32, interleaved as they came; ``cos`` and
    ``sin`` are (P, 1, D/2)."""
    even, odd = states.float().unflatten(-1, (-1, 2)).unbind(-1)  # (P, N, D/2)
    rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return rotated.flatten(-2).to(states.dtype)


def attention(query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int]) -> Tensor:
    """Full attention inside each image and none between images; all tensors (P, N, D), ``lengths`` sum to P."""
    if flash_attention.usable(query):
        return flash_attention.packed(query, key, value, lengths)
    if len(set(lengths)) == 1:  # equal images go as one batch
        query, key, value = (s.unflatten(0, (len(lengths), -1)).transpose(1, 2) for s in (query, key, value))
        return sdpa.attention(query, key, value).transpose(1, 2).flatten(0, 1)  # (P, N, D)
    split = [states.transpose(0, 1).split(list(lengths), dim=1) for states in (query, key, value)]  # (N, P_i, D)
    outputs = [sdpa.attention(q[None], k[None], v[None])[0] for q, k, v in zip(*split, strict=True)]
    return torch.cat(outputs, dim=1).transpose(0, 1)  # (P, N, D)


class Mlp(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.fc0 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc1 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, states: Tensor) -> Tensor:
        return self.fc1(F.gelu(self.fc0(states), approximate="tanh"))


class Block(nn.Module):
    """One pre-norm transformer layer."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.norm0 = nn.LayerNorm(config.hidden_size, eps=LAYER_NORM_EPS)
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=LAYER_NORM_EPS)
        self.wqkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.wo = nn.Linear(config.hidden_size, config.hidden_size)
        self.mlp = Mlp(config)

    def forward(self, states: Tensor, cos: Tensor, sin: Tensor, lengths: Sequence[int]) -> Tensor:
        qkv = self.wqkv(self.norm0(states)).unflatten(-1, (3, self.num_heads, -1))  # (P, 3, N, D)
        query, key, value = qkv.unbind(1)
        query, key = apply_rope_interleaved(query, cos, sin), apply_rope_interleaved(key, cos, sin)
        states = states + self.wo(attention(query, key, value, lengths).flatten(1))  # (P, C)
        return states + self.mlp(self.norm1(states))


class Encoder(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.head_dim = config.head_dim
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.final_layernorm = nn.LayerNorm(config.hidden_size, eps=LAYER_NORM_EPS)

    def forward(self, states: Tensor, grids: Sequence[Grid]) -> Tensor:
        angles = rope_angles(grids, self.head_dim, states.device).unsqueeze(1)  # (P, 1, D/2)
        cos, sin = angles.cos(), angles.sin()
        lengths = [rows * columns for rows, columns in grids]
        for block in self.blocks:
            states = block(states, cos, sin, lengths)
        return self.final_layernorm(states)


def merge(states: Tensor, grids: Sequence[Grid], kernel: tuple[int, int]) -> Tensor:
    """Group neighbouring patches (P, C) of each image, row-major inside and over the groups: (T, 4, C)."""
    height, width = kernel
    groups = []
    for image, (rows, columns) in zip(states.split([r * c for r, c in grids]), grids, strict=True):
        tiles = image.view(rows // height, height, columns // width, width, -1).transpose(1, 2)
        groups.append(tiles.reshape(-1, height * width, states.shape[-1]))  # (T_i, 4, C)
    return torch.cat(groups)


class VisionTower(nn.Module):
    """``vision_tower``: pixel_values (P, 3, 14, 14) and the grids of the images to (T, 4, C)."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.merge_kernel_size = config.merge_kernel_size
        self.patch_embed = PatchEmbed(config)
        self.encoder = Encoder(config)

    def forward(self, pixel_values: Tensor, grids: Sequence[Grid]) -> Tensor:
        states = self.patch_embed(pixel_values, grids)
        return merge(self.encoder(states, grids), grids, self.merge_kernel_size)
