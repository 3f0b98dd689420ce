"""Log-probabilities, biases and constraints against a loop over the plain model, alone and beside other requests, in
ordinary steps and in those over static buffers."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from kimi_vl import kernels
from kimi_vl.engine import sampling
from kimi_vl.engine.cuda_graphs import StaticDecoder
from kimi_vl.engine.engine import Engine, Patches
from kimi_vl.engine.sampling import LogitBias, Logprobs, NextToken, Sampled, Sampling, sample_step, uniform
from kimi_vl.errors import UserError
from kimi_vl.model.generation import Prompt, Session
from kimi_vl.model.kimi_vl import KimiVL
from kimi_vl.weights import loader
from tests.parity.test_engine import CHECKPOINT, SMALL, Listener, ids_of, settle, some_requests

TEXT_TOKENS, VOCABULARY = 1024, 1280
CYCLE = 37  # a constraint allows one id in so many
BIAS = {7: 100.0, 8: -100.0, 500: 3.5, 1023: 0.25}


@pytest.fixture(scope="module")
def model() -> KimiVL:
    return loader.load(CHECKPOINT, dtype=torch.float32)


@pytest.fixture(params=["ordinary", "static"])
def engine(request: pytest.FixtureRequest, model: KimiVL) -> Iterator[Engine]:
    ops = kernels.REFERENCE if request.param == "static" else None
    engine = Engine(copy.deepcopy(model), TEXT_TOKENS, SMALL, ops=ops)
    assert (engine.static_decoder is not None) == (request.param == "static")
    yield engine
    settle(engine)
    engine.close()


class InTurn:
    """Allows the ids that leave one remainder, which each token changes: a state of its own."""

    def __init__(self) -> None:
        self.state = 0

    def consume(self, token: int) -> None:
        assert token % CYCLE == self.state, "a token that is ruled out"
        self.state = (self.state * 3 + token // CYCLE + 1) % CYCLE

    @staticmethod
    def fill(constraints: Sequence[InTurn], masks: np.ndarray) -> None:
        for own, mask in zip(constraints, masks, strict=True):
            for token in range(own.state, VOCABULARY, CYCLE):
                mask[token // 32] |= np.array(1 << token % 32, dtype=np.uint32).view(np.int32)


class Steered(Listener):
    """Takes tokens under rules that change with their number, and keeps their log-probabilities."""

    def __init__(
        self, sampling: Sampling, max_new_tokens: int = 14, biased_from: int = 99, constrained_from: int = 99
    ) -> None:
        super().__init__(max_new_tokens, sampling)
        self._bias, self._biased_from, self._constrained_from = LogitBias(BIAS), biased_from, constrained_from
        self._constraint = InTurn()
        self.logprobs: list[tuple[int, Logprobs]] = []  # with the place of their token

    @property
    def text_only(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return len(self.tokens) == 1

    @property
    def logit_bias(self) -> LogitBias | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._bias if self._biased_from <= len(self.tokens) else None

    @property
    def constraint(self) -> InTurn | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._constraint if self._constrained_from <= len(self.tokens) else None

    def forced(self) -> int | None:
        return 17 if len(self.tokens) == 3 and self._constrained_from > 3 else None

    def sampled(self, logprobs: Logprobs) -> None:
        self.logprobs.append((len(self.tokens), logprobs))

    def take(self, token: int) -> int | None:
        if self.constraint is not None:
            self.constraint.consume(token)
        return super().take(token)


def slowly(model: KimiVL, ids: Sequence[int], patches: Sequence[Patches], steered: Steered) -> list[torch.Tensor]:
    """Drive ``steered`` with the plain loop of the model; the log-probabilities (V,) at the place of each token."""
    pixels = torch.cat([torch.from_numpy(each.pixel_values) for each in patches]) if patches else None
    prompt = Prompt(ids, pixels, [each.grid for each in patches])
    session = Session(model, [prompt], steered.max_new_tokens)
    places = []
    token: int | None = 0
    while token is not None:
        logits = session.logits[0].clone()  # (V,)
        places.append(logits.double().log_softmax(-1))
        if steered.text_only:
            logits[TEXT_TOKENS:] = float("-inf")
        for index, bias in BIAS.items() if steered.logit_bias is not None else ():
            logits[index] += bias
        if steered.constraint is not None:
            logits[torch.arange(VOCABULARY) % CYCLE != steered.constraint.state] = float("-inf")
        number = uniform(steered.sampling.seed, len(steered.tokens))
        drawn = steered.forced()
        token = steered.take(sampling.sample_one(logits, steered.sampling, number) if drawn is None else drawn)
        if token is not None:
            session.step([token])
    return places


RULES: list[dict[str, Any]] = [
    {},
    {"biased_from": 0},
    {"biased_from": 5},
    {"constrained_from": 0},
    {"constrained_from": 6},
    {"biased_from": 2, "constrained_from": 9},
]
SETTINGS = [(0, 1, 0), (1, 1, 0), (0.8, 0.9, 0), (1.5, 1, 20), (2, 0.99, 200)]


def some_steered(logprobs: Sequence[int | None] = (None, 0, 3, 20)) -> list[Steered]:
    return [
        Steered(Sampling(*SETTINGS[n % len(SETTINGS)], seed=n, logprobs=logprobs[n % len(logprobs)]), **rules)
        for n, rules in enumerate(RULES * 2)
    ]


def near(value: Any) -> Any:
    """What float32 makes of sums in another order."""
    return pytest.approx(float(value), rel=1e-5, abs=1e-5)


def same(found: Steered, wanted: Steered, places: Sequence[torch.Tensor]) -> None:
    assert found.result() == wanted.tokens
    count = found.sampling.logprobs
    forced = {n for n in range(len(found.tokens)) if n == 3 and found._constrained_from > 3}
    assert [place for place, _ in found.logprobs] == (
        [] if count is None else [n for n in range(len(found.tokens)) if n not in forced]
    )
    for place, logprobs in found.logprobs:
        right = places[place]
        assert logprobs.logprob == near(right[found.tokens[place]])
        assert len(logprobs.top) == count
        best = right.topk(max(1, count or 0)).values.tolist()
        for (token, value), likely in zip(logprobs.top, best, strict=bool(count)):
            assert value == near(right[token]) and value == near(likely)
        assert len({token for token, _ in logprobs.top}) == count


def test_each_request_is_what_the_plain_loop_makes_of_it(model: KimiVL, engine: Engine) -> None:
    """Alone, and then all of them together, beside some without rules, which stay as they are."""
    requests = some_requests()
    wanted = some_steered()
    places = [slowly(model, *requests[n % len(requests)], steered) for n, steered in enumerate(wanted)]
    for n in range(len(RULES)):  # without log-probabilities these take other ways, to the same tokens
        for logprobs in (None, 3):
            alone = some_steered([logprobs])[n]
            engine.submit(*requests[n], alone.max_new_tokens, alone)
            same(alone, wanted[n], places[n])
    together, neighbours = some_steered(), [Listener(14, Sampling(1, 0.95, 0, seed)) for seed in range(3)]
    before = [Listener(14, Sampling(1, 0.95, 0, seed)) for seed in range(3)]
    for listener in before:
        engine.submit(ids_of(9, 4), [], 14, listener)
        listener.result()
    for n, steered in enumerate(together):
        engine.submit(*requests[n % len(requests)], steered.max_new_tokens, steered)
        if n < len(neighbours):
            engine.submit(ids_of(9, 4), [], 14, neighbours[n])
    for n, steered in enumerate(together):
        same(steered, wanted[n], places[n])
    assert [listener.result() for listener in neighbours] == [listener.tokens for listener in before]
    assert len({tuple(steered.tokens) for steered in wanted}) > 8


def test_steps_are_overlapped_but_where_the_host_must_see_logits(model: KimiVL, monkeypatch: Any) -> None:
    """A request leaves the overlapped steps when its constraint begins, and no token is sampled twice."""
    engine = Engine(copy.deepcopy(model), TEXT_TOKENS, SMALL, ops=kernels.REFERENCE)
    counts = {"launch": 0, "logits": 0}
    for name in counts:
        whole = getattr(StaticDecoder, name)

        def counted(self: StaticDecoder, sequences: Any, name: str = name, whole: Any = whole) -> Any:
            counts[name] += 1
            return whole(self, sequences)

        monkeypatch.setattr(StaticDecoder, name, counted)
    steered = Steered(Sampling(1, 1, 0, 3), 14, constrained_from=6)
    engine.submit(ids_of(5), [], 14, steered)
    steered.result()
    assert counts["logits"] == 14 - 6
    assert counts["launch"] >= 5
    counts.update(launch=0, logits=0)
    plain = Listener(14, Sampling(1, 1, 0, 3))
    engine.submit(ids_of(5), [], 14, plain)
    plain.result()
    assert counts == {"launch": 13, "logits": 0}
    engine.close()


@pytest.mark.parametrize("mistake", ["empty", "raises"])
def test_a_constraint_that_fails_ends_its_own_request(engine: Engine, mistake: str, monkeypatch: Any) -> None:
    before = some_steered()
    for n, steered in enumerate(before):
        engine.submit(ids_of(7, n), [], 14, steered)
    for steered in before:
        steered.result()
    bad = Steered(Sampling(1, 1, 0, 77), 14, constrained_from=4)
    fill = InTurn.fill

    def failing(constraints: Sequence[InTurn], masks: np.ndarray) -> None:
        if bad._constraint in constraints and mistake == "raises":
            raise ValueError("planted")
        fill(constraints, masks)
        for own, mask in zip(constraints, masks, strict=True):
            if own is bad._constraint:
                mask[:] = 0

    monkeypatch.setattr(InTurn, "fill", staticmethod(failing))
    engine.submit(ids_of(4), [], 14, bad)
    after = some_steered()
    for n, steered in enumerate(after):
        engine.submit(ids_of(7, n), [], 14, steered)
    with pytest.raises((ValueError, RuntimeError), match=r"planted|no token"):
        bad.result()
    assert len(bad.tokens) == 4
    assert [steered.result() for steered in after] == [steered.tokens for steered in before]
    assert engine.healthy()


# One step


def step(logits: torch.Tensor, *wanted: NextToken | None, rounded: bool = False) -> list[Any]:
    return sample_step(logits, wanted, rounded)


def following(
    settings: tuple[float, float, int], number: float, logprobs: int | None = None, **rules: Any
) -> NextToken:
    return NextToken(None, Sampling(*settings, seed=0, logprobs=logprobs), number, rules.pop("limit", 50), **rules)


class Only:
    def __init__(self, *allowed: int):
        self.allowed = allowed

    @staticmethod
    def fill(constraints: Sequence[Only], masks: np.ndarray) -> None:
        for own, mask in zip(constraints, masks, strict=True):
            for token in own.allowed:
                mask[token // 32] |= np.array(1 << token % 32, dtype=np.uint32).view(np.int32)


@pytest.mark.parametrize("settings", [*SETTINGS, (1, 1, 3), (0.7, 0.5, 40)])
@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("number", [0.0, 0.5, 1 - 2**-53])
def test_what_a_constraint_rules_out_is_never_sampled(
    settings: tuple[float, float, int], on_device: bool, number: float, monkeypatch: Any
) -> None:
    """However unlikely the rest is, at both ends of the random numbers, and with as many sequences as there are."""
    if on_device:
        monkeypatch.setattr(sampling, "sample_batch", sampling.sample_batch_on_device)
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(1)) * 3
    logits[:, [3, 31, 32, 49]] -= 60
    constraints = [Only(3), Only(31, 32), Only(49), Only(3, 31, 32, 49)]
    found = step(logits, *[following(settings, number, constraint=each) for each in constraints])
    for got, constraint in zip(found, constraints, strict=True):
        assert got.token in constraint.allowed


def test_the_logits_that_are_given_stay_as_they_are() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(1))
    before = logits.clone()
    bias = LogitBias({3: 100})
    rules = [{"bias": bias}, {"constraint": Only(3)}, {"bias": bias, "constraint": Only(3, 4)}]
    found = step(logits, *[following((1, 1, 0), 0.5, 2, **each) for each in rules])
    assert [got.token for got in found] == [3, 3, 3]
    assert torch.equal(logits, before)
    right = before.double().log_softmax(-1)
    for got, own in zip(found, right, strict=True):
        assert abs(got.logprobs.logprob - float(own[3])) < 1e-6
        assert [token for token, _ in got.logprobs.top] == own.topk(2).indices.tolist()


def test_a_step_answers_each_by_itself() -> None:
    logits = torch.randn(5, 50, generator=torch.Generator().manual_seed(2))
    logits[3, 7] = float("nan")
    found = step(
        logits,
        None,
        NextToken(9, Sampling(1, 1, 0, 0, 3), 0.5, 50, None, Only()),
        following((0, 1, 0), 0.0, constraint=Only()),
        following((0, 1, 0), 0.0, 5),
        following((0, 1, 0), 0.0, limit=1),
    )
    assert found[0] is None
    assert found[1] == Sampled(9)
    assert isinstance(found[2], RuntimeError) and "no token" in str(found[2])
    assert isinstance(found[3], RuntimeError) and "finite" in str(found[3])
    assert found[4] == Sampled(0)


def test_a_bias_does_not_change_a_neighbour_s_way_to_sample() -> None:
    """bfloat16 logits need no sorting, but biased ones do: only these are sorted."""
    logits = torch.randn(2, 50, generator=torch.Generator().manual_seed(2)).bfloat16().float()
    seen = []

    def watched(own: torch.Tensor, *given: Any, rounded: bool) -> list[int]:
        seen.append((len(own), rounded))
        return [0] * len(own)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "sample_batch", watched)
        step(logits, following((1, 0.9, 0), 0.5), following((1, 0.9, 0), 0.5, bias=LogitBias({1: 0.1})), rounded=True)
    assert seen == [(1, True), (1, False)]


def test_of_equally_likely_tokens_the_first_ids_are_named() -> None:
    logits = torch.zeros(2, 30)
    logits[1, [5, 9, 20]] = 1
    first, second = sampling.logprobs_of(logits[:, :20], [0, 1], [3, 4])
    assert len(first.top) == 3 and first.top[0][1] == pytest.approx(-np.log(20), abs=1e-6)
    assert [token for token, _ in second.top] == [5, 9, 0, 1]


@pytest.mark.parametrize(
    "values",
    [
        *({1: 100.1}, {1: -101}, {1: float("nan")}, {1: "5"}, {1: True}, {-1: 1}, {1.5: 1}, {"1": 1}, {2**40: 1}),
        dict.fromkeys(range(1025), 1),
    ],
)
def test_a_bias_out_of_bounds_is_refused(values: Any) -> None:
    with pytest.raises(UserError, match=r"^E_PARAMETER: .*logit_bias"):
        LogitBias(values)


@pytest.mark.parametrize("count", [-1, 21, 1.5, "3", True])
def test_a_number_of_logprobs_out_of_bounds_is_refused(count: Any) -> None:
    with pytest.raises(UserError, match=r"^E_PARAMETER: logprobs"):
        Sampling(1, 1, 0, 0, count)
