"""Between the phases: the projector learns to say where objects are, and goes on saying what the decoder knows already.

A token of the tower tells places as coordinates, to about two hundredths; the projector has one hidden layer to turn
them into waves. Gradients alone hardly find that, so some of its units begin as steps along the coordinates, and its
last matrix is solved for. Everything is computed from a gallery's vectors in a few minutes.
"""

from __future__ import annotations

import argparse
import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from demo_world import forward, gallery, labels, training, waves
from kimi_vl.model.kimi_vl import KimiVL
from kimi_vl.model.projector import Projector

SCALE = 8.0
"""Of the waves in the projector's output: the decoder's matrices learn large parts of their input soon."""
MINDED_TOKENS = 150_000  # of pictures, from which it is known what the decoder minds
RAMPS = torch.arange(-3.0, 103.0, 4.0)  # hundredths at which units begin to rise, for each number
OBJECTS, GROUND = 3072, 2048  # tokens of a step
SOLVED_TOKENS = 100_000
SOLVED_EVERY = 150  # steps
RATE = 2e-4
KEEP_WEIGHT, PLACE_WEIGHT, GROUND_WEIGHT = 0.3, 3.0, 0.3
LEAST = 0.1  # of its mean that the decoder minds everything at least


@dataclass
class Seen:
    """Tokens of all exhibits: their vectors (T, 4, C) and the places (T, PLACES) of what they show."""

    groups: Tensor
    places: Tensor

    @classmethod
    def of(cls, exhibits: Sequence[gallery.Exhibit]) -> Seen:
        places = [gallery.token_places(picture) for exhibit in exhibits for picture in exhibit.pictures]
        return cls(torch.cat([exhibit.groups for exhibit in exhibits]), torch.cat(places))


def minded(model: KimiVL, teacher: gallery.Teacher, kept: forward.Kept, tokens: int) -> Tensor:
    """How much the loss of lessons minds a change of the projector's output: (H, H), the mean of outer products of its
    gradients (Fisher's information), of 1 on the diagonal's mean."""
    outputs: list[Tensor] = []

    def keep(_: object, __: object, output: Tensor) -> Tensor:
        outputs.append(output.detach().requires_grad_())
        return outputs[-1]

    width, seen = model.config.text_config.hidden_size, 0
    made = torch.zeros(width, width, device=model.device)
    hook = model.multi_modal_projector.register_forward_hook(keep)
    for batch in teacher.batches(0):
        if batch.kind == "text":
            continue
        batch = batch.to(model.device)
        loss = torch.zeros((), device=model.device)
        for part in forward.learnt(model, batch, forward.read_pictures(model, batch), kept):
            loss = loss + F.cross_entropy(part.logits, part.targets, reduction="sum")
        [gradient] = torch.autograd.grad(loss, outputs)
        made, seen = made + gradient.T @ gradient, seen + len(gradient)
        outputs.clear()
        if seen >= tokens:
            break
    hook.remove()
    return made / made.diag().mean()


