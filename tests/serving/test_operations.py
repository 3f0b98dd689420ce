"""A server as its operator sees it: figures of real requests, a log without content, and pictures by URL refused."""

from __future__ import annotations

import asyncio
import base64
import json
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from kimi_vl.serving.app import build_app
from kimi_vl.serving.options import OptionError, ServerOptions

from .conftest import ROOT, ServerProcess, ask, until, user

KEY = "secret-key-0123"
PICTURE = ROOT / "images" / "math_problem.png"


@pytest.fixture(scope="module")
def guarded() -> Iterator[ServerProcess]:
    """With a key, and fetching pictures by URL."""
    flags = ("--allow-image-urls", "--allow-http-image-urls")
    with ServerProcess(*flags, environment={"KIMI_VL_API_KEYS": KEY}) as running:
        yield running


def figures(http: httpx.Client) -> dict[str, float]:
    """The samples of ``/metrics`` by name and labels, as they are written."""
    answer = http.get("/metrics", headers={"Authorization": f"Bearer {KEY}"})
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    families = text_string_to_metric_families(answer.text)
    return {
        sample.name + "".join(f",{key}={sample.labels[key]}" for key in sorted(sample.labels)): sample.value
        for family in families
        for sample in family.samples
    }


def picture_url(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def test_the_figures_are_those_of_the_answers(guarded: ServerProcess) -> None:
    with guarded.http(headers={"Authorization": f"Bearer {KEY}"}) as http:
        before = figures(http)
        content = [{"type": "image_url", "image_url": {"url": picture_url(PICTURE)}}, {"type": "text", "text": "What?"}]
        whole = ask(http, messages=[{"role": "user", "content": content}]).json()
        cut = ask(http, max_tokens=5, n=2).json()
        body = {"messages": user("What is 12 + 30?"), "stream": True, "stream_options": {"include_usage": True}}
        with http.stream("POST", "/v1/chat/completions", json=body) as answer:
            lines = [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: {")]
        streamed = next(line["usage"] for line in lines if line.get("usage"))
        assert ask(http, temperature=9).status_code == 400
        after = figures(http)
    gained = {name: after[name] - before.get(name, 0) for name in after}
    usages = [whole["usage"], cut["usage"], streamed]
    thinking = sum(used["completion_tokens_details"]["reasoning_tokens"] for used in usages)
    assert gained["kimi_vl_prompt_tokens_total"] == sum(used["prompt_tokens"] for used in usages)
    assert gained["kimi_vl_image_tokens_total"] == whole["usage"]["prompt_tokens_details"]["image_tokens"] > 0
    assert gained["kimi_vl_generation_tokens_total,kind=thinking"] == thinking > 0
    answers = sum(used["completion_tokens"] for used in usages) - thinking
    assert gained["kimi_vl_generation_tokens_total,kind=answer"] == answers
    assert gained["kimi_vl_requests_total,finish_reason=stop,status=200"] == 2
    assert gained["kimi_vl_requests_total,finish_reason=length,status=200"] == 1
    assert gained["kimi_vl_requests_total,finish_reason=error,status=400"] == 1
    assert gained["kimi_vl_request_seconds_count"] == gained["kimi_vl_time_to_first_token_seconds_count"] == 3
    assert gained["kimi_vl_queue_seconds_count"] == 4  # sequences
    pieces = gained["kimi_vl_inter_token_seconds_count"]  # of the stream alone, but for its first chunk
    assert 0 < pieces < streamed["completion_tokens"]
    assert 0 < gained["kimi_vl_inter_token_seconds_sum"] < gained["kimi_vl_request_seconds_sum"]
    assert gained["kimi_vl_engine_steps_total"] > 0 and after["kimi_vl_engine_healthy"] == 1
    assert after["kimi_vl_requests_running"] == after["kimi_vl_requests_waiting"] == 0


def test_a_client_that_leaves_is_counted(guarded: ServerProcess) -> None:
    name = "kimi_vl_requests_total,finish_reason=abort,status=499"
    with guarded.http(headers={"Authorization": f"Bearer {KEY}"}) as http:
        before = figures(http).get(name, 0)
        body = {"messages": user("Explain the concept of multimodal models."), "stream": True}
        with http.stream("POST", "/v1/chat/completions", json=body) as answer:
            next(answer.iter_lines())
        until(lambda: figures(http).get(name, 0) == before + 1)


def get(path: str, options: ServerOptions, **headers: str) -> httpx.Response:
    """The answer of an application that has no model yet, without a server."""

    async def run() -> httpx.Response:
        transport = httpx.ASGITransport(build_app(None, options))
        async with httpx.AsyncClient(transport=transport, base_url="http://a.test") as client:
            return await client.get(path, headers=headers)

    return asyncio.run(run())


def test_the_figures_need_the_key_unless_they_are_opened() -> None:
    for keys, opened, key, status in (
        ((KEY,), False, "", 401),
        ((KEY,), False, "Bearer other", 401),
        ((KEY,), False, f"Bearer {KEY}", 200),
        ((KEY,), True, "", 200),
        ((), False, "", 200),
    ):
        options = ServerOptions(api_keys=keys, open_metrics=opened)
        answer = get("/metrics", options, authorization=key)
        assert answer.status_code == status
        assert ("kimi_vl_engine_healthy 0.0" in answer.text) == (status == 200)
    assert get("/v1/models", ServerOptions(api_keys=(KEY,), open_metrics=True)).status_code == 401


# Pictures by URL


def with_picture(url: str) -> list[dict]:
    part = {"type": "image_url", "image_url": {"url": url}}
    return [{"role": "user", "content": [part, {"type": "text", "text": "What is this?"}]}]


class Listener:
    """Counts connections to a port of this machine."""

    def __init__(self) -> None:
        self.connections = 0
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        threading.Thread(target=self._count, daemon=True).start()

    def _count(self) -> None:
        while True:
            self._socket.accept()[0].close()
            self.connections += 1


def test_pictures_by_url_are_off_by_default() -> None:
    assert build_app(None).state.service.fetch_images is None
    assert build_app(None, ServerOptions(allow_image_urls=True)).state.service.fetch_images is not None


def test_no_url_reaches_this_machine(guarded: ServerProcess) -> None:
    listener = Listener()
    urls = [
        f"http://127.0.0.1:{listener.port}/",
        "http://127.0.0.1/",
        "https://127.0.0.1/",
        f"https://localhost:{listener.port}/",
        "http://169.254.169.254/latest/meta-data/",
        "https://[::1]/",
        "https://user:password@127.0.0.1/",
    ]
    with guarded.http(headers={"Authorization": f"Bearer {KEY}"}) as http:
        with ThreadPoolExecutor() as threads:
            answers = list(threads.map(lambda url: ask(http, messages=with_picture(url)), urls))
        assert {answer.status_code for answer in answers} == {400}
        errors = {json.dumps(answer.json()["error"]) for answer in answers}
        assert len(errors) == 1 and '"e_image_url"' in errors.pop()
        many = [part for url in range(65) for part in with_picture(f"https://127.0.0.1/{url}")[0]["content"]]
        answer = ask(http, messages=[{"role": "user", "content": many}])
        assert answer.json()["error"]["code"] == "e_too_many_images"
        answer = http.post("/tokenize", json={"messages": with_picture("https://127.0.0.1/")})
        assert answer.json()["error"]["code"] == "e_image_url"
    assert listener.connections == 0


@pytest.mark.parametrize(
    "options",
    [
        ServerOptions(image_url_host=("a.test",)),
        ServerOptions(allow_http_image_urls=True),
        ServerOptions(allow_image_urls=True, image_url_host=("a.test", "a/b")),
    ],
)
def test_options_that_cannot_be_meant_are_refused(options: ServerOptions) -> None:
    with pytest.raises(OptionError, match="--image-url-host"):
        build_app(None, options)


# The log

SECRETS = {
    "prompt": "secret-prompt",
    "system": "secret-system",
    "model": "secret-model",
    "field": "secret_field",
    "header": "secret-header",
    "cookie": "secret-cookie",
    "agent": "secret-agent",
    "path": "secret-path",
    "query": "secret-query",
    "file": "secret-file",
    "stop": "secret-stop",
}


def test_the_log_has_no_content(guarded: ServerProcess) -> None:
    headers = {
        "Authorization": f"Bearer {KEY}",
        "X-Custom": SECRETS["header"],
        "Cookie": SECRETS["cookie"],
        "User-Agent": SECRETS["agent"],
        "x-request-id": "known-id",
    }
    picture = picture_url(PICTURE)
    with guarded.http(headers=headers) as http:
        messages = [{"role": "system", "content": SECRETS["system"]}, *with_picture(picture)]
        answer = ask(http, messages=messages, stop=[SECRETS["stop"]], **{SECRETS["field"]: SECRETS["field"]}).json()
        said = answer["choices"][0]["message"]
        ask(http, messages=user(SECRETS["prompt"]), stream=True)
        ask(http, model=SECRETS["model"])
        ask(http, messages=[{"role": SECRETS["prompt"], "content": SECRETS["prompt"]}])
        ask(http, messages=with_picture(picture[:200] + SECRETS["file"]))
        ask(http, messages=with_picture(f"https://127.0.0.1/{SECRETS['file']}"))
        ask(http, messages=with_picture(f"file:///{SECRETS['file']}"))
        ask(http, temperature=SECRETS["prompt"])
        http.post(f"/v1/chat/completions?{SECRETS['query']}", content=SECRETS["prompt"].encode())
        broken = '{"' + SECRETS["prompt"]
        http.post("/v1/chat/completions", content=broken, headers={"Content-Type": "application/json"})
        http.get(f"/{SECRETS['path']}?{SECRETS['query']}")
        http.get(f"/v1/models/{SECRETS['model']}")
        http.get("/metrics", headers={"Authorization": f"Bearer {SECRETS['header']}"})
        http.post("/tokenize", json={"prompt": SECRETS["prompt"]})
        until(lambda: sum(record["id"] == "known-id" for record in guarded.records()) >= 14)
    log = "\n".join(guarded.lines)
    assert "known-id" in log
    for secret in (*SECRETS.values(), KEY, said["content"], said["reasoning_content"], picture[40:80], "127.0.0.1/"):
        assert len(secret) > 5 and secret not in log
        assert json.dumps(secret)[1:-1] not in log


def test_a_line_of_the_log_has_the_figures_of_its_request(guarded: ServerProcess) -> None:
    with guarded.http(headers={"Authorization": f"Bearer {KEY}"}) as http:
        answer = ask(http, max_tokens=6).json()
        refused = ask(http, temperature=9)
        until(lambda: any(record["id"] == refused.headers["x-request-id"] for record in guarded.records()))
    answered = [record for record in guarded.records() if record.get("finish_reason") == ["length"]][-1]
    assert answered["prompt_tokens"] == answer["usage"]["prompt_tokens"]
    assert answered["completion_tokens"] == answer["usage"]["completion_tokens"] == 6
    assert answered["status"] == 200 and 0 < answered["first_token_seconds"] <= answered["seconds"]
    error = next(record for record in guarded.records() if record["id"] == refused.headers["x-request-id"])
    assert error["status"] == 400 and error["code"] == "e_parameter" and "prompt_tokens" not in error
