"""Whether an answer is right: word for word, but for boxes and clicks, which may be a little off, and JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence

from demo_world.lessons import Conversation
from demo_world.pictures import Picture
from demo_world.turns import name_of
from kimi_vl.text.grounding import Box, Finding, grounding

OVERLAP = 0.7
"""Intersection over union from which on a box is right."""
BOXES = ("box", "boxes")


def is_right(conversation: Conversation, pictures: Sequence[Picture], answer: str) -> bool:
    """Whether ``answer`` to a conversation about ``pictures`` is right; white space around it does not count."""
    if conversation.task in BOXES:
        findings = grounding(answer, pictures[0].size).findings
        return bool(findings or _says_none(answer)) and _all_found(conversation, findings)
    if conversation.task == "click":
        return _clicked(conversation, grounding(answer, pictures[0].size).findings)
    if conversation.task == "json":
        return _same_json(conversation.answer, answer)
    return answer.strip() == conversation.answer


def overlap(one: Box, other: Box) -> float:
    """Intersection over union of two boxes (left, top, right, bottom)."""
    wide = min(one[2], other[2]) - max(one[0], other[0])
    high = min(one[3], other[3]) - max(one[1], other[1])
    both = max(0.0, wide) * max(0.0, high)
    return both / (_area(one) + _area(other) - both)


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def _says_none(answer: str) -> bool:
    return answer.strip() == "```json\n[]\n```"


def _all_found(conversation: Conversation, findings: Sequence[Finding]) -> bool:
    """Each wanted object once, by its name, and nothing else."""
    left = list(conversation.wanted)
    for finding in findings:
        for item in left:
            box: Box = (item.box[0], item.box[1], item.box[2], item.box[3])
            if finding.box and finding.label == name_of(item) and overlap(finding.box, box) >= OVERLAP:
                left.remove(item)
                break
        else:
            return False
    return not left


def _clicked(conversation: Conversation, findings: Sequence[Finding]) -> bool:
    """One click, and that inside the object's box."""
    [item] = conversation.wanted
    points = [point for finding in findings if finding.action == "click" for point in finding.points]
    left, top, right, bottom = item.box
    return len(points) == 1 and left <= points[0][0] <= right and top <= points[0][1] <= bottom


def _same_json(due: str, answer: str) -> bool:
    try:
        return json.loads(answer) == json.loads(due)
    except ValueError:
        return False
