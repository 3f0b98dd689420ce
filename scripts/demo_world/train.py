"""Trains the demo model: vision first on labelled patches, then the whole network on lessons.

Everything is drawn and chosen from one seed; batch k is the same whichever worker makes it. Both phases use
bfloat16 arithmetic on float32 weights where the machine has it.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from demo_world import checkpoint, gallery, lessons, pictures
from kimi_vl.media.images import ImageOptions, preprocess
from kimi_vl.model.kimi_vl import KimiVL
from kimi_vl.model.language import Attention, Experts, Gate
from kimi_vl.text.tokenizer import Tokenizer
from kimi_vl.weights import loader

SEED = 20260101
LABEL_CLASSES = (len(pictures.KINDS), len(pictures.COLOURS), pictures.MAX_ORDER + 1)
LABEL_WEIGHTS = (1.0, 0.5, 0.5)


class PatchReader(nn.Module):
    """Training aid, thrown away afterwards: reads kind, colour and order of what a patch shows."""

    def __init__(self, width: int):
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(width, classes) for classes in LABEL_CLASSES)

    def loss(self, groups: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy, and the share of labelled patches whose kind is right; (T, 4, C) and (T, 4, 3)."""
        loss = groups.new_zeros((), dtype=torch.float32)
        right = groups.new_zeros(())
        for index, head in enumerate(self.heads):
            scores, wanted = head(groups).float().flatten(0, 1), labels[..., index].flatten()
            # ground fills most patches: it counts less than what there is to see
            weights = torch.where(wanted == 0, 0.2, 1.0)
            loss = (
                loss
                + LABEL_WEIGHTS[index]
                * (F.cross_entropy(scores, wanted, reduction="none") * weights).sum()
                / weights.sum()
            )
            if index == 0:
                seen = wanted > 0
                right = (scores.argmax(-1)[seen] == wanted[seen]).float().mean()
        return loss, right


def merged_labels(picture: pictures.Picture) -> Tensor:
    """Labels of a picture's patches in the order of the vision tower's output: (T, 4, 3)."""
    labels = torch.from_numpy(pictures.patch_labels(picture))  # (rows, columns, 3)
    rows, columns, kinds = labels.shape
    tiles = labels.view(rows // 2, 2, columns // 2, 2, kinds).transpose(1, 2)
    return tiles.reshape(-1, 4, kinds)


@dataclass
class PictureBatch:
    """Pictures of one size with their labels."""

    pixel_values: Tensor  # (P, 3, 14, 14)
    grids: list[tuple[int, int]]
    labels: Tensor  # (T, 4, 3)


class PictureBatches(torch.utils.data.Dataset):
    """First phase: soups of glyphs and shapes, sums, scenes; all pictures of a batch have one size."""

    def __init__(self, seed: int, count: int, patches: int, options: ImageOptions):
        self.seed, self.count, self.patches, self.options = seed, count, patches, options
        self.fonts = pictures.find_fonts()

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> PictureBatch:
        rng = random.Random(f"{self.seed} pictures {index}")
        size = pictures.picture_size(rng, high=364 if index < self.count * 3 // 4 else 448)
        of_one = math.ceil(size[0] / 28) * math.ceil(size[1] / 28) * 4
        drawn = [self.draw(rng, size) for _ in range(max(2, round(self.patches / of_one)))]
        encoded = [preprocess(picture.image, self.options) for picture in drawn]
        return PictureBatch(
            torch.cat([torch.from_numpy(patches) for patches, _ in encoded]),
            [grid for _, grid in encoded],
            torch.cat([merged_labels(picture) for picture in drawn]),
        )

    def draw(self, rng: random.Random, size: tuple[int, int]) -> pictures.Picture:
        chance = rng.random()
        if chance < 0.45:
            return pictures.draw_soup(rng, self.fonts, size=size)
        if chance < 0.75:
            return pictures.draw_sum(
                rng, self.fonts, rng.randrange(100), rng.choice("+-"), rng.randrange(100), size=size
            )
        looks = [(rng.choice(pictures.COLOURS[1:]), rng.choice(pictures.SHAPES)) for _ in range(rng.randint(1, 6))]
        return pictures.draw_scene(rng, looks, size=size)


def in_order(dataset: torch.utils.data.Dataset, workers: int) -> Iterator[Any]:
    """The items of a dataset, made in other processes, in order."""
    yield from torch.utils.data.DataLoader(
        dataset, batch_size=None, num_workers=workers, prefetch_factor=8 if workers else None
    )


class Optimizer:
    """Muon for the matrices inside the network and AdamW for the rest, with one schedule for both."""

    def __init__(self, named: dict[str, nn.Parameter], matrix_rate: float, rate: float, plateau: float):
        self.plateau = plateau
        matrices = [p for name, p in named.items() if p.ndim == 2 and "embed" not in name and "head" not in name]
        chosen = {id(p) for p in matrices}
        others = [p for p in named.values() if id(p) not in chosen]
        self.parts: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, lr=matrix_rate, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0.0),
        ]
        self.rates = (matrix_rate, rate)
        self.parameters = [*matrices, *others]
        self.steps = 0

    def step(self, progress: float) -> None:
        """Apply the gradients: warm-up over 100 steps, a plateau, and a linear fall from there to ``progress`` 1."""
        self.steps += 1
        factor = max(0.0, min(1.0, self.steps / 100, (1 - progress) / (1 - self.plateau)))
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for part, rate in zip(self.parts, self.rates, strict=True):
            for group in part.param_groups:
                group["lr"] = rate * factor
            part.step()
            part.zero_grad(set_to_none=True)


def plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """``scaled_dot_product_attention`` as two products: the fused one's backward pass is far slower on a CPU."""
    scores = (query * (scale or query.shape[-1] ** -0.5)) @ key.transpose(-1, -2)
    if is_causal:
        length = query.shape[-2]
        attn_mask = torch.ones(length, length, dtype=torch.bool).tril()
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, float("-inf"))
    return scores.softmax(-1) @ value


def all_experts(self: Experts, states: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
    """What :meth:`kimi_vl.model.language.Experts.forward` computes, with every expert seeing every token.

    Two large products, most of their rows weighted by zero, train these small experts several times faster than
    many small GEMMs over the tokens of each.
    """
    experts, width, hidden = self.gate_up_proj.shape
    dense = topk_weights.new_zeros(states.shape[0], experts).scatter(1, topk_ids.long(), topk_weights)  # (T, E)
    gate, up = F.linear(states, self.gate_up_proj.flatten(0, 1)).view(-1, experts, width).chunk(2, dim=-1)
    weighted = (F.silu(gate) * up) * dense.unsqueeze(-1).to(gate.dtype)  # (T, E, I)
    return F.linear(weighted.flatten(1), self.down_proj.transpose(0, 1).reshape(hidden, -1)).to(states.dtype)


def learn_pictures(model: KimiVL, options: ImageOptions, args: argparse.Namespace) -> None:
    """Phase one: the vision tower and the reader learn what each patch shows."""
    dataset = PictureBatches(args.seed, args.picture_steps, args.picture_patches, options)
    reader = PatchReader(model.config.vision_config.hidden_size)
    named = dict(model.vision_tower.named_parameters()) | dict(reader.named_parameters(prefix="reader_head"))
    optimizer = Optimizer(named, args.matrix_rate, args.rate, plateau=0.45)

    def step(batch: PictureBatch) -> tuple[Tensor, dict[str, float]]:
        loss, right = reader.loss(model.vision_tower(batch.pixel_values, batch.grids), batch.labels)
        return loss, {"patches right": float(right)}

    run("pictures", in_order(dataset, args.workers), args.picture_steps, optimizer, step, args)


def run(
    name: str,
    batches: Iterator[Any],
    count: int,
    optimizer: Optimizer,
    step: Callable[[Any], tuple[Tensor, dict[str, float]]],
    args: argparse.Namespace,
    after: Callable[[int], None] | None = None,
    minutes: float = 0,
) -> None:
    """``count`` steps, or ``minutes`` of them; prints running means every 50 steps."""
    means: dict[str, float] = {}
    began = time.monotonic()
    for index, batch in enumerate(batches, start=1):
        progress = (time.monotonic() - began) / (60 * minutes) if minutes else (index - 1) / count
        if progress >= 1:
            break
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=args.bfloat16):
            loss, figures = step(batch)
        loss.backward()
        optimizer.step(progress)
        if after is not None:
            after(index)
        for key, value in {"loss": float(loss.detach()), **figures}.items():
            if not math.isnan(value):
                means[key] = 0.95 * means.get(key, value) + 0.05 * value
        if index % 50 == 0 or index == count:
            shown = ", ".join(f"{key} {value:.3f}" for key, value in means.items())
            print(f"{name} {index}/{count} {time.monotonic() - began:.0f} s: {shown}", flush=True)


