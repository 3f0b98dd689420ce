"""Between the phases: the projector learns to say where objects are, and goes on saying what the decoder knows already.

A token of the tower tells places as coordinates, to about two hundredths; the projector has one hidden layer to turn
them into waves. Gradients alone hardly find that, so some of its units begin as steps along the coordinates, and its
last matrix is solved for. Everything is computed from a gallery's vectors in a few minutes.

Where a training goes on with a tower that tells places to its projector already, and the tower itself has learnt on,
the projector follows it: it learns to make of the new tower's tokens what it made of the old one's, with exact waves in
the directions in which they were.
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

from demo_world import alignment, forward, gallery, labels, training, waves
from kimi_vl.media.images import ImageOptions
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
KEEP_WEIGHT, PLACE_WEIGHT, GROUND_WEIGHT = 50.0, 1.0, 0.05
TELLS = 0.25  # of the numbers are told at most one hundredth off by a projector that has learnt places
COMPARED_PAGES, COMPARED_TOKENS = 200, 800  # pictures that two towers see, and tokens of each page of them
TURNS, TOLD_TOKENS = 2000, 20_000
LEAST = 0.1  # of its mean that the decoder minds everything at least


@dataclass
class Seen:
    """Tokens of pictures: their vectors (T, 4, C), the places (T, PLACES) of what they show, and what the projector is
    to make of them (T, H), but for the waves."""

    groups: Tensor
    places: Tensor
    outputs: Tensor

    @classmethod
    def of(cls, exhibits: Sequence[gallery.Exhibit], projector: Projector) -> Seen:
        """All tokens of a gallery, of which the projector is to make what it makes of them."""
        places = [gallery.token_places(picture) for exhibit in exhibits for picture in exhibit.pictures]
        outputs = [projector(exhibit.groups.float()) for exhibit in exhibits]
        return cls(torch.cat([exhibit.groups for exhibit in exhibits]), torch.cat(places), torch.cat(outputs))

    @classmethod
    def by_two(cls, model: KimiVL, before: KimiVL, options: ImageOptions, args: argparse.Namespace) -> Seen:
        """Some tokens of pictures that no gallery has, of which the projector is to make what it makes of them as the
        tower of ``before`` sees them."""
        projector = copy.deepcopy(model.multi_modal_projector).cpu()
        book = gallery.Sketchbook(args.seed + 1, COMPARED_PAGES, args.patches, options)
        made: list[tuple[Tensor, Tensor, Tensor]] = []
        for drawn in training.in_order(book, args.workers):
            exhibits, earlier = list(gallery.hang(model, drawn)), list(gallery.hang(before, drawn))
            own, outputs = cls.of(exhibits, projector), cls.of(earlier, projector).outputs
            shown = torch.cat([alignment.shown_in(exhibit.pictures) for exhibit in exhibits])
            objects = (shown != alignment.NOTHING).any(-1)
            chosen = (torch.rand(len(objects)) + 0.7 * objects).argsort(descending=True)[:COMPARED_TOKENS]
            made.append((own.groups[chosen], own.places[chosen], outputs[chosen]))
        return cls(*map(torch.cat, zip(*made, strict=True)))

    @property
    def placed(self) -> Tensor:
        return self.places[:, 0] != labels.NOWHERE


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


def told(outputs: Tensor, places: Tensor) -> Tensor | None:
    """The directions (H, WAVES), at right angles, in which outputs (N, H) come nearest to the waves of ``places``; None
    where these do not tell them."""
    wanted = waves.waves(places)
    gram, common = (outputs.T @ outputs / len(places)).double(), (SCALE * outputs.T @ wanted / len(places)).double()
    found = _at_right_angles(torch.linalg.solve(gram + 1e-2 * torch.eye(len(gram)), common))
    steepest = torch.linalg.eigvalsh(gram)[-1]
    for _ in range(TURNS):  # each lowers the squared distance: what is minimised lies below a plane through the last
        found = _at_right_angles(steepest * found - gram @ found + common)
    directions = found.float()
    return directions if waves.near(outputs @ directions / SCALE, places) >= TELLS else None


def _at_right_angles(matrix: Tensor) -> Tensor:
    """The matrix of orthonormal columns that is nearest to a direction of ``matrix`` (H, W)."""
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    return left @ right


class Steps:
    """The projector in training: its input normed, so that a step moves all of it alike."""

    def __init__(self, old: Projector, seen: Seen, mind: Tensor, fit: Tensor):
        """``fit`` (N,) are the tokens that its last matrix is solved for."""
        self.old, self.mind = old, mind
        outputs, self.places = seen.outputs[fit], seen.places[fit]
        self.placed = self.places[:, 0] != labels.NOWHERE
        directions = told(outputs[self.placed][:TOLD_TOKENS], self.places[self.placed][:TOLD_TOKENS])
        width = len(mind)
        if directions is None:  # those that are minded least
            vectors = torch.linalg.eigh(mind + 1e-3 * torch.eye(width)).eigenvectors[:, : waves.WAVES]
            directions = vectors @ torch.linalg.qr(torch.randn(waves.WAVES, waves.WAVES)).Q
        self.directions = directions  # (H, WAVES)
        self.rest = torch.eye(width) - directions @ directions.T
        self.metric = mind + LEAST * torch.eye(width)
        self.whole = self.minded(outputs @ self.rest).mean()
        inputs = old.pre_norm(seen.groups[fit].float()).flatten(1)
        self.mean, self.spread = inputs.mean(0), inputs.std(0)
        self.inputs, self.targets = (inputs - self.mean) / self.spread, self.wanted(outputs, self.places)
        self.first = old.linear_1.weight * self.spread
        self.first_bias = old.linear_1.bias + old.linear_1.weight @ self.mean
        self._ramps()
        self.solve()

    def minded(self, change: Tensor) -> Tensor:
        """How much a change (N, H) matters: (N,)."""
        return ((change @ self.metric) * change).sum(1)

    def wanted(self, outputs: Tensor, places: Tensor) -> Tensor:
        """What is due for ``outputs`` (N, H): the same, with waves, or nothing, in their directions."""
        placed = (places[:, 0] != labels.NOWHERE)[:, None]
        due = torch.where(placed, waves.waves(places), 0.0)
        return outputs @ self.rest + SCALE * due @ self.directions.T

    def _ramps(self) -> None:
        """Units that matter least but for the waves become ramps: they rise, or fall, from points along a linear
        estimate of each number on, away from the middle."""
        hidden = F.gelu(F.linear(self.inputs, self.first, self.first_bias))
        last = self.rest @ self.old.linear_2.weight
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

    def loss(self, groups: Tensor, places: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Of the vectors of tokens (N, 4, C), and the waves (N, WAVES) in what the projector makes of them."""
        normed = (self.old.pre_norm(groups.float()).flatten(1) - self.mean) / self.spread
        made = F.linear(F.gelu(F.linear(normed, self.first, self.first_bias)), self.last, self.last_bias)
        off = made - self.wanted(outputs, places)
        kept, found = self.minded(off @ self.rest), (off @ self.directions / SCALE).square().mean(1)
        placed = places[:, 0] != labels.NOWHERE
        loss = KEEP_WEIGHT * kept.mean() / self.whole
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


