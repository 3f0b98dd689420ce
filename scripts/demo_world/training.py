"""A phase of the training as steps that can be interrupted: what is learnt is on disk, and goes on from there."""

from __future__ import annotations

import math
import os
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from demo_world.optimizer import Optimizer

SHOWN_EVERY = 50  # steps


def in_order(dataset: torch.utils.data.Dataset, workers: int) -> Iterator[Any]:
    """The items of a dataset, made in other processes, in order."""
    yield from torch.utils.data.DataLoader(
        dataset, batch_size=None, num_workers=workers, prefetch_factor=8 if workers else None
    )


class Phase:
    """Steps of one kind: ``count`` of them, or as many as ``minutes`` allow.

    Every ``save_minutes`` everything that the next step depends on is written to ``folder``: the modules, the
    optimizer's state, how far it is. With ``resume`` a phase that is found there goes on.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        modules: nn.Module,
        optimizer: Optimizer,
        count: int,
        minutes: float = 0,
        save_minutes: float = 10,
        resume: bool = False,
    ):
        self.name, self.count, self.minutes, self.save_minutes = name, count, minutes, save_minutes
        self.modules, self.optimizer = modules, optimizer
        self.path = folder / f"{name}.pt"
        self.done = 0
        """Steps so far."""
        self.seconds = 0.0
        """Spent in them."""
        self.means: dict[str, float] = {}
        if resume and self.path.exists():
            self._load()

    def _load(self) -> None:
        state = torch.load(self.path, map_location="cpu", weights_only=True)
        self.modules.load_state_dict(state["modules"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.done, self.seconds, self.means = state["done"], state["seconds"], state["means"]
        print(f"{self.name}: goes on after step {self.done}", flush=True)

    def save(self) -> None:
        """Written beside and renamed: an interruption leaves the earlier state."""
        state = {
            "modules": self.modules.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "done": self.done,
            "seconds": self.seconds,
            "means": self.means,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".new")
        torch.save(state, beside)
        os.replace(beside, self.path)

    def run(
        self,
        batches: Iterable[Any],
        step: Callable[[Any, int], tuple[float, dict[str, float]]],
        after: Callable[[], None] | None = None,
        on_save: Callable[[int], None] | None = None,
    ) -> None:
        """Learn from ``batches``, which begin with the one after the last that is done; ``step`` adds the gradients."""
        saved = time.monotonic()
        for batch in batches:
            began = time.monotonic()
            progress = self.seconds / (60 * self.minutes) if self.minutes else self.done / self.count
            if progress >= 1:
                break
            loss, figures = step(batch, self.done)
            self.optimizer.step(progress)
            if after is not None:
                after()
            self.done += 1
            self.seconds += time.monotonic() - began
            self._note({"loss": loss, **figures})
            if time.monotonic() - saved > 60 * self.save_minutes:
                self.save()
                if on_save is not None:
                    on_save(self.done)
                saved = time.monotonic()
        self.save()

    def _note(self, figures: dict[str, float]) -> None:
        for key, value in figures.items():
            if not math.isnan(value):
                self.means[key] = 0.95 * self.means.get(key, value) + 0.05 * value
        if self.done % SHOWN_EVERY == 0 or self.done == self.count:
            shown = ", ".join(f"{key} {value:.3f}" for key, value in self.means.items())
            print(f"{self.name} {self.done}/{self.count} {self.seconds:.0f} s: {shown}", flush=True)


@torch.no_grad()
def round_to_stored(parameters: Iterable[Tensor]) -> None:
    """Make parameters what the checkpoint will have, which is bfloat16."""
    for parameter in parameters:
        parameter.copy_(parameter.bfloat16())


@contextmanager
def as_stored(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Parameters as the checkpoint will have them: what is learnt has to bear their rounding.

    The parameters before it come back afterwards; the gradients are applied to them."""
    exact = [parameter.detach().clone() for parameter in parameters]
    round_to_stored(parameters)
    yield
    with torch.no_grad():
        for parameter, own in zip(parameters, exact, strict=True):
            parameter.copy_(own)


def seeded(seed: int, name: str, index: int) -> random.Random:
    """The random numbers of one batch, whatever came before it."""
    return random.Random(f"{seed} {name} {index}")
