"""Replicate's own clients against a server that runs here, as far as they can be pointed at it.

The JavaScript client takes a base URL, and a `fetch` that asks again where Cog is at capacity. The Python client asks
below /v1, wants a model and a version in every answer, and an answer at once where it does not wait: a transport, which
is an option of that client, does this for Replicate. Streaming with either needs a URL that Replicate's API adds and
Cog's server does not have.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cog_local.server import ROOT, Server

from .conftest import DEMO
from .scripted import Loopback
from .test_concurrent import check_hooks, hooks_of

JAVASCRIPT_CLIENT = "replicate@1.4.0"
PACKAGES = Path(os.environ.get("KIMI_VL_NODE_PACKAGES") or Path(tempfile.gettempdir()) / "kimi-vl-node-packages")
"""Where npm puts the JavaScript client, once for all runs."""

VERSION = "0" * 64

PYTHON = """
import json, os, sys, time
import httpx, replicate

class AsReplicate(httpx.HTTPTransport):
    def handle_request(self, request):
        request.url = request.url.copy_with(path=request.url.path.removeprefix("/v1"))
        request.headers.setdefault("Prefer", "respond-async")
        response = super().handle_request(request)
        body = json.loads(response.read() or b"{}")
        if "id" in body:
            body |= {"model": "a/b", "version": "v", "urls": {}}
        return httpx.Response(response.status_code, json=body)

client = replicate.Client(api_token="none", base_url=os.environ["SERVER"], transport=AsReplicate())
create = client.predictions.create
"""

JAVASCRIPT = """
const Replicate = require("replicate");
const { readFileSync } = require("node:fs");
const pause = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));
const patient = async (...request) => {  // Cog refuses some of those that come together though it has a slot for each
  for (let wait = 5; ; wait = Math.min(250, 2 * wait)) {
    const response = await fetch(...request);
    if (response.status !== 409) return response;
    await pause(wait);
  }
};
const client = new Replicate({ auth: "none", baseUrl: process.env.SERVER, fetch: patient });
const model = "a/b:" + process.env.VERSION;
const picture = "data:image/png;base64," + readFileSync("images/math_problem.png").toString("base64");
const error = async (work) => { try { await work(); return "none"; } catch (error) { return error.message; } };
const long = { prompt: "Tell me a long story.", temperature: 0, max_length_tokens: 100000 };
const untilCanceled = async (id) => {
  for (;;) {
    try { await client.predictions.cancel(id); } catch (error) { if (error.response.status === 404) return; }
    await pause(20);
  }
};
"""


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server(environment={**os.environ, **DEMO}, concurrent=True) as running:
        yield running


@pytest.fixture
def loopback() -> Iterator[Loopback]:
    with Loopback().running() as running:
        yield running


def result(command: list[str], server: Server, **environment: str) -> Any:
    """The JSON that a program prints."""
    process = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "SERVER": server.url, "VERSION": VERSION, **environment},
        capture_output=True,
        encoding="utf-8",
        timeout=300,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


# Python


@pytest.fixture(scope="module")
def python() -> str:
    if importlib.util.find_spec("replicate") is None:
        pytest.skip("needs the package replicate, of the extra dev")
    return sys.executable


def by_python(python: str, server: Server, code: str, **environment: str) -> Any:
    return result([python, "-c", PYTHON + code], server, **environment)


def test_python_gets_an_answer_about_a_file(python: str, server: Server) -> None:
    code = """
inputs = {"prompt": "What is the result?", "image": open("images/math_problem.png", "rb"), "output_format": "answer"}
done = create(version="v", input={**inputs, "temperature": 0}, wait=True, file_encoding_strategy="base64")
print(json.dumps([done.status, "".join(done.output), done.metrics["finish_reason"]]))
"""
    assert by_python(python, server, code) == ["succeeded", "25 + 13 = 38", "stop"]


def test_python_is_told_of_a_mistake(python: str, server: Server) -> None:
    code = """
failed = create(version="v", input={"prompt": " "}, wait=True)
try:
    create(version="v", input={"temperature": 9}, wait=True)
except replicate.exceptions.ReplicateError as error:
    print(json.dumps([failed.status, failed.error, error.status]))
