"""Native kernels are compiled once, kept, found again, and never loaded damaged; where they cannot be had, a reason."""

from __future__ import annotations

import functools
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kimi_vl.kernels.cpu import build

ROOT = Path(__file__).parents[2]
FEATURES = frozenset(build.NEEDED)
pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or build.platform.machine() != "x86_64", reason="native kernels are for Linux on x86-64"
)


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "one.cpp").write_text('#include "two.h"\nextern "C" int answer() { return two(); }\n')
    (folder / "two.h").write_text("inline int two() { return 2; }\n")
    return folder


def counted(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that compile something."""
    commands: list[list[str]] = []
    run = build._run

    def counting(command: list[str], seconds: float) -> str:
        if "-o" in command:
            commands.append(command)
        return run(command, seconds)

    monkeypatch.setattr(build, "_run", counting)
    return commands


@pytest.mark.slow
def test_a_library_is_compiled_once_and_again_for_other_sources_or_flags(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    commands, folder = counted(monkeypatch), tmp_path / "cache"
    assert build.build(FEATURES, folder, sources).answer() == 2
    assert build.build(FEATURES, folder, sources).answer() == 2
    assert len(commands) == 1
    assert set(build.NEEDED.values()) <= set(commands[0]) and "-mavx512bf16" not in commands[0]
    (sources / "two.h").write_text("inline int two() { return 3; }\n")
    assert build.build(FEATURES, folder, sources).answer() == 3
    build.build(FEATURES | {"avx512_bf16"}, folder, sources)
    assert len(commands) == 3 and "-mavx512bf16" in commands[2]
    assert sorted(path.suffix for path in folder.iterdir()) == [".so"] * 3, "nothing else is left"


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["cut", "altered", "empty"])
def test_a_damaged_library_is_compiled_again(
    damage: str, sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    commands, folder = counted(monkeypatch), tmp_path / "cache"
    build.build(FEATURES, folder, sources)
    (library,) = folder.iterdir()
    content = library.read_bytes()
    middle = len(content) // 2
    damaged = {
        "cut": content[:middle],
        "altered": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
        "empty": b"",
    }[damage]
    library.unlink()  # another file: this process has the first one loaded
    library.write_bytes(damaged)
    assert build.build(FEATURES, folder, sources).answer() == 2
    assert len(commands) == 2
    assert library.read_bytes() == content or library.stat().st_size == len(content)


def _answer(folder: Path, sources: Path) -> int:
    return build.build(FEATURES, folder, sources).answer()


@pytest.mark.slow
def test_processes_may_compile_at_the_same_time(sources: Path, tmp_path: Path):
    folder = tmp_path / "cache"
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        assert pool.starmap(_answer, [(folder, sources)] * 3) == [2, 2, 2]
    assert [path.suffix for path in folder.iterdir()] == [".so"]


@pytest.mark.slow
def test_reasons_why_there_is_none(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def reason(features: frozenset[str] = FEATURES, folder: Path = tmp_path / "cache") -> str:
        with pytest.raises(build.Unavailable) as info:
            build.build(features, folder, sources)
        return str(info.value)

    assert reason(FEATURES - {"avx512_vnni", "fma"}) == "the processor lacks avx512_vnni, fma"
    (tmp_path / "file").write_text("")
    assert reason(folder=tmp_path / "file" / "cache").startswith("they cannot be kept in")
    (sources / "one.cpp").write_text("int answer( {\n")
    assert "fails: " in reason() and "error" in reason()
    monkeypatch.setenv("CXX", "no-such-compiler -O1")
    assert reason() == "there is no g++; install it, or set CXX to one"
    clang = tmp_path / "other"
    clang.write_text("#!/bin/sh\necho clang version 17\n")
    clang.chmod(0o755)
    monkeypatch.setenv("CXX", str(clang))
    assert reason() == "there is no g++; install it, or set CXX to one"
    monkeypatch.setenv("CXX", "false")
    assert reason().startswith("false fails")
    monkeypatch.setattr(build.platform, "machine", lambda: "aarch64")
    assert reason() == "they are for Linux on x86-64"


def test_a_machine_without_them_says_why_each_time(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(build, "processor_features", lambda: frozenset({"avx512f"}))
    monkeypatch.setattr(build, "_library", functools.cache(build._library.__wrapped__))  # the others keep theirs
    for _ in range(2):
        with pytest.raises(build.Unavailable, match="the processor lacks avx512bw"):
            build.library()


def test_features_are_those_of_the_first_processor(tmp_path: Path):
    info = tmp_path / "cpuinfo"
    info.write_text("processor : 0\nflags\t\t: fpu avx512f fma\n\nprocessor : 1\nflags\t\t: fpu\n")
    assert build.processor_features(info) == {"fpu", "avx512f", "fma"}
    info.write_text("Features : neon\n")
    assert build.processor_features(info) == frozenset()
    assert build.processor_features(tmp_path / "none") == frozenset()


@pytest.mark.slow
@pytest.mark.skipif(not build.processor_features() >= FEATURES, reason="this processor has no native kernels")
def test_kernels_share_the_runtime_of_openmp_with_torch():
    """Two would be two pools of threads, each with idle ones that spin on the other's cores."""
    code = (
        "from kimi_vl.kernels.cpu import build; build.library();"
        "maps = open('/proc/self/maps').read();"
        "print(len({line.split()[-1] for line in maps.splitlines() if 'libgomp' in line or 'libomp' in line}))"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ, capture_output=True, text=True)
    assert found.stdout.split() == ["1"], found.stderr
