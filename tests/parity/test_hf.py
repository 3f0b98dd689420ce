"""The Hugging Face integration against golden data of the original, against our own model, and through disk."""

from __future__ import annotations

import base64
import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    DeepseekV3Config,
    TextIteratorStreamer,
)

import kimi_vl.hf
from kimi_vl.errors import CheckpointError
from kimi_vl.hf import KimiVLConfig, KimiVLForConditionalGeneration, KimiVLProcessor, KimiVLTextConfig
from kimi_vl.model.config import Config
from kimi_vl.weights import loader as own_loader

GOLDEN = Path(os.environ.get("KIMI_VL_GOLDEN", Path(__file__).parents[1] / "golden" / "golden_a"))
CHECKPOINT = GOLDEN / "checkpoint"
CASES = sorted(path.name for path in (GOLDEN / "cases").iterdir())
BOS = 1024  # of the golden checkpoint


@pytest.fixture(scope="module")
def model():
    return KimiVLForConditionalGeneration.from_pretrained(CHECKPOINT, dtype=torch.float32)


@pytest.fixture(scope="module")
def processor():
    return KimiVLProcessor.from_pretrained(CHECKPOINT)


def case_inputs(processor, name):
    folder = GOLDEN / "cases" / name
    messages = json.loads((folder / "messages.json").read_text(encoding="utf-8"))
    images = [Image.open(path) for path in sorted(folder.glob("image_*.png"))]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    return text, processor(text=text, images=images or None, return_tensors="pt")


def largest(actual, expected):
    assert actual.shape == expected.shape
    return (actual - expected).abs().max().item()


def largest_golden(actual, tensors, name):
    """Against the whole golden tensor, or its last rows where the copy holds no more."""
    if name in tensors:
        return largest(actual, tensors[name])
    tail = tensors[f"{name}_tail"]
    return largest(actual[-tail.shape[0] :], tail)


# -----------------------------------------------------------------------------------------------------------
# Golden data
# -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_golden_case(processor, name, attention):
    model = KimiVLForConditionalGeneration.from_pretrained(
        CHECKPOINT, dtype=torch.float32, attn_implementation=attention
    )
    expected = json.loads((GOLDEN / "cases" / name / "expected.json").read_text(encoding="utf-8"))
    tensors = load_file(GOLDEN / "cases" / name / "tensors.safetensors")
    text, inputs = case_inputs(processor, name)
    assert text == expected["prompt"]
    assert inputs["input_ids"].tolist() == [expected["input_ids"]]
    if "pixel_values" in inputs:
        grids = inputs["image_grid_hws"]
        assert grids.tolist() == expected["image_grid_hws"]
        assert largest_golden(inputs["pixel_values"], tensors, "pixel_values") <= 1e-6
        assert largest(model.vision_features(inputs["pixel_values"], grids), tensors["vit_output"]) <= 2e-6
        assert largest(model.projected(inputs["pixel_values"], grids), tensors["projector_output"]) <= 2e-6
    assert largest_golden(model(**inputs).logits[0], tensors, "logits") <= 5e-4
    generated = model.generate(**inputs, max_new_tokens=32, do_sample=False, eos_token_id=None)
    assert generated[0, len(expected["input_ids"]) :].tolist() == expected["generated_ids_32"]
    assert processor.decode(expected["generated_ids_32"]) == expected["generated_text"]


@pytest.mark.parametrize("name", ["13_stops_on_EOS", "13_stops_on_im_end", "08_multi_turn"])
def test_default_stops(model, processor, name):
    expected = json.loads((GOLDEN / "cases" / name / "expected.json").read_text(encoding="utf-8"))
    _, inputs = case_inputs(processor, name)
    ids = expected["generated_ids_32"]
    ends = [index for index, token in enumerate(ids) if token in (BOS + 1, BOS + 2)]
    stopped = ids[: ends[0] + 1] if ends else ids
    generated = model.generate(**inputs, max_new_tokens=32, do_sample=False)
    assert generated[0, inputs["input_ids"].shape[1] :].tolist() == stopped
    explicit = model.generate(**inputs, max_new_tokens=32, do_sample=False, eos_token_id=BOS + 1)
    assert explicit[0, inputs["input_ids"].shape[1] :].tolist() == expected["generated_ids_stop_on_EOS_only"]


