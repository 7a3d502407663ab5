"""How much people like a picture, whatever it was asked to show: LAION's aesthetic predictor."""

from dataclasses import dataclass

import torch
from PIL import Image
from torch import nn

from .base import ModelReward, hub_file, load_once, load_weights
from .clip import ClipEncoder, load_clip


@dataclass(frozen=True)
class Aesthetic(ModelReward):
    """
    LAION's aesthetic predictor, as DDPO (https://huggingface.co/papers/2305.13301) uses it: CLIP's image features, of
    length 1, and a linear head of five layers that was trained on ratings of photographs, drawings and logos. Its
    scores are on the scale of the ratings, 1 to 10, of which most pictures are between 4 and 7.

    It does not read the prompt, so it needs another reward beside it, or a small share of the advantage.

    Args:
        model (`str`, *optional*, defaults to `"openai/clip-vit-large-patch14"`):
            CLIP, repository or folder. The head is made for the default.
        head (`str`, *optional*, defaults to `"trl-lib/ddpo-aesthetic-predictor"`):
            Repository or folder with `aesthetic-model.pth`, or a file with the same tensors under another name, such
            as LAION's `sac+logos+ava1-l14-linearMSE.pth`.
    """

    default_name = "aesthetic"
    measures = "how beautiful people would find a picture, whatever it shows"
    blind_to = "the prompt, so that it needs another reward beside it"
    model: str = "openai/clip-vit-large-patch14"
    head: str = "trl-lib/ddpo-aesthetic-predictor"

    def _scores(self, prompts: list[str], images: list[Image.Image]) -> list[float]:
        encoder, head = _load(self.model, self.head, self.torch_device, self.torch_dtype)
        with torch.autocast(self.torch_device.type, enabled=False):
            return head(encoder.images(images, self.batch_size)).squeeze(-1).tolist()


aesthetic = Aesthetic()


def linear_head(width: int, weights: dict[str, torch.Tensor], source: str) -> nn.Sequential:
    """
    The head of LAION's predictor and of ImageReward: five linear layers, and dropout for the numbers of the layers.
    Raises `ValueError` for weights of another architecture, which came from `source`.
    """
    sizes, dropouts = (width, 1024, 128, 64, 16, 1), {0: 0.2, 1: 0.2, 2: 0.1}
    layers: list[nn.Module] = []
    for i in range(5):
        layers.append(nn.Linear(sizes[i], sizes[i + 1]))
        layers += [nn.Dropout(dropouts[i])] if i in dropouts else []
    head = nn.Sequential(*layers)
    load_strictly(head, weights, source, "five linear layers: features, 1024, 128, 64, 16, 1")
    return head.float().eval().requires_grad_(False)


def load_strictly(module: nn.Module, weights: dict[str, torch.Tensor], source: str, what: str) -> None:
    """`load_state_dict`, with a message that says which file does not fit, and with what."""
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"{source} does not fit {what}. {' '.join(str(error).split())[:500]}") from error


@load_once
def _load(model: str, head: str, device: torch.device, dtype: torch.dtype) -> tuple[ClipEncoder, nn.Module]:
    path = hub_file(head, "aesthetic-model.pth")
    encoder = load_clip(model, None, dtype, device)
    width = encoder.images([Image.new("RGB", (8, 8))], 1).shape[1]
    weights = {name.removeprefix("layers."): tensor for name, tensor in load_weights(path).items()}
    return encoder, linear_head(width, weights, f"{path}, as head on {model},").to(device)
