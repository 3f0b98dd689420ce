"""Trains the demo model: vision first on labelled patches, then the whole network on lessons.

Everything is drawn and chosen from one seed; batch k is the same whichever worker makes it, and whenever.
"""

from __future__ import annotations

import argparse
import copy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import _muon

from demo_world import aids, checkpoint, forward, gallery, lessons, patches, projector, training
from demo_world.optimizer import Optimizer, newton_schulz
from kimi_vl.media.images import ImageOptions
from kimi_vl.model.kimi_vl import KimiVL
from kimi_vl.model.language import Experts, Gate
from kimi_vl.text.tokenizer import Tokenizer
from kimi_vl.weights import loader

SEED = 20260101
READER_STEPS = 60  # of the reader alone, where the tower has learnt already


def learn_pictures(model: KimiVL, tokenizer: Tokenizer, options: ImageOptions, args: argparse.Namespace) -> None:
    """Phase one: the vision tower and the reader learn what each patch shows."""
    reader = patches.PatchReader(model.config.vision_config.hidden_size).to(args.device)
    learners = nn.ModuleDict({"tower": model.vision_tower, "reader_head": reader})
    optimizer = Optimizer(dict(learners.named_parameters()), args.matrix_rate, args.rate, plateau=0.45)
    phase = training.Phase(
        "pictures", args.work, learners, optimizer, args.picture_steps, 0, args.save_minutes, args.resume
    )
    dataset = patches.PictureBatches(args.seed, args.picture_steps, args.picture_patches, options, phase.done)

    def step(batch: patches.PictureBatch, index: int) -> tuple[float, dict[str, float]]:
        with args.autocast:
            with torch.set_grad_enabled(not args.start or index >= READER_STEPS):
                groups = model.vision_tower(batch.pixel_values.to(args.device), [(r, c) for r, c in batch.grids])
            loss, figures = reader.loss(groups, batch.labels.to(args.device))
        loss.backward()
        return loss.item(), figures

    def on_save(index: int) -> None:
        checkpoint.write(args.work / "pictures", model, tokenizer)

    phase.run(training.in_order(dataset, args.workers), step, on_save=on_save)
    checkpoint.write(args.work / "pictures", model, tokenizer)


