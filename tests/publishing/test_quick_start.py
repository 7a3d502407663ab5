import ast
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from PIL import Image

from slas_trl.publishing.card import render
from slas_trl.publishing.facts import Base, Place, Sample
from slas_trl.publishing.quick_start import quick_start
from slas_trl.shapes import load_shapes_pipeline
from tests.tiny_pipelines import flux_pipeline

from .tiny_facts import FLUX, facts


CODE = """\
import torch
from diffusers import FluxPipeline

pipe = FluxPipeline.from_pretrained("black-forest-labs/FLUX.1-dev", torch_dtype=torch.bfloat16)
pipe.load_lora_weights(
    "user/repo",
    revision="v2",
    weight_name="pytorch_lora_weights.safetensors",
)
pipe.to("cuda" if torch.cuda.is_available() else "cpu")

image = pipe(
    prompt="word",
    generator=torch.Generator().manual_seed(7),
).images[0]
image.save("image.png")"""


def test_flux():
    assert quick_start(facts(call={}), Place("user/repo", "v2", True)) == CODE


EDITS = {
    "picture_arguments": ["image", "control_image"],
    "samples": [Sample("a", "a.png", inputs={"image": ["samples/1.png", "samples/2.png"]})],
}
LOCAL = Base("FluxPipeline", name="mine", folder="models/mine", init_kwargs={"variant": "fp16"})


@pytest.mark.parametrize(
    ("changes", "place", "lines"),
    [
        (
            {"denoisers": {"transformer": "WanTransformer3DModel", "transformer_2": "WanTransformer3DModel"},
             "output": "frames", "call": {"num_frames": 1}},
            Place("x"),
            ['pipe.load_lora_weights("x")', 'output_type="pil"', "num_frames=1", ").frames[0][0]",
             'weight_name="pytorch_lora_weights_transformer_2.safetensors"', "load_into_transformer_2=True"],
        ),
        (
            {"denoisers": {"unet": "UNet2DConditionModel"}, "loads_lora": False},
            Place("x"),
            ['pipe.unet.load_lora_adapter("x", prefix=None, use_safetensors=True)'],
        ),
        (
            {"adapter": False},
            Place("."),
            ["from diffusers import FluxPipeline, FluxTransformer2DModel", 'subfolder="transformer"',
             "# From the folder of this card:"],
        ),
        (
            {"base": replace(FLUX, pipeline="FluxImg2ImgPipeline"), "picture_arguments": ["image"]},
            Place("x"),
            ["from diffusers.utils import load_image", "pipe = FluxImg2ImgPipeline.from_pretrained(",
             "# Of your own picture:", '    image=load_image("image.png"),\n', 'image.save("edited.png")'],
        ),
        (
            EDITS,
            Place("x"),
            ['    image=[load_image("x/samples/1.png"), load_image("x/samples/2.png")],\n',
             '    control_image=load_image("control_image.png"),\n'],
        ),
        (
            EDITS,
            Place("u/x", "try", True),
            ["from huggingface_hub import hf_hub_download",
             'load_image(hf_hub_download("u/x", filename="samples/1.png", revision="try"))'],
        ),
        (
            {"output": "image", "call": {"sigmas": [1], "size": (1, 2)}},
            Place("x"),
            [").image[0]\n", "    sigmas=[1],\n", "    size=[1, 2],\n"],
        ),
        (
            {"base": LOCAL, "samples": [], "prompt": "y"},
            Place("x"),
            ["# The FluxPipeline that was trained, which is not on the Hub:", 'prompt="y"', "manual_seed(0)",
             'pipe = FluxPipeline.from_pretrained("models/mine", variant="fp16")'],
        ),
        ({"base": LOCAL}, Place("u/x", on_hub=True), ['from_pretrained("path/to/mine", variant="fp16")']),
    ],
)  # fmt: skip
def test_other_pipelines(changes, place, lines):
    code = quick_start(facts(**changes), place)
    ast.parse(code)
    for line in lines:
        assert line in code


@pytest.mark.parametrize("kind", ["embedded", "adapter", "whole"])
def test_makes_the_picture(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    pipe: Any = load_shapes_pipeline() if kind == "embedded" else flux_pipeline()
    base = Base("ShapesPipeline", embedded=True) if kind == "embedded" else Base("x", hub_id="base")
    if kind != "embedded":
        pipe.save_pretrained("base")
    if kind != "whole":
        pipe.transformer.add_adapter(LoraConfig(r=2, lora_alpha=8, target_modules=["to_q"], init_lora_weights=False))
        pipe.transformer.save_lora_adapter("run")
    else:
        for weight in pipe.transformer.parameters():
            weight.data *= 1.1
        pipe.transformer.save_pretrained("run/transformer")
    call = {"num_inference_steps": 2, "height": 16, "width": 16}
    made = {"denoisers": {"transformer": type(pipe.transformer).__name__}, "adapter": kind != "whole", "call": call}
    run = facts(base=base, loads_lora=False, samples=[Sample("a circle", "after.png", seed=5)], **made)
    expected = pipe(prompt="a circle", generator=torch.Generator().manual_seed(5), **call).images[0]
    [code] = re.findall(r"```python\n(.*?)\n```", render(run, Place("run")), re.DOTALL)
    names: dict = {}
    exec(code, names)
    assert isinstance(names["pipe"], DiffusionPipeline)
    with Image.open(Path("image.png")) as picture:
        assert picture.tobytes() == names["image"].tobytes() == expected.tobytes()
