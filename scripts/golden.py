"""Runs an implementation over a golden directory and measures how far it is from the original, stage by stage.

Golden directories hold a tiny checkpoint and, for some conversations, what the original implementation computed
(tests/golden/README.md has the layout). Knows both of our implementations through one small interface.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from unittest import mock

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import kimi_vl.model.language
import kimi_vl.model.vision
from kimi_vl.media.images import ImageOptions, preprocess
from kimi_vl.model.config import num_image_tokens
from kimi_vl.model.kimi_vl import KimiVL
from kimi_vl.model.latent_cache import LatentCache
from kimi_vl.text import chat
from kimi_vl.text.tokenizer import Tokenizer
from kimi_vl.weights import loader

Grids = list[tuple[int, int]]

# Largest absolute difference allowed, by the beginning of the stage's name; 0 means equal.
TOLERANCES = {
    "pixel_values": 1e-6,
    "vit_output": 2e-6,
    "projector_output": 2e-6,
    "logits": 5e-4,
    "generation_step_logits": 5e-4,
    "vit.": 2e-5,
    "projector.": 2e-5,
    "lm.": 5e-4,
}
GENERATED = 32


class Implementation(Protocol):
    """What can be measured. Grids are (rows, columns) of patches; text rows are single."""

    name: str

    @property
    def special_tokens(self) -> Iterable[str]: ...

    def prompt(self, messages: list[dict[str, Any]]) -> str: ...
    def inputs(
        self, messages: list[dict[str, Any]], images: list[Image.Image]
    ) -> tuple[list[int], Tensor | None, Grids]: ...
    def vision(self, pixel_values: Tensor, grids: Grids) -> Tensor: ...
    def projected(self, pixel_values: Tensor, grids: Grids) -> Tensor: ...
    def logits(self, ids: list[int], pixel_values: Tensor | None, grids: Grids) -> Tensor: ...
    def generate(self, ids: list[int], pixel_values: Tensor | None, grids: Grids) -> tuple[list[int], Tensor]: ...
    def stages(self, ids: list[int], pixel_values: Tensor | None, grids: Grids) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class Difference:
    """How far one stage of one case is off; ``amount`` is infinite where shapes or kinds differ."""

    case: str
    stage: str
    amount: float
    tolerance: float

    @property
    def good(self) -> bool:
        return self.amount <= self.tolerance


class Native:
    """Our own implementation."""

    name = "kimi_vl"

    def __init__(self, directory: Path, device: str = "cpu"):
        self.model = loader.load(directory, dtype=torch.float32, device=device)
        self.tokenizer = Tokenizer.from_directory(directory)
        self.options = ImageOptions.from_directory(directory)
        self.device = device

    @property
    def special_tokens(self) -> Iterable[str]:
        return self.tokenizer.special

    def prompt(self, messages: list[dict[str, Any]]) -> str:
        return chat.render(messages)

    def inputs(
        self, messages: list[dict[str, Any]], images: list[Image.Image]
    ) -> tuple[list[int], Tensor | None, Grids]:
        encoded = [preprocess(image, self.options) for image in images]
        grids = [grid for _, grid in encoded]
        pixels = torch.cat([torch.from_numpy(patches) for patches, _ in encoded]) if encoded else None
        return (
            chat.encode(self.tokenizer, messages, [num_image_tokens(grid) for grid in grids]),
            pixels,
            grids,
        )

    def vision(self, pixel_values: Tensor, grids: Grids) -> Tensor:
        return self.model.vision_tower(pixel_values.to(self.device), grids)

    def projected(self, pixel_values: Tensor, grids: Grids) -> Tensor:
        return self.model.encode_images(pixel_values.to(self.device), grids)

    def logits(self, ids: list[int], pixel_values: Tensor | None, grids: Grids) -> Tensor:
        pixels = None if pixel_values is None else pixel_values.to(self.device)
        return self.model(torch.tensor([ids], device=self.device), pixels, grids)[0]

    def generate(self, ids: list[int], pixel_values: Tensor | None, grids: Grids) -> tuple[list[int], Tensor]:
        pixels = None if pixel_values is None else pixel_values.to(self.device)
        cache = LatentCache(
            self.model.config.text_config, 1, len(ids) + GENERATED, dtype=torch.float32, device=self.device
        )
        logits = self.model(torch.tensor([ids], device=self.device), pixels, grids, cache=cache)[0, -1]
        generated, steps = [], []
        for position in range(len(ids), len(ids) + GENERATED):
            steps.append(logits)
            generated.append(int(logits.argmax()))
            token, at = (torch.tensor([[value]], device=self.device) for value in (generated[-1], position))
            logits = self.model(token, positions=at, cache=cache)[0, -1]
        return generated, torch.stack(steps)

    def stages(self, ids: list[int], pixel_values: Tensor | None, grids: Grids) -> dict[str, Tensor]:
        caught: dict[str, Tensor] = {}
        with _watching(self.model, caught):
            self.logits(ids, pixel_values, grids)
        return caught


def _keeping(caught: dict[str, Any], name: str) -> Callable[..., None]:
    """A forward hook that keeps what a module gives back the first time."""

    def keep(_: Any, __: Any, result: Any) -> None:
        caught.setdefault(name, result)

    return keep


@contextmanager
def _watching(model: KimiVL, caught: dict[str, Tensor]) -> Iterator[None]:
    """Catches every golden stage of our model under its golden name."""

    def entry(name: str) -> Callable[..., None]:
        def keep(_: Any, inputs: Any) -> None:
            caught.setdefault(name, inputs[0])

        return keep

    def vision_rope(
        states: Tensor, cos: Tensor, sin: Tensor, rotate: Any = kimi_vl.model.vision.apply_rope_interleaved
    ) -> Tensor:
        result = rotate(states, cos, sin)
        caught.setdefault("vit.rope_freqs_cis_real_imag", torch.stack((cos, sin), dim=-1))
        name = "vit.block0.k_rope" if "vit.block0.q_rope" in caught else "vit.block0.q_rope"
        caught.setdefault(name, result)
        return result

    def text_rope(
        states: Tensor, cos: Tensor, sin: Tensor, rotate: Any = kimi_vl.model.language.apply_rope_half
    ) -> Tensor:
        result = rotate(states, cos, sin)
        name = "lm.layer0.k_pe" if "lm.layer0.q_pe_in" in caught else "lm.layer0.q_pe"
        for stage, value in (
            (f"{name}_in", states),
            (f"{name}_rope", result),
            ("lm.rope_cos", cos),
            ("lm.rope_sin", sin),
        ):
            caught.setdefault(stage, value)
        return result

    tower, projector, text = model.vision_tower, model.multi_modal_projector, model.language_model.model
    after = {"vit.patch_embed": tower.patch_embed, "vit.final_layernorm": tower.encoder.final_layernorm}
    before: dict[str, Any] = {"vit.patch_embed.proj": tower.patch_embed.pos_emb}
    for index, block in enumerate(tower.encoder.blocks):
        after[f"vit.block{index}.out"] = block
    first: Any = tower.encoder.blocks[0]
    for name in ("norm0", "wqkv", "wo", "norm1", "mlp"):
        after[f"vit.block0.{name}"] = getattr(first, name)
    after["vit.block0.mlp.fc0"], before["vit.block0.attn_before_wo"] = first.mlp.fc0, first.wo
    after |= {
        "projector.pre_norm": projector.pre_norm,
        "projector.linear_1": projector.linear_1,
        "projector.out": projector,
    }
    before["projector.act"] = projector.linear_2
    after["lm.norm"] = text.norm
    for index, layer in enumerate(text.layers):
        prefix, parts = f"lm.layer{index}", dict(layer.named_modules())
        for name in ("self_attn", "post_attention_layernorm", "mlp"):
            after[f"{prefix}.{name}"] = parts[name]
        after[f"{prefix}.out"] = layer
        if "mlp.gate" in parts:
            after[f"{prefix}.shared_experts"], after[f"{prefix}.gate"] = (
                parts["mlp.shared_experts"],
                parts["mlp.gate"],
            )
    opening: Any = text.layers[0]
    before["lm.layer0.in"], before["lm.layer0.attn_before_o_proj"] = opening, opening.self_attn.o_proj
    after["lm.layer0.input_layernorm"] = opening.input_layernorm
    for name in ("q_proj", "kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj"):
        after[f"lm.layer0.{name}"] = getattr(opening.self_attn, name)
    with ExitStack() as stack:
        for name, module in after.items():
            stack.callback(module.register_forward_hook(_keeping(caught, name)).remove)
        for name, module in before.items():
            stack.callback(module.register_forward_pre_hook(entry(name)).remove)
        stack.enter_context(mock.patch.object(kimi_vl.model.vision, "apply_rope_interleaved", vision_rope))
        stack.enter_context(mock.patch.object(kimi_vl.model.language, "apply_rope_half", text_rope))
        yield
    for name in [name for name in caught if name.endswith(".gate")]:
        topk_ids, topk_weights = caught.pop(name)
        caught[f"{name}.topk_idx"], caught[f"{name}.topk_weight"] = topk_ids, topk_weights


class HuggingFace:
    """The Hugging Face integration."""

    name = "kimi_vl.hf"

    def __init__(self, directory: Path, device: str = "cpu"):
        from kimi_vl.hf import KimiVLForConditionalGeneration, KimiVLProcessor

        self.model: Any = KimiVLForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).to(device)
        self.processor = KimiVLProcessor.from_pretrained(directory)
        self.device = device

    @property
    def special_tokens(self) -> Iterable[str]:
        return self.processor.tokenizer.special

    def prompt(self, messages: list[dict[str, Any]]) -> str:
        return str(self.processor.apply_chat_template(messages, add_generation_prompt=True))

    def inputs(
        self, messages: list[dict[str, Any]], images: list[Image.Image]
    ) -> tuple[list[int], Tensor | None, Grids]:
        encoded = self.processor(text=self.prompt(messages), images=images or None, return_tensors="pt")
        grids = [(rows, columns) for rows, columns in encoded["image_grid_hws"].tolist()] if images else []
        return encoded["input_ids"][0].tolist(), encoded["pixel_values"] if images else None, grids

    def vision(self, pixel_values: Tensor, grids: Grids) -> Tensor:
        return self.model.vision_features(pixel_values.to(self.device), torch.tensor(grids, device=self.device))

    def projected(self, pixel_values: Tensor, grids: Grids) -> Tensor:
        return self.model.projected(pixel_values.to(self.device), torch.tensor(grids, device=self.device))

    def logits(self, ids: list[int], pixel_values: Tensor | None, grids: Grids) -> Tensor:
        return self.model(**self._arguments(ids, pixel_values, grids)).logits[0]

    def generate(self, ids: list[int], pixel_values: Tensor | None, grids: Grids) -> tuple[list[int], Tensor]:
        result = self.model.generate(
            **self._arguments(ids, pixel_values, grids),
            max_new_tokens=GENERATED,
            do_sample=False,
            eos_token_id=-1,
            output_logits=True,
            return_dict_in_generate=True,
        )
        return result.sequences[0, len(ids) :].tolist(), torch.cat(result.logits)

    def stages(self, ids: list[int], pixel_values: Tensor | None, grids: Grids) -> dict[str, Tensor]:
        """Those stages that transformers' modules have as well: its towers rotate and route in other forms."""
        caught: dict[str, Tensor] = {}
        modules = dict(self.model.named_modules())
        with ExitStack() as stack:
            for path, name in self._stage_modules(modules).items():
                hook = modules[path].register_forward_hook(_keeping(caught, name))
                stack.callback(hook.remove)
            self.logits(ids, pixel_values, grids)
        return {name: result[0] if isinstance(result, tuple) else result for name, result in caught.items()}

    @staticmethod
    def _stage_modules(modules: dict[str, Any]) -> dict[str, str]:
        endings = {
            "input_layernorm": "input_layernorm",
            "self_attn": "self_attn",
            "self_attn.q_proj": "q_proj",
            "self_attn.kv_a_proj_with_mqa": "kv_a_proj_with_mqa",
            "self_attn.kv_a_layernorm": "kv_a_layernorm",
            "self_attn.o_proj": "o_proj",
            "post_attention_layernorm": "post_attention_layernorm",
            "mlp": "mlp",
            "mlp.shared_experts": "shared_experts",
            "": "out",
        }
        found = {}
        for path in modules:
            _, _, tail = path.partition("language_model.layers.")
            if tail:
                index, _, ending = tail.partition(".")
                if ending in endings:
                    found[path] = f"lm.layer{index}.{endings[ending]}"
            elif path.endswith("language_model.norm"):
                found[path] = "lm.norm"
        return found

    def _arguments(self, ids: list[int], pixel_values: Tensor | None, grids: Grids) -> dict[str, Tensor]:
        arguments = {"input_ids": torch.tensor([ids], device=self.device)}
        arguments["attention_mask"] = torch.ones_like(arguments["input_ids"])
        if pixel_values is not None:
            arguments["pixel_values"] = pixel_values.to(self.device)
            arguments["image_grid_hws"] = torch.tensor(grids, device=self.device)
        return arguments


