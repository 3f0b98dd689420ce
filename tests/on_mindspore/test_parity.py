"""The demo on MindSpore against the demo on PyTorch, in one process: the same tokens, alone and in any batch."""
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
import pytest
import torch
from mindspore import ops
from PIL import Image

from demo_world import evaluate, lessons
from kimi_vl.engine.sampling import Sampling, sample_one, uniform
from kimi_vl.mindspore import inputs, language, layers, model
from kimi_vl.model import generation
from kimi_vl.model.generation import Prompt
from kimi_vl.text import chat
from tests.on_mindspore.conftest import DEMO, inputs_of

ROOT = Path(__file__).parents[2]
SEED = 41_000_000  # neither training's nor another test's
REQUESTS, TOKENS = 40, 64
NEVER: frozenset[int] = frozenset()
NONSENSE = Prompt(list(range(300, 312)))  # after which many tokens are likely


@pytest.fixture(scope="module")
def examinee() -> evaluate.Examinee:
    return evaluate.Examinee(DEMO)


@pytest.fixture(scope="module")
def prompts(examinee: evaluate.Examinee) -> list[Prompt]:
    """Questions of every task in turn: without a picture, with one and with several, of one turn and of more."""
    count = -(-REQUESTS // len(lessons.TASKS))
    drawn = zip(*(list(evaluate.questions(SEED, count, task)) for task in lessons.TASKS), strict=True)
    return [examinee.prompt(*asked) for asked in chain.from_iterable(drawn)][:REQUESTS]


def answers(model: Any, prompts: Sequence[Prompt], limit: int, side: str = "left", **options: Any) -> list[list[int]]:
    """The next tokens of each prompt, by default the likeliest and past every end."""
    given = inputs_of(prompts, side)
    whole = model.generate(**given, max_new_tokens=limit, **({"eos_token_id": -1} | options)).asnumpy()
    assert (whole[:, : given["input_ids"].shape[1]] == given["input_ids"].asnumpy()).all()
    return whole[:, given["input_ids"].shape[1] :].tolist()


def test_the_requests_are_of_every_kind(examinee, prompts):
    assert len(prompts) == REQUESTS
    assert {0, 1, 2} <= {len(prompt.grids) for prompt in prompts}
    turn = examinee.tokenizer.special["<|im_user|>"]
    assert {1, 2} <= {list(prompt.ids).count(turn) for prompt in prompts}


@pytest.mark.parametrize("half", [0, 1])
def test_both_frameworks_say_the_same(demo, examinee, prompts, half):
    chosen = prompts[half::2]
    ours = answers(demo, chosen, TOKENS, side=("left", "right")[half])
    assert ours == generation.greedy(examinee.model, chosen, NEVER, TOKENS)


def test_a_sequence_is_the_same_alone_and_beside_others(demo, prompts):
    chosen = [prompts[index] for index in np.argsort([len(prompt.ids) for prompt in prompts])[[0, 3, -1]]]
    together = answers(demo, chosen, 12)
    assert together == answers(demo, chosen, 12, side="right")
    assert together == [answers(demo, [prompt], 12)[0] for prompt in chosen]


def test_sampling_is_that_of_the_engine(demo, examinee, prompts):
    settings, seed, count = {"temperature": 2.0, "top_p": 0.99, "top_k": 200}, 1234, 8
    chosen = [*prompts[:2], NONSENSE]
    ours = answers(demo, chosen, count, do_sample=True, seed=seed, **settings)
    for index, prompt in enumerate(chosen):
        session = generation.Session(examinee.model, [prompt], count)
        sampling, tokens = Sampling(**settings, seed=seed + index), []
        for step in range(count):
            tokens.append(sample_one(session.logits[0], sampling, uniform(seed + index, len(prompt.ids) + step)))
            session.step(tokens[-1:])
        assert ours[index] == tokens
    assert ours != answers(demo, chosen, count)


def test_without_a_seed_mindspore_s_own_decides(demo):
    drawn = []
    for seed in (5, 6, 5):
        ms.set_seed(seed)
        drawn.append([answers(demo, [NONSENSE], 8, do_sample=True, temperature=2.0) for _ in range(2)])
    assert drawn[0] == drawn[2] != drawn[1] and drawn[0][0] != drawn[0][1]


def test_an_ended_sequence_is_filled_with_padding(demo, examinee, prompts):
    """Each keeps the token that ends it; the longest ends the batch."""
    pad = demo.generation_config.pad_token_id
    ours = answers(demo, prompts[:4], 100, eos_token_id=None)
    alone = [generation.greedy(examinee.model, [prompt], examinee.tokenizer.stop_ids, 100)[0] for prompt in prompts[:4]]
    assert len(set(map(len, alone))) > 1
    for tokens, due in zip(ours, alone, strict=True):
        assert tokens[: len(due)] == due and tokens[len(due)] in examinee.tokenizer.stop_ids
        assert set(tokens[len(due) + 1 :]) <= {pad}
    assert len(ours[0]) == max(map(len, alone)) + 1


def ask(demo: Any, examinee: evaluate.Examinee, messages: list[dict[str, Any]], *names: str) -> str:
    images = [Image.open(ROOT / "images" / name) for name in names]
    encoded = [evaluate.preprocess(image, examinee.options) for image in images]
    pixels = torch.cat([torch.from_numpy(patches) for patches, _ in encoded]) if encoded else None
    grids = [grid for _, grid in encoded]
    ids = chat.encode(examinee.tokenizer, messages, [evaluate.num_image_tokens(grid) for grid in grids])
    (tokens,) = answers(demo, [Prompt(ids, pixels, grids)], 120, eos_token_id=None)
    return examinee.tokenizer.decode([token for token in tokens if token not in examinee.tokenizer.stop_ids])


def test_the_demo_thinks_and_answers(demo, examinee):
    question = [{"type": "image"}, {"type": "text", "text": "Solve this math problem shown in the image."}]
    said = ask(demo, examinee, [{"role": "user", "content": question}], "math_problem.png")
    assert said.startswith("◁think▷The picture shows 25 + 13.") and said.endswith("◁/think▷25 + 13 = 38")
    count = [{"type": "image"}, {"type": "text", "text": "How many objects are there?"}]
    assert ask(demo, examinee, [{"role": "user", "content": count}], "demo1.jpeg").endswith("There are 3 objects.")


# ---------------------------------------------------------------------------------------------
# Memory


def test_blocks_change_nothing(demo, prompts, monkeypatch):
    """Queries, keys that they see, and what is wider than the hidden size, in blocks of several sizes."""
    given = inputs_of(prompts[:2])
    whole, keys = demo(**given).asnumpy(), given["input_ids"].shape[1]
    tokens = given["attention_mask"].asnumpy() == 1  # what padding sees means nothing
    for queries, size in ((7, 50), (64, 13)):
        monkeypatch.setattr(layers, "_SCORES", 2 * demo.network.text_config.num_attention_heads * keys * queries)
        monkeypatch.setattr(layers, "_TOKENS", size)
        assert np.abs(demo(**given).asnumpy() - whole)[tokens].max() < 1e-5 * np.abs(whole[tokens]).max()


def test_no_block_has_more_scores_than_it_may(monkeypatch):
    seen: list[int] = []
    softmax = ops.softmax
    monkeypatch.setattr(ops, "softmax", lambda scores, axis: seen.append(scores.size) or softmax(scores, axis))
    query, value = ms.Tensor(np.ones((2, 3, 100, 8), np.float32)), ms.Tensor(np.ones((2, 3, 100, 5), np.float32))
    monkeypatch.setattr(layers, "_SCORES", 2 * 3 * 100 * 11)
    assert layers.attention(query, query, value, scale=1.0, causal=True).shape == (2, 3, 100, 5)
    assert len(seen) == 10 and max(seen) <= layers._SCORES


def test_the_cache_holds_latents(demo, prompts, monkeypatch):
    caches: list[dict[int, Any]] = []
    decoder = language.decoder
    monkeypatch.setattr(language, "decoder", lambda *given: caches.append(given[4]) or decoder(*given))
    answers(demo, prompts[:2], 5)
    text, longest = demo.network.text_config, max(len(prompt.ids) for prompt in prompts[:2])
    shape = (2, longest + 4, text.kv_lora_rank + text.qk_rope_head_dim)
    assert [values.shape for values in caches[-1].values()] == [shape] * text.num_hidden_layers


@pytest.mark.parametrize("past", [0, 5])
def test_the_absorbed_form_is_the_expanded_one(demo, past):
    rng, text = np.random.default_rng(past), demo.network.text_config
    widths = text.qk_nope_head_dim, text.qk_rope_head_dim, text.kv_lora_rank + text.qk_rope_head_dim
    q_nope, q_rope = (ms.Tensor(rng.normal(size=(2, 4, 1, n)).astype(np.float32)) for n in widths[:2])
    kv = ms.Tensor(rng.normal(size=(2, past + 1, widths[2])).astype(np.float32))
    valid = ms.Tensor(np.tril(np.ones((2, past + 1), np.float32), past)[::-1].copy())
    weights = demo._weights / "language_model.model.layers.1.self_attn.kv_b_proj"
    forms = [
        form(weights, text, q_nope, q_rope, kv, valid).asnumpy() for form in (language.absorbed, language.expanded)
    ]
    assert np.abs(forms[0] - forms[1]).max() < 1e-4


# ---------------------------------------------------------------------------------------------
# Planted mistakes of batches


def _rows_at_the_left(*given: Any) -> inputs.Batch:
    """Padding at the side where the next token is read."""
    right = inputs.read(*given)
    ids, valid = right.ids.copy(), right.valid.copy()
    for index, length in enumerate(right.valid.sum(1)):
        ids[index], valid[index] = np.roll(ids[index], length), np.roll(valid[index], length)
    return inputs.Batch(ids, valid, right.pixel_values, right.grids)


@pytest.mark.parametrize("mistake", ["side", "mask"])
def test_a_planted_mistake_of_padding_is_seen(demo, prompts, monkeypatch, mistake):
    chosen = [prompts[index] for index in np.argsort([len(prompt.ids) for prompt in prompts])[[0, -1]]]
    alone = demo(**inputs_of(chosen[:1])).asnumpy()[0, -1]

    def far() -> float:
        return float(np.abs(demo(**inputs_of(chosen)).asnumpy()[0, -1] - alone).max())

    assert far() < 1e-4
    if mistake == "side":
        monkeypatch.setattr(model, "read", _rows_at_the_left)
    else:
        decoder = language.decoder
        monkeypatch.setattr(
            language, "decoder", lambda w, c, states, seen, cache: decoder(w, c, states, np.ones_like(seen), cache)
        )
    assert far() > 1e-2
