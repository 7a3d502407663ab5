"""Models of rewards with their real classes and formats, small, and with weights that are the same everywhere."""

from math import prod
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil


SIZES = [(224, 224), (300, 227), (333, 100), (640, 481), (56, 1025), (3, 7)]  # square, odd, wide, tall, tiny


def pictures(sizes: list[tuple[int, int]] = SIZES) -> list[Image.Image]:
    """Colored waves and noise; no two of them alike."""
    random = np.random.RandomState(0)
    images = []
    for i, (width, height) in enumerate(sizes):
        y, x = np.mgrid[:height, :width][..., None] / 40
        waves = np.sin(x * (1 + i) + np.arange(3) * i) * np.cos(y + np.arange(3)) * 80 + 128
        images.append(Image.fromarray((waves + random.normal(0, 20, waves.shape)).clip(0, 255).astype(np.uint8)))
    return images


def deep(image: Image.Image) -> Image.Image:
    """Its grays in 16 bits."""
    return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)


def random_weights(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, torch.Tensor]:
    """Of the magnitudes that trained ones have; embeddings are so small that the epsilons of layer norms matter."""
    random = np.random.RandomState(seed)  # whose numbers are the same in all versions
    weights = {}
    for name, shape in shapes.items():
        values = random.standard_normal(shape)
        if name.endswith("norm.weight") or "norm1.weight" in name or "norm2.weight" in name or "Norm.weight" in name:
            values = 1 + 0.1 * values
        elif len(shape) < 2:
            values *= 0.1
        elif "embed" in name or "cls_token" in name:
            values *= 0.01 / (prod(shape[1:]) ** 0.5 if len(shape) == 4 else 1)
        elif name.startswith(("layers.", "mlp.layers.")):
            values *= 1 / shape[1] ** 0.5  # scores of about 1
        else:
            values *= 1.5 / shape[1] ** 0.5
        weights[name] = torch.from_numpy(values).float()
    return weights


def head_shapes(width: int, prefix: str = "layers.") -> dict[str, tuple[int, ...]]:
    """Those of the linear head that LAION's predictor has, and ImageReward."""
    sizes = {0: (1024, width), 2: (128, 1024), 4: (64, 128), 6: (16, 64), 7: (1, 16)}
    return {
        f"{prefix}{i}.{kind}": size if kind == "weight" else size[:1]
        for i, size in sizes.items()
        for kind in ("weight", "bias")
    }


def save_clip(folder: Path, width: int = 48) -> CLIPModel:
    """A CLIP of two layers, that sees pictures of 56 x 56 pixels, in transformers' format."""
    layers = {"intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "projection_dim": width}
    config = CLIPConfig(
        text_config={"hidden_size": 32, **layers},
        vision_config={"hidden_size": 32, "image_size": 56, "patch_size": 14, **layers},
        projection_dim=width,
    )
    torch.manual_seed(0)
    clip = CLIPModel(config).eval().requires_grad_(False)
    clip.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}).save_pretrained(folder)
    return clip


PUBLISHED = {
    **{"vision": 1024, "vision_layers": 24, "patch": 16},
    **{"text": 768, "text_layers": 12, "vocabulary": 30524, "positions": 512},
}


def image_reward_shapes(
    vision: int = 192,
    text: int = 128,
    vision_layers: int = 2,
    text_layers: int = 2,
    patch: int = 56,
    image: int = 224,
    vocabulary: int = 64,
    positions: int = 40,
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in ImageReward.pt, at other sizes than the published ones (`PUBLISHED`)."""
    shapes: dict[str, tuple[int, ...]] = {}

    def linear(name: str, rows: int, columns: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (rows, columns), (rows,)

    def norm(name: str, width: int) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (width,)

    eye = "blip.visual_encoder"
    shapes[f"{eye}.cls_token"] = (1, 1, vision)
    shapes[f"{eye}.pos_embed"] = (1, (image // patch) ** 2 + 1, vision)
    shapes[f"{eye}.patch_embed.proj.weight"] = (vision, 3, patch, patch)
    shapes[f"{eye}.patch_embed.proj.bias"] = (vision,)
    for i in range(vision_layers):
        block = f"{eye}.blocks.{i}"
        norm(f"{block}.norm1", vision)
        linear(f"{block}.attn.qkv", 3 * vision, vision)
        linear(f"{block}.attn.proj", vision, vision)
        norm(f"{block}.norm2", vision)
        linear(f"{block}.mlp.fc1", 4 * vision, vision)
        linear(f"{block}.mlp.fc2", vision, 4 * vision)
    norm(f"{eye}.norm", vision)

    reader = "blip.text_encoder"
    shapes[f"{reader}.embeddings.word_embeddings.weight"] = (vocabulary, text)
    shapes[f"{reader}.embeddings.position_embeddings.weight"] = (positions, text)
    norm(f"{reader}.embeddings.LayerNorm", text)
    for i in range(text_layers):
        for attention, width in (("attention", text), ("crossattention", vision)):
            block = f"{reader}.encoder.layer.{i}.{attention}"
            linear(f"{block}.self.query", text, text)
            linear(f"{block}.self.key", text, width)
            linear(f"{block}.self.value", text, width)
            linear(f"{block}.output.dense", text, text)
            norm(f"{block}.output.LayerNorm", text)
        block = f"{reader}.encoder.layer.{i}"
        linear(f"{block}.intermediate.dense", 4 * text, text)
        linear(f"{block}.output.dense", text, 4 * text)
        norm(f"{block}.output.LayerNorm", text)

    linear("blip.vision_proj", 256, vision)
    linear("blip.text_proj", 256, text)
    return {**shapes, **head_shapes(text, "mlp.layers.")}


def image_reward_weights(seed: int = 0, **sizes: int) -> dict[str, torch.Tensor]:
    """What ImageReward.pt holds, at other sizes."""
    weights = random_weights(image_reward_shapes(**sizes), seed)
    positions = len(weights["blip.text_encoder.embeddings.position_embeddings.weight"])
    weights["blip.text_encoder.embeddings.position_ids"] = torch.arange(positions)[None]
    return weights


def save_bert_tokenizer(folder: Path) -> None:
    """The vocabulary of a tokenizer like BERT's: letters, and "cat"."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters), "cat"]
    folder.joinpath("vocab.txt").write_text("\n".join(words))
