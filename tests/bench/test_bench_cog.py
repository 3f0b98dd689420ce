"""`scripts/bench cog` asks the engine and the server for the same, and ends with its figures as JSON."""

from __future__ import annotations

import json
import socket
import threading
from pathlib import Path

import pytest
from bench_suite import cog, streams

ROOT = Path(__file__).resolve().parents[2]


def test_the_last_line_is_json(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KIMI_VL_MODEL", "demo")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert cog.main(["--rounds", "1", "--streams", "1", "3", "--tokens", "12"]) == 0
    *_, last = capsys.readouterr().out.splitlines()
    figures = json.loads(last)
    assert [result["streams"] for result in figures["results"]] == [1, 3]
    for result in figures["results"]:
        for who in cog.WHO:
            assert 0 < result[who]["first_piece_s_range"][0] <= result[who]["first_piece_s"]
            assert result[who]["tokens_per_second"] > 0
        assert all(result[f"{name}_of_engine"] >= 0 for name in cog.RATIOS)


def test_a_sample_counts_all_tokens_and_takes_the_middle_of_the_first_pieces() -> None:
    answers = iter([cog.Answer(0.1, 4.0, 10), cog.Answer(0.2, 2.0, 20), cog.Answer(9.0, 3.0, 70)])
    sample = cog.measure(lambda asked: next(answers), [{}, {}, {}], [])
    assert sample.first == 0.2
    assert sample.rate == pytest.approx(100 / 4.0, rel=0.25)
    assert sample.busy == 0


def test_pieces_are_as_long_as_the_predictor_s() -> None:
    assert f"\nCHUNK_SECONDS = {cog.CHUNK_SECONDS}\n" in (ROOT / "predict.py").read_text()


def test_what_cog_refuses_is_asked_again() -> None:
    said = [
        b"HTTP/1.1 409 Conflict\r\n\r\n",
        b'HTTP/1.1 200 OK\r\n\r\n{"chunk":"a"}"output_token_count":7}\r\n0\r\n\r\n',
    ]
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            for each in said:
                connection, _ = listener.accept()
                with connection:
                    connection.recv(65536)
                    connection.sendall(each)

        thread = threading.Thread(target=answer)
        thread.start()
        [stream] = streams.ask(listener.getsockname(), [{}], streams.DIALECTS["cog"])
        thread.join()
    assert (stream.tokens, stream.error) == (7, "") and 0 < stream.first_byte <= stream.end
