"""``kimi-vl batch`` on the demo model: killed at any moment, it goes on; and what its user sees."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kimi_vl.cli.main import main

ROOT = Path(__file__).parents[2]
PICTURES = ROOT / "images"
COUNT = 160


def lines(count: int = COUNT) -> list[bytes]:
    """Questions with and without a picture, answered without thinking."""
    found = []
    for number in range(count):
        content: Any = f"What is {number % 90 + 1} + {number // 90 + 2}?"
        if number % 50 == 7:
            image = {"type": "image_url", "image_url": {"url": "math_problem.png"}}
            content = [image, {"type": "text", "text": content}]
        body = {"messages": [{"role": "user", "content": content}], "temperature": 0, "thinking_budget": 0}
        line = {"custom_id": f"line-{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}
        found.append(json.dumps(line).encode() + b"\n")
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copy(PICTURES / "math_problem.png", tmp_path)
    (tmp_path / "in.jsonl").write_bytes(b"".join(lines()))
    return tmp_path


@pytest.fixture
def batch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., int]]:
    """Calls the command in this process."""
    threads, handler = torch.get_num_threads(), signal.getsignal(signal.SIGTERM)
    monkeypatch.setenv("KIMI_VL_MODEL", "demo")
    yield lambda *arguments: main(["batch", *map(str, arguments)])
    torch.set_num_threads(threads)
    signal.signal(signal.SIGTERM, handler)


def start(folder: Path, source: str = "in.jsonl", target: str = "out.jsonl", **streams: Any) -> Any:
    environment = {**os.environ, "KIMI_VL_MODEL": "demo", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "kimi_vl.cli", "batch", source, target]
    return subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, **streams)


def whole_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def stop_at(folder: Path, count: int, number: int) -> Any:
    """A run that gets a signal when there are so many answers."""
    process = start(folder)
    deadline = time.monotonic() + 300
    while whole_lines(folder / "out.jsonl") < count:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(number)
    process.wait()
    return process


def answers(path: Path) -> dict[str, str]:
    """The texts by custom_id, each of which must be there once."""
    found = [json.loads(line) for line in path.read_text().splitlines()]
    texts = {each["custom_id"]: each["response"]["body"]["choices"][0]["message"]["content"] for each in found}
    assert len(texts) == len(found)
    return texts


def test_killed_three_times_it_answers_as_if_it_had_not_been(
    folder: Path, batch: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    out = folder / "out.jsonl"
    for count in (10, 50, 90):
        process = stop_at(folder, count, signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL and count <= whole_lines(out) < COUNT
        with out.open("ab") as file:
            file.write(b'{"id": "batch_req_0123')  # a line that a kill tore
    before = out.read_bytes()
    assert batch(folder / "in.jsonl", out) == 0
    assert out.read_bytes().startswith(before[: before.rindex(b"\n") + 1])
    done = before.count(b"\n")
    assert f"{COUNT} answered ({done} of them before)" in capsys.readouterr().err
    assert batch(folder / "in.jsonl", folder / "whole.jsonl", "--ordered") == 0
    whole = answers(folder / "whole.jsonl")
    assert answers(out) == whole and len(whole) == COUNT
    assert list(whole) == [f"line-{number}" for number in range(COUNT)]
    assert whole["line-3"].startswith("4 + 2 = ")


@pytest.mark.nightly
def test_a_signal_ends_it_with_its_status_and_whole_lines(folder: Path) -> None:
    process = stop_at(folder, 20, signal.SIGTERM)
    assert process.returncode == 130
    assert process.stderr.read().decode().endswith("\ncanceled\n")
    data = (folder / "out.jsonl").read_bytes()
    assert data.endswith(b"\n") and 20 <= len(answers(folder / "out.jsonl")) < COUNT


def test_a_line_that_fails_makes_the_status_1(
    folder: Path, batch: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "in.jsonl").write_bytes(lines(2)[0] + b"nothing\n" + lines(2)[1])
    for _ in range(2):
        assert batch(folder / "in.jsonl", folder / "out.jsonl") == 1
        assert "3 answered" in (said := capsys.readouterr().err) and "1 failed" in said
    assert whole_lines(folder / "out.jsonl") == 3


def test_a_folder_is_described_by_one_command(tmp_path: Path, batch: Callable[..., int]) -> None:
    pictures, out = tmp_path / "pictures", tmp_path / "out.jsonl"
    (pictures / "sums").mkdir(parents=True)
    shutil.copy(PICTURES / "math_problem.png", pictures / "sums")
    shutil.copy(PICTURES / "demo1.jpeg", pictures)
    (pictures / "broken.png").write_bytes(b"not a picture")
    assert batch("--folder", pictures, "--prompt", "What is the result?", "--temperature", "0", out) == 1
    found = {each["custom_id"]: each["response"] for each in map(json.loads, out.read_text().splitlines())}
    assert found.keys() == {"broken.png", "demo1.jpeg", "sums/math_problem.png"}
    assert found["sums/math_problem.png"]["body"]["choices"][0]["message"]["content"] == "25 + 13 = 38"
    assert found["broken.png"]["body"]["error"]["code"] == "e_image_format"


@pytest.mark.nightly
def test_lines_go_through_pipes(folder: Path) -> None:
    with start(folder, "-", "-", stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdin.write(lines(1)[0])
        process.stdin.flush()  # an answer comes before the end of the lines
        first = json.loads(process.stdout.readline())
        process.stdin.write(lines(8)[7])
        process.stdin.close()
        second = json.loads(process.stdout.readline())
        assert process.stdout.read() == b""
    assert process.returncode == 0
    assert [first["custom_id"], second["custom_id"]] == ["line-0", "line-7"]
    assert second["response"]["body"]["usage"]["prompt_tokens_details"]["image_tokens"] > 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["in.jsonl"], "write: kimi-vl batch IN.jsonl OUT.jsonl"),
        (["in.jsonl", "in.jsonl"], "line 1 is no answer of a batch"),
        (["missing.jsonl", "out.jsonl"], "missing.jsonl: cannot be read (No such file or directory)"),
        (["in.jsonl", "missing/out.jsonl"], "missing/out.jsonl: cannot be written (No such file or directory)"),
        (["in.jsonl", "out.jsonl", "--prompt", "x"], "give these options with --folder"),
        (["--folder", ".", "out.jsonl"], "--prompt"),
        (["--folder", "missing", "--prompt", "x", "out.jsonl"], "missing: no pictures are there"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    arguments: list[str],
    says: str,
    folder: Path,
    batch: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(folder)
    assert batch(*arguments) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ") and says in last
    assert (folder / "in.jsonl").read_bytes() == b"".join(lines())


def test_the_file_of_lines_is_never_the_file_of_answers(
    folder: Path, batch: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "in.jsonl").write_bytes(b"")
    (folder / "other.jsonl").symlink_to(folder / "in.jsonl")
    assert batch(folder / "in.jsonl", folder / "other.jsonl") == 1
    assert "the answers would go to the file of the lines" in capsys.readouterr().err