# -----------------------------------------------------------------------------------------------------------
# Batches
# -----------------------------------------------------------------------------------------------------------


def test_rows_with_different_numbers_of_images(model, processor):
    names = ["07_two_images", "01_text_only", "03_landscape", "11_image_modes_L_RGBA_P"]
    texts, images, wanted = [], [], []
    for name in names:
        folder = GOLDEN / "cases" / name
        expected = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
        texts.append(expected["prompt"])
        images.append([Image.open(path) for path in sorted(folder.glob("image_*.png"))])
        wanted.append(expected["generated_ids_32"])
    inputs = processor(text=texts, images=images, return_tensors="pt", padding=True)
    assert inputs["attention_mask"][1, 0] == 0 and inputs["attention_mask"][:, -1].all()  # left side
    generated = model.generate(**inputs, max_new_tokens=32, do_sample=False, eos_token_id=None)
    assert generated[:, inputs["input_ids"].shape[1] :].tolist() == wanted


def test_several_answers_and_beams_repeat_images_by_row(model, processor):
    names = ["07_two_images", "01_text_only", "03_landscape"]
    texts, images = [], []
    for name in names:
        texts.append(json.loads((GOLDEN / "cases" / name / "expected.json").read_text(encoding="utf-8"))["prompt"])
        images += [Image.open(path) for path in sorted((GOLDEN / "cases" / name).glob("image_*.png"))]
    inputs = processor(text=texts, images=images, return_tensors="pt")
    settings = {"max_new_tokens": 4, "num_beams": 2, "do_sample": False, "eos_token_id": None}
    together = model.generate(**inputs, **settings, num_return_sequences=2)
    for row, name in enumerate(names):
        _, single = case_inputs(processor, name)
        alone = model.generate(**single, **settings, num_return_sequences=2)
        assert torch.equal(together[2 * row : 2 * row + 2, -4:], alone[:, -4:])


