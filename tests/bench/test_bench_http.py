"""`scripts/bench http` asks the engine and the server for the same, and ends with its figures as JSON."""

from __future__ import annotations

import json
import socket
import threading

import pytest
from bench_suite import http, streams


def test_the_last_line_is_json(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KIMI_VL_MODEL", "demo")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    small = ["--rounds", "1", "--streams", "3", "--tokens", "12", "--first", "2", "--open", "70", "--open-tokens", "2"]
    assert http.main(small) == 0
    *_, last = capsys.readouterr().out.splitlines()
    figures = json.loads(last)
    [result] = figures["results"]
    assert result["streams"] == 3 and result["tokens_per_second_of_engine"] > 0
    for who in ("engine", "server"):
        assert result[who]["tokens_per_second"] > 0 and result[who]["first_text_s"] > 0
    assert 0 < figures["first"]["server_first_byte_ms"] <= figures["first"]["server_ms"]
    assert figures["open"]["streams"] == 70 and figures["open"]["errors"] == {}
    assert figures["open"]["megabytes_before"] > 10 and figures["open"]["last_first_byte_s"] > 0


HEAD = b"HTTP/1.1 200 OK\r\n\r\n"
EVENT = b'data: {"choices": [{"delta": {"%s": "%s"}}]}\n\n'
USAGE = b'data: {"choices": [], "usage": {"completion_tokens": 7}}\n\n'
END = b"data: [DONE]\n\n"


def stream_of(*pieces: bytes) -> streams.Stream:
    """What the client notes of a server that says ``pieces``, one after the other, and hangs up."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                asked = b""
                while not asked.endswith(b"}"):
                    asked += connection.recv(65536)
                for piece in pieces:
                    connection.sendall(piece)

        thread = threading.Thread(target=answer)
        thread.start()
        [stream] = streams.ask(listener.getsockname(), [{"max_tokens": 3}], streams.DIALECTS["openai"])
        thread.join()
    return stream


def test_a_stream_is_read_in_whatever_pieces_it_comes() -> None:
    whole = HEAD + EVENT % (b"content", b"") + EVENT % (b"reasoning_content", b"Hm.") + USAGE + END
    for pieces in ([whole], [whole[at : at + 5] for at in range(17, len(whole), 5)]):
        stream = stream_of(*(pieces if len(pieces) == 1 else [whole[:17], *pieces]))
        assert (stream.tokens, stream.error) == (7, "")
        assert 0 < stream.first_byte <= stream.first_text <= stream.end


@pytest.mark.parametrize(
    ("said", "error"),
    [
        ([b"HTTP/1.1 429 Too Many Requests\r\n\r\n"], "HTTP/1.1 429"),
        ([], "closed"),
        ([HEAD, USAGE], "cut off"),
        ([HEAD, END], "cut off"),
    ],
)
def test_what_goes_wrong_is_told(said: list[bytes], error: str) -> None:
    assert stream_of(*said).error == error