"""
    status, error, refused = by_python(python, server, code)
    assert (status, refused) == ("failed", 422) and "E_PROMPT_EMPTY: " in error


def test_python_cancels_and_its_webhook_hears_of_it(python: str, endless_server: Server, loopback: Loopback) -> None:
    code = """
long = {"prompt": "Tell me a long story.", "temperature": 0, "max_length_tokens": 100_000}
running = create(version="v", input=long, webhook=os.environ["HOOK"])
try:
    while True:  # Cog may lose what cancels a prediction in its first moments
        client._request("POST", f"/v1/predictions/{running.id}/cancel")
        time.sleep(0.02)
except replicate.exceptions.ReplicateError as error:
    print(json.dumps([running.id, running.status, error.status]))
"""
    name, status, refused = by_python(python, endless_server, code, HOOK=loopback.url + "/hook")
    assert (status, refused) == ("starting", 404)
    check_hooks(hooks_of(loopback, [name])[name], "canceled")


# JavaScript


@pytest.fixture(scope="module")
def node() -> str:
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        pytest.skip("needs node and npm")
    if not (PACKAGES / "node_modules" / "replicate").is_dir():
        PACKAGES.mkdir(parents=True, exist_ok=True)
        install = [npm, "install", "--prefix", str(PACKAGES), "--no-audit", "--no-fund", JAVASCRIPT_CLIENT]
        try:
            subprocess.run(install, capture_output=True, timeout=300, check=True)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
            pytest.skip(f"npm cannot install {JAVASCRIPT_CLIENT}")
    return node


def by_javascript(node: str, server: Server, code: str, **environment: str) -> Any:
    """What an expression comes to."""
    program = f"{JAVASCRIPT}(async () => console.log(JSON.stringify(await ({code})())))();"
    return result([node, "-e", program], server, NODE_PATH=str(PACKAGES / "node_modules"), **environment)


def test_javascript_gets_an_answer_about_a_picture(node: str, server: Server) -> None:
    code = """async () => {
      const input = { prompt: "What is the result?", image: picture, output_format: "answer", temperature: 0 };
      return (await client.run(model, { input })).join("");
    }"""
    assert by_javascript(node, server, code) == "25 + 13 = 38"


def test_javascript_gets_the_answers_of_many_at_once(node: str, server: Server) -> None:
    code = """async () => {
      const one = async (seed) => {
        const input = { prompt: "What is 12 + 30?", seed, output_format: "json" };
        return JSON.parse((await client.run(model, { input })).join("").trim().split("\\n").pop()).seed;
      };
      return await Promise.all([...Array(32).keys()].map(one));
    }"""
    assert by_javascript(node, server, code) == list(range(32))


def test_javascript_is_told_of_a_mistake(node: str, server: Server) -> None:
    code = """async () => [
      await error(() => client.run(model, { input: { prompt: " " } })),
      await error(() => client.run(model, { input: { prompt: "Hello.", temperature: 9 } })),
    ]"""
    failed, refused = by_javascript(node, server, code)
    assert "E_PROMPT_EMPTY: " in failed and "422" in refused and "temperature" in refused


def test_javascript_cancels(node: str, endless_server: Server) -> None:
    code = """async () => {
      const running = client.predictions.create({ version: "v", id: "javascript-cancels", input: long, wait: true });
      let over = false;
      running.then(() => { over = true; });
      while (!over) await untilCanceled("javascript-cancels");
      return (await running).status;
    }"""
    assert by_javascript(node, endless_server, code) == "canceled"


def test_javascript_s_webhooks_are_called(node: str, server: Server, loopback: Loopback) -> None:
    code = """async () => {
      const data = { version: "v", id: "javascript-hooks", webhook: process.env.HOOK, input: { prompt: "Hello." } };
      return await client.predictions.create(data);
    }"""
    done = by_javascript(node, server, code, HOOK=loopback.url + "/hook")
    hooks = hooks_of(loopback, ["javascript-hooks"])["javascript-hooks"]
    check_hooks(hooks, "succeeded")
    assert [hook["output"] for hook in hooks if hook["status"] == "succeeded"] == [done["output"]]


def test_javascript_s_stream_needs_replicate_s_own_api(node: str, server: Server) -> None:
    code = """async () => await error(async () => {
      for await (const event of client.stream(model, { input: { prompt: "Hello." } })) throw new Error(event);
    })"""
    assert by_javascript(node, server, code) == "Prediction does not support streaming"
