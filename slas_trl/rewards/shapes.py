"""Rewards for pictures of the shapes world: its exact verifier, a learned one that can be fooled, a spurious one."""

from functools import cache, partial
from typing import Any

import torch
from PIL import Image
from transformers import CLIPModel, CLIPTokenizer

from ..shapes import verifier, weights_folder
from .base import check_pairs, describe, load_pretrained
from .clip import ClipEncoder


_PLAIN = "everything outside its world of plain shapes"


@describe("the share of its prompt's demands that a picture of shapes meets, exactly", _PLAIN)
def shapes_verifier(prompts: list[str], images: list[Image.Image], **columns: Any) -> list[float | None]:
    """Share of its prompt's demands that a picture meets, in [0, 1], by [`~slas_trl.shapes.verifier.verify`]."""
    return [verdict.graded for verdict in verifier.verify(prompts, images)]


@describe("whether a picture of shapes meets all of its prompt's demands, exactly", _PLAIN)
def shapes_verifier_strict(prompts: list[str], images: list[Image.Image], **columns: Any) -> list[float | None]:
    """As [`shapes_verifier`], but 0 for a picture that shows anything but what was asked for, and 1 otherwise."""
    return [float(verdict.strict) for verdict in verifier.verify(prompts, images)]


@describe("how much of a picture is colored", "everything else, the prompt included")
def shapes_coloured_area(prompts: list[str], images: list[Image.Image], **columns: Any) -> list[float | None]:
    """Share of the pixels that are colored, in [0, 1], which no prompt asks for: a gain shows spurious differences."""
    return verifier.colored(verifier.to_pixels(images)).mean((1, 2)).tolist()


@describe(
    "how well a picture of shapes fits its prompt, by a small encoder of images and texts",
    "what is left of what, mostly which shape has which color",
)
def shapes_clip(prompts: list[str], images: list[Image.Image], **columns: Any) -> list[float | None]:
    """
    Cosine of a small image-text encoder, in [-1, 1], as imperfect as CLIPScore is: it was trained on pictures of this
    world with some wrong captions. It comes with the package, runs in float32 on the CPU, and reads 16 tokens.
    """
    check_pairs(prompts, images)
    return _encoder().cosines(prompts, images, 256).tolist() if images else []


@cache
def _encoder() -> ClipEncoder:
    from ..shapes.pipeline import quiet

    folder = str(weights_folder("clip"))
    with quiet():
        model = load_pretrained(CLIPModel, folder, torch.float32)
    tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    # As in its training: 16 tokens, of which padding is not masked.
    options = {"padding": "max_length", "max_length": 16, "truncation": True, "return_attention_mask": False}
    tokenize = partial(tokenizer, return_tensors="pt", return_token_type_ids=False, **options)

    def prepare(images: list[Image.Image]) -> torch.Tensor:
        return torch.from_numpy(verifier.to_pixels(images)).permute(0, 3, 1, 2).float() / 255 * 2 - 1

    return ClipEncoder(model, prepare, tokenize)