class Steps:
    """The projector in training: its input normed, so that a step moves all of it alike."""

    def __init__(self, old: Projector, seen: Seen, mind: Tensor, fit: Tensor):
        """``fit`` (N,) are the tokens that its last matrix is solved for."""
        self.old, self.mind = old, mind
        width = len(mind)
        directions = torch.linalg.eigh(mind + 1e-3 * torch.eye(width)).eigenvectors
        mixed = torch.linalg.qr(torch.randn(waves.WAVES, waves.WAVES)).Q
        self.directions = directions[:, : waves.WAVES] @ mixed  # (H, WAVES), those that are minded least
        self.rest = torch.eye(width) - self.directions @ self.directions.T
        self.metric = mind + LEAST * torch.eye(width)
        inputs = old.pre_norm(seen.groups[fit].float()).flatten(1)
        self.mean, self.spread = inputs.mean(0), inputs.std(0)
        self.inputs, self.places = (inputs - self.mean) / self.spread, seen.places[fit]
        self.placed = self.places[:, 0] != labels.NOWHERE
        self.targets = self.wanted(old.linear_2(F.gelu(old.linear_1(inputs))), self.places)
        self.first = old.linear_1.weight * self.spread
        self.first_bias = old.linear_1.bias + old.linear_1.weight @ self.mean
        self._ramps()
        self.solve()

    def wanted(self, outputs: Tensor, places: Tensor) -> Tensor:
        """What is due for the old ``outputs`` (N, H): the same, with waves, or nothing, in their directions."""
        placed = (places[:, 0] != labels.NOWHERE)[:, None]
        due = torch.where(placed, waves.waves(places), 0.0)
        return outputs @ self.rest + SCALE * due @ self.directions.T

    def _ramps(self) -> None:
        """Units that matter least become ramps: they rise, or fall, from points along a linear estimate of each number
        on, away from the middle."""
        hidden, last = F.gelu(F.linear(self.inputs, self.first, self.first_bias)), self.old.linear_2.weight
        matters = hidden.var(0) * ((last.T @ self.mind) * last.T).sum(1)
        units = matters.argsort()[: labels.PLACES * len(RAMPS)].view(labels.PLACES, -1)
        inputs = F.pad(self.inputs[self.placed], (0, 1), value=1.0).double()
        estimate = _solved(inputs, self.places[self.placed].double(), 5.0).float()  # (I + 1, PLACES)
        step = float(RAMPS[1] - RAMPS[0])
        for number, of_number in enumerate(units):
            for unit, begin in zip(of_number, RAMPS.tolist(), strict=True):
                way = (1 if begin >= 50 else -1) / step
                self.first[unit] = way * estimate[:-1, number]
                self.first_bias[unit] = way * (estimate[-1, number] - begin)

    def solve(self) -> None:
        """The last matrix, by least squares."""
        hidden = F.pad(F.gelu(F.linear(self.inputs, self.first, self.first_bias)), (0, 1), value=1.0).double()
        weights = torch.where(self.placed, 1.0, 0.5)[:, None]
        solved = _solved(hidden, self.targets.double(), 2.0, weights).float().T
        self.last, self.last_bias = solved[:, :-1].contiguous(), solved[:, -1].contiguous()

    def loss(self, groups: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """Of the vectors of tokens (N, 4, C), and the waves (N, WAVES) in what the projector makes of them."""
        normed = (self.old.pre_norm(groups.float()).flatten(1) - self.mean) / self.spread
        made = F.linear(F.gelu(F.linear(normed, self.first, self.first_bias)), self.last, self.last_bias)
        off = made - self.wanted(self.old(groups.float()), places)
        kept, found = off @ self.rest, (off @ self.directions / SCALE).square().mean(1)
        placed = places[:, 0] != labels.NOWHERE
        loss = KEEP_WEIGHT * ((kept @ self.metric) * kept).sum(1).mean()
        loss = loss + PLACE_WEIGHT * found[placed].mean() + GROUND_WEIGHT * found[~placed].mean()
        return loss, made @ self.directions / SCALE

    def write(self, projector: Projector) -> None:
        projector.linear_1.weight.copy_(self.first / self.spread)
        projector.linear_1.bias.copy_(self.first_bias - (self.first / self.spread) @ self.mean)
        projector.linear_2.weight.copy_(self.last)
        projector.linear_2.bias.copy_(self.last_bias)


def _solved(inputs: Tensor, targets: Tensor, ridge: float, weights: Tensor | float = 1.0) -> Tensor:
    """The matrix (I, O) that brings ``inputs`` (N, I) nearest to ``targets`` (N, O)."""
    gram = (inputs * weights).T @ inputs
    return torch.linalg.solve(gram + ridge * torch.eye(len(gram)), (inputs * weights).T @ targets)


def learn_places(model: KimiVL, teacher: gallery.Teacher, kept: forward.Kept, args: argparse.Namespace) -> None:
    """Change the projector in place, or take it from --work where a training is resumed."""
    path = args.work / "projector.pt"
    if args.resume and path.exists():
        model.multi_modal_projector.load_state_dict(torch.load(path, weights_only=True))
        return
    mind = minded(model, teacher, kept, MINDED_TOKENS).cpu()
    projector = copy.deepcopy(model.multi_modal_projector).cpu()
    with torch.no_grad():
        teach(projector, Seen.of(teacher.exhibits), mind, args.place_steps)
    model.multi_modal_projector.load_state_dict(projector.state_dict())
    torch.save(projector.state_dict(), path)


def teach(projector: Projector, seen: Seen, mind: Tensor, steps: int) -> float:
    """The share of numbers of the last batch's objects that are read at most one hundredth off."""
    placed = seen.places[:, 0] != labels.NOWHERE
    objects, ground = placed.nonzero()[:, 0], (~placed).nonzero()[:, 0]
    some = [each[torch.randperm(len(each))[: SOLVED_TOKENS // 2]] for each in (objects, ground)]
    made = Steps(copy.deepcopy(projector), seen, mind, torch.cat(some))
    near = 0.0
    learnt = [made.first.requires_grad_(), made.first_bias.requires_grad_()]
    optimizer = torch.optim.AdamW(learnt, weight_decay=0.0, betas=(0.9, 0.98))
    for step in itertools.count(1):
        if step % SOLVED_EVERY == 0 or step > steps:
            made.solve()
        chosen = torch.cat(
            [each[torch.randint(len(each), (count,))] for each, count in ((objects, OBJECTS), (ground, GROUND))]
        )
        with torch.enable_grad():
            loss, found = made.loss(seen.groups[chosen], seen.places[chosen])
        near = waves.near(found[:OBJECTS], seen.places[chosen[:OBJECTS]])
        if step % training.SHOWN_EVERY == 1 or step > steps:
            print(f"projector {step - 1}/{steps}: loss {loss.item():.3f}, places near {near:.3f}", flush=True)
        if step > steps:
            break
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1, step / 50) * (1 - step / steps)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    made.write(projector)
    return near
