"""Models of rewards with their real classes and formats, small, and with weights that are the same everywhere."""

import re
from math import prod
from pathlib import Path

import numpy as np
import torch
from PIL import Image


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


def random_weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Of the magnitudes that trained ones have; embeddings are so small that the epsilons of layer norms matter."""
    random = np.random.RandomState(0)  # whose numbers are the same in all versions
    weights = {}
    for name, shape in shapes.items():
        values = random.standard_normal(shape)
        if re.search(r"(norm[12]?|Norm)\.weight$", name):
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
    shapes: dict[str, tuple[int, ...]] = {}
    for i, size in {0: (1024, width), 2: (128, 1024), 4: (64, 128), 6: (16, 64), 7: (1, 16)}.items():
        shapes |= {f"{prefix}{i}.weight": size, f"{prefix}{i}.bias": size[:1]}
    return shapes


PUBLISHED = {
    **{"vision": 1024, "vision_layers": 24, "patch": 16},
    **{"text": 768, "text_layers": 12, "vocabulary": 30524, "positions": 512},
}
SMALL = {
    **{"vision": 192, "vision_layers": 2, "patch": 56},
    **{"text": 128, "text_layers": 2, "vocabulary": 64, "positions": 40},
}


def image_reward_shapes(
    *, vision: int, text: int, vision_layers: int, text_layers: int, patch: int, vocabulary: int, positions: int
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in ImageReward.pt."""
    shapes: dict[str, tuple[int, ...]] = {}

    def add(block: str, **sizes: tuple[int, ...]) -> None:
        for name, size in sizes.items():
            name = f"{block}.{name.replace('__', '.')}"
            shapes.update({f"{name}.weight": size, f"{name}.bias": size[:1]})

    eye, reader = "blip.visual_encoder", "blip.text_encoder"
    shapes[f"{eye}.cls_token"] = (1, 1, vision)
    shapes[f"{eye}.pos_embed"] = (1, (224 // patch) ** 2 + 1, vision)
    add(eye, patch_embed__proj=(vision, 3, patch, patch))
    for i in range(vision_layers):
        block = f"{eye}.blocks.{i}"
        add(block, norm1=(vision,), attn__qkv=(3 * vision, vision), attn__proj=(vision, vision))
        add(block, norm2=(vision,), mlp__fc1=(4 * vision, vision), mlp__fc2=(vision, 4 * vision))
    add(eye, norm=(vision,))

    shapes[f"{reader}.embeddings.word_embeddings.weight"] = (vocabulary, text)
    shapes[f"{reader}.embeddings.position_embeddings.weight"] = (positions, text)
    add(f"{reader}.embeddings", LayerNorm=(text,))
    for i in range(text_layers):
        layer = f"{reader}.encoder.layer.{i}"
        for attention, width in (("attention", text), ("crossattention", vision)):
            block = f"{layer}.{attention}"
            add(block, self__query=(text, text), self__key=(text, width), self__value=(text, width))
            add(block, output__dense=(text, text), output__LayerNorm=(text,))
        add(layer, intermediate__dense=(4 * text, text), output__dense=(text, 4 * text), output__LayerNorm=(text,))

    add("blip", vision_proj=(256, vision), text_proj=(256, text))
    return {**shapes, **head_shapes(text, "mlp.layers.")}


def image_reward_weights(sizes: dict[str, int] = SMALL) -> dict[str, torch.Tensor]:
    """What ImageReward.pt holds, at these sizes."""
    positions = torch.arange(sizes["positions"])[None]
    return random_weights(image_reward_shapes(**sizes)) | {"blip.text_encoder.embeddings.position_ids": positions}


def save_bert_tokenizer(folder: Path) -> None:
    """The vocabulary of a tokenizer like BERT's: letters, and "cat"."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters), "cat"]
    folder.joinpath("vocab.txt").write_text("\n".join(words))
