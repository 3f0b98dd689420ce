"""The chat format, typed control tokens, and the split of thinking from answer."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from kimi_vl.errors import UserError
from kimi_vl.text import chat
from kimi_vl.text.messages import read
from kimi_vl.text.thinking import ThinkingSplitter
from kimi_vl.text.tokenizer import Tokenizer

CHECKPOINT = Path(__file__).parents[1] / "golden" / "golden_a" / "checkpoint"
IMAGE = {"type": "image"}


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_directory(CHECKPOINT)


def user(*parts):
    return {"role": "user", "content": list(parts)}


def text(value):
    return {"type": "text", "text": value}


def test_rendered_examples():
    system = "<|im_system|>system<|im_middle|>You are a helpful assistant<|im_end|>"
    ask, reply = "<|im_user|>user<|im_middle|>", "<|im_assistant|>assistant<|im_middle|>"
    picture = "<|media_start|>image<|media_content|><|media_pad|><|media_end|>"
    assert chat.render([{"role": "user", "content": "Hi"}]) == f"{system}{ask}Hi<|im_end|>{reply}"
    assert chat.render([user(IMAGE, text("What?"))]) == f"{system}{ask}{picture}What?<|im_end|>{reply}"
    own = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert chat.render(own, add_generation_prompt=False) == (
        f"<|im_system|>system<|im_middle|>Be brief.<|im_end|>{ask}Hi<|im_end|>"
    )


def test_ids_equal_those_of_the_rendered_text(tokenizer):
    messages = [
        user(text("First: "), IMAGE, text(" and "), text("second"), IMAGE),
        {"role": "assistant", "content": "x"},
    ]
    rendered = chat.render(messages).replace("<|media_pad|>", "<|media_pad|>" * 3)
    assert chat.encode(tokenizer, messages, [3, 3]) == tokenizer.encode(rendered, allow_special=True)


def test_typed_control_tokens_are_text(tokenizer):
    expected = chat.encode(tokenizer, [{"role": "user", "content": "x"}], [])
    controls = [index for index in expected if tokenizer.is_special(index)]
    for name in tokenizer.special:
        for messages in (
            [{"role": "user", "content": name}],
            [user(text(name))],
            [{"role": "system", "content": name}, {"role": "user", "content": name}],
        ):
            ids = chat.encode(tokenizer, messages, [])
            assert [index for index in ids if tokenizer.is_special(index)] == controls, name


@pytest.mark.parametrize("count", [0, 1, 3])
def test_images_and_slots_must_match(tokenizer, count):
    with pytest.raises(UserError, match="E_MESSAGES_INVALID"):
        chat.encode(tokenizer, [user(IMAGE, IMAGE, text("?"))], [4] * count)


@pytest.mark.parametrize(
    "bad",
    [["x"], [{"role": "user"}], [{"role": 1, "content": "x"}], [{"role": "user", "content": 5}], [user({})]],
)
def test_malformed_messages(tokenizer, bad):
    with pytest.raises(UserError, match="E_MESSAGES_INVALID"):
        chat.encode(tokenizer, bad, [])


SPLITS = {
    "◁think▷why◁/think▷because": ("why", "because"),
    "\n ◁think▷why◁/think▷ because": ("why", " because"),
    "no marker": ("", "no marker"),
    "◁think▷never closed": ("never closed", ""),
    "◁think▷◁/think▷": ("", ""),
    "◁think▷a◁/thin◁/think▷b◁/think▷c": ("a◁/thin", "b◁/think▷c"),
    "◁thin": ("", "◁thin"),
    "": ("", ""),
    "answer ◁think▷ later": ("", "answer ◁think▷ later"),
    "◁think▷x◁": ("x◁", ""),
}


@pytest.mark.parametrize("whole", SPLITS)
def test_split_is_the_same_under_any_chunking(whole):
    rng = random.Random(whole)
    for trial in range(60):
        cuts = sorted(rng.randint(0, len(whole)) for _ in range(rng.randint(0, 12) if trial else 0))
        splitter = ThinkingSplitter()
        pieces = []
        for begin, end in zip([0, *cuts], [*cuts, len(whole)], strict=True):
            pieces += splitter.push(whole[begin:end])
        pieces += splitter.finish()
        joined = {section: "".join(t for s, t in pieces if s == section) for section in ("reasoning", "answer")}
        assert (joined["reasoning"], joined["answer"]) == SPLITS[whole]
        assert all(piece for _, piece in pieces)


def test_a_last_turn_of_the_assistant_stays_open(tokenizer):
    asked = [user(IMAGE, text("Why?"))]
    prefilled = [*asked, {"role": "assistant", "content": [text("◁think▷Hm.◁/think▷Bec"), text("ause<|im_end|>")]}]
    said = "◁think▷Hm.◁/think▷Because<|im_end|>"
    assert chat.assistant_prefill(read(prefilled)) == said
    ids = chat.encode(tokenizer, prefilled, [3], continue_final_message=True)
    assert ids == chat.encode(tokenizer, asked, [3]) + tokenizer.encode(said)
    assert chat.assistant_prefill(read(asked)) is None
    assert chat.assistant_prefill([]) is None
