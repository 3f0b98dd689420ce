"""Clients of OpenAI's API that are written by others, each as a program of its own against one server.

Each program tells, as JSON, what it got: an answer, the same one streamed, one about a picture, one in a given form,
what its errors are, and what it does where the server is busy. The Python clients are in an environment of their own
(`kimi_vl_clients` in scripts/environment.sh), the JavaScript one where npm puts it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kimi_vl.engine.faults import Overloaded

from .conftest import PATIENCE_S, ROOT, ServerThread, python_with

pytestmark = pytest.mark.nightly

KEY = "secret"
BUSY_SEED = 429
"""The server is overloaded on the first request with this seed."""

THINKING = "The question is 12 + 30. Ones: 2 + 0 = 2. Tens: 1 + 3 = 4. So 42."
JAVASCRIPT_CLIENT = "openai@6.49.0"
PACKAGES = Path(os.environ.get("KIMI_VL_NODE_PACKAGES") or Path(tempfile.gettempdir()) / "kimi-vl-node-packages")
"""Where npm puts the JavaScript client, once for all runs."""

PYTHON = """
import base64, json, os
SERVER, SUM = os.environ["SERVER"] + "/v1", "What is 12 + 30?"
from typing import Literal
from pydantic import BaseModel

class Verdict(BaseModel):
    colour: Literal["red", "green"]
    sure: bool

