"""Disk to parameters: safetensors straight into the (fused) parameters on their device, and back to disk.

Strict: every tensor the configuration calls for, of its shape, and none besides. Knows no network and no downloads.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .config import Config
from .errors import CheckpointError
from .model import KimiVL

_FLOATING = ("F64", "F32", "F16", "BF16")
_ROUTER_BIAS = "e_score_correction_bias"


@dataclass(frozen=True)
class Slot:
    """Where a checkpoint tensor lives: a parameter's path and, for fused ones, the part of it."""

    parameter: str
    index: tuple[int | slice, ...]
    shape: tuple[int, ...]


def checkpoint_layout(config: Config) -> dict[str, Slot]:
    """Every tensor name of a checkpoint with ``config``, and its slot among the model's parameters."""
    return _layout(empty_model(config))


def _layout(model: KimiVL) -> dict[str, Slot]:
    return dict(pair for name, value in model.named_parameters() for pair in _slots(name, value))


def _slots(parameter: str, value: Tensor) -> Iterator[tuple[str, Slot]]:
    prefix, fused, kind = parameter.rpartition(".mlp.experts.")
    if not fused:
        yield parameter, Slot(parameter, (), tuple(value.shape))
        return
    experts, rows, columns = value.shape
    for expert in range(experts):
        name = f"{prefix}.mlp.experts.{expert}"
        if kind == "down_proj":
            yield f"{name}.down_proj.weight", Slot(parameter, (expert,), (rows, columns))
        else:
            half = rows // 2
            yield f"{name}.gate_proj.weight", Slot(parameter, (expert, slice(0, half)), (half, columns))
            yield f"{name}.up_proj.weight", Slot(parameter, (expert, slice(half, rows)), (half, columns))


def empty_model(config: Config, dtype: torch.dtype = torch.bfloat16) -> KimiVL:
    """The model without memory for its parameters (meta device); the router's correction biases stay float32."""
    with torch.device("meta"), _NoRandomFilling():
        model = KimiVL(config).to(dtype)
        for name, parameter in model.named_parameters():
            if name.endswith(_ROUTER_BIAS):
                parameter.data = parameter.data.float()
    return model


class _NoRandomFilling(TorchFunctionMode):
    """Leaves out the random start of parameters that have no memory; torch would import its compiler for it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.nn.init.normal_, torch.nn.init.uniform_, torch.nn.init.kaiming_uniform_):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def load(
    directory: str | Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    threads: int = 0,
) -> KimiVL:
    """The model of ``directory`` in ``dtype`` on ``device``, ready for inference.

    Raises :class:`CheckpointError` naming each file, missing, unexpected or misshapen tensor. ``threads`` 0 takes
    one a core, eight at most.
    """
    directory = Path(directory)
    config = Config.from_directory(directory)
    model = empty_model(config, dtype)
    slots = _layout(model)
    shards = _shards(directory)
    _check(directory, shards, slots)
    model.to_empty(device=device)
    parameters = dict(model.named_parameters())

    def fill(path: Path, names: list[str]) -> None:
        with torch.inference_mode(), _opened(path) as file:
            for name in names:
                slot = slots[name]
                try:
                    parameters[slot.parameter][slot.index].copy_(file.get_tensor(name))
                except SafetensorError as error:
                    raise CheckpointError(f"{path}: tensor {name} cannot be read ({error})") from None

    workers = threads or min(8, os.cpu_count() or 1)
    with ThreadPoolExecutor(workers) as pool:
        # a shard in several parts, so that a checkpoint of one file is read in parallel too
        jobs = [
            pool.submit(fill, directory / file, sorted(names)[part::workers])
            for file, names in shards.items()
            for part in range(workers)
        ]
        for job in jobs:
            job.result()
    return model.eval().requires_grad_(False)


def check(directory: str | Path) -> None:
    """Compare the checkpoint's headers with its configuration, reading no values; raises as :func:`load`."""
    directory = Path(directory)
    _check(directory, _shards(directory), checkpoint_layout(Config.from_directory(directory)))


def save(model: KimiVL, path: str | Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write the weights to one safetensors file with the checkpoint's tensor names; router biases as float32."""
    parameters = dict(model.named_parameters())
    tensors = {}
    for name, slot in checkpoint_layout(model.config).items():
        kept = torch.float32 if name.endswith(_ROUTER_BIAS) else dtype
        tensors[name] = parameters[slot.parameter].detach()[slot.index].to("cpu", kept, copy=True).contiguous()
    save_file(tensors, str(path), metadata={"format": "pt"})


def _shards(directory: Path) -> dict[str, set[str]]:
    """File names with the tensors that the index (or the only file itself) says they hold."""
    index = directory / "model.safetensors.index.json"
    if not index.exists():
        single = "model.safetensors"
        if not (directory / single).exists():
            raise CheckpointError(f"{directory}: holds neither {index.name} nor {single}")
        with _opened(directory / single) as file:
            return {single: set(file.keys())}
    weight_map = _weight_map(index)
    shards: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        shards.setdefault(file, set()).add(name)
    return shards


def _weight_map(index: Path) -> Mapping[str, str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError):
        raise CheckpointError(f"{index}: has no readable weight_map") from None
    if not isinstance(weight_map, Mapping):
        raise CheckpointError(f"{index}: weight_map is not an object")
    for name, file in weight_map.items():
        if not isinstance(file, str) or file != Path(file).name:
            raise CheckpointError(f"{index}: the file of tensor {name} is not a plain file name")
    return weight_map


def _check(directory: Path, shards: Mapping[str, set[str]], slots: Mapping[str, Slot]) -> None:
    """Compare every shard's header with the layout before any memory is taken."""
    problems: list[str] = []
    found: set[str] = set()
    for file, promised in sorted(shards.items()):
        path = directory / file
        if not path.exists():
            raise CheckpointError(f"{path}: is missing")
        with _opened(path) as opened:
            held = set(opened.keys())
            problems += [f"{path}: tensor {name} is not in it" for name in sorted(promised - held)]
            problems += [f"{path}: unexpected tensor {name}" for name in sorted(held - (promised & slots.keys()))]
            for name in sorted(held & promised & slots.keys()):
                part = opened.get_slice(name)
                shape, kind = tuple(part.get_shape()), part.get_dtype()
                if shape != slots[name].shape:
                    problems.append(f"{path}: tensor {name} has shape {shape}; {slots[name].shape} was expected")
                if kind not in _FLOATING:
                    problems.append(f"{path}: tensor {name} has dtype {kind}; a floating-point one was expected")
            found |= held
    problems += [f"{directory}: missing tensor {name}" for name in sorted(slots.keys() - found)]
    if problems:
        more = f" (and {len(problems) - 5} more problems)" if len(problems) > 5 else ""
        raise CheckpointError("; ".join(problems[:5]) + more)


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: is not a complete safetensors file ({error})") from None