def case_folders(directory: Path) -> list[Path]:
    return sorted(path.parent for path in directory.glob("cases/*/expected.json"))


@torch.inference_mode()
def compare(implementation: Implementation, folder: Path) -> list[Difference]:
    """Every difference between ``implementation`` and one golden case."""
    expected = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
    messages = json.loads((folder / "messages.json").read_text(encoding="utf-8"))
    images: list[Image.Image] = [Image.open(path) for path in sorted(folder.glob("image_*.png"))]
    golden = load_file(folder / "tensors.safetensors")
    found: list[Difference] = []

    def equal(stage: str, ours: Any, theirs: Any) -> None:
        found.append(Difference(folder.name, stage, 0.0 if ours == theirs else float("inf"), 0.0))

    def near(stage: str, ours: Tensor | None, theirs: Tensor) -> None:
        found.append(Difference(folder.name, stage, _distance(ours, theirs), _tolerance(stage)))

    def near_golden(stage: str, ours: Tensor | None) -> None:
        """Against the whole tensor, or its last rows where the copy was trimmed."""
        if stage in golden:
            near(stage, ours, golden[stage])
        elif f"{stage}_tail" in golden:
            tail = golden[f"{stage}_tail"]
            near(stage, None if ours is None else ours[-tail.shape[0] :], tail)

    equal("prompt", implementation.prompt(messages), expected["prompt"])
    ids, pixel_values, grids = implementation.inputs(messages, images)
    typed = any(name in json.dumps(messages, ensure_ascii=False) for name in implementation.special_tokens)
    if typed and isinstance(implementation, Native):  # the original lets a typed control token act; ours is text
        equal("input_ids", ids != expected["input_ids"], True)
    else:
        equal("input_ids", ids, expected["input_ids"])
    ids = expected["input_ids"]
    if images:
        assert pixel_values is not None
        equal("image_grid_hws", [list(grid) for grid in grids], expected["image_grid_hws"])
        near_golden("pixel_values", pixel_values)
        near_golden("vit_output", implementation.vision(pixel_values, grids))
        near_golden("projector_output", implementation.projected(pixel_values, grids))
    near_golden("logits", implementation.logits(ids, pixel_values, grids))
    generated, steps = implementation.generate(ids, pixel_values, grids)
    equal("generated_ids", generated, expected["generated_ids_32"])
    near_golden("generation_step_logits", steps)
    staged = folder / "stages.safetensors"
    if staged.exists():
        ours = implementation.stages(ids, pixel_values, grids)
        for stage, theirs in load_file(staged).items():
            if stage not in ours and not isinstance(implementation, Native):
                continue  # transformers computes it in another form, or not at all
            unordered = ".gate.topk_" in stage
            near(
                stage,
                _sorted(ours.get(stage)) if unordered else ours.get(stage),
                _sorted(theirs) if unordered else theirs,
            )
    return found


