"""The command `kimi-vl` as a person uses it: on a terminal, in a pipe, with mistakes, and interrupted."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from kimi_vl.cli import ask, programs
from kimi_vl.cli.main import main
from kimi_vl.events import Answer, Done, MediaUse, Usage
from kimi_vl.media import sources

ROOT = Path(__file__).parents[2]
PICTURE = str(ROOT / "images" / "math_problem.png")
NOTICE = "no CUDA GPU found: answering with the demo model, not with Kimi-VL (--model chooses)\n"
SUM, ANSWER = "What is 12 + 30?", "12 + 30 = 42"
THINKING = "The question is 12 + 30. Ones: 2 + 0 = 2. Tens: 1 + 3 = 4. So 42."
DIM, PLAIN = "\x1b[2m", "\x1b[0m"


def environment(**changes: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("KIMI_VL")}
    return {**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **changes}


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-P", "-m", "kimi_vl.cli", *arguments]


@dataclass(frozen=True)
class Result:
    returncode: int
    stdout: str
    stderr: str


class Scripted:
    """A pipeline whose answer is given, where the demo model could not say it."""

    def __init__(self, answer: str):
        self.answer = answer

    def prepare(self, messages: Any, images: list[Path], **params: Any) -> SimpleNamespace:
        sizes = tuple(Image.open(image).size for image in images)
        return SimpleNamespace(image_sizes=sizes, media=[MediaUse("image", 1, *size) for size in sizes])

    def stream(self, prepared: SimpleNamespace, **params: Any) -> Iterator[Any]:
        yield Answer(self.answer)
        yield Done("", self.answer, "stop", "none", Usage(1, 0, 1, 0), 0, 0.0, 0.0, image_sizes=prepared.image_sizes)

    def pictures(self, messages: Any, images: list[Path]) -> list[Image.Image]:
        return [Image.open(image).convert("RGB") for image in images]

    def close(self) -> None:
        pass


def test_boxes_are_drawn_on_the_picture(
    run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pictures = [str(tmp_path / f"{name}.png") for name in "ab"]
    for picture in pictures:
        Image.new("RGB", (200, 100), "white").save(picture)
    answer = (
        '[{"bbox": [0.25, 0.2, 0.75, 0.8], "label": "a\x1bdog"}, {"image": 2, "point": [0.5, 0.5], "label": "cat"}]'
    )
    monkeypatch.setattr(ask, "_load", lambda model, status: Scripted(answer))
    result = run("ask", "Where?", *pictures, "--boxes", str(tmp_path / "out.png"))
    assert result.returncode == 0 and result.stdout == answer + "\n"
    assert result.stderr == f"{tmp_path / 'out.png'}: 1: a\ufffddog, 2: cat\n"
    first, second = Image.open(tmp_path / "out.png"), Image.open(tmp_path / "out-2.png")
    assert first.getpixel((149, 60)) != (255, 255, 255) and second.getpixel((149, 60)) == (255, 255, 255)
    assert second.getpixel((100, 50)) != (255, 255, 255)
    found = json.loads(run("ask", "Where?", *pictures, "--json").stdout)["grounding"]
    assert [(each["label"], each["box"], each["points"], each["image"]) for each in found["findings"]] == [
        ("a\x1bdog", [50.0, 20.0, 150.0, 80.0], [], 0),
        ("cat", None, [[100.0, 50.0]], 1),
    ]


@pytest.mark.parametrize(
    "path, picture", [("out.txt", True), ("out", True), ("no_such_folder/out.png", True), ("out.png", False)]
)
def test_a_picture_that_cannot_be_drawn_is_refused_before_the_model_is_loaded(
    run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, path: str, picture: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delattr(ask, "_load")
    result = run("ask", "Where?", *([PICTURE] if picture else []), "--boxes", path)
    assert result.returncode != 0 and result.stderr.count("\n") == 1 and "--boxes" in result.stderr


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Result]]:
    """Calls the command in this process: starting one with torch in it takes far longer than what it does."""
    for name in [name for name in os.environ if name.startswith("KIMI_VL")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("KIMI_VL_CACHE", str(ROOT / "model_cache"))
    threads, handler = torch.get_num_threads(), signal.getsignal(signal.SIGTERM)

    def call(*arguments: str, said: str = "", **changes: str) -> Result:
        for name, value in changes.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr("sys.stdin", io.StringIO(said))
        try:
            status = main(arguments)
        except SystemExit as ended:  # argparse
            status = ended.code if isinstance(ended.code, int) else 0
        out, err = capsys.readouterr()
        return Result(status, str(out), str(err))

    yield call
    torch.set_num_threads(threads)
    signal.signal(signal.SIGTERM, handler)


def in_a_process(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments), env=environment(), capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False
    )


def on_terminal(*arguments: str, **changes: str) -> tuple[int, str]:
    """The exit status and everything that a terminal was sent."""
    master, slave = pty.openpty()
    with subprocess.Popen(
        command(*arguments), stdin=slave, stdout=slave, stderr=slave, env=environment(**changes)
    ) as process:
        os.close(slave)
        shown = bytearray()
        with contextlib.suppress(OSError):  # the terminal closes with its last user
            while piece := os.read(master, 4096):
                shown += piece
        os.close(master)
    return process.returncode, shown.decode().replace("\r\n", "\n")


def read_until(stream: Any, text: str) -> str:
    shown = ""
    while text not in shown:
        ready, _, _ = select.select([stream], [], [], 300)
        piece = os.read(stream.fileno(), 4096).decode() if ready else ""
        assert piece, f"ended before {text!r}: {shown}"
        shown += piece
    return shown


def test_a_program_reads_the_answer_alone() -> None:
    found = in_a_process("ask", "What is the result?", PICTURE, "--temperature", "0")
    assert (found.returncode, found.stdout) == (0, "25 + 13 = 38\n")
    assert found.stderr.startswith(NOTICE)


@pytest.mark.parametrize(
    ("thinking", "text"),
    [("show", f"{THINKING}\n\n{ANSWER}\n"), ("hide", f"{ANSWER}\n"), ("only", f"{THINKING}\n")],
)
def test_thinking_is_shown_hidden_or_all_there_is(run, thinking: str, text: str) -> None:
    found = run("ask", SUM, "--temperature", "0", "--thinking", thinking)
    assert (found.returncode, found.stdout) == (0, text)


def test_json_is_the_whole_result(run) -> None:
    found = json.loads(run("ask", SUM, "--temperature", "0", "--json", "--seed", "7").stdout)
    assert (found["reasoning"], found["answer"], found["finish_reason"], found["seed"]) == (THINKING, ANSWER, "stop", 7)
    assert found["usage"]["output_tokens"] > found["usage"]["reasoning_tokens"] > 0


@pytest.mark.parametrize("arguments", [[], ["-"]])
def test_the_question_may_come_by_standard_input(run, arguments: list[str]) -> None:
    assert run("ask", *arguments, "--temperature", "0", said=SUM).stdout == f"{ANSWER}\n"
    assert run("ask", "-", PICTURE, "--temperature", "0", said="What is the result?\n").stdout == "25 + 13 = 38\n"


def test_options_reach_the_model(run) -> None:
    stopped = run("ask", SUM, "--temperature", "0", "--stop", "= 4", "--stop", "never")
    assert stopped.stdout == "12 + 30 \n"
    assert run("ask", SUM, "--temperature", "0", "--thinking-budget", "0", "--thinking", "only").stdout == ""
    short = json.loads(run("ask", SUM, "--max-tokens", "3", "--json").stdout)
    assert (short["usage"]["output_tokens"], short["finish_reason"]) == (3, "length")


def test_a_terminal_shows_the_thinking_dimmed() -> None:
    status, shown = on_terminal("ask", SUM, "--temperature", "0")
    assert status == 0
    assert f"{DIM}{THINKING}{PLAIN}\n\n{ANSWER}\n" in shown
    assert "loading the model" in shown and shown.index("\x1b[K") < shown.index(THINKING)


def test_a_terminal_counts_the_thinking_that_it_hides() -> None:
    status, shown = on_terminal("ask", SUM, "--temperature", "0", "--thinking", "hide")
    assert status == 0 and THINKING not in shown
    assert re.search(r"thinking \(\d+\)", shown) and shown.endswith(f"{ANSWER}\n")


def test_colour_can_be_turned_off() -> None:
    _, shown = on_terminal("ask", SUM, "--temperature", "0", NO_COLOR="1")
    assert f"{THINKING}\n\n{ANSWER}\n" in shown and f"{DIM}{THINKING}" not in shown


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ["ask", "x", "nowhere.png"],
            "error: nowhere.png: No such file or directory; name an image, a video or a PDF document.",
        ),
        (["ask", "x", "/tmp"], "error: /tmp: Is a directory; name an image, a video or a PDF document."),
        (["ask", PICTURE], f'error: the question comes before the image: kimi-vl ask "What is this?" {PICTURE}'),
        (["ask", "x", "--model", str(ROOT / "images")], f"error: {ROOT}/images: holds no checkpoint (config.json)"),
        (["ask", "x", "--model", "nobody"], "error: model 'nobody' is neither one of thinking"),
        (["ask", "x", "--temperature", "3"], "error: temperature must be from 0 to 2; change it."),
        (["ask", "x", "--max-tokens", "0"], "error: max_length_tokens must be from 1 to 131072; change it."),
        (["ask", "x", str(ROOT / "LICENSE")], "error: "),
        (["pack", "/nowhere", "/tmp/nowhere.tar"], "error: /nowhere: "),
        (["fetch", "nobody"], "error: model 'nobody' is neither"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(run, arguments: list[str], line: str) -> None:
    found = run(*arguments)
    *before, last = found.stderr.splitlines()
    assert (found.returncode, found.stdout) == (1, "")
    assert last.startswith(line) and "Traceback" not in found.stderr
    assert all(text.startswith(("no CUDA GPU", "loaded ", "a first request took ")) for text in before)


@pytest.mark.parametrize(
    "arguments",
    [[], ["frob"], ["ask", "x", "--wrong"], ["ask", "x", "--top-k", "many"], ["ask", "x", "--thinking", "maybe"],
     ["check", "extra"], ["pack", "one"]],
)  # fmt: skip
def test_a_wrong_command_line_shows_the_usage(run, arguments: list[str]) -> None:
    found = run(*arguments)
    assert found.returncode == 2 and found.stdout == ""
    assert found.stderr.startswith("usage: kimi-vl") and ": error: " in found.stderr.splitlines()[-1]


@pytest.mark.parametrize("name", ["no\nsuch\r.png", "no\x1b[31msuch.png", "no\u202esuch.png", "no\udcffsuch.png"])
def test_a_name_neither_breaks_the_line_nor_steers_the_terminal(run, name: str) -> None:
    found = run("ask", "What is this?", name)
    assert found.returncode == 1
    assert found.stderr.endswith(".png: No such file or directory; name an image, a video or a PDF document.\n")
    assert found.stderr[:-1].isprintable()


@pytest.mark.parametrize("length", [100, 255, 256, 5000])
def test_a_long_question_is_no_file(run, length: int) -> None:
    question = "a" * length + ". What is 12 + 30?"
    assert run("ask", "--max-tokens", "1", question).returncode == 0


def test_a_question_that_never_ends_is_too_long(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kimi_vl.cli.ask._MAX_PROMPT", 100)
    found = run("ask", said="a" * 101)
    assert (found.returncode, found.stderr) == (1, "error: the question on standard input is too long; shorten it.\n")
    assert run("ask", "--max-tokens", "1", said="a" * 100).returncode == 0


def test_a_pipe_is_an_image_where_somebody_writes_to_it(run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pipe, opened = tmp_path / "pipe.png", sources._open_at_once
    os.mkfifo(pipe)
    found = run("ask", "What is the result?", str(pipe))
    assert (found.returncode, found.stderr.splitlines()[-1]) == (1, "error: an image is empty; send the file again.")
    writer = os.open(pipe, os.O_RDWR)
    os.write(writer, Path(PICTURE).read_bytes())  # less than a pipe holds

    def open_then_end(path: str, flags: int) -> int:
        number = opened(path, flags)
        os.close(writer)
        return number

    monkeypatch.setattr(sources, "_open_at_once", open_then_end)
    found = run("ask", "--temperature", "0", "What is the result?", str(pipe))
    assert (found.returncode, found.stdout) == (0, "25 + 13 = 38\n")


@pytest.mark.parametrize(
    ("closed", "status", "out", "err"),
    [("stdout", 0, "", "NOTICE"), ("stderr", 0, ANSWER, ""), ("stdin", 0, ANSWER, "NOTICE"), ("all", 0, "", "")],
)
def test_standard_streams_may_be_closed(closed: str, status: int, out: str, err: str) -> None:
    ends = {"stdin": "<&-", "stdout": ">&-", "stderr": "2>&-", "all": "<&- >&- 2>&-"}[closed]
    shell = ["bash", "-c", f'exec "$@" {ends}', "-", *command("ask", "--temperature", "0", SUM)]
    found = subprocess.run(shell, env=environment(), capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout.strip()) == (status, out)
    assert found.stderr.startswith(NOTICE) if err else not found.stderr


def test_an_error_does_not_go_where_the_answer_goes() -> None:
    shell = ["bash", "-c", 'exec "$@" 2>&-', "-", *command("ask", SUM, "no-such.png")]
    found = subprocess.run(shell, env=environment(), capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout, found.stderr) == (1, "", "")


@pytest.mark.parametrize("port", ["0", "-1", "65536", "99999", "1e3", "", "٣"])
def test_a_port_that_cannot_be_is_a_wrong_command_line(port: str, monkeypatch, capsys) -> None:
    from cog_local import server

    monkeypatch.setattr("sys.argv", ["serve", f"--port={port}"])
    monkeypatch.setattr(server, "interrupt_on_signals", lambda: None)
    monkeypatch.setattr(server, "Server", lambda **_: pytest.fail("it was started"))
    with pytest.raises(SystemExit) as ended:
        server.main()
    assert ended.value.code == 2
    assert "a port is a number from 1 to 65535" in capsys.readouterr().err


def test_without_a_home_a_cache_is_asked_for(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kimi_vl.cli.programs.CHECKOUT", None)
    monkeypatch.delenv("KIMI_VL_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(
        Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("Could not determine home directory."))
    )
    found = run("ask", SUM)
    assert (found.returncode, found.stderr) == (
        1, "error: there is no home folder to keep models in; set KIMI_VL_CACHE to a folder\n"
    )  # fmt: skip


def test_an_unexpected_error_is_one_line_and_can_be_looked_into(run) -> None:
    broken = {"KIMI_VL_KERNELS": "wrong"}
    found = run("ask", SUM, **broken)
    assert found.returncode == 1 and found.stderr.splitlines()[-1].startswith("error: ValueError: ")
    assert "Traceback" not in found.stderr
    assert "Traceback" in run("--debug", "ask", SUM, **broken).stderr


def test_a_reader_that_leaves_ends_it_quietly() -> None:
    # the reader is gone before the first piece, so that writing it cannot succeed
    shell = ["bash", "-c", '"$@" | true; echo "${PIPESTATUS[0]}"', "bash", *command("ask", SUM)]
    found = subprocess.run(shell, env=environment(), capture_output=True, text=True, check=False)
    assert found.stdout == "141\n"
    assert all(
        line.startswith(("no CUDA GPU", "loaded ", "a first request took ")) for line in found.stderr.splitlines()
    )


@pytest.mark.parametrize(("number", "moment"), [(signal.SIGTERM, "loading"), (signal.SIGINT, "answering")])
def test_an_interruption_is_one_line_and_a_status(number: signal.Signals, moment: str, endless_model: Path) -> None:
    endless = ["--model", str(endless_model), "--temperature", "0", "--max-tokens", "100000", "--thinking", "show"]
    with subprocess.Popen(
        command("ask", "Tell me a story.", *endless),
        env=environment(),
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdout and process.stderr
        said = read_until(process.stderr, "\n")  # the first line comes before the weights
        if moment == "answering":
            assert os.read(process.stdout.fileno(), 1)
        assert process.poll() is None
        process.send_signal(number)
        _, rest = process.communicate(timeout=300)
    lines = (said + rest.decode()).splitlines()
    assert process.returncode == 130 and lines[-1] == "canceled"
    assert not [line for line in lines if "Traceback" in line]


def test_check_says_what_is_here(run) -> None:
    text = run("check").stdout
    assert re.search(r"^device +no CUDA GPU", text, re.M) and re.search(r"^  demo +here +fits", text, re.M)
    found = json.loads(run("check", "--json").stdout)
    assert [fit["model"] for fit in found["models"]] == ["demo", "thinking", "thinking-2506", "instruct"]
    assert found["device"]["total"] >= found["device"]["free"] > 0 and found["limits"]["images a request"] == 64


def test_fetch_and_pack(run, tmp_path: Path) -> None:
    folder = run("fetch", "demo").stdout.strip()
    assert Path(folder) == ROOT / "kimi_vl" / "demo"
    packed = run("pack", folder, str(tmp_path / "demo.tar"))
    assert packed.returncode == 0 and re.search(r"revision [0-9a-f]{40}, sha256 [0-9a-f]{64}", packed.stdout)


def test_the_server_keeps_models_where_the_other_commands_do(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KIMI_VL_CACHE")
    monkeypatch.setattr(programs, "CHECKOUT", None)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    seen = []
    monkeypatch.setattr(programs, "run", lambda *_: seen.append(os.environ["KIMI_VL_CACHE"]) or 0)
    assert run("serve", "--cog").returncode == 0 and seen == ["/somewhere/kimi-vl"]


@pytest.mark.parametrize("name", ["serve", "bench"])
def test_programs_beside_the_package_go_by_its_name(name: str) -> None:
    found = in_a_process(name, "--help")
    assert found.returncode == 0 and found.stdout.startswith(f"usage: kimi-vl {name} ")
    assert in_a_process(name, "--wrong").returncode == 2


@pytest.mark.nightly
def test_an_interruption_at_any_moment_leaves_nothing() -> None:
    for step in range(60):
        with subprocess.Popen(
            command("ask", SUM), env=environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ) as process:  # fmt: skip
            time.sleep(0.2 + step * 0.04)
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=300)
        assert process.returncode in (0, 130, -signal.SIGINT)
        if process.returncode == 130:
            assert err.decode().splitlines()[-1] == "canceled" and b"Traceback" not in err, (step, err)