class RouterBalance:
    """Moves the routers' correction biases toward equal load (DeepSeek-V3 report, section 2.1.2)."""

    def __init__(self, model: KimiVL, speed: float = 1e-3):
        self.speed = speed
        self.gates: list[Gate] = [module for module in model.modules() if isinstance(module, Gate)]
        self.loads = [torch.zeros_like(gate.e_score_correction_bias) for gate in self.gates]
        for gate, load in zip(self.gates, self.loads, strict=True):
            gate.register_forward_hook(self._counting(load))

    @staticmethod
    def _counting(load: Tensor) -> Callable[..., None]:
        def count(_: nn.Module, __: Any, output: tuple[Tensor, Tensor]) -> None:
            load.add_(torch.bincount(output[0].flatten(), minlength=load.numel()))

        return count

    @torch.no_grad()
    def update(self) -> None:
        for gate, load in zip(self.gates, self.loads, strict=True):
            gate.e_score_correction_bias.add_(self.speed * torch.sign(load.mean() - load))
            load.zero_()


class SharedPast:
    """A cache for training: what the rows of pictures left behind comes before each conversation."""

    def __init__(self) -> None:
        self.past: dict[int, Tensor] = {}
        self.present: dict[int, Tensor] = {}
        self.rows: Tensor | None = None

    def share(self, rows: Tensor) -> None:
        """From now on row r is preceded by the earlier row ``rows[r]``."""
        self.past, self.present, self.rows = self.present, {}, rows

    def at(self, positions: Tensor) -> SharedPast:
        return self

    def attend(self, layer: int, attention: Attention, q_nope: Tensor, q_rope: Tensor, new_kv: Tensor) -> Tensor:
        self.present[layer] = new_kv
        if self.rows is None:
            return attention.expanded(q_nope, q_rope, new_kv, None)
        seen = torch.cat((self.past[layer].index_select(0, self.rows), new_kv), dim=1)
        own, length = new_kv.shape[1], seen.shape[1]
        mask = torch.ones(own, length, dtype=torch.bool).tril(length - own)
        return attention.expanded(q_nope, q_rope, seen, mask)


def final_states(model: KimiVL, batch: gallery.LessonBatch) -> Tensor:
    """States (R, S, H) of the conversations' own tokens."""
    past, shared_length = None, 0
    if batch.shared_ids is not None and batch.groups is not None and batch.shared_row is not None:
        past, shared_length = SharedPast(), batch.shared_ids.shape[1]
        positions = torch.arange(shared_length).expand_as(batch.shared_ids)
        embeddings = model.embed(batch.shared_ids, model.multi_modal_projector(batch.groups))
        model.language_model(embeddings, positions, past)
        past.share(batch.shared_row)
    positions = shared_length + torch.arange(batch.ids.shape[1]).expand_as(batch.ids)
    return model.language_model(model.embed(batch.ids), positions, past)


