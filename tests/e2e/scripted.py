"""A checkpoint in which each token decides the next, so that what it says is known before; and a server of our own."""

from __future__ import annotations

import contextlib
import itertools
import json
import queue
import re
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file, save_file

from cog_local.server import ROOT
from kimi_vl.text.thinking import THINK_CLOSE, THINK_OPEN
from kimi_vl.text.tokenizer import Tokenizer

CHECKPOINT = ROOT / "tests" / "golden" / "golden_a" / "checkpoint"
TOKENIZER = Tokenizer.from_directory(CHECKPOINT)
WORDS = [
    index
    for index in range(TOKENIZER.num_ranks)
    if re.fullmatch(rb" ?[A-Za-z]{2,}", TOKENIZER.token_bytes(index)) and TOKENIZER.token_bytes(index) != b"think"
][:400]
"""What it says, again and again: longer than any loop that is looked for."""


def spoken(count: int) -> str:
    """The first so many words that it says."""
    return TOKENIZER.decode(itertools.islice(itertools.cycle(WORDS), count))


def make_thinker(folder: Path) -> Path:
    """Thinks for ever, and answers for ever once its thinking is closed."""
    following = dict(zip(WORDS, [*WORDS[1:], WORDS[0]], strict=True))
    opener = TOKENIZER.encode(THINK_OPEN)
    assert len(set(opener)) == len(opener) and opener[-1] == TOKENIZER.encode(THINK_CLOSE)[-1]
    following |= dict(zip([TOKENIZER.special["<|im_middle|>"], *opener], [*opener, WORDS[0]], strict=True))
    return make_scripted(folder, following, otherwise=WORDS[0])


def make_scripted(folder: Path, following: dict[int, int], otherwise: int) -> Path:
    """``following`` maps a token to the next one. The layers add nothing, so that the last token alone decides."""
    shutil.copytree(CHECKPOINT, folder, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 131072
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if name.startswith("language_model.") and name.endswith(("o_proj.weight", "down_proj.weight")):
            tensor.zero_()
    head = torch.zeros_like(tensors["language_model.lm_head.weight"])
    # every token has two of the hidden places for its own; no other token has the same two
    for row, pair in zip(head, itertools.combinations(range(head.shape[1]), 2), strict=False):
        row[list(pair)] = 10
    tensors["language_model.lm_head.weight"] = head
    nexts = torch.tensor([following.get(index, otherwise) for index in range(len(head))])
    tensors["language_model.model.embed_tokens.weight"] = head[nexts].clone()
    tensors["language_model.model.norm.weight"].fill_(1)
    save_file(tensors, folder / "model.safetensors")
    return folder


class Handler(BaseHTTPRequestHandler):
    """Hooks are put into a queue; pages are given out, and who asked for them is kept."""

    hooks: ClassVar[queue.Queue[dict[str, Any]]]
    pages: ClassVar[dict[str, tuple[int, dict[str, str], bytes]]]
    asked: ClassVar[list[str]]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.hooks.put(body)
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_GET(self) -> None:
        self.asked.append(self.path)
        status, headers, body = self.pages.get(self.path, (404, {}, b"there is nothing"))
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


class Receiver(ThreadingHTTPServer):
    request_queue_size = 512  # Cog opens a connection for every hook, and does not try again


class Loopback:
    """An HTTP server of our own: a receiver of webhooks, and a place for files."""

    def __init__(self) -> None:
        self.hooks: queue.Queue[dict[str, Any]] = queue.Queue()
        self.pages: dict[str, tuple[int, dict[str, str], bytes]] = {}
        self.asked: list[str] = []
        handler = type("Here", (Handler,), {"hooks": self.hooks, "pages": self.pages, "asked": self.asked})
        self.server = Receiver(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def put(self, path: str, body: bytes, status: int = 200, **headers: str) -> str:
        """Give a file out; returns its URL."""
        self.pages[path] = (status, {name.replace("_", "-"): value for name, value in headers.items()}, body)
        return self.url + path

    def until_terminal(self, seconds: float = 300) -> list[dict[str, Any]]:
        """The hooks up to the one that says how the prediction ended."""
        hooks = []
        while not hooks or hooks[-1]["status"] in ("starting", "processing"):
            hooks.append(self.hooks.get(timeout=seconds))
        return hooks

    @contextlib.contextmanager
    def running(self) -> Iterator[Loopback]:
        thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.server.shutdown()
            self.server.server_close()
            thread.join()
