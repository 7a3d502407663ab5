"""
Seconds per image of the models that rewards use, as ratios to CLIP ViT-L/14 in the same run.

    python benchmarks/reward_cost.py --json cost.json

The architectures are the real ones in float32, their weights are random, and nothing is downloaded. What is timed is a
call with a batch of 512 x 512 pictures for one prompt, as a group is scored: preprocessing, the image encoder, and the
prompt, which CLIP encodes once and ImageReward with every picture. Rewards without a model, or with one that comes in
a package, are called as they are. Seconds are of CPU time, so that other processes hardly count; with one thread and
an idle machine they pass as such. CLIP ViT-L/14 takes turns with each of them, so that both are disturbed alike;
the median of the ratios is printed, and the least and greatest. The first turns, of one image, warm up.
"""

import argparse
import gc
import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import nn

from slas_trl import rewards
from slas_trl.rewards.blip import to_pixels


Score = Callable[[list[str], list[Image.Image]], Any]

BASELINE = "CLIP ViT-L/14"
PROMPT = 'A street at night with a neon sign that says "OPEN", photograph'
VIT_LARGE: dict[str, Any] = {
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "hidden_size": 1024,
    "intermediate_size": 4096,
}
# Those that are called as they are, and the sentence that the shapes world understands.
AS_THEY_ARE = {
    "ocr": PROMPT,
    "jpeg_compressibility": PROMPT,
    "brightness": PROMPT,
    "shapes_clip": "a red circle",
    "shapes_verifier": "a red circle",
}


def open_clip_score(architecture: str) -> tuple[Score, int]:
    import open_clip

    model: Any
    model, _, preprocess = open_clip.create_model_and_transforms(architecture, pretrained=None)
    tokenizer = open_clip.get_tokenizer(architecture)
    model.eval().requires_grad_(False)

    def score(prompts: list[str], images: list[Image.Image]) -> torch.Tensor:
        text = model.encode_text(tokenizer(list(dict.fromkeys(prompts))), normalize=True)
        pixels = torch.stack([preprocess(image) for image in images])  # type: ignore[operator]
        return model.encode_image(pixels, normalize=True) @ text.T

    return score, parameters(model)


def aesthetic_score() -> tuple[Score, int]:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    model = CLIPVisionModelWithProjection(CLIPVisionConfig(**VIT_LARGE, patch_size=14, projection_dim=768)).eval()
    processor, head = CLIPImageProcessorPil(), linear_head()

    def score(prompts: list[str], images: list[Image.Image]) -> torch.Tensor:
        pixels = processor(images, return_tensors="pt")["pixel_values"]
        return head(nn.functional.normalize(model(pixel_values=pixels).image_embeds, dim=-1))

    return score, parameters(model, head)


def image_reward_score() -> tuple[Score, int]:
    from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

    vision = BlipVisionModel(BlipVisionConfig(**VIT_LARGE, image_size=224)).eval()
    text = BlipTextModel(BlipTextConfig(num_attention_heads=12, encoder_hidden_size=1024), add_pooling_layer=False)
    text.eval()
    head = linear_head()

    def score(prompts: list[str], images: list[Image.Image]) -> torch.Tensor:
        seen = vision(pixel_values=torch.stack([to_pixels(image, 224) for image in images])).last_hidden_state
        tokens = torch.full((len(prompts), 35), 1000)  # always 35, of which a mask leaves out the padding
        read = text(input_ids=tokens, attention_mask=torch.ones_like(tokens), encoder_hidden_states=seen)
        return head(read.last_hidden_state[:, 0])

    return score, parameters(vision, text, head)


def linear_head() -> nn.Module:
    return nn.Sequential(
        *(nn.Linear(m, n) for m, n in [(768, 1024), (1024, 128), (128, 64), (64, 16), (16, 1)])
    ).eval()


def as_it_is(name: str) -> tuple[Score, int]:
    return getattr(rewards, name), 0


def parameters(*models: nn.Module) -> int:
    return sum(parameter.numel() for model in models for parameter in model.parameters())


# Names of rewards that have the model, and what makes it.
CASES: dict[str, tuple[str, Callable[[], tuple[Score, int]]]] = {
    BASELINE: ("clip_score", lambda: open_clip_score("ViT-L-14-quickgelu")),
    "aesthetic": ("aesthetic", aesthetic_score),
    "ImageReward": ("image_reward", image_reward_score),
    "CLIP ViT-H/14": ("hpsv2, pick_score", lambda: open_clip_score("ViT-H-14")),
    "CLIP ViT-H/14-378": ("clip_score (DFN5B)", lambda: open_clip_score("ViT-H-14-378-quickgelu")),
    **{name: (name, lambda name=name: as_it_is(name)) for name in AS_THEY_ARE if name in rewards.NAMES},
}


def pictures(count: int) -> list[Image.Image]:
    """Smooth colors, some noise, and a word."""
    random = np.random.default_rng(0)
    images = []
    for _ in range(count):
        coarse = Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((512, 512), Image.Resampling.BICUBIC), dtype=float)
        images.append(Image.fromarray((smooth + random.normal(0, 4, smooth.shape)).clip(0, 255).astype(np.uint8)))
        ImageDraw.Draw(images[-1]).text((120, 200), "OPEN", "white", ImageFont.load_default(96))
    return images


@torch.no_grad()
def seconds(score: Score, prompt: str, images: list[Image.Image]) -> float:
    """CPU time per image, of all threads."""
    start = time.process_time()
    score([prompt] * len(images), images)
    return (time.process_time() - start) / len(images)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--json", help="a file for the numbers")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    images = pictures(max(options.batch_sizes))
    baseline, baseline_size = CASES[BASELINE][1]()
    seconds(baseline, PROMPT, images[:1])
    rows = []
    print(f"threads {options.threads}, float32, 512 x 512 pictures, {options.repeats} turns each\n")
    print(f"| Model | Used by | Parameters (M) | Batch | CPU s per image | Ratio to {BASELINE} |")
    print("|---|---|---|---|---|---|")
    for name in options.only:
        used_by, make = CASES[name]
        try:
            score, size = (baseline, baseline_size) if name == BASELINE else make()
            prompt = AS_THEY_ARE.get(name, PROMPT)
            seconds(score, prompt, images[:1])
        except ImportError as error:
            print(f"| {name} | {used_by} | not installed: {error} | | | |")
            continue
        for batch in options.batch_sizes:
            pairs = np.array(
                [
                    [seconds(baseline, PROMPT, images[:batch]), seconds(score, prompt, images[:batch])]
                    for _ in range(options.repeats)
                ]
            )
            ratios = pairs[:, 1] / pairs[:, 0]
            row = {
                "model": name,
                "used_by": used_by,
                "parameters": size,
                "batch_size": batch,
                "cpu_seconds_per_image": float(np.median(pairs[:, 1])),
                "ratio": float(np.median(ratios)),
                "ratio_range": [float(ratios.min()), float(ratios.max())],
            }
            rows.append(row)
            millions = f"{size / 1e6:.0f}" if size else ""
            print(
                f"| {name} | {used_by} | {millions} | {batch} | {row['cpu_seconds_per_image']:.3g} | "
                f"{row['ratio']:.3g} ({ratios.min():.3g} to {ratios.max():.3g}) |",
                flush=True,
            )
        del score
        gc.collect()  # ViT-H/14-378 takes 4 GB
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({"threads": options.threads, "repeats": options.repeats, "rows": rows}, file, indent=2)


if __name__ == "__main__":
    main()
