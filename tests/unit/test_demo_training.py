"""Training of the demo model can be interrupted anywhere: what goes on is what would have been."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import _muon

from demo_world import (
    aids,
    alignment,
    artists,
    checkpoint,
    forward,
    gallery,
    lessons,
    patches,
    pictures,
    places,
    projector,
    training,
    turns,
    waves,
)
from demo_world.labels import NOWHERE, PLACES
from demo_world.optimizer import Optimizer, newton_schulz
from demo_world.printing import find_fonts
from kimi_vl.media.images import preprocess
from kimi_vl.model.kimi_vl import KimiVL
from kimi_vl.model.language import Experts
from kimi_vl.model.projector import Projector
from kimi_vl.text.thinking import THINK_CLOSE, THINK_OPEN
from kimi_vl.text.tokenizer import Tokenizer
from kimi_vl.weights import loader, resolve

OPTIONS = checkpoint.image_options()
PER_PICTURE = alignment.LABEL + len(alignment.MARKS)


def phase(folder: Path, count: int, resume: bool) -> tuple[training.Phase, nn.Module]:
    torch.manual_seed(3)
    module = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    optimizer = Optimizer(dict(module.named_parameters()), 0.02, 0.02, plateau=0.5)
    return training.Phase("net", folder, module, optimizer, count, save_minutes=0, resume=resume), module


def learn(made: training.Phase, module: nn.Module, batches: int) -> None:
    def step(batch: Tensor, index: int) -> tuple[float, dict[str, float]]:
        assert index == made.done
        loss = (module(batch) - 1).square().mean()
        loss.backward()
        return loss.item(), {}

    def inputs() -> Any:
        for index in range(made.done, batches):
            yield torch.full((3, 4), float(index % 5))

    made.run(inputs(), step)


def test_a_phase_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    whole, module = phase(tmp_path / "whole", 12, resume=False)
    learn(whole, module, 12)
    first, parted = phase(tmp_path / "parts", 12, resume=False)
    learn(first, parted, 5)
    second, parted = phase(tmp_path / "parts", 12, resume=True)
    assert second.done == 5
    learn(second, parted, 12)
    assert second.done == 12
    for one, other in zip(module.parameters(), parted.parameters(), strict=True):
        assert torch.equal(one, other)
    anew, _ = phase(tmp_path / "parts", 12, resume=False)
    assert anew.done == 0


def exhibits() -> list[gallery.Exhibit]:
    rng, made = random.Random(8), []
    artist = artists.Artist(rng, find_fonts(), [(84, 84)])
    for task, count in (("box", 1), ("click", 1), ("film", 3), ("film", 2), ("sum", 1), ("pages", 2)) * 3:
        shown = artists.pictures_for(artist, task, count)
        made.append(gallery.Exhibit(task, shown, (9,) * len(shown), torch.zeros(9 * len(shown), 4, 128)))
    return made


@pytest.mark.slow  # starts processes
def test_batches_begin_anywhere_and_share_what_comes_before_the_questions() -> None:
    tokenizer = Tokenizer.from_directory(resolve.DEMO)
    whole = list(itertools.islice(gallery.Teacher(5, tokenizer, exhibits(), 700).batches(2), 24))
    rest = itertools.islice(gallery.Teacher(5, tokenizer, exhibits(), 700).batches(2, begin=9), 15)
    for one, other in zip(whole[9:], rest, strict=True):
        assert torch.equal(one.ids, other.ids) and torch.equal(one.targets, other.targets)
        assert one.kind == other.kind
    taught = gallery.Lessons(gallery.Teacher(5, tokenizer, exhibits(), 700), 2, begin=9)
    for one, other in zip(whole[9:], training.in_order(taught, workers=2), strict=False):
        assert torch.equal(one.ids, other.ids) and torch.equal(one.targets, other.targets)
    assert [batch.kind for batch in whole[:2]] == ["text", "text"] and {batch.kind for batch in whole} == {
        "text",
        "picture",
    }
    for batch in whole:
        if batch.shared_ids is not None and batch.groups is not None and batch.shared_row is not None:
            assert int((batch.shared_ids == tokenizer.media_pad_id).sum()) == batch.groups.shape[0]
            assert batch.shared_row.max() == len(batch.shared_ids) - 1 and len(batch.shared_row) == len(batch.ids)
            assert (batch.ids != tokenizer.media_pad_id).all()


def test_a_click_is_at_times_asked_for_in_the_form_of_the_prompts() -> None:
    rng = random.Random(2)
    systems = {lessons.system_message(rng, "click") for _ in range(60)}
    assert lessons.GUI_SYSTEM in systems and None in systems
    assert lessons.GUI_SYSTEM not in {lessons.system_message(rng, "sum") for _ in range(200)}


def test_picture_batches_begin_anywhere_and_the_reader_learns_them() -> None:
    batches = patches.PictureBatches(1, 40, 600, OPTIONS)
    later = patches.PictureBatches(1, 40, 600, OPTIONS, begin=30)
    assert len(later) == 10
    one, other = batches[31], later[1]
    assert torch.equal(one.pixel_values, other.pixel_values) and torch.equal(one.labels, other.labels)
    assert one.labels.shape == (one.pixel_values.shape[0] // 4, 4, 3 + PLACES)

    # vectors that say all: every place is read from them soon
    torch.manual_seed(0)
    labels = one.labels
    shown = torch.cat(
        [nn.functional.one_hot(labels[..., n] - labels[..., n].min()) for n in range(3 + PLACES)], -1
    ).float()
    reader = patches.PatchReader(shown.shape[-1])
    optimizer = torch.optim.Adam(reader.parameters(), 0.05)
    losses = []
    for _ in range(60):
        loss, _ = reader.loss(shown, labels)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (labels[..., 3] != NOWHERE).any()
    assert losses[-1] < losses[0] / 10
    assert reader.loss(shown, labels)[1] == {"patches right": 1.0, "places near": 1.0}


@torch.inference_mode()
def test_conversations_that_share_pictures_are_computed_as_if_each_had_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """The training's arithmetic beside the model's own, on whole sequences one by one."""
    monkeypatch.setattr(gallery, "rearranged", lambda _, exhibit: exhibit)
    model = loader.load(resolve.DEMO, dtype=torch.float32)
    kept = forward.Kept().of(model.language_model.model.layers[aids.ANSWER_LAYER])
    visits: dict[int, list[tuple[gallery.Exhibit, torch.Tensor, list[tuple[int, int]]]]] = {1: [], 3: []}
    for task, count in (("boxes", 1), ("boxes", 1), ("film", 3)):
        artist = artists.Artist(random.Random(f"{task} {len(visits[count])}"), find_fonts(), [(112, 140)])
        shown = artists.pictures_for(artist, task, count)
        encoded = [preprocess(picture.image, OPTIONS) for picture in shown]
        pixels, grids = torch.cat([torch.from_numpy(made) for made, _ in encoded]), [grid for _, grid in encoded]
        [exhibit] = gallery.hang(model, ([(task, shown)], pixels, grids))
        exact = model.vision_tower(pixels, grids)
        assert (exhibit.groups - exact).abs().max() < 0.05  # kept in bfloat16
        visits[count].append((dataclasses.replace(exhibit, groups=exact), pixels, grids))
    teacher = gallery.Teacher(3, Tokenizer.from_directory(resolve.DEMO), [])
    for visit in visits.values():
        batch = teacher.picture_batch(random.Random(1), [exhibit for exhibit, _, _ in visit])
        assert batch.shared_ids is not None and batch.shared_row is not None
        past = forward.read_pictures(model, batch)
        assert past is not None and batch.places is not None and batch.groups is not None
        for latent in forward.latents(model, batch, past, range(4)):
            assert latent.shape == (len(batch.groups), model.config.text_config.kv_lora_rank)
        assert len(batch.places) == len(batch.groups)
        logits = torch.zeros(*batch.ids.shape, model.config.text_config.vocab_size)
        parts = list(forward.learnt(model, batch, past, kept))
        for part in parts:
            assert part.of_row.unique().tolist() == part.rows.sort().values.tolist()
            for row in part.rows.tolist():
                own = part.of_row == row
                assert part.targets[own].tolist() == batch.targets[row][batch.targets[row] >= 0].tolist()
                logits[row, batch.targets[row] >= 0] = part.logits[own]
        check_aids(model, batch, past, parts)
        for row, of in enumerate(batch.shared_row.tolist()):
            _, pixels, grids = visit[of]
            whole = torch.cat((batch.shared_ids[of], batch.ids[row])).unsqueeze(0)
            alone = model(whole, pixels, grids)[0, batch.shared_ids.shape[1] :]
            check_kept(batch, parts, kept, row)
            due = batch.targets[row] >= 0
            assert due.any() and (logits[row] - alone)[due].abs().max() < 1e-3


def check_kept(batch: gallery.LessonBatch, parts: list[forward.Learnt], kept: forward.Kept, row: int) -> None:
    """What was kept of a layer for the tokens of a row is what it takes and gives on the row alone."""
    [part] = [part for part in parts if row in part.rows.tolist()]
    [at] = (part.rows == row).nonzero()[0].tolist()
    due = batch.targets[row][: part.length] >= 0
    assert batch.shared_ids is not None
    begin = batch.shared_ids.shape[1]
    for state, alone in ((part.before, kept.before), (part.states, kept.states)):
        assert (state[at] - alone[0, begin : begin + part.length])[due].abs().max() < 1e-3
    assert (part.before - part.states).abs().max() > 0.1


def check_aids(
    model: KimiVL, batch: gallery.LessonBatch, past: forward.SharedPast, parts: list[forward.Learnt]
) -> None:
    """The attention that an aid computes again is the network's, token by token."""
    assert batch.aligned is not None and batch.shown is not None and batch.shared_row is not None
    assert batch.shared_ids is not None
    about = batch.aligned.about
    image = batch.shared_ids == model.config.media_placeholder_token_id
    layer, head, attention = aids.ANSWER_LAYER, aids.ANSWER_HEAD, aids.attention_of(model)
    config, compared = attention.config, 0
    for part in parts:
        due = []
        for row, step in (about[part.rows, : part.length] != alignment.NOTHING).nonzero()[:: aids.EVERY].tolist():
            of = int(batch.shared_row[part.rows[row]])
            seen = torch.cat((past.present[layer][of], part.cache.present[layer][row, : step + 1]))  # (L, R+P)
            number = about[part.rows[row], step]
            places = (batch.shown[of] == number).any(-1).nonzero()[:, 0]
            assert len(places) > 0 and (image[of][places] == (number % PER_PICTURE < alignment.LABEL)).all()
            latent, rope = seen.split((config.kv_lora_rank, config.qk_rope_head_dim), dim=-1)
            keys = attention.kv_b_proj(latent).unflatten(-1, (config.num_attention_heads, -1))[:, head]
            keys = torch.cat((keys[:, : config.qk_nope_head_dim], rope), dim=-1)
            scores = keys @ part.cache.queries[layer][row, head, step] * attention.scale  # (L,)
            due.append(-scores.softmax(-1)[places].sum().log())
        found = aids.overlooked(model, batch, part)
        assert len(found) == len(due) and all(abs(one - other) < 1e-3 for one, other in zip(found, due, strict=True))
        compared += len(due)
    assert compared > 0
    film = len(batch.shared_ids) == 1
    loss, figures = aids.Aids(model.config.text_config).loss(model, batch, past, parts)
    assert loss > 0 and {"latents near", "overlooked"} <= figures.keys()
    assert ("mislabelled" in figures) == ("lost" in figures) == film
    assert check_recall(model, batch, past, parts) or not film
    assert ("answers near" in figures) == ("digits off" in figures) == bool((batch.aligned.said != NOWHERE).any())


