"""HPSv2 (https://huggingface.co/papers/2306.09341): a CLIP ViT-H/14 trained on what people preferred."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL.Image import Image

from ..images import to_rgb
from .base import ModelReward, hub_file, load_once, load_weights, put_weights, require
from .clip import ClipEncoder, OpenClipEncoder, normalized


SIZE = 224
FILES = {"v2.0": "HPS_v2_compressed.pt", "v2.1": "HPS_v2.1_compressed.pt"}
ARCHITECTURE = "ViT-H-14"


@dataclass(frozen=True)
class HPSv2(ModelReward):
    """
    Human Preference Score v2: the cosine of image and text in a CLIP that was trained on choices between images, in
    [-1, 1], mostly 0.2 to 0.35, and not times 100 as in the benchmark's tables. Texts are cut off at 77 tokens.

    Args:
        version (`str`, *optional*, defaults to `"v2.1"`): Of its weights: "v2.0" or "v2.1".
        checkpoint (`str`, *optional*): File of weights, or folder with it; by default of `xswu/HPSv2` on the Hub.
    """

    default_name = "hpsv2"
    measures = "which picture of a prompt people would prefer, by the model HPSv2"
    blind_to = "detail below 224 pixels; has a taste for glossy pictures"
    version: str = "v2.1"
    checkpoint: str | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.version not in FILES:
            raise ValueError(f"version of {self.__name__} must be v2.0 or v2.1, but it is {self.version!r}.")

    def _scores(self, prompts: list[str], images: list[Image], columns: dict[str, Any]) -> list[float]:
        encoder = _load(self.version, self.checkpoint or "xswu/HPSv2", self.torch_dtype, self.torch_device)
        return encoder.cosines(prompts, images, self.batch_size).tolist()


hpsv2 = HPSv2()


def _square(image: Image) -> torch.Tensor:
    """
    Pixel values `(3, 224, 224)`: the float image with its longer side resized to 224, antialiased as in torchvision
    since 0.17, and padded with black. The package does not pad an image of 224 × 150, at which its model fails.
    """
    return normalized(_padded(_resized(image)))


def _resized(image: Image) -> torch.Tensor:
    pixels = torch.from_numpy(np.array(to_rgb(image))).permute(2, 0, 1).contiguous().float().div(255)
    if (longest := max(image.size)) == SIZE:
        return pixels
    # At least a pixel: of an image that is 448 times as long as wide, the package leaves none, and fails.
    height, width = (max(1, round(side * (SIZE / longest))) for side in pixels.shape[1:])
    return torch.nn.functional.interpolate(pixels[None], (height, width), mode="bicubic", antialias=True)[0]


def _padded(pixels: torch.Tensor) -> torch.Tensor:
    height, width = (SIZE - side for side in pixels.shape[1:])
    left, top = width // 2, height // 2
    return torch.nn.functional.pad(pixels, (left, width - left, top, height - top))


@load_once
def _load(version: str, checkpoint: str, dtype: torch.dtype, device: torch.device) -> ClipEncoder:
    open_clip = require("open_clip", "rewards")
    path = hub_file(checkpoint, FILES[version])
    weights: Any = load_weights(path)
    # Without memory or random weights: the checkpoint holds them all, of a model that was never another one's.
    with torch.device("meta"):
        model = open_clip.CLIP(**open_clip.get_model_config(ARCHITECTURE))
    put_weights(model, weights.get("state_dict", weights), path, f"HPSv2, open_clip's {ARCHITECTURE}")
    # The only buffer, which no checkpoint holds: what a text's tokens may not look at.
    model.attn_mask = torch.full((model.context_length, model.context_length), -math.inf).triu(1)
    return OpenClipEncoder(model.to(device, dtype), _square, open_clip.tokenize)
