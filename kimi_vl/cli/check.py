"""``kimi-vl check``: what this machine has, which models fit on it, and what a request may be here."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from .. import __version__

GIB = 2**30
# The published checkpoints: all have the same tensors, in bfloat16.
PUBLISHED_BYTES = 32_815_312_096
# Bytes of their quantised weights in each form, and how many values stay floating-point beside these.
QUANTIZED_BYTES = {
    "int8": 15_638_522_240,
    "float8": 15_638_522_240,
    "int4": 8_958_951_424,
    "int4-g128": 8_245_098_496,
}
KEPT_VALUES = 786_627_824
LEAST_CONTEXT = 4096  # tokens, with which a model is of use
PUBLISHED = {
    "thinking": "models--moonshotai--Kimi-VL-A3B-Thinking",
    "thinking-2506": "models--moonshotai--Kimi-VL-A3B-Thinking-2506",
    "instruct": "models--moonshotai--Kimi-VL-A3B-Instruct",
}


@dataclass(frozen=True)
class Device:
    """Where a model would run: ``kind`` is "cuda" or "cpu". Memory in bytes."""

    kind: str
    name: str
    total: int
    free: int
    bytes_a_parameter: int


@dataclass(frozen=True)
class Fit:
    """Whether a model can be served from here. ``context`` is how many tokens its KV cache would hold."""

    model: str
    fetched: bool
    needs: int
    fits: bool
    context: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the same as JSON")


def run(arguments: argparse.Namespace) -> int:
    device = _device()
    cache = Path(os.environ["KIMI_VL_CACHE"])
    facts = {
        "kimi-vl": __version__,
        "python": platform.python_version(),
        "libraries": {name: _version(name) for name in ("torch", "transformers", "triton", "flash-attn", "cog")},
        "videos": _reader("av"),
        "documents": _reader("pypdfium2"),
        "device": asdict(device),
        "kernels": _kernels(),
        "cpu": f"{_processor()}, {os.cpu_count()} cores",
        "cache": str(cache),
        "disk_free": shutil.disk_usage(_existing(cache)).free,
        "pget": shutil.which(os.environ.get("PGET") or "pget"),
        "models": [asdict(fit) for fit in fits(device, cache)],
        "quantized": [asdict(fit) for fit in quantized_fits(device)],
        "limits": _limits(),
    }
    print(json.dumps(facts, indent=2) if arguments.json else _text(facts))
    return 0


def fits(device: Device, cache: Path) -> list[Fit]:
    """The demo and the published models on ``device``, whose free memory they would have to themselves."""
    needs = PUBLISHED_BYTES // 2 * device.bytes_a_parameter
    context = _context(device, needs)
    found = [Fit("demo", True, 0, True, 8192)]
    for model, folder in PUBLISHED.items():
        fetched = (cache / f"{folder}.verified").is_file()
        found.append(Fit(model, fetched, needs, context >= LEAST_CONTEXT, context))
    return found


def quantized_fits(device: Device) -> list[Fit]:
    """A published model in each form that KIMI_VL_QUANTIZE may ask for here; ``model`` is the form's name."""
    import torch

    from ..device import cuda

    found = []
    for form, nbytes in QUANTIZED_BYTES.items():
        if form == "float8" and device.kind == "cuda" and not cuda.has_float8(torch.device(device.kind)):
            continue
        needs = nbytes + KEPT_VALUES * device.bytes_a_parameter
        context = _context(device, needs)
        found.append(Fit(form, False, needs, context >= LEAST_CONTEXT, context))
    return found


def _context(device: Device, weights: int) -> int:
    """Tokens that a request may have of the KV cache that an engine would make beside ``weights`` bytes of weights."""
    import torch

    from ..engine.engine import EngineOptions
    from ..engine.kv_cache import PagedCache
    from ..model.config import PUBLISHED_TEXT

    options, dtype = EngineOptions(), torch.bfloat16 if device.bytes_a_parameter == 2 else torch.float32
    pages = options.page_count(torch.device(device.kind), PUBLISHED_TEXT, dtype, weights)
    cache = pages * PagedCache.page_bytes(PUBLISHED_TEXT, options.page_size, dtype)
    if device.kind == "cpu" and weights + cache > device.free:  # where the cache's size does not depend on what is free
        return 0
    return min(pages * options.page_size, PUBLISHED_TEXT.max_position_embeddings)


def _device() -> Device:
    import torch

    from .. import kernels
    from ..device import memory

    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        major, minor = torch.cuda.get_device_capability()
        name = f"{torch.cuda.get_device_name()}, compute capability {major}.{minor}"
        return Device("cuda", name, total, free, 2)
    if reason := kernels.missing_native():
        how, size = f"in float32, without native kernels: {reason}", 4
    else:
        how, size = "in bfloat16 with native kernels, and the demo in float32", 2
    return Device("cpu", f"no CUDA GPU: models run on the CPU, {how}", memory.total(), memory.available(), size)


def _kernels() -> str:
    asked = os.environ.get("KIMI_VL_KERNELS")
    return f"KIMI_VL_KERNELS={asked}" if asked else "KIMI_VL_KERNELS is not set"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _reader(library: str) -> str | None:
    """A library that only processes of their own import, with its version; None where it is not installed."""
    if importlib.util.find_spec(library) is None:
        return None
    return f"{library} {_version(library) or 'of an unknown version'}"


def _existing(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def _limits() -> dict[str, int]:
    from .. import parameters
    from ..media import image_files, images
    from ..text import stop_sequences

    return {
        "images a request": images.MAX_IMAGES,
        "bytes an image": image_files.MAX_BYTES,
        "pixels an image": images.MAX_PIXELS,
        "new tokens": parameters.MAX_LENGTH_TOKENS,
        "stop sequences": stop_sequences.MAX_SEQUENCES,
    }


def _text(facts: dict) -> str:
    device = facts["device"]
    versions = ", ".join(f"{name} {version or 'not installed'}" for name, version in facts["libraries"].items())
    lines = [
        f"kimi-vl {facts['kimi-vl']}, Python {facts['python']}",
        f"libraries  {versions}",
        f"videos     {facts['videos'] or _missing('video')}",
        f"documents  {facts['documents'] or _missing('pdf')}",
        f"device     {device['name']}",
        f"memory     {device['free'] / GIB:.1f} of {device['total'] / GIB:.1f} GiB free",
        f"processor  {facts['cpu']}",
        f"kernels    {facts['kernels']}",
        f"cache      {facts['cache']}, {facts['disk_free'] / 1e9:.0f} GB free on its disk",
        f"download   {facts['pget'] or 'by Python: pget is not on PATH'}",
        "models",
    ]
    for fit in facts["models"]:
        place = "here" if fit["fetched"] else "not fetched"
        lines.append(f"  {fit['model']:<14} {place:<12} {_verdict(fit, device)}")
    lines.append("published models with KIMI_VL_QUANTIZE")
    lines += [f"  {fit['model']:<27} {_verdict(fit, device)}" for fit in facts["quantized"]]
    lines.append("limits")
    lines += [f"  {name:<16} {value:,}" for name, value in facts["limits"].items()]
    return "\n".join(lines)


def _missing(extra: str) -> str:
    return f'not read: pip install "kimi-vl[{extra}]"'


def _verdict(fit: dict, device: dict) -> str:
    if fit["fits"]:
        return f"fits, with up to {fit['context']:,} tokens of context"
    return f"does not fit: {fit['needs'] / GIB:.1f} GiB of weights, {device['free'] / GIB:.1f} GiB are free"