def check_recall(
    model: KimiVL, batch: gallery.LessonBatch, past: forward.SharedPast, parts: list[forward.Learnt]
) -> bool:
    """The attention of tokens that repeat others is the network's, and rests on these; whether any stands at what it
    repeats itself."""
    assert batch.aligned is not None and batch.shared_row is not None
    wanted, layer, attention = batch.aligned.wanted, aids.ANSWER_LAYER, aids.attention_of(model)
    config, named = attention.config, False
    for part in parts:
        due, even = [], []
        for row, step in (wanted[part.rows, : part.length] != alignment.NOTHING).nonzero().tolist():
            own = past.present[layer][int(batch.shared_row[part.rows[row]])]
            seen = torch.cat((own, part.cache.present[layer][row, : step + 1]))
            latent, rope = seen.split((config.kv_lora_rank, config.qk_rope_head_dim), dim=-1)
            keys = attention.kv_b_proj(latent).unflatten(-1, (config.num_attention_heads, -1))[:, aids.RECALL_HEAD]
            keys = torch.cat((keys[:, : config.qk_nope_head_dim], rope), dim=-1)
            scores = keys @ part.cache.queries[layer][row, aids.RECALL_HEAD, step] * attention.scale
            known = (batch.aligned.known[part.rows[row]] == wanted[part.rows[row], step]).nonzero()[:, 0] + 1
            named |= bool((known == step).any())
            known = known[known < step]
            assert len(known) > 0
            due.append(-scores.softmax(-1)[len(own) + known].sum().log())
            even.append(-math.log(len(known) / len(seen)))
        found = aids.unrecalled(model, batch, part)
        assert len(found) == len(due) and all(abs(one - other) < 1e-3 for one, other in zip(found, due, strict=True))
        part.cache.queries[layer].zero_()  # which attend to all tokens alike
        assert aids.unrecalled(model, batch, part).tolist() == pytest.approx(even, abs=1e-4)
    return named