def test_images_are_looked_at_once(model, processor, monkeypatch):
    seen = []
    original = model.model.vision_features
    monkeypatch.setattr(model.model, "vision_features", lambda *args: seen.append(1) or original(*args))
    _, inputs = case_inputs(processor, "03_landscape")
    model.generate(**inputs, max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert len(seen) == 1


def test_a_static_cache_gives_the_same_ids(model, processor):
    expected = json.loads((GOLDEN / "cases" / "03_landscape" / "expected.json").read_text(encoding="utf-8"))
    _, inputs = case_inputs(processor, "03_landscape")
    generated = model.generate(
        **inputs, max_new_tokens=8, do_sample=False, eos_token_id=None, cache_implementation="static"
    )
    assert generated[0, inputs["input_ids"].shape[1] :].tolist() == expected["generated_ids_32"][:8]


def test_mistakes_in_the_inputs_are_named(model, processor):
    _, inputs = case_inputs(processor, "03_landscape")
    fewer = dict(inputs)
    fewer["input_ids"] = inputs["input_ids"][:, 40:]
    fewer["attention_mask"] = inputs["attention_mask"][:, 40:]
    with pytest.raises(ValueError, match="image tokens"):
        model(**fewer)
    with pytest.raises(ValueError, match="image_grid_hws"):
        model(input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"])
    with pytest.raises(ValueError, match="patches in all"):
        model.vision_features(inputs["pixel_values"], inputs["image_grid_hws"] + 2)
    with pytest.raises(NotImplementedError, match="prefill_chunk_size"):
        model.generate(**inputs, max_new_tokens=1, prefill_chunk_size=8)


def test_a_placeholder_without_image_is_an_ordinary_token(model):
    ids = torch.tensor([[1, BOS + 21, 2]])
    with torch.no_grad():
        embedded = model.get_input_embeddings()(ids)
        assert torch.equal(model(input_ids=ids).logits, model(inputs_embeds=embedded).logits)


def test_loss(model):
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        output = model(input_ids=ids, labels=ids)
    expected = torch.nn.functional.cross_entropy(output.logits[0, :-1], ids[0, 1:])
    torch.testing.assert_close(output.loss, expected)


# -----------------------------------------------------------------------------------------------------------
# Processor
# -----------------------------------------------------------------------------------------------------------


def test_processor_forms(processor):
    image = Image.new("RGB", (60, 30), "red")
    text = "<|media_pad|>a"
    as_lists = processor(text=text, images=image)
    arrays = processor(text=[text], images=[np.asarray(image)], return_tensors="np")
    tensors = processor(image, text, return_tensors="pt")
    assert as_lists["input_ids"] == arrays["input_ids"].tolist() == tensors["input_ids"].tolist()
    assert arrays["input_ids"].dtype == np.int64 and arrays["pixel_values"].dtype == np.float32
    assert arrays.image_grid_hws.tolist() == [[4, 6]] and tensors.pixel_values.shape == (24, 3, 14, 14)
    np.testing.assert_array_equal(arrays["pixel_values"], tensors["pixel_values"].numpy())
    assert set(processor(text=text)) == {"input_ids", "attention_mask"}
    half = tensors.to(torch.bfloat16)
    assert half["pixel_values"].dtype == torch.bfloat16 and half["input_ids"].dtype == torch.int64


def test_processor_refuses_what_does_not_fit(processor):
    image = Image.new("RGB", (60, 30))
    for text, images in (
        ("no place", image),
        ("<|media_pad|><|media_pad|>", [image]),
        ("<|media_pad|>", [image] * 2),
    ):
        with pytest.raises(ValueError, match="places for images"):
            processor(text=text, images=images)
    with pytest.raises(ValueError, match="max_length"):
        processor(text="one two three", truncation=True, max_length=1)
    with pytest.raises(ValueError, match="must be a Pillow image"):
        processor(text="<|media_pad|>", images="https://example.invalid/image.png")
    with pytest.raises(ValueError, match="text is missing"):
        processor(images=image)


def test_padding(processor):
    inputs = processor(text=["a", "a b c d"], return_tensors="np", padding=True)
    missing = int((inputs["attention_mask"][0] == 0).sum())
    assert missing > 0
    assert inputs["input_ids"][0, :missing].tolist() == [processor.tokenizer.pad_id] * missing
    assert inputs["attention_mask"][0].tolist() == [0] * missing + [1] * (inputs["input_ids"].shape[1] - missing)
    wide = processor(text="a", return_tensors="np", padding="max_length", max_length=9)
    assert wide["input_ids"].shape == (1, 9)


def test_many_placeholders_stay_whole(processor):
    rows = processor(text="<|media_pad|>" * 3000)["input_ids"]
    assert rows == [[processor.tokenizer.media_pad_id] * 3000]


def test_template_with_tensors(processor):
    folder = GOLDEN / "cases" / "07_two_images"
    messages = json.loads((folder / "messages.json").read_text(encoding="utf-8"))
    images = iter(sorted(folder.glob("image_*.png")))
    for message in messages:
        if not isinstance(message["content"], str):
            for part in message["content"]:
                if part.get("type") == "image":
                    part["image"] = str(next(images))
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    _, expected = case_inputs(processor, "07_two_images")
    assert torch.equal(inputs["input_ids"], expected["input_ids"])
    assert torch.equal(inputs["pixel_values"], expected["pixel_values"])
    assert (
        processor.apply_chat_template([messages, messages], add_generation_prompt=True)
        == [processor.apply_chat_template(messages, add_generation_prompt=True)] * 2
    )


def test_messages_are_read_as_the_service_reads_them(processor):
    path = GOLDEN / "cases" / "03_landscape" / "image_0.png"
    encoded = base64.b64encode(path.read_bytes()).decode()
    text = {"type": "text", "text": "What is this?"}

    def tensors(part):
        messages = [{"role": "user", "content": [part, text]}]
        return processor.apply_chat_template(messages, tokenize=True, return_tensors="pt")

    plain = tensors({"type": "image", "image": str(path)})
    for part in (
        {"type": "image", "path": str(path)},
        {"type": "image", "image": Image.open(path), "text": None},
        {"type": "image", "base64": encoded, "url": None},
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": encoded}},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64," + encoded}},
    ):
        inputs = tensors(part)
        assert torch.equal(inputs["input_ids"], plain["input_ids"])
        assert torch.equal(inputs["pixel_values"], plain["pixel_values"])

    def rendered(**message):
        return processor.apply_chat_template([{"role": "user", "content": "Hi", **message}])

    assert rendered(content=[{"type": "text", "text": "Hi", "image_url": None, "image": None}]) == rendered()
    assert rendered(role="developer") == rendered(role="system")
    assert "◁think▷a◁/think▷b" in rendered(role="assistant", content="◁think▷a◁/think▷b"), "as published"
    for role in ("User", "human", "tool", "", None, "<|im_user|>"):
        with pytest.raises(ValueError, match="E_MESSAGES_INVALID"):
            rendered(role=role)
    with pytest.raises(ValueError, match="E_MESSAGES_INVALID"):
        rendered(content=[{"type": "image", "blob": encoded}])