picture = "data:image/png;base64," + base64.b64encode(open("images/math_problem.png", "rb").read()).decode()
ABOUT = [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": "What is the result?"}]

def error(work):
    try:
        work()
        return None
    except Exception as error:
        return [type(error).__name__, getattr(error, "status_code", None)]
"""

LANGCHAIN = """
from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI

def ask(content, **options):
    given = {"model": "kimi-vl-demo", "base_url": SERVER, "api_key": "secret", "temperature": 0, "max_retries": 0}
    return ChatOpenAI(**{**given, **options}).invoke([HumanMessage(content)])

answer = ask(SUM)
model = ChatOpenAI(model="kimi-vl-demo", base_url=SERVER, api_key="secret", temperature=0, stream_usage=True)
first, *others = model.stream(SUM)
for piece in others:
    first += piece
form = ChatOpenAI(model="kimi-vl-demo", base_url=SERVER, api_key="secret").with_structured_output(Verdict).invoke(SUM)
tokens = lambda said: [said.usage_metadata[name] for name in ("input_tokens", "output_tokens")] + [
    said.usage_metadata["output_token_details"]["reasoning"]]
print(json.dumps({
    "answer": answer.content, "usage": tokens(answer), "stream": first.content, "stream usage": tokens(first),
    "pieces": len(others), "finish": answer.response_metadata["finish_reason"], "picture": ask(ABOUT).content,
    "form": form.model_dump(),
    "key": error(lambda: ask(SUM, api_key="wrong")), "model": error(lambda: ask(SUM, model="other")),
    "mistake": error(lambda: ask(SUM, max_tokens=-1)), "busy": error(lambda: ask(SUM, seed=429)),
    "again": ask(SUM, seed=429, max_retries=2).content}))
"""

LITELLM = """
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
import litellm
litellm.suppress_debug_info, litellm.telemetry = True, False
prefix = os.environ["PREFIX"]

def ask(content, model="kimi-vl-demo", **options):
    given = {"api_base": SERVER, "api_key": "secret", "temperature": 0, "max_retries": 0}
    messages = [{"role": "user", "content": content}]
    return litellm.completion(model=f"{prefix}/{model}", messages=messages, **{**given, **options})

answer = ask(SUM)
chunks = list(ask(SUM, stream=True, stream_options={"include_usage": True}))
deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
tokens = lambda usage: [
    usage.prompt_tokens, usage.completion_tokens, usage.completion_tokens_details.reasoning_tokens]
message = answer.choices[0].message
form = ask(SUM, response_format=Verdict).choices[0].message.content
print(json.dumps({
    "answer": message.content, "thinking": message.reasoning_content, "usage": tokens(answer.usage),
    "stream": "".join(delta.content or "" for delta in deltas),
    "stream thinking": "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas),
    "stream usage": tokens(chunks[-1].usage), "pieces": len(chunks), "finish": answer.choices[0].finish_reason,
    "picture": ask(ABOUT).choices[0].message.content, "form": Verdict.model_validate_json(form).model_dump(),
    "key": error(lambda: ask(SUM, api_key="wrong")), "model": error(lambda: ask(SUM, model="other")),
    "mistake": error(lambda: ask(SUM, max_tokens=-1)), "busy": error(lambda: ask(SUM, seed=429)),
    "again": ask(SUM, seed=429, num_retries=2).choices[0].message.content}))
"""

JAVASCRIPT = """
const OpenAI = require("openai");
const { readFileSync } = require("node:fs");
const url = "data:image/png;base64," + readFileSync("images/math_problem.png").toString("base64");
const SUM = "What is 12 + 30?";
const ABOUT = [{ type: "image_url", image_url: { url } }, { type: "text", text: "What is the result?" }];
const schema = {
  type: "object",
  properties: { colour: { enum: ["red", "green"] }, sure: { type: "boolean" } },
  required: ["colour", "sure"],
  additionalProperties: false,
};
const form = { response_format: { type: "json_schema", json_schema: { name: "verdict", strict: true, schema } } };
const client = (options) =>
  new OpenAI({ baseURL: process.env.SERVER + "/v1", apiKey: "secret", maxRetries: 0, ...options }).chat.completions;
const body = (content, more) =>
  ({ model: "kimi-vl-demo", temperature: 0, messages: [{ role: "user", content }], ...more });
const ask = (content, more, options) => client(options).create(body(content, more));
const error = async (work) => {
  try { await work; return null; } catch (error) { return [error.constructor.name, error.status]; }
};
const tokens = (usage) =>
  [usage.prompt_tokens, usage.completion_tokens, usage.completion_tokens_details.reasoning_tokens];
(async () => {
  const answer = await ask(SUM);
  const stream = client().stream(body(SUM, { stream_options: { include_usage: true } }));
  let thinking = "", pieces = 0;
  stream.on("chunk", (chunk) => { pieces += 1; thinking += chunk.choices[0]?.delta.reasoning_content ?? ""; });
  const whole = await stream.finalChatCompletion();
  const { message, finish_reason } = answer.choices[0];
  console.log(JSON.stringify({
    answer: message.content, thinking: message.reasoning_content, usage: tokens(answer.usage), finish: finish_reason,
    stream: whole.choices[0].message.content, "stream thinking": thinking, "stream usage": tokens(whole.usage), pieces,
    picture: (await ask(ABOUT)).choices[0].message.content,
    form: (await client().parse(body(SUM, form))).choices[0].message.parsed,
    key: await error(ask(SUM, {}, { apiKey: "wrong" })), model: await error(ask(SUM, { model: "other" })),
    mistake: await error(ask(SUM, { max_tokens: -1 })), busy: await error(ask(SUM, { seed: 429 })),
    again: (await ask(SUM, { seed: 429 }, { maxRetries: 2 })).choices[0].message.content,
  }));
})();
"""

Program = Callable[..., dict[str, Any]]


class BusyServer(ServerThread):
    """A server with a key, which refuses the first request with :data:`BUSY_SEED`, and each second one from then on."""

    def __init__(self) -> None:
        super().__init__(api_keys=(KEY,))
        self.busy: Counter[int] = Counter()
        submit = self.pipeline.submit

        def sometimes(*arguments: Any, **params: Any) -> Any:
            seed = params["seed"]
            self.busy[seed] += seed == BUSY_SEED
            if self.busy[seed] in (1, 2):
                raise Overloaded("too many requests wait; try again later.", "queue")
            return submit(*arguments, **params)

        self.pipeline.submit = sometimes


@pytest.fixture(scope="module")
def server() -> Iterator[BusyServer]:
    running = BusyServer()
    with running:
        yield running


def result(command: list[str], server: BusyServer, **environment: str) -> dict[str, Any]:
    """The JSON that a program prints."""
    server.busy.clear()
    process = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "SERVER": server.url, **environment},
        capture_output=True,
        encoding="utf-8",
        timeout=PATIENCE_S,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    assert server.busy[BUSY_SEED] == 3, "refused, refused, and asked again"
    return json.loads(process.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def python() -> str:
    return python_with("clients", "langchain-openai and litellm")


@pytest.fixture(scope="module")
def node() -> str:
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        pytest.skip("needs node and npm")
    package = PACKAGES / "node_modules" / "openai" / "package.json"
    if not package.is_file() or json.loads(package.read_text())["version"] != JAVASCRIPT_CLIENT.partition("@")[2]:
        PACKAGES.mkdir(parents=True, exist_ok=True)
        install = [npm, "install", "--prefix", str(PACKAGES), "--no-audit", "--no-fund", JAVASCRIPT_CLIENT]
        try:
            subprocess.run(install, capture_output=True, timeout=PATIENCE_S, check=True)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
            pytest.skip(f"npm cannot install {JAVASCRIPT_CLIENT}")
    return node


def check(found: dict[str, Any]) -> None:
    """What every client must have got."""
    assert found["answer"] == found["stream"] == found["again"] == "12 + 30 = 42"
    assert found["usage"] == found["stream usage"] == [26, 55, 44]
    assert found["finish"] == "stop" and found["pieces"] > 3
    assert found["picture"] == "25 + 13 = 38"
    assert found["form"]["colour"] in ("red", "green") and type(found["form"]["sure"]) is bool
    assert set(found["form"]) == {"colour", "sure"}


def statuses(found: dict[str, Any]) -> dict[str, int]:
    return {name: found[name][1] for name in ("key", "model", "mistake", "busy")}


ERRORS = {"key": 401, "model": 404, "mistake": 400, "busy": 429}


def test_langchain(python: str, server: BusyServer) -> None:
    found = result([python, "-c", PYTHON + LANGCHAIN], server)
    check(found)
    assert statuses(found) == ERRORS
    assert [found[name][0] for name in ("key", "model")] == ["OpenAIAuthenticationError", "OpenAIModelNotFoundError"]


@pytest.mark.parametrize("prefix", ["openai", "hosted_vllm"])
def test_litellm(python: str, server: BusyServer, prefix: str) -> None:
    found = result([python, "-c", PYTHON + LITELLM], server, PREFIX=prefix)
    check(found)
    assert found["thinking"] == found["stream thinking"] == THINKING
    assert statuses(found) == ERRORS
    names = [found[name][0] for name in ERRORS]
    assert names == ["AuthenticationError", "NotFoundError", "BadRequestError", "RateLimitError"]


def test_openai_in_javascript(node: str, server: BusyServer) -> None:
    found = result([node, "-e", JAVASCRIPT], server, NODE_PATH=str(PACKAGES / "node_modules"))
    check(found)
    assert found["thinking"] == found["stream thinking"] == THINKING
    assert statuses(found) == ERRORS
    names = [found[name][0] for name in ERRORS]
    assert names == ["AuthenticationError", "NotFoundError", "BadRequestError", "RateLimitError"]
