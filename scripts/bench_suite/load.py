"""`scripts/bench load`: our loader and transformers' on the same weights, beside what reading and copying alone take.

Every measurement is a process of its own, so that none finds memory or caches that another left; the contestants take
turns, so that a slow minute of the machine meets all of them. The files are in the page cache.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import mmap
import os
import platform
import resource
import statistics
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from kimi_vl.weights import loader

from . import checkpoint, conditions

_PIECE = 2**24

# In the order of the table. Ceilings first; the loaders' memory is new, so the third is the one they can reach.
CONTESTANTS = {
    "copy": "copy in memory",
    "read": "read into memory in use",
    "read_new": "read into new memory",
    "kimi_vl": "kimi_vl.weights.loader.load",
    "transformers": "transformers from_pretrained",
}
_CEILINGS = ("copy", "read", "read_new")
_LOADERS = ("kimi_vl", "transformers")
Report = dict[str, Any]


@dataclass(frozen=True)
class Sample:
    """One measurement: seconds, the bytes they were spent on, and for loaders the peak of memory taken meanwhile.

    ``touched`` are the seconds until every page of the parameters has been read once: a loader that only maps the
    files reads them then. ``values`` is a sum over all parameters that no order changes.
    """

    seconds: float
    nbytes: int
    touched: float | None = None
    peak: int | None = None
    values: int | None = None

    @property
    def rate(self) -> float:
        """GB/s."""
        return self.nbytes / 1e9 / self.seconds


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench load", description=(__doc__ or "").partition("\n\n")[2])
    parser.add_argument("--gb", type=float, default=4.0, help="size of the synthetic checkpoint (default 4)")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each contestant (default 5)")
    parser.add_argument("--threads", type=int, default=0, help="of our loader and of reading (default: the loader's)")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda or cuda:N")
    parser.add_argument("--cache", type=Path, default=checkpoint.CACHE, help="where it is kept (default .cache/bench)")
    parser.add_argument("--one", choices=CONTESTANTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.rounds < 1:
        parser.error("--rounds must be at least 1")
    args.threads = args.threads or loader.default_threads()
    if args.one:
        print(json.dumps(vars(measure(args.one, args.folder, args.threads, torch.device(args.device)))))
        return 0
    try:
        weights = checkpoint.ready(args.cache, args.gb * 1e9)
    except ValueError as error:
        parser.error(f"--gb: {error}")
    _read(weights.shards, weights.nbytes, args.threads, fresh=True)  # the page cache
    args.load_before = conditions.load_average()
    samples: dict[str, list[Sample]] = {name: [] for name in CONTESTANTS}
    for number in range(args.rounds):
        # there and back, so that nobody always follows the same one
        for name in list(CONTESTANTS)[:: -1 if number % 2 else 1]:
            samples[name].append(_in_a_process(name, weights.folder, args.threads, args.device))
    _same_values(samples, weights.folder)
    report = _report(weights, args, samples)
    print(table(report))
    print(json.dumps(report))
    return 0


def _in_a_process(name: str, folder: Path, threads: int, device: str) -> Sample:
    command = [sys.executable, "-P", "-m", __package__, "load", "--one", name, "--folder", str(folder)]
    command += ["--threads", str(threads), "--device", device]
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if process.returncode:
        raise SystemExit(f"error: measuring {CONTESTANTS[name]} ended with status {process.returncode}")
    return Sample(**json.loads(process.stdout.splitlines()[-1]))


# ---------------------------------------------------------------------------------------------
# One measurement, in its own process


def measure(name: str, folder: Path, threads: int, device: torch.device) -> Sample:
    shards = sorted(folder.glob("*.safetensors"))
    total = sum(path.stat().st_size for path in shards)
    if device.type == "cuda":
        torch.zeros(1, device=device)  # its context
    if name == "copy":
        return _copy(device)
    if name in ("read", "read_new"):
        return Sample(_read(shards, total, threads, fresh=name == "read_new"), total)
    if name == "kimi_vl":
        return _load(lambda: loader.load(folder, device=device, threads=threads), device, total)
    import transformers

    from kimi_vl.hf import KimiVLForConditionalGeneration

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    options: dict[str, Any] = {"dtype": torch.bfloat16}
    if device.type == "cuda":
        options["device_map"] = str(device)
    return _load(lambda: KimiVLForConditionalGeneration.from_pretrained(folder, **options), device, total)


def _load(load: Callable[[], torch.nn.Module], device: torch.device, total: int) -> Sample:
    before = _resident()
    _forget_peak()
    began = time.monotonic()
    model = load()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = time.monotonic() - began
    peak = _peak() - before
    values = [value.detach() for value in model.state_dict().values()]
    began = time.monotonic()
    for value in values:
        value.flatten()[:: mmap.PAGESIZE // value.itemsize].sum()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    touched = seconds + time.monotonic() - began
    return Sample(seconds, total, touched, peak, _values(values))


def _values(tensors: Iterable[Tensor]) -> int:
    """A sum over the bits of all values as bfloat16: the same for the same values in any order and grouping."""
    return sum(int(tensor.bfloat16().view(torch.int16).sum(dtype=torch.int64)) for tensor in tensors)


def _read(paths: list[Path], total: int, threads: int, *, fresh: bool) -> float:
    """Seconds to read ``paths``, ``total`` bytes, into one buffer whose memory is new (``fresh``) or in use."""
    with mmap.mmap(-1, total, flags=mmap.MAP_PRIVATE) as memory:
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
        if not fresh:
            for page in range(0, total, mmap.PAGESIZE):
                memory[page] = 1
        view = memoryview(memory)
        pieces: deque[tuple[int, int, memoryview]] = deque()
        files, at = [os.open(path, os.O_RDONLY) for path in paths], 0
        for file, path in zip(files, paths, strict=True):
            size = path.stat().st_size
            for begin in range(0, size, _PIECE):
                count = min(_PIECE, size - begin)
                pieces.append((file, begin, view[at : at + count]))
                at += count

        def work() -> None:
            while True:
                try:
                    file, begin, part = pieces.popleft()
                except IndexError:
                    return
                if os.preadv(file, [part], begin) != len(part):
                    raise OSError("a file changed while it was read")
                part.release()

        workers = [threading.Thread(target=work) for _ in range(threads)]
        began = time.monotonic()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        seconds = time.monotonic() - began
        for file in files:
            os.close(file)
        view.release()
        return seconds


def _copy(device: torch.device) -> Sample:
    """From memory to memory of this machine or, where there is one, to the device."""
    nbytes = 2**30
    source = torch.ones(nbytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
    target = torch.zeros(nbytes, dtype=torch.uint8, device=device)
    seconds = []
    for _ in range(4):
        began = time.monotonic()
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.monotonic() - began)
    return Sample(min(seconds), nbytes)


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


def _resident() -> int:
    """Bytes of memory this process has, those of mapped files included."""
    if Path("/proc/self/status").exists():
        return _status("VmRSS")
    return _peak()


def _peak() -> int:
    # not getrusage where it can be helped: on Linux its peak may be that of the process that started this one
    if Path("/proc/self/status").exists():
        return _status("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _forget_peak() -> None:
    with contextlib.suppress(OSError):  # then importing counts where it took more than what follows
        Path("/proc/self/clear_refs").write_text("5")


# ---------------------------------------------------------------------------------------------
# The report


def _same_values(samples: dict[str, list[Sample]], folder: Path) -> None:
    stored = 0
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            stored += _values(file.get_tensor(name) for name in file.keys())  # noqa: SIM118 - not a mapping
    for name in _LOADERS:
        if any(sample.values != stored for sample in samples[name]):
            raise SystemExit(f"error: {CONTESTANTS[name]} did not give the checkpoint's values")


def _report(weights: checkpoint.Checkpoint, args: argparse.Namespace, samples: dict[str, list[Sample]]) -> Report:
    middle = {name: statistics.median(sample.rate for sample in taken) for name, taken in samples.items()}
    results = {}
    for name, taken in samples.items():
        rates = [sample.rate for sample in taken]
        results[name] = {
            "seconds": [rounded(sample.seconds) for sample in taken],
            "gb_per_s": rounded(middle[name]),
            "gb_per_s_range": [rounded(min(rates)), rounded(max(rates))],
        }
        results[name] |= {f"percent_of_{other}": rounded(100 * middle[name] / middle[other]) for other in _CEILINGS}
        if name in _LOADERS:
            touched = [sample.nbytes / 1e9 / sample.touched for sample in taken if sample.touched]
            peaks = [sample.peak / sample.nbytes for sample in taken if sample.peak is not None]
            results[name] |= {
                "gb_per_s_until_touched": rounded(statistics.median(touched)),
                "peak_over_model": rounded(max(peaks)),
            }
    return {
        "bench": "load",
        "bytes": weights.nbytes,
        "files": len(weights.shards),
        "shape": weights.shape,
        "dtype": "bfloat16",
        "device": torch.cuda.get_device_name(args.device) if args.device.startswith("cuda") else args.device,
        "machine": conditions.processor(),
        "threads": args.threads,
        "rounds": args.rounds,
        "cpus": os.cpu_count(),
        "load_average": [args.load_before, conditions.load_average()],
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
        "python": platform.python_version(),
        "results": results,
        "times_transformers": rounded(middle["kimi_vl"] / middle["transformers"]),
    }


def rounded(value: float) -> float:
    """Four digits, however small a figure is."""
    return float(f"{value:.4g}")


def table(report: Report) -> str:
    """The report for people, as a Markdown table under its conditions."""
    lines = [
        f"{report['bytes'] / 1e9:.3f} GB of {report['dtype']} in {report['files']} files ({report['shape']}), "
        f"page cache warm; {report['device']}, {report['machine']}, {report['threads']} threads, "
        f"{report['cpus']} CPUs; load average {report['load_average'][0]} before, {report['load_average'][1]} after; "
        f"torch {report['torch']}, transformers {report['transformers']}, Python {report['python']}; "
        f"median of {report['rounds']} rounds, "
        "each measurement in a process of its own",
        "",
        "| what | seconds | GB/s (least to most) | of copy | of read | of read, new memory | GB/s until all is touched "
        "| peak memory / model |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, title in CONTESTANTS.items():
        row = report["results"][name]
        low, high = row["gb_per_s_range"]
        # a copy is of another size: seconds would mislead
        seconds = "" if name == "copy" else f"{statistics.median(row['seconds']):.2f}"
        cells = [title, seconds, f"{row['gb_per_s']:.2f} ({low:.2f} to {high:.2f})"]
        cells += [f"{row[f'percent_of_{other}']:.0f} %" for other in _CEILINGS]
        cells += [f"{row[key]:.2f}" if key in row else "" for key in ("gb_per_s_until_touched", "peak_over_model")]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", f"kimi_vl loads {report['times_transformers']:.2f} times as fast as transformers."]
    return "\n".join(lines)