def test_streaming(model, processor):
    expected = json.loads((GOLDEN / "cases" / "03_landscape" / "expected.json").read_text(encoding="utf-8"))
    _, inputs = case_inputs(processor, "03_landscape")
    streamer: Any = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    model.generate(**inputs, max_new_tokens=32, do_sample=False, eos_token_id=None, streamer=streamer)
    assert "".join(streamer) == processor.decode(expected["generated_ids_32"], skip_special_tokens=True)


def test_decoding(processor):
    ids = processor.tokenizer.encode("Hallo [EOS]◁think▷", allow_special=True)
    assert BOS + 1 in ids
    assert processor.decode(torch.tensor(ids)) == "Hallo [EOS]◁think▷"
    assert processor.batch_decode(
        torch.tensor([ids]), skip_special_tokens=True, clean_up_tokenization_spaces=False
    ) == ["Hallo ◁think▷"]
    tokenizer = processor.tokenizer
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id) == (
        BOS + 1,
        BOS + 255,
        BOS,
    )
    assert tokenizer.convert_tokens_to_ids(["<|im_end|>"]) == [BOS + 2]
    assert tokenizer.decode(np.int64(ids[0])) == tokenizer.decode(ids[:1])


# -----------------------------------------------------------------------------------------------------------
# Configuration
# -----------------------------------------------------------------------------------------------------------


def assert_contains(actual, expected):
    """Every value of ``expected`` is in ``actual``, except the version that wrote it."""
    for name, value in expected.items():
        if isinstance(value, dict) and name != "auto_map":
            assert_contains(actual[name], value)
        elif name != "transformers_version":
            assert actual[name] == value, name


def test_config_round_trip(tmp_path):
    published = json.loads((CHECKPOINT / "config.json").read_text(encoding="utf-8"))
    config = KimiVLConfig.from_pretrained(CHECKPOINT)
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert_contains(written, published)
    assert written.keys() == published.keys()
    assert written["text_config"].keys() - published["text_config"].keys() == {"model_type"}
    assert written["vision_config"].keys() == published["vision_config"].keys()
    again = KimiVLConfig.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict()


def test_our_own_config_reads_what_is_written(tmp_path):
    KimiVLConfig.from_pretrained(CHECKPOINT).save_pretrained(tmp_path)
    assert Config.from_directory(tmp_path) == Config.from_directory(CHECKPOINT)


def test_defaults_are_the_published_model():
    config = KimiVLConfig()
    with torch.device("meta"):
        model = KimiVLForConditionalGeneration(config)
    # the correction biases are buffers; the frequencies are not stored
    count = sum(t.numel() for t in model.state_dict().values())
    assert count == 16_407_656_048
    assert config.text_config.rope_parameters == {"rope_theta": 800_000.0, "rope_type": "default"}
    assert model.generation_config.eos_token_id == [163_585, 163_586]
    assert model.generation_config.pad_token_id == 163_839


def test_extra_top_level_ids_are_kept():
    values = json.loads((CHECKPOINT / "config.json").read_text(encoding="utf-8"))
    values |= {"pad_token_id": 7, "bos_token_id": 8, "eos_token_id": 9}
    values["text_config"]["model_type"] = "deepseek_v3"
    assert_contains(KimiVLConfig(**values).to_dict(), values)


@pytest.mark.parametrize(
    "section, name, value",
    [
        ("text_config", "scoring_func", "softmax"),
        ("text_config", "topk_method", "gready"),
        ("text_config", "moe_layer_freq", 2),
        (None, "tie_word_embeddings", True),
    ],
)
def test_unsupported_values_are_refused(section, name, value):
    values = json.loads((CHECKPOINT / "config.json").read_text(encoding="utf-8"))
    (values[section] if section else values)[name] = value
    with pytest.raises(ValueError, match=name):
        KimiVLConfig(**values)


