"""
Rewards for pictures of the shapes world: its exact verifier, a learned reward that can be fooled, and a spurious one.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from slas_trl.shapes import verifier, weights_folder


if TYPE_CHECKING:
    import torch
    from transformers import CLIPTokenizer

_MAX_TOKENS = 16  # what the encoder was trained with
_BATCH = 256  # pictures at a time


def shapes_verifier(prompts: list[str], images: list[Image.Image], **columns: Any) -> list[float | None]:
    """
    Share of its prompt's demands that a picture meets, see [`~slas_trl.shapes.verifier.verify`].

    Args:
        prompts (`list[str]`): sentences of the shapes world.
        images (`list[PIL.Image.Image]`): one for each prompt, of any size.
        columns: ignored.

    Returns:
        `list[float]`: in [0, 1]; 1 when the picture shows what was asked for and nothing else.

    Raises:
        `ValueError`: for a prompt that is not of this world.
    """
    return [verdict.graded for verdict in verifier.verify(prompts, images)]


def shapes_verifier_strict(prompts: list[str], images: list[Image.Image], **columns: Any) -> list[float | None]:
    """As [`shapes_verifier`], but 0 for a picture that shows anything but what was asked for, and 1 otherwise."""
    return [float(verdict.strict) for verdict in verifier.verify(prompts, images)]


def shapes_coloured_area(prompts: list[str], images: list[Image.Image], **columns: Any) -> list[float | None]:
    """
    Share of a picture's pixels that are coloured: nothing that a prompt asks for, so what a policy gains here beside
    another reward shows how far it follows spurious differences.

    Args:
        prompts (`list[str]`): ignored.
        images (`list[PIL.Image.Image]`): of any size.
        columns: ignored.

    Returns:
        `list[float]`: in [0, 1].
    """
    return verifier.coloured(verifier.to_pixels(images)).mean((1, 2)).tolist()


def shapes_clip(prompts: list[str], images: list[Image.Image], **columns: Any) -> list[float | None]:
    """
    Cosine of a small contrastive image-text encoder, of the kind of CLIPScore
    (https://huggingface.co/papers/2104.08718). It was trained on pictures of this world with some wrong captions, and
    is as imperfect as such rewards are: it knows the colours of a picture, mostly its shapes, hardly which shape has
    which colour, and not at all what is left of what.

    The encoder comes with the package, is loaded at the first call and kept, and runs in float32 on the CPU.

    Args:
        prompts (`list[str]`): any text, of which the first 16 tokens are read.
        images (`list[PIL.Image.Image]`): one for each prompt, of any size.
        columns: ignored.

    Returns:
        `list[float]`: in [-1, 1].

    Raises:
        `FileNotFoundError`: when the package was installed without its weights.
        `ValueError`: for numbers of prompts and images that differ.
    """
    import torch

    from slas_trl.rewards.base import check_pairs

    check_pairs(prompts, images)
    pixels = verifier.to_pixels(images)
    texts = list(dict.fromkeys(prompts))  # a group of images shares its prompt
    row = {text: i for i, text in enumerate(texts)}
    with torch.no_grad():
        embedded = _in_batches(_embed_texts, texts)
        which = torch.tensor([row[prompt] for prompt in prompts], dtype=torch.long)
        return (_in_batches(_embed_images, pixels) * embedded[which]).sum(-1).tolist()


@cache
def _encoder() -> tuple[Any, "CLIPTokenizer"]:
    import torch
    from transformers import CLIPModel, CLIPTokenizer
    from transformers.utils import logging

    folder = weights_folder("clip")
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model = CLIPModel.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    finally:
        if bars:
            logging.enable_progress_bar()
    return model.eval().requires_grad_(False), tokenizer


def _in_batches(embed: Callable, items: Sequence[str] | np.ndarray) -> "torch.Tensor":
    """Unit vectors `(N, D)`."""
    import torch

    parts = [embed(items[i : i + _BATCH]) for i in range(0, len(items), _BATCH)]
    return torch.nn.functional.normalize(torch.cat(parts), dim=-1) if parts else torch.empty(0, 1)


def _embed_texts(texts: list[str]) -> "torch.Tensor":
    model, tokenizer = _encoder()  # loaded at the first call
    tokens = tokenizer(texts, padding="max_length", max_length=_MAX_TOKENS, truncation=True, return_tensors="pt")
    # As in its training, the padding is not masked.
    return model.get_text_features(input_ids=tokens["input_ids"]).pooler_output


def _embed_images(pixels: np.ndarray) -> "torch.Tensor":
    import torch

    model, _ = _encoder()
    values = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255 * 2 - 1
    return model.get_image_features(pixel_values=values).pooler_output
