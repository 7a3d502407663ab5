"""How much people like a picture, whatever it was asked to show: LAION's aesthetic predictor."""

from collections import OrderedDict
from dataclasses import dataclass
from itertools import pairwise, starmap
from typing import Any

import torch
from PIL.Image import Image
from torch import nn

from .base import ModelReward, hub_file, load_once, load_weights, put_weights
from .clip import ClipEncoder, load_clip


@dataclass(frozen=True)
class Aesthetic(ModelReward):
    """
    LAION's aesthetic predictor, as DDPO (https://huggingface.co/papers/2305.13301) uses it: CLIP's image features, of
    length 1, and a linear head trained on ratings from 1 to 10. Most pictures are between 4 and 7.

    Args:
        model (`str`, *optional*): CLIP, repository or folder. The head is made for the default.
        head (`str`, *optional*): Repository or folder with `aesthetic-model.pth`, or a file such as LAION's.
    """

    default_name = "aesthetic"
    measures = "how beautiful people would find a picture, whatever it shows"
    blind_to = "the prompt, so that it needs another reward beside it"
    model: str = "openai/clip-vit-large-patch14"
    head: str = "trl-lib/ddpo-aesthetic-predictor"

    def _scores(self, prompts: list[str], images: list[Image], columns: dict[str, Any]) -> list[float]:
        encoder, head = _load(self.model, self.head, self.torch_device, self.torch_dtype)
        with torch.autocast(self.torch_device.type, enabled=False):
            return head(encoder.images(images, self.batch_size)).squeeze(-1).tolist()


aesthetic = Aesthetic()


def linear_head(width: int) -> nn.Module:
    """The head of LAION's predictor and of ImageReward, without the dropout between the layers."""
    layers = starmap(nn.Linear, pairwise((width, 1024, 128, 64, 16, 1)))
    return nn.Sequential(OrderedDict(zip(("0", "2", "4", "6", "7"), layers, strict=True)))


@load_once
def _load(model: str, head: str, device: torch.device, dtype: torch.dtype) -> tuple[ClipEncoder, nn.Module]:
    path = hub_file(head, "aesthetic-model.pth")
    encoder = load_clip(model, None, dtype, device)
    weights = {name.removeprefix("layers."): tensor for name, tensor in load_weights(path).items()}
    layers = linear_head(weights.get("0.weight", torch.empty(0, 768)).shape[1])
    put_weights(layers, weights, path, "five linear layers: features, 1024, 128, 64, 16, 1")
    return encoder, layers.to(device, torch.float32)