def test_reduced_debug_model(processor):
    config = KimiVLConfig.from_pretrained(CHECKPOINT, attn_implementation="eager")
    config.text_config.num_hidden_layers = 2
    config.vision_config.num_hidden_layers = 1
    model = KimiVLForConditionalGeneration._from_config(config, dtype=torch.bfloat16)
    assert len(model.model.language_model.layers) == 2 and len(model.model.vision_tower.layers) == 1
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.config.text_config._attn_implementation == model.config.vision_config._attn_implementation == "eager"
    assert model.generation_config.eos_token_id == [BOS + 1, BOS + 2]
    _, inputs = case_inputs(processor, "03_landscape")
    length = inputs["input_ids"].shape[1]
    out = model.generate(**inputs, max_new_tokens=3, do_sample=True, temperature=0.6, top_p=0.9, eos_token_id=None)
    assert out.shape == (1, length + 3)


# -----------------------------------------------------------------------------------------------------------
# Checkpoints of other shapes
# -----------------------------------------------------------------------------------------------------------

SHAPES = {
    "non_square": {
        "vision": {
            "init_pos_emb_height": 12,
            "init_pos_emb_width": 20,
            "num_attention_heads": 2,
            "hidden_size": 48,
        },
        "text": {"n_shared_experts": 1, "v_head_dim": 24, "num_attention_heads": 3, "num_key_value_heads": 3},
    },
    "two_dense": {
        "vision": {
            "init_pos_emb_height": 10,
            "init_pos_emb_width": 6,
            "num_hidden_layers": 1,
            "num_attention_heads": 6,
        },
        "text": {
            "first_k_dense_replace": 2,
            "num_experts_per_tok": 2,
            "n_routed_experts": 5,
            "kv_lora_rank": 24,
        },
    },
    "narrow_values": {
        "vision": {"num_hidden_layers": 2, "intermediate_size": 100},
        "text": {
            "v_head_dim": 8,
            "qk_nope_head_dim": 24,
            "qk_rope_head_dim": 8,
            "routed_scaling_factor": 1.5,
        },
    },
}


