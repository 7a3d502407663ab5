"""Tiny CLIPs of both libraries, with random weights and preprocessing of their own, saved as they lie on the Hub."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from tests.tiny_pipelines import clip_tokenizer


# One that open_clip can make: `tokenize` gives 77 of 49,408 tokens.
OPEN_CLIP_ARCHITECTURE = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 224, "layers": 2, "width": 32, "head_width": 16, "patch_size": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}


def spread_out(model: torch.nn.Module) -> None:
    """Weights so large that different images and texts have clearly different features."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if name != "logit_scale":
            torch.nn.init.normal_(parameter, std=0.25, generator=generator)


def save_transformers_clip(folder: Path) -> Path:
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = tower | {"vocab_size": 192, "max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 1}
    vision = tower | {"image_size": 32, "patch_size": 8}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    spread_out(model)
    model.save_pretrained(folder)
    clip_tokenizer().save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def save_open_clip(folder: Path, **preprocessing: object) -> Path:
    import open_clip

    model = open_clip.CLIP(**OPEN_CLIP_ARCHITECTURE, quick_gelu=True)
    spread_out(model)
    config = {"model_cfg": OPEN_CLIP_ARCHITECTURE | {"quick_gelu": True}, "preprocess_cfg": preprocessing}
    folder.mkdir(exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder


def in_hub_cache(cache: Path, repo_id: str, folder: Path) -> None:
    """Puts a folder's files where a download from the Hub would."""
    revision = "0" * 40
    repository = cache / f"models--{repo_id.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision, encoding="utf-8")
    (repository / "snapshots").mkdir()
    (repository / "snapshots" / revision).symlink_to(folder, target_is_directory=True)


def picture(width: int, height: int, seed: int = 0, mode: str = "RGB") -> Image.Image:
    """Smooth blots and some noise, in color."""
    generator = np.random.default_rng([width, height, seed])
    coarse = Image.fromarray(generator.integers(0, 256, (4, 5, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=float)
    pixels = smooth + generator.normal(0, 12, smooth.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).convert(mode)


class Harmful:
    """Touches a file when it is unpickled."""

    def __reduce__(self):
        return (Path.touch, (Path("unpickled"),))
