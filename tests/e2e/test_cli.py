"""scripts/predict and what it is made of."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cog_local import server as cog_server
from cog_local.client import Event, parse_events
from cog_local.predict import InputError, plain_error, read_inputs
from cog_local.schema import generate
from cog_local.server import ROOT, Server, ServerError, model_environment
from tests.weights_world import FaultServer

from .conftest import picture

PREDICT = str(ROOT / "scripts" / "predict")
SHORT = ["-i", "prompt=Hello.", "-i", "temperature=0", "-i", "max_length_tokens=40"]
LONG = ["-i", "prompt=Tell me a long story.", "-i", "temperature=0", "-i", "max_length_tokens=100000"]


# Reading the command line


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return generate((ROOT / "predict.py").read_text(encoding="utf-8"))


def url_of(content: bytes, mime: str) -> str:
    return f"data:{mime};base64,{base64.b64encode(content).decode()}"


@pytest.mark.parametrize(
    ("pair", "value"),
    [
        ("prompt=a=b", "a=b"),
        ("prompt=", ""),
        ("temperature=0", 0.0),
        ("top_k=4", 4),
        ("seed=99999999999", 99999999999),
        ("output_format=json", "json"),
        ("image=https://a.example/b.png", "https://a.example/b.png"),
        ("images=https://a.example/b.png", ["https://a.example/b.png"]),
        ('images=["https://a.example/b.png"]', ["https://a.example/b.png"]),
        ('messages=[{"role": "user", "content": "hi"}]', [{"role": "user", "content": "hi"}]),
        ('messages={"role": "user", "content": "hi"}', [{"role": "user", "content": "hi"}]),
    ],
)
def test_values_get_the_type_of_the_schema(document: dict[str, Any], pair: str, value: Any) -> None:
    inputs = read_inputs([pair], document)
    assert inputs == {pair.partition("=")[0]: value}
    assert type(next(iter(inputs.values()))) is type(value)


def test_files_become_data_urls(document: dict[str, Any], tmp_path: Path) -> None:
    for name in ("a.png", "b c.jpg", "d.webp", "e.txt", "f"):
        (tmp_path / name).write_bytes(name.encode())
    pairs = [f"image=@{tmp_path}/a.png", f"images=@{tmp_path}/b c.jpg", f"images=@{tmp_path}/d.webp"]
    assert read_inputs([*pairs, f"prompt=@{tmp_path}/e.txt", f"system_prompt=@{tmp_path}/f"], document) == {
        "image": url_of(b"a.png", "image/png"),
        "images": [url_of(b"b c.jpg", "image/jpeg"), url_of(b"d.webp", "image/webp")],
        "prompt": url_of(b"e.txt", "text/plain"),
        "system_prompt": url_of(b"f", "application/octet-stream"),
    }


def test_messages_may_be_a_file(document: dict[str, Any], tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hi"}]
    (tmp_path / "chat.json").write_text(json.dumps(messages))
    assert read_inputs([f"messages=@{tmp_path}/chat.json"], document) == {"messages": messages}


@pytest.mark.parametrize(
    ("pair", "hint"),
    [
        ("promt=hi", "did you mean prompt?"),
        ("zzz=hi", "there are: prompt, image"),
        ("prompt", "write -i prompt=value"),
        ("top_k=many", "type integer"),
        ("temperature=warm", "type number"),
        ("messages=hi", "must be JSON"),
        ("image=@/nowhere/a.png", "cannot read /nowhere/a.png"),
    ],
)
def test_mistakes_on_the_command_line(document: dict[str, Any], pair: str, hint: str) -> None:
    with pytest.raises(InputError) as caught:
        read_inputs([pair], document)
    assert hint in str(caught.value)


def test_plain_error() -> None:
    wrapped = "Prediction failed: Generator iteration error: UserError: E_PARAMETER: top_k must be whole."
    assert plain_error(wrapped) == "E_PARAMETER: top_k must be whole."
    assert plain_error("Worker crashed") == "Worker crashed"


def test_server_sent_events() -> None:
    body = (
        b": keep-alive\n\n"
        b'event: start\ndata: {"id":"a"}\n\n'
        b'event: output\r\ndata: {"chunk":\r\ndata: "\xc3\xa9\\n"}\r\n\r\n'
        b'data:{"x":1}\n\n'
        b"event: lost\n\n"
        b'event: cut\ndata: {"never'
    )
    assert list(parse_events(body.splitlines(keepends=True))) == [
        Event("start", {"id": "a"}),
        Event("output", {"chunk": "é\n"}),
        Event("message", {"x": 1}),
    ]


@pytest.mark.parametrize(
    ("environment", "gpu", "model", "notices"),
    [
        ({}, False, "demo", 1),
        ({}, True, "thinking", 0),
        ({"KIMI_VL_MODEL": "instruct"}, False, "instruct", 0),
        ({"KIMI_VL_MODEL": ""}, False, "demo", 1),
    ],
)
def test_which_model(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], gpu: bool, model: str, notices: int
) -> None:
    monkeypatch.setattr(cog_server, "has_gpu", lambda environment: gpu)
    said: list[str] = []
    assert model_environment(environment, said.append)["KIMI_VL_MODEL"] == model
    assert len(said) == notices
    assert all(line.startswith("no CUDA GPU found: answering with the demo model") for line in said)


def test_a_model_folder_is_found_from_the_caller_s_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "models" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    settled = model_environment({"KIMI_VL_MODEL": "models/mine"}, print)
    assert settled["KIMI_VL_MODEL"] == str(tmp_path / "models" / "mine")


def test_a_hidden_gpu_is_no_gpu() -> None:
    assert not cog_server.has_gpu({"CUDA_VISIBLE_DEVICES": ""})
    assert not cog_server.has_gpu({"CUDA_VISIBLE_DEVICES": "-1"})


# Starting a server


def test_a_taken_port_is_an_error_and_not_somebody_else_s_server(server: Server) -> None:
    second = Server(environment=server.environment, port=server.port)
    with pytest.raises(ServerError, match="Address already in use"), second:
        pass
    assert server.client.health()["status"] == "READY"


# Running it


@pytest.fixture
def mark(processes: Callable[[str], list[int]]) -> Iterator[str]:
    """A text for the environment of a command; afterwards no process with it may be left."""
    text = f"KIMI_VL_TEST_{uuid.uuid4().hex}"
    yield text
    deadline = time.monotonic() + 300
    while processes(text) and time.monotonic() < deadline:
        time.sleep(0.05)
    left = processes(text)
    for process in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    assert left == []


def command(
    mark: str, *arguments: str, model: str | None = "demo", cwd: Path = ROOT, **variables: str
) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if name != "KIMI_VL_MODEL"}
    environment[mark] = environment["OMP_NUM_THREADS"] = "1"
    environment["CUDA_VISIBLE_DEVICES"] = ""
    environment |= variables
    if model is not None:
        environment["KIMI_VL_MODEL"] = model
    return subprocess.Popen(
        [PREDICT, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        cwd=cwd,
        env=environment,
    )


def run(mark: str, *arguments: str, **options: Any) -> tuple[int, str, str]:
    process = command(mark, *arguments, **options)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def test_the_answer_alone_is_on_stdout(mark: str, tmp_path: Path) -> None:
    (tmp_path / "red.png").write_bytes(picture())
    images = ["-i", "image=@red.png", "-i", "images=@red.png"]
    code, out, err = run(mark, *SHORT, *images, model=None, cwd=tmp_path)
    assert code == 0, err
    assert out.strip() and out.endswith("\n")
    assert "setup" not in out and "setup: loading the model" in err
    assert err.count("no CUDA GPU found: answering with the demo model") == 1


def test_json(mark: str) -> None:
    code, out, err = run(mark, *SHORT, "--json")
    assert code == 0, err
    response = json.loads(out)
    assert response["status"] == "succeeded" and response["metrics"]["output_token_count"] > 0
    assert "no CUDA GPU" not in err, "the model was chosen by the caller"


def test_text_is_printed_as_it_comes(mark: str, endless_model: Path) -> None:
    process = command(mark, *LONG, model=str(endless_model))
    assert process.stdout is not None
    for _ in range(4):
        assert os.read(process.stdout.fileno(), 65536)
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=300)
    assert process.returncode == 130


KNOWN_COMMANDS = {
    ("prompt=Describe this image in detail.", "image=@images/demo1.jpeg"): "The picture shows 3 objects on a light "
    "ground. From left to right: a red circle, a green triangle and a blue star.",
    ("prompt=Explain the concept of multimodal large language models.",): "multimodal",
    (
        "prompt=Solve this math problem shown in the image.",
        "image=@images/math_problem.png",
        "temperature=0.6",
    ): "25 + 13 = 38",
}


@pytest.mark.parametrize("inputs", KNOWN_COMMANDS, ids=lambda inputs: inputs[0][7:20])
def test_the_commands_that_everybody_knows(mark: str, inputs: tuple[str, ...]) -> None:
    code, out, err = run(mark, *[word for pair in inputs for word in ("-i", pair)], "-i", "seed=1", model=None)
    assert code == 0, err
    thinking, closer, said = out.strip().partition("◁/think▷")
    assert thinking.startswith("◁think▷") and closer
    assert KNOWN_COMMANDS[inputs] in said


def test_errors_of_the_model(mark: str) -> None:
    code, out, err = run(mark, "-i", "prompt=")
    assert (code, out) == (1, "")
    assert err.splitlines()[-1].startswith("error: E_PROMPT_EMPTY: ")


def test_values_out_of_bounds(mark: str) -> None:
    code, out, err = run(mark, *SHORT, "-i", "top_p=2")
    assert (code, out) == (1, "")
    assert err.splitlines()[-1].startswith("error: top_p: ")


def test_unknown_inputs_are_refused_before_anything_starts(mark: str) -> None:
    code, out, err = run(mark, "-i", "promt=hi")
    assert (code, out) == (1, "")
    assert err == "error: there is no input promt; did you mean prompt?\n"


def test_a_model_that_cannot_be_loaded(mark: str, tmp_path: Path) -> None:
    code, out, err = run(mark, *SHORT, model=str(tmp_path / "missing"))
    assert (code, out) == (1, "")
    assert err.splitlines()[-1].startswith("error: the set-up failed: ")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupting_cancels_and_leaves_nothing(mark: str, endless_model: Path, number: signal.Signals) -> None:
    process = command(mark, *LONG, model=str(endless_model))
    assert process.stdout is not None
    assert os.read(process.stdout.fileno(), 65536)
    process.send_signal(number)
    _, err = process.communicate(timeout=300)  # the request alone would take many minutes
    assert process.returncode == 130
    assert err.splitlines()[-1] == "canceled"


def test_being_killed_outright_leaves_nothing(mark: str, endless_model: Path) -> None:
    process = command(mark, *LONG, model=str(endless_model))
    assert process.stdout is not None
    assert os.read(process.stdout.fileno(), 65536)
    process.kill()
    process.communicate(timeout=300)  # and the mark finds no process afterwards


def test_interrupting_the_setup_leaves_nothing(mark: str, tmp_path: Path) -> None:
    """A set-up that waits for a server that does not answer."""
    (tmp_path / "model.tar").write_bytes(bytes(10**6))
    with FaultServer(tmp_path) as silent:
        silent.limit = 0
        process = command(mark, *SHORT, model=f"{silent.url}model.tar", KIMI_VL_CACHE=str(tmp_path / "cache"))
        while not silent.requests:
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=300)
    assert process.returncode == 130