def published_tensors(config, seed=0):
    """Random tensors with the names and shapes of the published checkpoints, for a parsed ``config.json``."""
    vision, text = config["vision_config"], config["text_config"]
    c, mlp, patch = vision["hidden_size"], vision["intermediate_size"], vision["patch_size"]
    h, heads = text["hidden_size"], text["num_attention_heads"]
    nope, rope, v, latent = (text[k] for k in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_lora_rank"))
    shapes = {
        "vision_tower.patch_embed.proj.weight": (c, 3, patch, patch),
        "vision_tower.patch_embed.proj.bias": (c,),
        "vision_tower.patch_embed.pos_emb.weight": (
            vision["init_pos_emb_height"],
            vision["init_pos_emb_width"],
            c,
        ),
        "vision_tower.encoder.final_layernorm.weight": (c,),
        "vision_tower.encoder.final_layernorm.bias": (c,),
        "multi_modal_projector.pre_norm.weight": (c,),
        "multi_modal_projector.pre_norm.bias": (c,),
        "multi_modal_projector.linear_1.weight": (4 * c, 4 * c),
        "multi_modal_projector.linear_1.bias": (4 * c,),
        "multi_modal_projector.linear_2.weight": (h, 4 * c),
        "multi_modal_projector.linear_2.bias": (h,),
        "language_model.model.embed_tokens.weight": (text["vocab_size"], h),
        "language_model.model.norm.weight": (h,),
        "language_model.lm_head.weight": (text["vocab_size"], h),
    }
    for i in range(vision["num_hidden_layers"]):
        block = f"vision_tower.encoder.blocks.{i}"
        sizes = {
            "norm0": (c,),
            "norm1": (c,),
            "wqkv": (3 * c, c),
            "wo": (c, c),
            "mlp.fc0": (mlp, c),
            "mlp.fc1": (c, mlp),
        }
        for name, shape in sizes.items():
            shapes[f"{block}.{name}.weight"] = shape
            shapes[f"{block}.{name}.bias"] = shape[:1]
    for i in range(text["num_hidden_layers"]):
        layer = f"language_model.model.layers.{i}"
        shapes[f"{layer}.input_layernorm.weight"] = shapes[f"{layer}.post_attention_layernorm.weight"] = (h,)
        shapes[f"{layer}.self_attn.q_proj.weight"] = (heads * (nope + rope), h)
        shapes[f"{layer}.self_attn.kv_a_proj_with_mqa.weight"] = (latent + rope, h)
        shapes[f"{layer}.self_attn.kv_a_layernorm.weight"] = (latent,)
        shapes[f"{layer}.self_attn.kv_b_proj.weight"] = (heads * (nope + v), latent)
        shapes[f"{layer}.self_attn.o_proj.weight"] = (h, heads * v)
        mlps = {"mlp": text["intermediate_size"]}
        if i >= text["first_k_dense_replace"]:
            width = text["moe_intermediate_size"]
            mlps = {f"mlp.experts.{e}": width for e in range(text["n_routed_experts"])}
            mlps["mlp.shared_experts"] = width * text["n_shared_experts"]
            shapes[f"{layer}.mlp.gate.weight"] = (text["n_routed_experts"], h)
            shapes[f"{layer}.mlp.gate.e_score_correction_bias"] = (text["n_routed_experts"],)
        for name, width in mlps.items():
            shapes[f"{layer}.{name}.gate_proj.weight"] = shapes[f"{layer}.{name}.up_proj.weight"] = (width, h)
            shapes[f"{layer}.{name}.down_proj.weight"] = (h, width)
    random = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in sorted(shapes.items()):
        value = torch.randn(shape, generator=random)
        if "norm" in name and name.endswith("weight"):
            value = 1 + 0.2 * value
        elif len(shape) == 1:
            value = 0.1 * value
        elif "pos_emb" in name or "embed_tokens" in name:
            value = 0.5 * value
        else:
            value = value * 1.5 / (value[0].numel() ** 0.5)
        tensors[name] = value
    return tensors


def write_checkpoint(folder, shape, shards=1, dtype=torch.float32):
    """A checkpoint folder of ``SHAPES[shape]``, its tensors dealt out to ``shards`` files."""
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads((CHECKPOINT / "config.json").read_text(encoding="utf-8"))
    config["vision_config"] |= SHAPES[shape]["vision"]
    config["text_config"] |= SHAPES[shape]["text"]
    for name in (
        "tiktoken.model",
        "tokenizer_config.json",
        "preprocessor_config.json",
        "generation_config.json",
    ):
        shutil.copyfile(CHECKPOINT / name, folder / name)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    tensors = {name: value.to(dtype) for name, value in published_tensors(config).items()}
    write_tensors(folder, tensors, shards)
    return tensors


def write_tensors(folder, tensors, shards=1):
    for path in folder.glob("model*.safetensors*"):
        path.unlink()
    names = sorted(tensors)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    files = {name: f"model-{k % shards + 1:05}-of-{shards:05}.safetensors" for k, name in enumerate(names)}
    for file in set(files.values()):
        save_file({n: tensors[n] for n in names if files[n] == file}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def read_tensors(folder):
    return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}


def sample_inputs(processor):
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "and"}, {"type": "image"}]},
    ]
    noise = np.random.default_rng(0).integers(0, 256, (2, 150, 250, 3), dtype=np.uint8)
    images = [Image.fromarray(noise[0]), Image.fromarray(noise[1][:70, :100])]
    return processor(text=processor.apply_chat_template(messages, True), images=images, return_tensors="pt")


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_save_and_load_keep_every_tensor(tmp_path, shape):
    tensors = write_checkpoint(tmp_path / "one", shape, shards=4)
    model = KimiVLForConditionalGeneration.from_pretrained(tmp_path / "one", dtype=torch.float32)
    processor = KimiVLProcessor.from_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "two", max_shard_size="200KB")
    processor.save_pretrained(tmp_path / "two")
    assert len(list((tmp_path / "two").glob("*.safetensors"))) > 1
    written = read_tensors(tmp_path / "two")
    assert written.keys() == tensors.keys()
    for name, value in tensors.items():
        assert torch.equal(written[name], value), name
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "two", dtype=torch.float32)
    inputs = sample_inputs(AutoProcessor.from_pretrained(tmp_path / "two"))
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)
    assert again.generation_config.eos_token_id == [BOS + 1, BOS + 2]