def recalled(text: str) -> list[tuple[str, list[str]]]:
    """What each token wants, and what the words up to the tokens that have it are."""
    tokenizer = Tokenizer.from_directory(resolve.DEMO)
    tokens = tokenizer.encode(text)
    made = alignment.align_text(alignment.Spelt(tokenizer, tokens))
    found = []
    for at in (made.wanted != alignment.NOTHING).nonzero()[:, 0].tolist():
        known = (made.known[: at - 1] == made.wanted[at]).nonzero()[:, 0].tolist()
        befores = [tokenizer.decode(tokens[: each + 1]) for each in known]
        found.append((tokenizer.decode([tokens[at]]), [re.split(r"[ :▷](?=.)", before)[-1] for before in befores]))
    return found


def test_what_a_completion_repeats_is_where_it_was_said_before() -> None:
    """An asked object's number is known at its name in the reading, a label at the last one that was read, and whether
    something is found, or the same, where it was said first: else at the beginning."""
    click = "◁think▷From left to right: 1 red star, 2 blue star, 3 red cross. Asked: blue star, number 2.◁/think▷x"
    assert recalled(click) == [("2", ["star"])]
    page = "◁think▷Page 3: 1 + 2.◁/think▷Page 3 says 1 + 2."
    assert recalled(page) == [("3", ["3"])]
    pages = "◁think▷Asked: red star. Page 1: 1 + 2 no. Page 2: 1 red cross no, 2 red star yes.◁/think▷It is on page 2."
    assert recalled(pages) == [(" no", ["◁think▷"]), (" no", ["◁think▷"]), (" yes", ["star"]), ("2", ["2"])]
    assert recalled("◁think▷The picture shows 1 + 2. Ones: 1 + 2 = 3. So 3.◁/think▷1 + 2 = 3") == []
    film = (
        "◁think▷00:17:09: left red star, right nothing. 00:17:10: left red star same, right nothing same. "
        "00:17:11: left red star same, right red cross different. Right: nothing, then red cross.◁/think▷At 00:17:11 "
    )
    found = recalled(film)
    assert [word for word, _ in found] == [" same", " same", " same", " different", *"001711"]
    assert [len(known) for _, known in found] == [1, 1, 2, 1, *[1] * 6]
    assert found[3][1] == ["◁think▷"] and all(known[-1] in ("star", "nothing") for _, known in found[:3])


