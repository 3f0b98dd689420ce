"""The examples of the documents do what they say, against a server that runs here or with the package itself."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

from cog_local.server import ROOT, Server

from .test_server import METRICS

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ADDRESS = "localhost:5000"

# What Replicate does for its clients, the server that runs here does not: these take the same calls, and ask it.
REPLICATE_PYTHON = """
import base64, io
from cog_local.client import Client

def _inputs(values):
    def plain(value):
        if isinstance(value, io.IOBase):
            return "data:application/octet-stream;base64," + base64.b64encode(value.read()).decode()
        return [plain(item) for item in value] if isinstance(value, list) else value
    return {name: plain(value) for name, value in values.items()}

def run(model, input):
    assert model.count("/") == 1
    prediction = Client("http://localhost:5000").predict(_inputs(input))
    assert prediction["status"] == "succeeded", prediction
    return iter(prediction["output"])

def stream(model, input):
    assert model.count("/") == 1
    for event in Client("http://localhost:5000").stream(_inputs(input)):
        assert event.data.get("status") != "failed", event.data
        if event.name == "output":
            yield event.data["chunk"]
"""
REPLICATE_JAVASCRIPT = """
export default class Replicate {
  async run(model, { input }) {
    if (model.split("/").length !== 2) throw new Error(model);
    const inputs = Object.fromEntries(Object.entries(input).map(([name, value]) => [
      name, Buffer.isBuffer(value) ? "data:application/octet-stream;base64," + value.toString("base64") : value,
    ]));
    const response = await fetch("http://localhost:5000/predictions", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ input: inputs }),
    });
    const prediction = await response.json();
    if (prediction.status !== "succeeded") throw new Error(JSON.stringify(prediction));
    return prediction.output;
  }
}
"""


@dataclass(frozen=True)
class Example:
    language: str
    code: str
    line: int
    page: str = ""

    @property
    def name(self) -> str:
        return f"{self.page} line {self.line}"


def examples(text: str, page: str = "") -> list[Example]:
    """The fenced examples that speak to the service or use the package, by their language. What imports MindSpore runs
    in tests/on_mindspore."""
    found = []
    for match in re.finditer(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        language, code = match.groups()
        uses_package = language == "python" and re.search(r"^(import|from) kimi_vl\b", code, re.MULTILINE)
        uses_package = uses_package and "import mindspore" not in code
        asks_replicate = "replicate" in code.lower().partition("\n")[0] or 'from "replicate"' in code
        if ADDRESS in code or asks_replicate or uses_package:
            found.append(Example(language, code, text[: match.start()].count("\n") + 1, page))
    return found


EXAMPLES = [found for page in PAGES for found in examples(page.read_text(encoding="utf-8"), page.name)]


def command(example: Example, address: str, folder: Path) -> list[str]:
    """How to run an example, written into a folder, against the server at an address."""
    code = example.code.replace(ADDRESS, address)
    if example.language == "sh":
        if shutil.which("curl") is None:
            pytest.skip("needs curl")
        return ["bash", "-euo", "pipefail", "-c", code]
    if example.language == "python":
        (folder / "replicate.py").write_text(REPLICATE_PYTHON.replace(ADDRESS, address))
        (folder / "example.py").write_text(code, encoding="utf-8")
        return [sys.executable, str(folder / "example.py")]
    assert example.language in ("javascript", "js"), f"{example.name}: nothing runs {example.language} here"
    node = shutil.which("node")
    if node is None:
        pytest.skip("needs node")
    package = folder / "node_modules" / "replicate"
    package.mkdir(parents=True)
    (package / "package.json").write_text('{"name": "replicate", "type": "module", "exports": "./index.js"}')
    (package / "index.js").write_text(REPLICATE_JAVASCRIPT.replace(ADDRESS, address))
    (folder / "example.mjs").write_text(code, encoding="utf-8")
    return [node, str(folder / "example.mjs")]


def run(example: Example, server: Server, folder: Path) -> str:
    """What an example prints."""
    deadline = time.monotonic() + 300
    while server.client.health()["status"] == "BUSY" and time.monotonic() < deadline:
        time.sleep(0.02)
    process = subprocess.run(
        command(example, server.url.removeprefix("http://"), folder),
        cwd=ROOT,
        env={**server.environment, "PYTHONPATH": f"{ROOT / 'scripts'}:{ROOT}", "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        encoding="utf-8",
        timeout=300,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_there_are_examples() -> None:
    """As many as there are of each kind, so that none is overlooked where it stands now."""
    kinds = Counter((example.page, example.language) for example in EXAMPLES)
    assert kinds[("README.md", "sh")] >= 1 and kinds[("README.md", "python")] == 1
    assert kinds[("http.md", "sh")] == 3
    assert kinds[("http.md", "python")] == 4
    assert kinds[("http.md", "javascript")] == 2
    assert kinds[("python.md", "python")] == 3


def test_the_table_of_metrics_has_every_metric() -> None:
    text = (ROOT / "docs" / "output.md").read_text(encoding="utf-8")
    table = text.partition("\n| metric |")[2].partition("\n\n")[0]
    named = [name for line in table.splitlines()[2:] for name in re.findall(r"`(\w+)`", line.split("|")[1])]
    assert set(named) == METRICS.keys() | {"media"}, "the last is of requests with videos or documents"


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: f"{example.language} {example.name}")
def test_an_example_gets_its_answer(server: Server, example: Example, tmp_path: Path) -> None:
    said = run(example, server, tmp_path)
    assert said.strip() or "print(" not in example.code
    assert "E_" not in said and '"detail"' not in said and '"failed"' not in said
    if example.language == "sh":
        assert '"status":"succeeded"' in said


@pytest.mark.parametrize(
    "example",
    [
        Example("sh", f"curl -s -f {ADDRESS}/nothing", 0),
        Example("python", f"import requests\nrequests.get('http://{ADDRESS}/nothing').raise_for_status()", 0),
        Example("python", "import replicate\nprint(*replicate.run('a/b', input={'temperature': 9}))", 0),
        Example("javascript", f'throw new Error(await (await fetch("http://{ADDRESS}/nothing")).text());', 0),
        Example("javascript", 'import R from "replicate"; await new R().run("a/b", { input: {} });', 0),
    ],
    ids=lambda example: example.code[:20],
)
def test_an_example_that_fails_is_noticed(server: Server, example: Example, tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        run(example, server, tmp_path)


def test_examples_are_found_by_their_language() -> None:
    text = f"```sh\ncurl {ADDRESS}/\n```\n\n```\noutput\n```\n\n```python\nimport torch\n```\n"
    text += '```python\nimport replicate\n```\n```javascript\nimport R from "replicate";\n```\n'
    assert [(found.language, found.line) for found in examples(text)] == [("sh", 1), ("python", 12), ("javascript", 15)]
    text = "```python\nfrom kimi_vl import hf\n```\n```sh\nimport kimi_vl\n```\n"
    text += "```python\nimport mindspore\nfrom kimi_vl import hf\n```\n"
    assert [found.language for found in examples(text)] == ["python"]