@torch.no_grad()
def test_a_model_made_from_a_config_saves_and_loads(tmp_path):
    config = KimiVLConfig.from_pretrained(CHECKPOINT)
    model = KimiVLForConditionalGeneration._from_config(config, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    assert read_tensors(tmp_path).keys() == load_file(CHECKPOINT / "model.safetensors").keys()
    again = KimiVLForConditionalGeneration.from_pretrained(tmp_path)
    assert again.dtype == torch.float32
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


@torch.no_grad()
def test_images_do_not_see_each_other(tmp_path):
    write_checkpoint(tmp_path, "non_square")
    model = KimiVLForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32)
    inputs = sample_inputs(KimiVLProcessor.from_pretrained(tmp_path))
    pixels, grids = inputs["pixel_values"], inputs["image_grid_hws"]
    sizes = grids.prod(-1).tolist()
    alone = [model.vision_features(p, g[None]) for p, g in zip(pixels.split(sizes), grids, strict=True)]
    torch.testing.assert_close(model.vision_features(pixels, grids), torch.cat(alone), atol=1e-6, rtol=0)


def test_bfloat16_keeps_the_routing_bias_exact(tmp_path):
    tensors = write_checkpoint(tmp_path, "two_dense")
    model = KimiVLForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
    bias = model.model.language_model.layers[2].mlp.gate.e_score_correction_bias
    assert torch.equal(bias, tensors["language_model.model.layers.2.mlp.gate.e_score_correction_bias"])
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    out = model.generate(**sample_inputs(KimiVLProcessor.from_pretrained(tmp_path)), max_new_tokens=2, do_sample=False)
    assert out.ndim == 2


def test_bfloat16_routing_bias_is_widened(tmp_path):
    tensors = write_checkpoint(tmp_path, "two_dense", dtype=torch.bfloat16)
    model = KimiVLForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
    bias = model.model.language_model.layers[2].mlp.gate.e_score_correction_bias
    assert bias.dtype == torch.float32
    assert torch.equal(bias, tensors["language_model.model.layers.2.mlp.gate.e_score_correction_bias"].float())


@pytest.mark.parametrize("loader", [KimiVLForConditionalGeneration, AutoModelForImageTextToText])
@pytest.mark.parametrize(
    "change, complaint",
    [
        (lambda t: t.pop("language_model.model.layers.1.mlp.experts.3.up_proj.weight"), "."),
        (lambda t: t.pop("vision_tower.encoder.blocks.0.wqkv.bias"), "missing"),
        (lambda t: t.pop("language_model.lm_head.weight"), "missing: lm_head.weight"),
        (lambda t: t.pop("language_model.model.layers.1.mlp.gate.e_score_correction_bias"), "missing"),
        (lambda t: t.update({"language_model.extra": torch.zeros(1)}), "unexpected"),
        (
            lambda t: t.update({"language_model.model.layers.9.input_layernorm.weight": torch.zeros(64)}),
            "unexpected",
        ),
        (
            lambda t: t.update({"language_model.model.layers.61.input_layernorm.weight": torch.zeros(64)}),
            "unexpected",
        ),
        (lambda t: t.update({"language_model.model.norm.weight": torch.zeros(63)}), "wrong shape"),
        (lambda t: t.update({"vision_tower.encoder.blocks.0.wqkv.weight": torch.zeros(3, 72)}), "."),
    ],
)
def test_tensors_that_do_not_fit_are_an_error(tmp_path, change, complaint, loader):
    shutil.copytree(CHECKPOINT, tmp_path, dirs_exist_ok=True)
    tensors = load_file(CHECKPOINT / "model.safetensors")
    change(tensors)
    write_tensors(tmp_path, tensors)
    with pytest.raises((CheckpointError, RuntimeError), match=complaint):
        loader.from_pretrained(tmp_path, dtype=torch.float32)


