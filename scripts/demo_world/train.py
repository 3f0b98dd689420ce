"""Trains the demo model: vision first on labelled patches, then the whole network on lessons.

Everything is drawn and chosen from one seed; batch k is the same whichever worker makes it. Both phases use
bfloat16 arithmetic on float32 weights where the machine has it.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from demo_world import checkpoint, lessons, pictures
from kimi_vl import chat, loader
from kimi_vl.images import ImageOptions, preprocess
from kimi_vl.language import Experts, Gate
from kimi_vl.model import KimiVL
from kimi_vl.tokenizer import Tokenizer

SEED = 20260101
LABEL_CLASSES = (len(pictures.KINDS), len(pictures.COLOURS), pictures.MAX_ORDER + 1)
LABEL_WEIGHTS = (1.0, 0.5, 0.5)
TEXT_TASKS = {"text_sum": 3, "talk": 1}  # with their shares of the batches without pictures
TEXT_SHARE = 0.3  # of the batches are without pictures: they are cheap, and teach the arithmetic of sums as well
TEXT_ONLY_START = 150  # quick first steps without pictures
CUT_SHARE = 0.08  # of the conversations have their thinking cut short


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
class Batch:
    """Pictures of one size with their labels and, in the second phase, rows of ids to learn."""

    pixel_values: Tensor | None  # (P, 3, 14, 14)
    grids: list[tuple[int, int]]
    labels: Tensor | None  # (T, 4, 3)
    ids: Tensor | None = None  # (B, S)
    targets: Tensor | None = None  # (B, S), -100 where nothing is to be learnt
    row_pictures: list[list[int]] | None = None  # which pictures each row looks at


class PictureBatches(torch.utils.data.Dataset):
    """First phase: soups of glyphs and shapes, sums, scenes; all pictures of a batch have one size."""

    def __init__(self, seed: int, count: int, patches: int, options: ImageOptions):
        self.seed, self.count, self.patches, self.options = seed, count, patches, options
        self.fonts = pictures.find_fonts()

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Batch:
        rng = random.Random(f"{self.seed} pictures {index}")
        size = pictures.picture_size(rng, high=364 if index < self.count * 3 // 4 else 448)
        drawn = [self.draw(rng, size) for _ in range(pictures_per_batch(size, self.patches))]
        return Batch(*encode_pictures(drawn, self.options))

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


def pictures_per_batch(size: tuple[int, int], patches: int) -> int:
    return max(2, round(patches / (math.ceil(size[0] / 28) * math.ceil(size[1] / 28) * 4)))


def encode_pictures(
    drawn: Sequence[pictures.Picture], options: ImageOptions
) -> tuple[Tensor, list[tuple[int, int]], Tensor]:
    encoded = [preprocess(picture.image, options) for picture in drawn]
    pixels = torch.cat([torch.from_numpy(patches) for patches, _ in encoded])
    return pixels, [grid for _, grid in encoded], torch.cat([merged_labels(picture) for picture in drawn])


def batches(dataset: torch.utils.data.Dataset, start: int, workers: int) -> Iterator[Batch]:
    """Batches from ``start`` on, made in other processes in order."""
    count = len(dataset)  # pyright: ignore[reportArgumentType]
    part = torch.utils.data.Subset(dataset, range(start, count))
    loader = torch.utils.data.DataLoader(
        part, batch_size=None, num_workers=workers, prefetch_factor=8 if workers else None
    )
    yield from loader


class Optimizer:
    """Muon for the matrices inside the network and AdamW for the rest, with one schedule for both."""

    def __init__(self, named: dict[str, nn.Parameter], matrix_rate: float, rate: float):
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
        """Apply the gradients: warm-up over 100 steps, a plateau, and a linear fall from ``progress`` 0.45 to 1."""
        self.steps += 1
        factor = max(0.0, min(1.0, self.steps / 100, (1 - progress) / 0.55))
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


def all_experts(self: Experts, states: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """What :meth:`kimi_vl.language.Experts.forward` computes, with every expert seeing every token.

    Two large products, most of their rows weighted by zero, train these small experts several times faster than
    many small products over chosen tokens.
    """
    experts, width, hidden = self.gate_up_proj.shape
    dense = weights.new_zeros(states.shape[0], experts).scatter(1, chosen, weights)  # (T, E)
    gate, up = F.linear(states, self.gate_up_proj.flatten(0, 1)).view(-1, experts, width).chunk(2, dim=-1)
    weighted = (F.silu(gate) * up) * dense.unsqueeze(-1).to(gate.dtype)  # (T, E, I)
    return F.linear(weighted.flatten(1), self.down_proj.transpose(0, 1).reshape(hidden, -1)).to(states.dtype)


def learn_pictures(model: KimiVL, options: ImageOptions, args: argparse.Namespace) -> None:
    """Phase one: the vision tower and the reader learn what each patch shows."""
    dataset = PictureBatches(args.seed, args.picture_steps, args.picture_patches, options)
    reader = PatchReader(model.config.vision_config.hidden_size)
    named = dict(model.vision_tower.named_parameters()) | dict(reader.named_parameters(prefix="reader_head"))
    optimizer = Optimizer(named, args.matrix_rate, args.rate)

    def step(batch: Batch) -> tuple[Tensor, dict[str, float]]:
        assert batch.pixel_values is not None and batch.labels is not None
        loss, right = reader.loss(model.vision_tower(batch.pixel_values, batch.grids), batch.labels)
        return loss, {"patches right": float(right)}

    run("pictures", dataset, 0, optimizer, step, args)


def run(
    name: str,
    dataset: torch.utils.data.Dataset,
    first: int,
    optimizer: Optimizer,
    step: Callable[[Batch], tuple[Tensor, dict[str, float]]],
    args: argparse.Namespace,
    after: Callable[[int], None] | None = None,
    minutes: float = 0,
) -> None:
    """One pass over ``dataset`` from batch ``first`` on, or ``minutes`` of it; prints running means every 50 steps."""
    means: dict[str, float] = {}
    began = time.monotonic()
    count = len(dataset)  # pyright: ignore[reportArgumentType]
    for index, batch in enumerate(batches(dataset, first, args.workers), start=first):
        progress = (index - first) / (count - first)
        if minutes:
            progress = (time.monotonic() - began) / (60 * minutes)
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
        if index % 50 == 0 or index + 1 == count:
            shown = ", ".join(f"{key} {value:.3f}" for key, value in means.items())
            print(f"{name} {index + 1}/{count} {time.monotonic() - began:.0f} s: {shown}", flush=True)


class LessonBatches(torch.utils.data.Dataset):
    """Second phase: conversations about pictures of one size, and now and then a batch without pictures."""

    def __init__(self, seed: int, count: int, patches: int, tokenizer: Tokenizer, options: ImageOptions):
        self.seed, self.count, self.patches = seed, count, patches
        self.tokenizer, self.options = tokenizer, options
        self.fonts = pictures.find_fonts()

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Batch:
        rng = random.Random(f"{self.seed} lessons {index}")
        if index < TEXT_ONLY_START or rng.random() < TEXT_SHARE:
            tasks = rng.choices(list(TEXT_TASKS), list(TEXT_TASKS.values()), k=64)
            studies = [lessons.make_study(rng, self.fonts, task, 1) for task in tasks]
        else:
            compare = rng.random() < 0.13
            size = pictures.picture_size(rng, high=336 if compare else 448)
            tasks = ["compare"] if compare else [task for task in lessons.TASKS if task not in ("compare", *TEXT_TASKS)]
            count = pictures_per_batch(size, self.patches)
            count = max(2, count // 2) if compare else count
            weights = [lessons.TASKS[task] for task in tasks]
            studies = [
                lessons.make_study(rng, self.fonts, rng.choices(tasks, weights)[0], 2, [size]) for _ in range(count)
            ]
        return self.encode(rng, studies)

    def encode(self, rng: random.Random, studies: Sequence[lessons.Study]) -> Batch:
        drawn = [picture for study in studies for picture in study.pictures]
        pixels, grids, labels = encode_pictures(drawn, self.options) if drawn else (None, [], None)
        rows, looks, first = [], [], 0
        for study in studies:
            looked = list(range(first, first + len(study.pictures)))
            first += len(looked)
            tokens = [grids[picture][0] * grids[picture][1] // 4 for picture in looked]
            for conversation in study.conversations:
                prompt = chat.encode(self.tokenizer, conversation.messages, tokens)
                rows.append((prompt, *self.completion(rng, conversation)))
                looks.append(looked)
        longest = max(len(prompt) + len(silent) + len(learnt) for prompt, silent, learnt in rows)
        ids = torch.full((len(rows), longest), self.tokenizer.pad_id)
        targets = torch.full((len(rows), longest), -100)
        for row, (prompt, silent, learnt) in enumerate(rows):
            begin, end = len(prompt) + len(silent), len(prompt) + len(silent) + len(learnt)
            ids[row, :end] = torch.tensor([*prompt, *silent, *learnt])
            targets[row, begin - 1 : end - 1] = torch.tensor(learnt)  # the token before predicts each
        return Batch(pixels, grids, labels, ids, targets, looks)

    def completion(self, rng: random.Random, conversation: lessons.Conversation) -> tuple[list[int], list[int]]:
        """Ids that are put there and ids that are learnt: mostly all of them are learnt, and at times the thinking
        is cut short, as a budget does, and the answer alone is learnt."""
        encode, end = self.tokenizer.encode, [self.tokenizer.im_end_id]
        thinking = chat.THINK_OPEN + conversation.thinking
        if rng.random() < CUT_SHARE:
            ids = encode(thinking)
            cut = ids[: rng.randint(len(encode(chat.THINK_OPEN)), len(ids))]
            return cut + encode(chat.THINK_CLOSE), encode(conversation.answer) + end
        return [], encode(thinking + chat.THINK_CLOSE + conversation.answer) + end


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


def learn_lessons(
    model: KimiVL, tokenizer: Tokenizer, options: ImageOptions, first: int, args: argparse.Namespace
) -> None:
    """Phase two: projector and decoder learn to think and answer. The vision tower stays as it is: it reads nearly
    every patch right by now, and leaving it out makes a step twice as fast."""
    dataset = LessonBatches(args.seed, args.lesson_steps, args.patches, tokenizer, options)
    model.vision_tower.requires_grad_(False)
    optimizer = Optimizer(
        {name: p for name, p in model.named_parameters() if p.requires_grad}, args.matrix_rate, args.rate
    )
    balance = RouterBalance(model)

    def step(batch: Batch) -> tuple[Tensor, dict[str, float]]:
        assert batch.ids is not None and batch.targets is not None and batch.row_pictures is not None
        features = None
        if batch.pixel_values is not None:
            with torch.no_grad():
                groups = model.vision_tower(batch.pixel_values, batch.grids)
            of_picture = model.multi_modal_projector(groups).split([r * c // 4 for r, c in batch.grids])
            features = torch.cat([of_picture[picture] for looks in batch.row_pictures for picture in looks])
        positions = torch.arange(batch.ids.shape[1]).expand_as(batch.ids)
        states = model.language_model(model.embed(batch.ids, features), positions)
        wanted = batch.targets.flatten()
        learnt = (wanted >= 0).nonzero().squeeze(1)
        wanted = wanted[learnt]
        logits = model.language_model.logits(states.flatten(0, 1).index_select(0, learnt))
        loss = F.cross_entropy(logits, wanted)
        kind = "text" if features is None else "compare" if len(batch.row_pictures[0]) > 1 else "picture"
        right = (logits.argmax(-1) == wanted).float().mean().item()
        return loss, {f"{kind} loss": loss.item(), f"{kind} tokens right": right}

    def after(index: int) -> None:
        balance.update()
        if (index + 1) % 250 == 0:
            keep(args.work / "lessons.pt", model, index + 1)

    run("lessons", dataset, first, optimizer, step, args, after, args.minutes)


def keep(path: Path, model: KimiVL, step: int) -> None:
    """The state that ``--resume`` begins from; optimizers begin anew."""
    torch.save({"model": model.state_dict(), "step": step}, path)


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
        "--work", type=Path, default=Path(".cache/train_demo"), help="folder for the state between phases"
    )
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--picture-steps", type=int, default=1100)
    parser.add_argument("--lesson-steps", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0, help="with --start: the number of the first batch of lessons")
    parser.add_argument("--minutes", type=float, default=0, help="end the second phase after this time instead")
    parser.add_argument("--start", type=Path, help="go on from this checkpoint's weights instead of from nothing")
    parser.add_argument("--resume", action="store_true", help="go on from what an earlier run left in --work")
    parser.add_argument("--picture-patches", type=int, default=8192, help="patches a batch in the first phase")
    parser.add_argument("--patches", type=int, default=4096, help="patches a batch in the second phase")
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
    options, config = checkpoint.image_options(), checkpoint.demo_config()
    model = KimiVL(config)
    initialise(model)
    tokenizer = checkpoint.train_tokenizer(lessons.vocabulary_text(random.Random(args.seed), 20_000))
    checkpoint.write_without_weights(args.out, tokenizer)
    args.work.mkdir(parents=True, exist_ok=True)
    pictures_done, first = args.work / "pictures.pt", 0
    found = [path for path in (args.work / "lessons.pt", pictures_done) if args.resume and path.exists()]
    if args.start:
        model = loader.load(args.start, dtype=torch.float32).train().requires_grad_(True)
        first = args.first
    elif found:
        state = torch.load(found[0])
        model.load_state_dict(state["model"])
        first = state["step"]
    else:
        learn_pictures(model, options, args)
        keep(pictures_done, model, 0)
    learn_lessons(model, tokenizer, options, first, args)
    checkpoint.write(args.out, model, tokenizer)


if __name__ == "__main__":
    main()
