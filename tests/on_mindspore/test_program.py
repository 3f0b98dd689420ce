"""The quick start of the MindSpore port, with its own calls, under the published names.

It is a program of its own here: the name of the model and the picture are all that is handed in. Runs in interpreters
of their own find the demo under a published name in the Hub's cache; the others save the time that takes.
"""
# pyright: reportMissingImports=false

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import weights_world
from tests.on_mindspore.conftest import DEMO

ROOT = Path(__file__).parents[2]
PICTURE = ROOT / "images" / "math_problem.png"

PROGRAM = """
import sys

import mindspore as ms
import mindspore.nn as nn
from PIL import Image
from transformers import AutoProcessor

from kimi_vl import KimiVLConfig, KimiVLForConditionalGeneration

MODEL_PATH, IMAGE_PATH, DEBUG = sys.argv[1], sys.argv[2], sys.argv[3] == "debug"


def as_input(value, dtype):
    tensor = ms.Tensor(value)
    if tensor.dtype == ms.int64:
        return tensor.to(ms.int32)
    return tensor if tensor.dtype == ms.bool_ else tensor.to(dtype)


if DEBUG:
    ms.runtime.launch_blocking()
    config = KimiVLConfig.from_pretrained(MODEL_PATH, attn_implementation="flash_attention_2")
    config.text_config.num_hidden_layers = 2
    config.vision_config.num_hidden_layers = 1
    model = KimiVLForConditionalGeneration._from_config(config, torch_dtype=ms.bfloat16)
else:
    with nn.no_init_parameters():
        model = KimiVLForConditionalGeneration.from_pretrained(
            MODEL_PATH, mindspore_dtype=ms.bfloat16, attn_implementation="flash_attention_2"
        )

processor = AutoProcessor.from_pretrained(MODEL_PATH, trust_remote_code=True)
question = "Solve this math problem shown in the image."
messages = [
    {"role": "user", "content": [{"text": None, "type": "image"}, {"text": question, "type": "text"}]},
]
text = processor.apply_chat_template(messages, add_generation_prompt=True)
inputs = processor(text=text, images=Image.open(IMAGE_PATH), return_tensors="np")
for key, value in inputs.items():
    inputs[key] = as_input(value, model.dtype)
output = model.generate(**inputs, max_new_tokens=200, do_sample=True, temperature=0.7, top_p=0.9)
response = processor.decode(output[0][inputs["input_ids"].shape[1] :], skip_special_tokens=True)
print("Response:", response)

# and as the later form of the program ends
inputs = processor(images=Image.open(IMAGE_PATH), text=text, return_tensors="np", padding=True, truncation=True)
for key, value in inputs.items():
    inputs[key] = as_input(value, model.dtype)
generated = model.generate(**inputs, max_new_tokens=12, do_sample=False, temperature=1.0)
trimmed = [whole[len(prompt) :] for prompt, whole in zip(inputs.input_ids, generated)]
print("Begins:", processor.batch_decode(trimmed, skip_special_tokens=True, clean_up_tokenization_spaces=False)[0])
"""
# At every token of it the demo leaves less than 0.0001 for all others, so that top_p 0.9 samples no other.
ANSWER = "◁think▷The picture shows 25 + 13. Ones: 5 + 3 = 8. Tens: 2 + 1 = 3. So 38.◁/think▷25 + 13 = 38"


def check(output: str, mode: str) -> None:
    """The demo knows the answer; a model of two fresh layers says anything."""
    responses = output.partition("Response: ")[2].partition("\nBegins: ")
    if mode == "whole":
        assert responses[0] == ANSWER
        assert responses[2].strip() and ANSWER.startswith(responses[2].strip())
    else:
        assert responses[0].strip() and responses[2].strip()


@pytest.mark.parametrize(("name", "mode"), [("Kimi-VL-A3B-Thinking", "whole"), ("Kimi-VL-A3B-Instruct", "debug")])
def test_under_a_published_name(tmp_path, name, mode):
    weights_world.cache_tree(tmp_path / "hub", DEMO).rename(tmp_path / "hub" / f"models--moonshotai--{name}")
    settings = {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, f"moonshotai/{name}", str(PICTURE), mode],
        capture_output=True,
        encoding="utf-8",
        env={key: value for key, value in os.environ.items() if not key.startswith(("HF_", "KIMI_VL_"))} | settings,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    check(done.stdout, mode)


# The one setting in which the published files differ: how many patches a picture may have.
KINDS = {"instruct": 1, "thinking-2506": 4}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model(tmp_path, monkeypatch, capsys, kind):
    folder = shutil.copytree(DEMO, tmp_path / kind)
    preprocessor = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
    preprocessor["in_token_limit"] *= KINDS[kind]
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor), encoding="utf-8")
    for stem in ("configuration", "modeling", "processing", "image_processing"):
        (folder / f"{stem}_kimi_vl.py").write_text("raise SystemExit('remote code ran')\n", encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["program", str(folder), str(PICTURE), "whole"])
    exec(PROGRAM, {"__name__": "__main__"})
    check(capsys.readouterr().out, "whole")


def test_the_example_of_the_document(monkeypatch, capsys):
    page = (ROOT / "docs" / "mindspore.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(ROOT)
    exec(code.replace('"moonshotai/Kimi-VL-A3B-Thinking"', '"kimi_vl/demo"'), {"__name__": "__main__"})
    assert capsys.readouterr().out.splitlines() == [ANSWER]
    assert f"\n{ANSWER}\n" in page