def test_tokens_of_frames_know_the_last_digits_of_their_label() -> None:
    shown = artists.pictures_for(artists.Artist(random.Random(4), find_fonts(), [(140, 112)]), "film", 3)
    exhibit = gallery.Exhibit("film", shown, (20, 20, 20), torch.zeros(60, 4, 128))
    digits = gallery.label_digits(exhibit)
    assert digits.shape == (60, 2)
    assert ["".join(map(str, row)) for row in digits[::20].tolist()] == [str(each.label)[-2:] for each in shown]
    pages = artists.pictures_for(artists.Artist(random.Random(4), find_fonts(), [(140, 140)]), "pages", 2)
    digits = gallery.label_digits(gallery.Exhibit("pages", pages, (25, 25), torch.zeros(50, 4, 128)))
    assert digits[::25].tolist() == [[alignment.NOTHING, int(str(page.label)[-1])] for page in pages]
    plain = gallery.Exhibit("sum", (dataclasses.replace(pages[0], label=None),), (25,), torch.zeros(25, 4, 128))
    assert (gallery.label_digits(plain) == alignment.NOTHING).all()


@pytest.mark.parametrize("task", [*lessons.TASKS])
def test_a_completion_looks_at_what_it_says(task: str) -> None:
    """Tokens that are about an object spell its name, or its glyph, or its place; all that is read is looked at."""
    tokenizer, rng = Tokenizer.from_directory(resolve.DEMO), random.Random(task)
    for _ in range(20):
        shown = artists.pictures_for(artists.Artist(rng, find_fonts()), task)
        talk = lessons.converse(rng, task, shown, lessons.system_message(rng, task))
        text = THINK_OPEN + talk.thinking + THINK_CLOSE + talk.answer
        ids = [*tokenizer.encode(text), tokenizer.im_end_id]
        made = (
            alignment.align(alignment.Spelt(tokenizer, ids), talk, shown)
            if shown
            else alignment.Alignment.empty(len(ids))
        )
        about, said = made.about, made.said
        items = {int(alignment.number_of(n, item.order)): item for n, each in enumerate(shown) for item in each.items}
        spoken: dict[int, str] = {}
        for token, number in zip(ids, about.tolist(), strict=True):
            if number != alignment.NOTHING:
                spoken[number] = spoken.get(number, "") + tokenizer.decode([token])
        for number, each in enumerate(shown):  # where a side of a frame is empty, its ground is looked at
            line = talk.thinking.partition(f"{each.label}: ")[2].partition(".")[0]
            ground = spoken.pop(int(alignment.number_of(number, alignment.GROUND)), "")
            assert ground.split() == (["nothing"] * line.count(" nothing") if each.label else [])
        labelled = torch.tensor([alignment.digits_of(None), *(alignment.digits_of(each.label) for each in shown)])
        for number, each in enumerate(shown):  # of a label that is read, the first and the last characters
            marks = [
                spoken.pop(int(alignment.number_of(number, mark)), "") for mark in range(alignment.LABEL, PER_PICTURE)
            ]
            label = f"{each.label}: " in talk.thinking and str(each.label)
            assert marks == ([label[0], label[-2], label[-1]] if label else [""] * 3)
        of_picture = torch.where(about == alignment.NOTHING, 0, 1 + about // PER_PICTURE)
        of_picture[(made.said[:, 0] != NOWHERE) | (about % PER_PICTURE >= alignment.LABEL)] = 0
        assert torch.equal(made.labels, labelled[of_picture])
        for number, item in items.items():
            label = shown[number // PER_PICTURE].label
            name = turns.name_of(item) if item.colour else item.kind
            line = talk.thinking.partition(f"{label}: ")[2].partition(".")[0]  # of a sequence it reads what it needs
            if item.kind in alignment.UNREAD or (label is not None and name not in line):
                assert number not in spoken
            else:
                assert name in spoken[number]
        assert about[-1] == alignment.NOTHING and spoken.keys() <= items.keys()
        for item in talk.wanted:
            number = int(alignment.number_of(0, item.order))
            assert any(text in spoken[number] for text in places.texts(item, shown[0]))
            place = pictures.hundredths(item, shown[0].size)
            numbers = torch.tensor([*place.box, *place.centre])
            own = (said == numbers).all(-1) & (about == number)
            digits = [own & (made.writing == index) for index in range(2 * PLACES)]
            written = [tokenizer.decode(torch.tensor(ids)[at].tolist()) for at in digits]
            due = [digit for value in numbers.tolist() for digit in f"{value % 100:02}"]
            assert written == ([*due[:8], *[""] * 4] if task != "click" else [*[""] * 8, *due[8:]])
        if not talk.wanted:
            assert (said == NOWHERE).all() and (made.writing == alignment.NOTHING).all()


def test_objects_of_tokens_are_those_of_their_patches() -> None:
    shown = artists.pictures_for(artists.Artist(random.Random(4), find_fonts(), [(140, 112)]), "film", 3)
    of_tokens = alignment.shown_in(shown)
    assert of_tokens.shape == (3 * 20, 4)
    for number, picture in enumerate(shown):
        seen = of_tokens[20 * number : 20 * number + 20].unique().tolist()
        objects = [alignment.number_of(number, item.order) for item in picture.items]
        assert seen == [alignment.NOTHING, *objects]
        told = alignment.shown_in(shown, grounds=True)[20 * number : 20 * number + 20]
        ground, own = alignment.number_of(number, alignment.GROUND), of_tokens[20 * number : 20 * number + 20]
        assert torch.equal((told == ground).all(-1), (own == alignment.NOTHING).all(-1))
        assert torch.equal(torch.where(told == ground, alignment.NOTHING, told), own)


def test_films_run_backwards_and_pages_change_places_under_new_labels() -> None:
    """With what each token shows; a document's numbers and a film's times go up as before."""
    rng = random.Random(4)
    for task, size, count in (("film", (140, 112), 4), ("pages", (140, 140), 3)):
        shown = artists.pictures_for(artists.Artist(rng, find_fonts(), [size]), task, count)
        tokens = size[0] // 28 * size[1] // 28
        groups = torch.arange(count).repeat_interleave(tokens)[:, None, None].expand(-1, 4, 2)
        exhibit = gallery.Exhibit(task, shown, (tokens,) * count, groups)
        orders, named = set(), set()
        for _ in range(60):
            made = gallery.rearranged(rng, exhibit)
            order = made.groups[::tokens, 0, 0].tolist()
            assert torch.equal(
                made.groups, torch.tensor(order).repeat_interleave(tokens)[:, None, None].expand(-1, 4, 2)
            )
            assert [each.items for each in made.pictures] == [shown[number].items for number in order]
            labels = [str(each.label) for each in made.pictures]
            assert labels == sorted(labels) and len(set(labels)) == count and made.room == exhibit.room
            orders.add(tuple(order))
            named.add(labels[0])
        every = tuple(range(count))
        assert orders == ({every, every[::-1]} if task == "film" else {*itertools.permutations(every)})
        assert len(named) > 3
    single = gallery.Exhibit("sum", shown[:1], (20,), torch.zeros(20, 4, 2))
    assert gallery.rearranged(rng, single) is single


def test_steps_learn_at_the_weights_that_are_stored() -> None:
    torch.manual_seed(2)
    weight = nn.Parameter(torch.randn(50))
    exact = weight.detach().clone()
    with training.as_stored([weight]):
        weight.square().sum().backward()
        assert torch.equal(weight, exact.bfloat16().float()) and not torch.equal(weight, exact)
    assert torch.equal(weight, exact) and weight.grad is not None
    assert torch.equal(weight.grad, 2 * exact.bfloat16().float())


def test_waves_are_read_as_the_places_that_made_them() -> None:
    numbers = torch.arange(101)
    every = torch.stack([numbers.roll(n) for n in range(PLACES)], dim=1)
    made = waves.waves(every)
    assert made.shape == (101, waves.WAVES) and made.abs().max() <= 1
    assert torch.equal(waves.read(made), every) and waves.near(made, every) == 1
    torch.manual_seed(0)
    noisy = made + 0.1 * torch.randn_like(made)
    assert ((waves.read(noisy) - every).abs() <= 2).all() and waves.near(noisy, every) > 0.9
    assert waves.near(made, (every + 2).clamp(max=100)) < 0.05


def test_ones_are_told_by_the_short_waves_alone_once_the_tens_are_written() -> None:
    numbers = torch.arange(100)
    every = numbers[:, None].expand(-1, PLACES)
    for number in range(PLACES):
        tens = aids.of_digits(every, torch.full((100,), 2 * number))
        assert torch.equal(tens, waves.of_numbers(waves.waves(every))[:, number])
        ones = aids.of_digits(every, torch.full((100,), 2 * number + 1))[:, 2:].unflatten(0, (10, 10))
        assert torch.allclose(ones, ones[:1].expand(10, -1, -1), atol=1e-5)  # whatever the tens are
        assert torch.cdist(ones[0], ones[0]).fill_diagonal_(9).min() > 0.3  # and different for each


def test_the_projector_learns_places_and_keeps_what_is_minded() -> None:
    """From vectors that hold places as coordinates, as the tower's do, among others."""
    torch.manual_seed(0)
    old = Projector(checkpoint.demo_config())
    tokens, width = 6000, 128
    numbers = torch.randint(0, 101, (tokens, PLACES))
    numbers[::2] = NOWHERE
    mixed = torch.randn(PLACES, 4 * width) / 100
    others = torch.randn(tokens, 4 * width)
    groups = others + torch.where(numbers == NOWHERE, 0.0, numbers - 50.0) @ mixed
    hidden = old.linear_2.out_features
    basis = torch.linalg.qr(torch.randn(hidden, hidden)).Q
    mind = basis @ torch.diag(torch.cat((torch.zeros(hidden // 2), 2 * torch.ones(hidden // 2)))) @ basis.T
    made = copy.deepcopy(old)
    with torch.no_grad():
        vectors = groups.view(tokens, 4, width)
        seen = projector.Seen(vectors, numbers, old(vectors))
        near = projector.teach(made, seen, mind, 30)
        change = made(seen.groups) - old(seen.groups)
    minded, other = change @ basis[:, hidden // 2 :], change @ basis[:, : hidden // 2]
    before = (old(seen.groups) @ basis[:, hidden // 2 :]).var()
    assert near > 0.3  # of numbers by chance: 0.03
    assert other.square().mean() > 1 and minded.square().mean() < 0.2 * before

    # a tower that has learnt on, and says the same in other words
    changed = 0.5 * (groups @ torch.linalg.qr(torch.randn(4 * width, 4 * width)).Q).view(tokens, 4, width)
    followed = copy.deepcopy(made)
    with torch.no_grad():
        outputs, placed = made(vectors), numbers[:, 0] != NOWHERE
        directions = projector.told(outputs[placed], numbers[placed])
        assert directions is not None
        assert projector.told(old(vectors)[placed], numbers[placed]) is None
        unchanged = waves.near(made(changed)[placed] @ directions / projector.SCALE, numbers[placed])
        projector.teach(followed, projector.Seen(changed, numbers, outputs), mind, 30)
        read = followed(changed)[placed] @ directions / projector.SCALE
    assert unchanged < 0.1 and waves.near(read, numbers[placed]) > 0.3


@torch.inference_mode()
def test_all_experts_at_once_compute_what_those_chosen_do() -> None:
    torch.manual_seed(1)
    model = loader.load(resolve.DEMO, dtype=torch.float32)
    experts = next(module for module in model.modules() if isinstance(module, Experts))
    states = torch.randn(50, 160)
    chosen = torch.stack([torch.randperm(8)[:2] for _ in range(50)])
    weights = torch.rand(50, 2)
    one, other = experts(states, chosen, weights), forward.all_experts(experts, states, chosen, weights)
    assert (one - other).abs().max() < 1e-4 < one.abs().max()


def test_plain_attention_is_attention() -> None:
    torch.manual_seed(1)
    query, key, value = (torch.randn(2, 3, 5, 8) for _ in range(3))
    mask = torch.rand(5, 5) < 0.7
    mask.fill_diagonal_(True)
    forms: list[dict[str, Any]] = [{}, {"is_causal": True}, {"attn_mask": mask}, {"scale": 0.3}]
    for arguments in forms:
        due = nn.functional.scaled_dot_product_attention(query, key, value, **arguments)
        assert (forward.plain_attention(query, key, value, **arguments) - due).abs().max() < 1e-5


def test_the_iteration_is_the_librarys() -> None:
    torch.manual_seed(1)
    library = _muon._zeropower_via_newtonschulz
    assert library is not newton_schulz
    for shape in ((40, 24), (24, 40), (16, 16)):
        gradient = torch.randn(shape)
        for steps in (1, 5):
            due = library(gradient, (3.4445, -4.775, 2.0315), steps, 1e-7).float()
            made = newton_schulz(gradient, (3.4445, -4.775, 2.0315), steps, 1e-7)
            assert (made - due).abs().max() < 0.05 * due.abs().max()  # bfloat16