def _sorted(values: Any) -> Any:
    return None if values is None else values.sort(-1).values


def _distance(ours: Tensor | None, theirs: Tensor) -> float:
    if ours is None or ours.numel() != theirs.numel():
        return float("inf")
    difference = (ours.detach().cpu().double().reshape(theirs.shape) - theirs.double()).abs().max()
    return float(difference) if torch.isfinite(difference) else float("inf")


def _tolerance(stage: str) -> float:
    if stage.endswith("topk_idx"):
        return 0.0
    exact = TOLERANCES.get(stage)
    return (
        exact if exact is not None else next(v for k, v in TOLERANCES.items() if k[-1] == "." and stage.startswith(k))
    )


def table(found: Sequence[Difference]) -> str:
    """Lines with the largest difference of each stage, its case, its tolerance and whether it holds."""
    worst: dict[str, Difference] = {}
    for difference in found:
        if difference.stage not in worst or difference.amount > worst[difference.stage].amount:
            worst[difference.stage] = difference
    lines = [f"  {'stage':<38} {'largest':>9} {'allowed':>9}  case"]
    for stage in sorted(worst, key=lambda name: ("." in name, name)):
        row = worst[stage]
        amount, allowed = f"{row.amount:.1e}", f"{row.tolerance:.0e}" if row.tolerance else "equal"
        lines.append(f"  {stage:<38} {amount:>9} {allowed:>9}  {row.case}{'' if row.good else '   FAILED'}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure both implementations against a golden directory.")
    parser.add_argument("directory", type=Path, help="holds checkpoint/ and cases/")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", choices=("native", "hf"), help="one implementation alone")
    args = parser.parse_args()
    folders = case_folders(args.directory)
    if not folders:
        print(f"error: {args.directory} has no cases/*/expected.json", file=sys.stderr)
        return 2
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.backends.cuda.matmul.allow_tf32 = False
    failed = 0
    for name, kind in (("native", Native), ("hf", HuggingFace)):
        if args.only not in (None, name):
            continue
        implementation = kind(args.directory / "checkpoint", args.device)
        found = [difference for folder in folders for difference in compare(implementation, folder)]
        bad = [difference for difference in found if not difference.good]
        print(f"{implementation.name}: {len(folders)} cases, {len(found)} comparisons, {len(bad)} beyond tolerance")
        print(table(found))
        for row in bad:
            print(f"  FAILED {row.case} {row.stage}: {row.amount:.1e} where {row.tolerance:.0e} is allowed")
        failed += len(bad)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