def learn_lessons(
    model: KimiVL, before: KimiVL | None, tokenizer: Tokenizer, options: ImageOptions, args: argparse.Namespace
) -> None:
    """Phase two: the decoder learns to think and answer; the vision tower and the projector stay as they are.

    The projector's exactness would not survive the large steps of this phase. ``before`` is the model before the first
    phase, where that had one.
    """
    training.round_to_stored(model.vision_tower.requires_grad_(False).parameters())
    model.multi_modal_projector.requires_grad_(False)
    exhibits = gallery.opened(args.work / "gallery.pt", model, options, args)
    teacher = gallery.Teacher(args.seed, tokenizer, exhibits, args.batch_tokens)
    kept = forward.Kept().of(model.language_model.model.layers[aids.ANSWER_LAYER])
    if args.place_steps:
        projector.learn_places(model, before, teacher, kept, options, args)
    readers = aids.Aids(model.config.text_config).to(args.device)
    learners = nn.ModuleDict({"model": model, "reader_head": readers})
    learnt = {name: p for name, p in learners.named_parameters() if p.requires_grad}
    optimizer = Optimizer(learnt, args.matrix_rate, args.rate, plateau=0.1)
    phase = training.Phase(
        "lessons", args.work, learners, optimizer, args.lesson_steps, args.minutes, args.save_minutes, args.resume
    )
    balance = forward.RouterBalance(model)

    def part(batch: gallery.LessonBatch) -> tuple[float, dict[str, float]]:
        batch = batch.to(args.device)
        loss, wrong = torch.zeros((), device=args.device), torch.zeros(len(batch.ids), dtype=torch.bool)
        with args.autocast:
            past = forward.read_pictures(model, batch)
            parts = list(forward.learnt(model, batch, past, kept))
            for some in parts:
                loss = loss + F.cross_entropy(some.logits, some.targets, reduction="sum")
                wrong[some.of_row[some.logits.argmax(-1) != some.targets].cpu()] = True
            loss, whole = loss / (batch.targets >= 0).sum(), 1 - wrong.float().mean().item()
            figures = {f"{batch.kind} loss": loss.item(), f"{batch.kind} conversations right": whole}
            more, found = readers.loss(model, batch, past, parts)
        ((loss + more) / args.accumulate).backward()
        return figures[f"{batch.kind} loss"], figures | found

    def on_save(index: int) -> None:
        checkpoint.write(args.work / "lessons", model, tokenizer)

    batches = training.in_order(gallery.Lessons(teacher, args.text_steps, phase.done * args.accumulate), args.workers)
    stored = [p for name, p in model.named_parameters() if not name.startswith("vision_tower.")]
    with ThreadPoolExecutor(args.accumulate) as threads:

        def step(several: tuple[gallery.LessonBatch, ...], index: int) -> tuple[float, dict[str, float]]:
            with training.as_stored(stored):
                parts = list(threads.map(part, several))
            figures = {name: value for _, figures in parts for name, value in figures.items()}
            return sum(loss for loss, _ in parts) / len(parts), figures

        phase.run(zip(*[batches] * args.accumulate, strict=False), step, balance.update, on_save)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the demo model.")
    parser.add_argument("--out", type=Path, default=Path("kimi_vl/demo"), help="folder for the checkpoint")
    parser.add_argument(
        "--work", type=Path, default=Path(".cache/train_demo"), help="folder for what is learnt on the way"
    )
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--start", type=Path, help="go on from this checkpoint")
    parser.add_argument("--resume", action="store_true", help="go on from what is in --work, with the same arguments")
    parser.add_argument("--save-minutes", type=float, default=10, help="time between two states in --work")
    parser.add_argument("--picture-steps", type=int, default=1100, help="steps of the first phase; 0 leaves it out")
    parser.add_argument("--picture-patches", type=int, default=8192, help="patches a batch in the first phase")
    parser.add_argument("--gallery", type=int, default=900, help="batches of pictures that the second phase has")
    parser.add_argument("--patches", type=int, default=8192, help="patches a batch of these")
    parser.add_argument("--place-steps", type=int, default=1500, help="steps of the projector between; 0 leaves it out")
    parser.add_argument("--text-steps", type=int, default=1200, help="its first steps, without pictures")
    parser.add_argument("--lesson-steps", type=int, default=8000, help="steps of the second phase")
    parser.add_argument("--batch-tokens", type=int, default=5000, help="tokens of a batch, about")
    parser.add_argument("--accumulate", type=int, default=1, help="batches of a step, each in a thread")
    parser.add_argument("--minutes", type=float, default=0, help="end the second phase after this time instead")
    parser.add_argument("--matrix-rate", type=float, default=1.5e-3)
    parser.add_argument("--rate", type=float, default=1.5e-3)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    args.device = torch.device(args.device)
    # without tiles of its own a CPU multiplies bfloat16 matrices more slowly than float32 ones
    bfloat16 = args.device.type == "cuda" or torch.cpu._is_amx_tile_supported()
    args.autocast = torch.autocast(args.device.type, dtype=torch.bfloat16, enabled=bfloat16)
    return args


def main() -> None:
    args = arguments()
    torch.manual_seed(args.seed)
    if args.device.type == "cpu":
        _muon._zeropower_via_newtonschulz = newton_schulz
        F.scaled_dot_product_attention = forward.plain_attention
    # cuDNN makes a plan for every new shape, and nearly every batch has one
    torch.backends.cuda.enable_cudnn_sdp(False)
    Experts.forward = forward.all_experts
    Gate.forward = torch.autocast(args.device.type, enabled=False)(Gate.forward)  # routing is float32, as in inference
    options = checkpoint.image_options()
    if args.start:
        model = loader.load(args.start, dtype=torch.float32).train().requires_grad_(True)
        tokenizer = Tokenizer.from_directory(args.start)
    else:
        model = KimiVL(checkpoint.demo_config())
        forward.initialise(model)
        tokenizer = checkpoint.train_tokenizer(lessons.vocabulary_text(training.seeded(args.seed, "texts", 0), 20_000))
    model.to(args.device)
    before = copy.deepcopy(model) if args.start and args.picture_steps else None
    if args.picture_steps:
        learn_pictures(model, tokenizer, options, args)
    learn_lessons(model, before, tokenizer, options, args)
    checkpoint.write(args.out, model, tokenizer)


if __name__ == "__main__":
    main()
