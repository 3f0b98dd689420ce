"""The well-known quick start for Kimi-VL, with only its framework lines changed, on folders of both kinds.

It is a program of its own here, and what it imports is the public API. One run has an interpreter to itself,
as a user's would, so that nothing but its own imports is there; the others save the time that takes.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

GOLDEN = Path(os.environ.get("KIMI_VL_GOLDEN", Path(__file__).parents[1] / "golden" / "golden_a"))
ROOT = Path(__file__).parents[2]

PROGRAM = """
import sys

import torch
from kimi_vl import KimiVLConfig, KimiVLForConditionalGeneration
from PIL import Image
from transformers import AutoProcessor

MODEL_PATH, IMAGE_PATH, DEBUG = sys.argv[1], sys.argv[2], sys.argv[3] == "debug"


def int64_to_int32(x):
    return x.to(torch.int32) if x.dtype == torch.int64 else x


def main():
    if DEBUG:
        config = KimiVLConfig.from_pretrained(MODEL_PATH, attn_implementation="sdpa")
        config.text_config.num_hidden_layers = 2  # one dense, one with experts
        config.vision_config.num_hidden_layers = 1
        model = KimiVLForConditionalGeneration._from_config(config, torch_dtype=torch.bfloat16)
    else:
        model = KimiVLForConditionalGeneration.from_pretrained(
            MODEL_PATH, torch_dtype=torch.bfloat16, attn_implementation="sdpa"
        )
    processor = AutoProcessor.from_pretrained(MODEL_PATH, trust_remote_code=True)

    image = Image.open(IMAGE_PATH)
    messages = [
        {
            "role": "user",
            "content": [
                {"type": "image", "image": IMAGE_PATH},
                {"type": "text", "text": "Describe this image in detail."},
            ],
        }
    ]
    text = processor.apply_chat_template(messages, add_generation_prompt=True, return_tensors="np")
    inputs = processor(images=image, text=text, return_tensors="np", padding=True, truncation=True)
    for k, v in inputs.items():
        inputs[k] = int64_to_int32(torch.from_numpy(v))
    generated_ids = model.generate(**inputs, max_new_tokens=12, do_sample=True, temperature=0.8, top_p=0.9)
    pairs = zip(inputs.input_ids, generated_ids)
    generated_ids_trimmed = [out_ids[len(in_ids) :] for in_ids, out_ids in pairs]
    response = processor.batch_decode(
        generated_ids_trimmed, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    print("tokens:", [len(ids) for ids in generated_ids_trimmed])
    print("answer:", response[0])


main()
"""

# the same with Auto classes alone, as the model cards have it
CARD_PROGRAM = """
import sys

import kimi_vl.hf  # noqa: F401
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoProcessor

model_path, image_path = sys.argv[1], sys.argv[2]
model = AutoModelForCausalLM.from_pretrained(
    model_path, torch_dtype="auto", device_map="auto", trust_remote_code=True
)
processor = AutoProcessor.from_pretrained(model_path, trust_remote_code=True)
images = [Image.open(image_path), Image.open(image_path)]
messages = [
    {
        "role": "user",
        "content": [{"type": "image", "image": image_path} for _ in images]
        + [{"type": "text", "text": "Describe this image in detail."}],
    }
]
text = processor.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
inputs = processor(images=images, text=text, return_tensors="pt", padding=True, truncation=True)
inputs = inputs.to(model.device)
generated_ids = model.generate(**inputs, max_new_tokens=12)
pairs = zip(inputs.input_ids, generated_ids)
generated_ids_trimmed = [out_ids[len(in_ids) :] for in_ids, out_ids in pairs]
response = processor.batch_decode(
    generated_ids_trimmed, skip_special_tokens=True, clean_up_tokenization_spaces=False
)[0]
print("tokens:", [len(ids) for ids in generated_ids_trimmed])
print("answer:", response)
"""


@pytest.fixture(scope="module", params=["instruct", "thinking"])
def model_path(request, tmp_path_factory):
    """A folder as published: same network, and the little in which the two kinds' files differ."""
    folder = tmp_path_factory.mktemp(request.param) / "model"
    shutil.copytree(GOLDEN / "checkpoint", folder)
    preprocessor = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
    preprocessor["in_token_limit"] *= 4 if request.param == "thinking" else 1
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor), encoding="utf-8")
    trap = "raise SystemExit('remote code ran')\n"
    for stem in ("configuration", "modeling", "processing", "image_processing"):
        (folder / f"{stem}_kimi_vl.py").write_text(trap, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def image_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("image") / "demo.png"
    noise = np.random.default_rng(0).integers(0, 256, (180, 240, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    return path


def check(output):
    tokens, answer = output.split("\n", 1)
    count = int(tokens.removeprefix("tokens: [").removesuffix("]"))
    assert 1 <= count <= 12
    assert answer.startswith("answer: ") and "<|media_pad|>" not in answer


@pytest.mark.slow
def test_quick_start_in_a_fresh_interpreter(model_path, image_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(model_path), str(image_path), "whole"],
        capture_output=True,
        encoding="utf-8",
        env=environment,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    check(done.stdout)


@pytest.mark.parametrize("program", [PROGRAM, CARD_PROGRAM], ids=["debug", "card"])
def test_programs(model_path, image_path, program, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["program", str(model_path), str(image_path), "debug"])
    exec(program, {"__name__": "__main__"})
    check(capsys.readouterr().out)