# -----------------------------------------------------------------------------------------------------------
# The two implementations against each other
# -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_both_implementations_agree(tmp_path, shape):
    write_checkpoint(tmp_path, shape, shards=3)
    model = KimiVLForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32)
    own = own_loader.load(tmp_path, dtype=torch.float32)
    inputs = sample_inputs(KimiVLProcessor.from_pretrained(tmp_path))
    pixels, grids = inputs["pixel_values"], inputs["image_grid_hws"]
    pairs = [(int(rows), int(columns)) for rows, columns in grids.tolist()]
    features = model.vision_features(pixels, grids)
    ours = own.vision_tower(pixels, pairs)
    torch.testing.assert_close(ours.reshape(features.shape), features, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(own.encode_images(pixels, pairs), model.projected(pixels, grids), atol=1e-5, rtol=1e-5)
    logits = model(**inputs).logits
    assert logits.std() > 0.1  # says something
    torch.testing.assert_close(own(inputs["input_ids"], pixels, pairs), logits, atol=5e-4, rtol=1e-4)


@torch.no_grad()
def test_both_read_what_the_other_writes(tmp_path):
    tensors = write_checkpoint(tmp_path / "made", "non_square")
    own = own_loader.load(tmp_path / "made", dtype=torch.float32)
    shutil.copytree(tmp_path / "made", tmp_path / "own")
    own_loader.save(own, tmp_path / "own" / "model.safetensors", dtype=torch.float32)
    model = KimiVLForConditionalGeneration.from_pretrained(tmp_path / "own", dtype=torch.float32)
    model.save_pretrained(tmp_path / "theirs", max_shard_size="300KB")
    again = own_loader.load(tmp_path / "theirs", dtype=torch.float32)
    for name, value in own.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    assert read_tensors(tmp_path / "theirs").keys() == tensors.keys()


# -----------------------------------------------------------------------------------------------------------
# Auto classes
# -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trust", [{}, {"trust_remote_code": False}, {"trust_remote_code": True}])
def test_auto_classes_run_no_remote_code(tmp_path, trust, monkeypatch):
    folder, marker = tmp_path / "model", tmp_path / "remote code ran"
    shutil.copytree(CHECKPOINT, folder)
    trap = f"open({str(marker)!r}, 'w').close()\nraise SystemExit('remote code ran')\n"
    for stem in ("configuration", "modeling", "processing", "image_processing"):
        (folder / f"{stem}_kimi_vl.py").write_text(trap, encoding="utf-8")
    (folder / "tokenization_moonshot.py").write_text(trap, encoding="utf-8")
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(trap, encoding="utf-8")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run remote code"))
    assert isinstance(AutoConfig.from_pretrained(folder, **trust), KimiVLConfig)
    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModel):
        loaded = auto.from_pretrained(folder, dtype=torch.float32, **trust)
        assert type(loaded) is KimiVLForConditionalGeneration
        made = auto.from_config(AutoConfig.from_pretrained(folder, **trust), **trust)
        assert type(made) is KimiVLForConditionalGeneration
    assert isinstance(AutoProcessor.from_pretrained(folder, **trust), KimiVLProcessor)
    named = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
    named["processor_class"] = "KimiVLProcessor"
    (folder / "preprocessor_config.json").write_text(json.dumps(named), encoding="utf-8")
    assert isinstance(AutoProcessor.from_pretrained(folder, **trust), KimiVLProcessor)
    assert not marker.exists()


def test_from_pretrained_arguments(tmp_path):
    model, info = KimiVLForConditionalGeneration.from_pretrained(
        CHECKPOINT, dtype="auto", device_map="cpu", attn_implementation="eager", output_loading_info=True
    )
    assert model.dtype == torch.float32 and not info["missing_keys"]
    assert model.model.language_model.config._attn_implementation == "eager"
    assert model.model.vision_tower.config._attn_implementation == "eager"
    assert not model.training
    shutil.copytree(CHECKPOINT, tmp_path, dirs_exist_ok=True)
    (tmp_path / "generation_config.json").unlink()
    model = KimiVLForConditionalGeneration.from_pretrained(tmp_path)
    assert model.generation_config.eos_token_id == [BOS + 1, BOS + 2]
    assert model.generation_config.pad_token_id == BOS + 255


def test_text_config_from_another_class():
    foreign: Any = DeepseekV3Config(n_group=1, topk_group=1, vocab_size=256, bos_token_id=10)
    config = KimiVLConfig(text_config=foreign)
    assert isinstance(config.text_config, KimiVLTextConfig) and config.text_config.vocab_size == 256


@pytest.mark.parametrize("name", kimi_vl.hf.__all__)
def test_classes_are_pickled_by_names_that_can_be_imported(name):
    named = getattr(kimi_vl.hf, name)
    assert pickle.loads(pickle.dumps(named)) is named
    assert pickle.loads(f"ckimi_vl.hf\n{name}\n.".encode()) is named  # as they were pickled from a single module


def test_a_config_survives_pickling():
    config = KimiVLConfig(text_config=KimiVLTextConfig(hidden_size=48))
    assert pickle.loads(pickle.dumps(config)).to_dict() == config.to_dict()
