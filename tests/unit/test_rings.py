"""Which tests a ring runs, and that the fast one starts nothing."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

TESTS = """
import socket, subprocess, sys
import pytest

def test_quick(): pass

@pytest.mark.slow
def test_slow(): subprocess.run([sys.executable, "-c", ""], check=True)

@pytest.mark.parametrize("n", [1, *(pytest.param(n, marks=pytest.mark.nightly) for n in (2, 3))])
def test_sweep(n): pass
"""
STARTING = """
import os, socket, subprocess, sys
import pytest

def test_process(): subprocess.run([sys.executable, "-c", ""], check=True)

def test_server():
    with socket.create_server(("127.0.0.1", 0)): pass

@pytest.fixture
def started(): subprocess.run([sys.executable, "-c", ""], check=True)

def test_fixture(started): pass
"""


@pytest.fixture
def project(pytester: pytest.Pytester) -> pytest.Pytester:
    pytester.makeconftest('pytest_plugins = ["tests.rings"]')
    pytester.makeini("[pytest]\nmarkers =\n  slow\n  nightly\n")
    pytester.makepyfile(test_ours=TESTS)
    pytester.mkdir("e2e").joinpath("test_served.py").write_text("def test_served(): pass\n")
    pytester.mkdir("on_mindspore").joinpath("test_ported.py").write_text("def test_ported(): pass\n")
    return pytester


@pytest.mark.parametrize(("ring", "passed", "deselected"), [("fast", 2, 3), ("default", 4, 2), ("all", 6, 0)])
def test_each_ring_holds_the_one_before(project: pytest.Pytester, ring: str, passed: int, deselected: int) -> None:
    """The fast one does not even collect what is in the slow folders."""
    project.runpytest_inprocess("--ring", ring).assert_outcomes(passed=passed, deselected=deselected)


def test_folders_that_take_longest_come_first(project: pytest.Pytester) -> None:
    for folder in ("bench", "parity", "unit"):
        # a name that no file of the project has: this process may have imported that one
        project.mkdir(folder).joinpath(f"test_in_{folder}.py").write_text(f"def test_{folder}(): pass\n")
    result = project.runpytest_inprocess("--collect-only", "--quiet")
    files = list(dict.fromkeys(line.partition("::")[0] for line in result.outlines if "::" in line))
    assert files[:3] == ["bench/test_in_bench.py", "e2e/test_served.py", "parity/test_in_parity.py"]
    assert sorted(files[3:]) == ["test_ours.py", "unit/test_in_unit.py"]


def test_one_ring_alone_collects_what_needs_mindspore(project: pytest.Pytester) -> None:
    project.runpytest_inprocess("on_mindspore").assert_outcomes()
    project.runpytest_inprocess("--ring", "mindspore", "on_mindspore").assert_outcomes(passed=1)


def test_without_a_ring_it_is_the_default_one_and_says_what_it_leaves_out(project: pytest.Pytester) -> None:
    result = project.runpytest_inprocess()
    result.assert_outcomes(passed=4, deselected=2)
    result.stdout.fnmatch_lines(["*only with scripts/test --all*", "test_ours.py::test_sweep (2)"])


@pytest.mark.slow
def test_processes_of_xdist_say_what_they_leave_out(project: pytest.Pytester) -> None:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "pytest", "-n", "2", "--dist", "loadfile", "-p", "no:cacheprovider", "."]
    done = subprocess.run(command, capture_output=True, text=True, cwd=project.path, env={"PYTHONPATH": str(root)})
    assert "4 passed" in done.stdout and "\ntest_ours.py::test_sweep (2)\n" in done.stdout, done.stdout


def test_the_fast_ring_starts_nothing(project: pytest.Pytester) -> None:
    project.makepyfile(test_ours=STARTING)
    result = project.runpytest_inprocess("--ring", "fast")
    result.assert_outcomes(failed=2, errors=1)
    result.stdout.fnmatch_lines(["*mark test_ours.py::test_process with pytest.mark.slow*"])


@pytest.mark.slow
@pytest.mark.parametrize(("failing", "status"), [("none", 0), ("default", 1), ("--mindspore", 1)])
def test_continuous_integration_runs_both_rings(tmp_path: Path, failing: str, status: int) -> None:
    """One after the other whatever the first one says; arguments are for one call."""
    for folder in (".ci", "scripts"):
        (tmp_path / folder).mkdir()
    run = tmp_path / ".ci" / "run"
    shutil.copy(Path(__file__).parents[2] / ".ci" / "run", run)
    test = tmp_path / "scripts" / "test"
    test.write_text(f'echo "${{*:-default}}" >> {tmp_path}/called; [ "${{1:-default}}" != {failing} ]\n')
    test.write_text("#!/usr/bin/env bash\n" + test.read_text())
    test.chmod(0o755)
    assert subprocess.run([run]).returncode == status
    assert (tmp_path / "called").read_text().splitlines() == ["default", "--mindspore"]
    assert subprocess.run([run, "--fast", "-k", "x"]).returncode == 0
    assert (tmp_path / "called").read_text().splitlines()[2:] == ["--fast -k x"]
