"""What lmms-eval calls for the task kimi_demo; copied beside its YAML, and run in lmms-eval's own environment."""

from __future__ import annotations

import json
from typing import Any

from PIL import Image


def doc_to_visual(doc: dict[str, Any]) -> list[Any]:
    return [Image.open(path).convert("RGB") for path in doc["pictures"]]


def doc_to_text(doc: dict[str, Any], **_: Any) -> str:
    return doc["question"]


def doc_to_messages(doc: dict[str, Any], **_: Any) -> list[dict[str, Any]]:
    """The conversation, with its pictures where they stand in it."""
    pictures = iter(doc_to_visual(doc))
    messages = []
    for message in json.loads(doc["messages"]):
        parts = message["content"]
        if isinstance(parts, str):
            parts = [{"type": "text", "text": parts}]
        content = [{"type": "image", "url": next(pictures)} if part["type"] == "image" else part for part in parts]
        messages.append({"role": message["role"], "content": content})
    return messages


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    return {"right": float(results[0].strip() == doc["answer"])}
