"""The scheduler and its pages alone, under random traffic, against a plain account of who holds what."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from kimi_vl.engine.page_pool import PagePool
from kimi_vl.engine.scheduler import NeverFits, Request, ScheduledChunk, Scheduler, Span

PAGE = 4


def make(pages: int = 40, **options: int | bool) -> Scheduler:
    values = {"max_num_seqs": 6, "max_num_batched_tokens": 16} | options
    return Scheduler(PagePool(pages), PAGE, **values)  # pyright: ignore[reportArgumentType]


def step(scheduler: Scheduler) -> list[ScheduledChunk]:
    """Plan and compute one step, then give every complete request a token."""
    chunks = scheduler.plan()
    for chunk in chunks:
        scheduler.computed(chunk)
    for chunk in chunks:
        if chunk.complete:
            chunk.request.ids.append(7)
    return chunks


def run(scheduler: Scheduler, request: Request) -> None:
    scheduler.add(request)
    while request.computed < request.prompt_length + request.max_new_tokens - 1:
        step(scheduler)
    scheduler.remove(request)


def test_a_prompt_is_computed_in_chunks_beside_requests_that_decode():
    scheduler = make()
    short, long = Request([1, 2], 30), Request(list(range(40)), 4)
    scheduler.add(short)
    step(scheduler)
    scheduler.add(long)
    ends = []
    while long.computed < 40:
        chunks = step(scheduler)
        assert chunks[0].request is short and chunks[0].end - chunks[0].begin == 1
        assert sum(chunk.end - chunk.begin for chunk in chunks) <= 16
        ends.append(long.computed)
    assert ends == [15, 30, 40]


def test_pages_of_equal_prompts_are_shared_and_the_last_token_is_computed():
    scheduler = make()
    before = Request(list(range(16)), 3)
    scheduler.add(before)
    step(scheduler)
    pages = before.pages[:4]
    scheduler.remove(before)
    again = Request(list(range(16)), 3)
    scheduler.add(again)
    first = step(scheduler)[0]
    assert (again.num_cached_tokens, first.begin, first.end) == (12, 12, 16)
    longer = Request(list(range(16)) + [99] * 5, 3)
    scheduler.add(longer)
    step(scheduler)
    assert longer.num_cached_tokens == 16 and longer.pages[:4] == pages
    assert again.pages[:3] == pages[:3] and again.pages[3] not in pages, "what it computes it writes into its own page"


def test_a_different_beginning_shares_nothing():
    scheduler = make()
    run(scheduler, Request([5, *range(1, 16)], 1))
    other = Request([6, *range(1, 16)], 1)
    scheduler.add(other)
    step(scheduler)
    assert other.num_cached_tokens == 0


@pytest.mark.parametrize(("first", "second", "cached"), [(b"a", b"a", 12), (b"a", b"b", 0)])
def test_pictures_of_equal_size_share_only_when_they_are_the_same(first, second, cached):
    scheduler = make()
    ids = [1, 2, *[50] * 10, 3, 4]
    run(scheduler, Request(list(ids), 1, [Span(2, 12, first)]))
    other = Request(list(ids), 1, [Span(2, 12, second)])
    scheduler.add(other)
    step(scheduler)
    assert other.num_cached_tokens == cached


def test_the_place_inside_a_picture_counts():
    """Two prompts whose second page holds nothing but placeholders, of different parts of one picture."""
    scheduler = make()
    run(scheduler, Request([1, 1, *[50] * 12, 3], 1, [Span(2, 14, b"a")]))
    other = Request([1, 1, *[50] * 12, 3], 1, [Span(0, 12, b"a")])
    scheduler.add(other)
    step(scheduler)
    assert other.num_cached_tokens == 0


def test_without_reuse_nothing_is_shared():
    scheduler = make(prefix_caching=False)
    for _ in range(2):
        request = Request(list(range(16)), 3)
        scheduler.add(request)
        step(scheduler)
        assert request.num_cached_tokens == 0
        scheduler.remove(request)


def test_what_is_forgotten_is_not_found_again():
    scheduler = make()
    request = Request(list(range(16)), 3)
    scheduler.add(request)
    step(scheduler)
    scheduler.remove(request, evict=True)
    again = Request(list(range(16)), 3)
    scheduler.add(again)
    step(scheduler)
    assert again.num_cached_tokens == 0


def test_bounds():
    scheduler = make(pages=10)
    with pytest.raises(NeverFits):
        scheduler.add(Request([1] * 30, 11))
    assert not scheduler.waiting
    scheduler.add(Request([1] * 30, 10))
    assert len(scheduler.waiting) == 1
    with pytest.raises(ValueError, match="token"):
        make(max_num_seqs=20)


def test_a_large_request_is_not_overtaken_for_ever():
    """Small requests keep coming; the large one at the head gets its pages as soon as those before it are done."""
    scheduler, large = make(pages=12), Request([1] * 30, 10)
    small = [Request([n] * 4, 4) for n in range(3)]
    for request in small:
        scheduler.add(request)
    step(scheduler)
    scheduler.add(large)
    waited = 0
    while large not in scheduler.running:
        scheduler.add(Request([99] * 4, 4))
        for request in [r for r in scheduler.running if r.computed >= 7]:
            scheduler.remove(request)
        step(scheduler)
        waited += 1
        assert waited < 10


def test_an_overlapped_step_has_its_pages_and_ends_where_a_request_does():
    """As many requests as the pages allow, each with all it may ever need, and the overlapped step takes no more."""
    scheduler = make(pages=9)
    requests = [Request([n, n], 10 - n) for n in range(3)]
    for request in requests:
        scheduler.add(request)
    step(scheduler)
    scheduler.fresh.clear()
    for count in range(3, 9):
        chunks = scheduler.plan()
        following = scheduler.plan_overlapped(chunks)
        assert [(chunk.begin, chunk.end) for chunk in following] == [(count, count + 1)] * 3
        assert all(len(chunk.request.pages) * PAGE >= chunk.end for chunk in following)
        assert bool(scheduler.fresh) == (count % PAGE == 0)
        scheduler.fresh.clear()
        for chunk in chunks:
            scheduler.computed(chunk)
            chunk.request.ids.append(7)
    # the third one has ten tokens then, of which the last is not computed
    assert scheduler.plan_overlapped(scheduler.plan()) == []


@pytest.mark.parametrize("seed", range(30))
def test_random_traffic_loses_no_page_shares_none_wrongly_and_lets_nobody_starve(seed: int):
    rng = random.Random(seed)
    pages = rng.choice((12, 25, 60))
    scheduler = make(pages=pages, max_num_seqs=rng.randint(1, 6), max_num_batched_tokens=rng.randint(6, 20))
    contents: dict[int, list[tuple[int, ...]]] = {}  # what each page holds: the tokens up to the end of each slot
    alive: list[Request] = []
    for _ in range(400):
        for _ in range(rng.choice((0, 0, 1, 2)) if len(scheduler.waiting) < 30 else 0):
            prompt = [rng.randint(0, 1) for _ in range(rng.randint(1, 20))]
            request = Request(prompt, rng.randint(1, 15))
            try:
                scheduler.add(request)
                alive.append(request)
            except NeverFits:
                assert len(prompt) + request.max_new_tokens > pages * PAGE
        order = list(scheduler.waiting)
        chunks = scheduler.plan()
        assert list(scheduler.waiting) == order[len(order) - len(scheduler.waiting) :]  # nobody is overtaken
        assert bool(chunks) == scheduler.busy
        assert [w.end - w.begin == 1 for w in chunks] == sorted((w.end - w.begin == 1 for w in chunks), reverse=True)
        assert sum(chunk.end - chunk.begin for chunk in chunks) <= scheduler.max_num_batched_tokens
        decoding = {r for r in scheduler.running if r.computed >= r.prompt_length}
        assert decoding <= {chunk.request for chunk in chunks}  # what decodes moves on in each step
        for page in scheduler.fresh:
            contents[page] = [()] * PAGE
        scheduler.fresh.clear()
        for chunk in chunks:
            for at in range(chunk.begin, chunk.end):
                contents[chunk.request.pages[at // PAGE]][at % PAGE] = tuple(chunk.request.ids[: at + 1])
        for chunk in chunks:  # everything a chunk reads is what its own tokens left, whoever computed it
            for at in range(chunk.end):
                held = contents[chunk.request.pages[at // PAGE]][at % PAGE]
                assert held == tuple(chunk.request.ids[: at + 1])
            scheduler.computed(chunk)
        for chunk in chunks:
            if chunk.complete:
                chunk.request.ids.append(rng.randint(0, 1))
        for request in list(alive):
            done = len(request.ids) >= request.prompt_length + request.max_new_tokens
            if done or rng.random() < 0.01:
                scheduler.remove(request, evict=rng.random() < 0.1)
                alive.remove(request)
        holders = Counter(page for request in scheduler.running for page in request.pages)
        assert scheduler.pool.available == pages - len(holders)
    for request in alive:
        scheduler.remove(request)
    assert scheduler.pool.available == pages and not scheduler.busy


def test_giving_back_twice_is_noticed():
    pool = PagePool(2)
    page = pool.take()
    pool.release(page)
    with pytest.raises(ValueError, match="holder"):
        pool.release(page)
    pool.take()
    pool.take()
    with pytest.raises(MemoryError):
        pool.take()