def learn_places(
    model: KimiVL,
    before: KimiVL | None,
    teacher: gallery.Teacher,
    kept: forward.Kept,
    options: ImageOptions,
    args: argparse.Namespace,
) -> None:
    """Change the projector in place, or take it from --work where a training is resumed.

    ``before`` is the model that the training went on from, where its tower has learnt since.
    """
    path = args.work / "projector.pt"
    if args.resume and path.exists():
        model.multi_modal_projector.load_state_dict(torch.load(path, weights_only=True))
        return
    mind = minded(model, teacher, kept, MINDED_TOKENS).cpu()
    projector = copy.deepcopy(model.multi_modal_projector).cpu()
    with torch.no_grad():
        seen = Seen.of(teacher.exhibits, projector) if before is None else Seen.by_two(model, before, options, args)
        teach(projector, seen, mind, args.place_steps)
    model.multi_modal_projector.load_state_dict(projector.state_dict())
    torch.save(projector.state_dict(), path)


def teach(projector: Projector, seen: Seen, mind: Tensor, steps: int) -> float:
    """The share of numbers of the last batch's objects that are read at most one hundredth off."""
    objects, ground = seen.placed.nonzero()[:, 0], (~seen.placed).nonzero()[:, 0]
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
            loss, found = made.loss(seen.groups[chosen], seen.places[chosen], seen.outputs[chosen])
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
