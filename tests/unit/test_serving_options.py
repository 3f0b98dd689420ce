"""Options of the server: flags before the environment before a file, names of models, and refusals in one line."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from kimi_vl.cli import main
from kimi_vl.serving import options
from kimi_vl.serving.options import OptionError, ServerOptions


def gather(*flags: str, **environment: str) -> ServerOptions:
    parser = argparse.ArgumentParser()
    options.add_arguments(parser)
    return options.gather(parser.parse_args(flags), environment)


def test_defaults():
    assert gather() == ServerOptions()
    assert (ServerOptions().host, ServerOptions().port) == ("127.0.0.1", 8000)
    assert gather(KIMI_VL_PORT="", KIMI_VL_LENIENT="") == ServerOptions()


def test_flags_come_before_the_environment_before_a_file(tmp_path: Path):
    file = tmp_path / "server.toml"
    file.write_text('port = 1\nhost = "::1"\napi_keys = ["a", "b"]\ndeadline_s = 5\nlenient = true\n')
    config = ("--config", str(file))
    found = gather(*config)
    assert (found.port, found.host, found.api_keys, found.deadline_s, found.lenient) == (
        1,
        "::1",
        ("a", "b"),
        5.0,
        True,
    )
    found = gather(*config, KIMI_VL_PORT="2", KIMI_VL_API_KEYS="c, d,", KIMI_VL_LENIENT="0", KIMI_VL_DEADLINE_S="7.5")
    assert (found.port, found.host, found.api_keys, found.deadline_s, found.lenient) == (
        2,
        "::1",
        ("c", "d"),
        7.5,
        False,
    )
    assert gather(*config, "--port", "3", KIMI_VL_PORT="2").port == 3
    found = gather("--served-model-name", "x", "--served-model-name", "y", KIMI_VL_SERVED_MODEL_NAME="z")
    assert found.names() == ("x", "y")


WRONG = [
    (("--port", "x"), {}, "--port must be a whole number, not 'x'"),
    (("--port", "65536"), {}, "--port must be at most 65535"),
    (("--port", "-1"), {}, "--port must be at least 0"),
    (("--host", ""), {}, "--host must not be empty"),
    (("--deadline-s", "0"), {}, "--deadline-s must be at least 0.1"),
    (("--deadline-s", "nan"), {}, "--deadline-s must be at least 0.1"),
    (("--max-num-seqs", "1.5"), {}, "--max-num-seqs must be a whole number, not '1.5'"),
    (
        ("--reasoning-field", "content"),
        {},
        "--reasoning-field must be a name of small letters that the message does not have yet",
    ),
    (
        ("--reasoning-field", 'a"b'),
        {},
        "--reasoning-field must be a name of small letters that the message does not have yet",
    ),
    ((), {"KIMI_VL_PORT": "x"}, "KIMI_VL_PORT must be a whole number, not 'x'"),
    ((), {"KIMI_VL_LENIENT": "maybe"}, "KIMI_VL_LENIENT must be 1 or 0, not 'maybe'"),
    (("--config", "/nowhere.toml"), {}, "/nowhere.toml: cannot be read (No such file or directory)"),
]


@pytest.mark.parametrize(("flags", "environment", "said"), WRONG, ids=lambda value: str(value)[:30])
def test_wrong_options_are_refused_in_one_line(
    flags: tuple[str, ...],
    environment: dict[str, str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    with pytest.raises(OptionError) as caught:
        gather(*flags, **environment)
    assert str(caught.value) == said
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    assert main.main(["serve", *flags]) == 1
    assert capsys.readouterr().err == f"error: {said}\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("port = 'x'", "port must be a whole number"),
        ("port = true", "port must be a whole number"),
        ("port = 1.5", "port must be a whole number"),
        ("lenient = 1", "lenient must be true or false"),
        ("api_keys = 'x'", "api_keys must be a list of texts"),
        ("api_keys = ['']", "api_keys must be a list of texts"),
        ("api_keys = [1]", "api_keys must be a list of texts"),
        ("nothing = 1", "there is no option nothing"),
        ("port", "is not TOML"),
        ("[server]\nport = 1", "there is no option server"),
    ],
)
def test_wrong_files_are_refused_by_their_name(tmp_path: Path, text: str, said: str):
    file = tmp_path / "server.toml"
    file.write_text(text)
    with pytest.raises(OptionError) as caught:
        gather("--config", str(file))
    assert str(caught.value).startswith(f"{file}: {said}") and "\n" not in str(caught.value)


def test_keys_are_not_taken_from_the_command_line(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        gather("--api-keys", "x")


@pytest.mark.parametrize(
    ("model", "first", "also", "never"),
    [
        ("demo", "kimi-vl-demo", ["demo", "moonshotai/Kimi-VL-A3B-Thinking", "Kimi-VL-A3B-Instruct"], ["gpt-4", ""]),
        ("thinking", "moonshotai/Kimi-VL-A3B-Thinking", ["Kimi-VL-A3B-Thinking", "thinking"], ["demo", "Kimi"]),
        ("thinking-2506", "moonshotai/Kimi-VL-A3B-Thinking-2506", ["kimi-vl-a3b-thinking-2506"], ["thinking"]),
        ("me/tuned@v1", "me/tuned", ["tuned", "TUNED", "me/tuned@v1"], ["me"]),
        ("/models/tuned/", "tuned", ["/models/tuned/"], ["models"]),
        ("https://host.example/tuned.tar", "tuned", [], ["host.example"]),
    ],
)
def test_names_of_a_model(model: str, first: str, also: list[str], never: list[str]):
    server = ServerOptions(model=model)
    assert server.names() == (first,)
    for name in (None, first, *also, "api-kimi-vl", "api-kimi-vl-thinking", "api-kimi-vl-thinking-2506"):
        assert server.served(name) == first
    for name in never:
        assert server.served(name) is None


def test_names_that_were_given_are_the_ones_that_are_listed():
    server = ServerOptions(model="demo", served_model_name=("one", "two"))
    assert server.names() == ("one", "two")
    assert [server.served(name) for name in ("one", "two", "TWO", None, "demo")] == ["one", "two", "two", "one", "one"]


def test_cogs_server_has_options_of_its_own(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr("signal.signal", lambda *_: None)
    ran: list[tuple[object, ...]] = []
    monkeypatch.setattr("kimi_vl.cli.programs.run", lambda *arguments: ran.append(arguments) or 0)
    assert main.main(["serve", "--cog", "--port", "5001"]) == 0
    assert ran == [("serve --cog", "cog_local.server", ["--port", "5001"])]
    assert main.main(["serve", "--port", "5001", "--cog"]) == 1
    assert capsys.readouterr().err == "error: --cog comes first: kimi-vl serve --cog …\n"
