"""The machine's memory."""

import ctypes
import mmap
from pathlib import Path

import torch

from kimi_vl.device import memory

GB = 10**9


def test_huge_pages_are_asked_for_inside_the_parameters_alone(monkeypatch):
    advised = []

    class Library:
        @staticmethod
        def madvise(begin, length, advice):
            advised.append((begin, length))
            assert advice == 14

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Library)
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", 14, raising=False)
    cpu, sizes = torch.device("cpu"), (5, 2**22 + 77, 2**20, 2**23)
    large = [values for size in sizes if (values := memory.empty((size,), torch.uint8, cpu)).nbytes > 2**21]
    assert len(advised) == 2
    for (begin, length), values in zip(advised, large, strict=True):
        assert begin % mmap.PAGESIZE == length % mmap.PAGESIZE == 0
        assert values.data_ptr() <= begin
        assert begin + length <= values.data_ptr() + values.nbytes
        assert length > values.nbytes - 2 * mmap.PAGESIZE
    advised.clear()
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE")
    assert memory.empty((3, 2**22), torch.float32, cpu).shape == (3, 2**22)
    assert advised == []


def test_what_is_free_is_what_the_container_leaves(tmp_path: Path):
    def write(name: str, text: object) -> None:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{text}\n")

    assert memory.available(tmp_path) == 0  # a system that does not say
    write("proc/meminfo", "MemTotal:       24684032 kB\nMemFree:         1000000 kB\nMemAvailable:   16000000 kB")
    assert memory.available(tmp_path) == 16_384_000_000
    write("sys/fs/cgroup/memory.current", 3 * GB)
    write("sys/fs/cgroup/memory.max", "max")
    assert memory.available(tmp_path) == 16_384_000_000
    write("sys/fs/cgroup/memory.max", 10 * GB)
    assert memory.available(tmp_path) == 7 * GB
    write("sys/fs/cgroup/memory.max", 2 * GB)
    assert memory.available(tmp_path) == 0


def test_this_machine_says_what_it_has():
    assert 0 < memory.available() < memory.total()
