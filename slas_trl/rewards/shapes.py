"""
Rewards for pictures of the shapes world: its exact verifier, a learned reward that can be fooled, and a spurious one.
"""

from functools import cache
from typing import Any

import torch
from PIL import Image
from transformers import CLIPModel, CLIPTokenizer

from ..shapes import verifier, weights_folder
from .base import check_pairs, describe, load_pretrained
from .clip import ClipEncoder


_MAX_TOKENS = 16  # what the encoder was trained with
_BATCH = 256  # pictures at a time
_PLAIN = "everything outside its world of plain shapes"


@describe("the share of its prompt's demands that a picture of shapes meets, exactly", _PLAIN)
def shapes_verifier(prompts: list[str], images: list[Image.Image], **columns: Any) -> list[float | None]:
    """
    Share of its prompt's demands that a picture of any size meets, in [0, 1], see
    [`~slas_trl.shapes.verifier.verify`], which raises `ValueError` for a prompt that is not of this world.
    """
    return [verdict.graded for verdict in verifier.verify(prompts, images)]


@describe("whether a picture of shapes meets all of its prompt's demands, exactly", _PLAIN)
def shapes_verifier_strict(prompts: list[str], images: list[Image.Image], **columns: Any) -> list[float | None]:
    """As [`shapes_verifier`], but 0 for a picture that shows anything but what was asked for, and 1 otherwise."""
    return [float(verdict.strict) for verdict in verifier.verify(prompts, images)]


@describe("how much of a picture is colored", "everything else, the prompt included")
def shapes_coloured_area(prompts: list[str], images: list[Image.Image], **columns: Any) -> list[float | None]:
    """
    Share of a picture's pixels that are colored, in [0, 1]: nothing that a prompt asks for, so what a policy gains
    here beside another reward shows how far it follows spurious differences.
    """
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
    return _encoder().cosines(prompts, images, _BATCH).tolist() if images else []


@cache
def _encoder() -> ClipEncoder:
    from ..shapes.pipeline import quiet

    folder = str(weights_folder("clip"))
    with quiet():
        model = load_pretrained(CLIPModel, folder, torch.float32)
    tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    # Padding is not masked, as in its training.
    options = {"padding": "max_length", "max_length": _MAX_TOKENS, "truncation": True, "return_attention_mask": False}

    def prepare(images: list[Image.Image]) -> torch.Tensor:
        return torch.from_numpy(verifier.to_pixels(images)).permute(0, 3, 1, 2).float() / 255 * 2 - 1

    def tokenize(texts: list[str]) -> Any:
        return tokenizer(texts, return_tensors="pt", return_token_type_ids=False, **options)

    return ClipEncoder(model, prepare, tokenize)