def learn_lessons(model: KimiVL, tokenizer: Tokenizer, options: ImageOptions, args: argparse.Namespace) -> None:
    """Phase two: projector and decoder learn to think and answer; the vision tower stays as it is."""
    model.vision_tower.requires_grad_(False)
    sketchbook = gallery.Sketchbook(args.seed, args.gallery, args.patches, options)
    exhibits: list[gallery.Exhibit] = []
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=args.bfloat16):
        for index, drawn in enumerate(in_order(sketchbook, args.workers), start=1):
            exhibits += gallery.hang(model, drawn)
            if index % 50 == 0:
                print(f"gallery {index}/{args.gallery}: {len(exhibits)} exhibits", flush=True)
    teacher = gallery.Teacher(random.Random(f"{args.seed} lessons"), tokenizer, exhibits)
    optimizer = Optimizer(
        {name: p for name, p in model.named_parameters() if p.requires_grad}, args.matrix_rate, args.rate, plateau=0.1
    )
    balance = RouterBalance(model)

    def step(batch: gallery.LessonBatch) -> tuple[Tensor, dict[str, float]]:
        logits = model.language_model.logits(final_states(model, batch))  # (R, S, vocab_size)
        loss = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())
        right = (logits.argmax(-1) == batch.targets) | (batch.targets < 0)
        whole = right.all(-1).float().mean().item()
        kind = "text" if batch.shared_ids is None else "picture"
        return loss, {f"{kind} loss": loss.item(), f"{kind} conversations right": whole}

    def after(index: int) -> None:
        balance.update()
        if index % 500 == 0:
            checkpoint.write(args.work / "lessons", model, tokenizer)

    run("lessons", teacher.batches(args.text_steps), args.lesson_steps, optimizer, step, args, after, args.minutes)


def initialise(model: KimiVL) -> None:
    """Small outputs into the residual stream, so that depth does not make the first steps unsteady."""
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            continue
        fan_in = parameter[0].numel() if parameter.ndim != 3 else parameter.shape[-1]
        scale = fan_in**-0.5
        if name.endswith(("wo.weight", "fc1.weight", "o_proj.weight", "down_proj.weight", "down_proj")):
            scale *= 0.3
        if "pos_emb" in name or "embed_tokens" in name:
            scale = 0.1
        nn.init.normal_(parameter, std=scale)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the demo model.")
    parser.add_argument("--out", type=Path, default=Path("kimi_vl/demo"), help="folder for the checkpoint")
    parser.add_argument(
        "--work", type=Path, default=Path(".cache/train_demo"), help="folder for checkpoints on the way"
    )
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--start", type=Path, help="go on from this checkpoint, with the second phase")
    parser.add_argument("--picture-steps", type=int, default=1100, help="steps of the first phase")
    parser.add_argument("--picture-patches", type=int, default=8192, help="patches a batch in the first phase")
    parser.add_argument("--gallery", type=int, default=900, help="batches of pictures that the second phase has")
    parser.add_argument("--patches", type=int, default=8192, help="patches a batch of these")
    parser.add_argument("--text-steps", type=int, default=1200, help="its first steps, without pictures")
    parser.add_argument("--lesson-steps", type=int, default=8000, help="steps of the second phase")
    parser.add_argument("--minutes", type=float, default=0, help="end the second phase after this time instead")
    parser.add_argument("--matrix-rate", type=float, default=1.5e-3)
    parser.add_argument("--rate", type=float, default=1.5e-3)
    parser.add_argument("--workers", type=int, default=1)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    args.bfloat16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    torch.manual_seed(args.seed)
    F.scaled_dot_product_attention = plain_attention
    Experts.forward = all_experts
    Gate.forward = torch.autocast("cpu", enabled=False)(Gate.forward)  # routing is float32, as in inference
    options = checkpoint.image_options()
    if args.start:
        model = loader.load(args.start, dtype=torch.float32).train().requires_grad_(True)
        tokenizer = Tokenizer.from_directory(args.start)
    else:
        model = KimiVL(checkpoint.demo_config())
        initialise(model)
        tokenizer = checkpoint.train_tokenizer(lessons.vocabulary_text(random.Random(args.seed), 20_000))
        learn_pictures(model, options, args)
        checkpoint.write(args.work / "pictures", model, tokenizer)
    learn_lessons(model, tokenizer, options, args)
    checkpoint.write(args.out, model, tokenizer)


if __name__ == "__main__":
    main()
