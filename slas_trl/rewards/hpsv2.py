"""
HPSv2 (https://huggingface.co/papers/2306.09341): a CLIP ViT-H/14 trained on what people preferred, in float32.

Its preprocessing is not that of any CLIP library: the float image is resized with its longer side to 224 and padded to
a square with zeros before it is normalised, so the padding is black.

The antialiasing is that of torchvision since 0.17. Before, resizing a tensor did not antialias, so with an old
torchvision the `hpsv2` package gives other scores.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL.Image import Image

from slas_trl.images import to_rgb
from slas_trl.rewards.base import ModelReward, check_pairs, hub_file, load_once, load_weights, require
from slas_trl.rewards.clip_score import ClipEncoder, open_clip_encoder


SIZE = 224
MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's
STD = (0.26862954, 0.26130258, 0.27577711)
REPOSITORY = "xswu/HPSv2"
FILES = {"v2.0": "HPS_v2_compressed.pt", "v2.1": "HPS_v2.1_compressed.pt"}
ARCHITECTURE = "ViT-H-14"


@dataclass(frozen=True)
class HPSv2(ModelReward):
    """
    Human Preference Score v2: the cosine of image and text in a CLIP that was trained on choices between images.

    Texts longer than 77 tokens are cut off there. Images of any mode are converted to RGB, which drops transparency.

    Args:
        version (`str`, *optional*, defaults to `"v2.1"`): Of its weights: "v2.0" or "v2.1".
        checkpoint (`str`, *optional*):
            File of weights, or folder with it; by default that of the version, of `xswu/HPSv2` on the Hub.

    Returns:
        `list[float]`: in [-1, 1], mostly 0.2 to 0.35. It is not multiplied by 100, as the benchmark's tables are.

    Raises:
        `FileNotFoundError`: for weights that cannot be had, with where to put them.
        `ImportError`: without open_clip.
        `ValueError`: for numbers of prompts and images that differ, and for weights of another model.
    """

    default_name: ClassVar[str] = "hpsv2"
    version: str = "v2.1"
    checkpoint: str | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.version not in FILES:
            raise ValueError(f"version of {self.__name__} must be v2.0 or v2.1, but it is {self.version!r}.")

    def __call__(self, prompts: list[str], images: list[Image], **columns: Any) -> list[float | None]:
        check_pairs(prompts, images)
        if not images:
            return []
        encoder = _load(self.version, self.checkpoint, self.torch_dtype, self.torch_device)
        return encoder.cosines(prompts, images, self.batch_size).tolist()


hpsv2 = HPSv2()


def _square(image: Image) -> torch.Tensor:
    """
    Pixel values `(3, 224, 224)` for the model. The package leaves an image of 224 × 150 narrow, and fails at the
    model, which takes squares only; here it is padded, as those of 223 × 149 and 225 × 151 are.
    """
    return _normalised(_padded(_resized(image)))


def _resized(image: Image) -> torch.Tensor:
    pixels = torch.from_numpy(np.array(to_rgb(image))).permute(2, 0, 1).contiguous().float().div(255)
    if (longest := max(image.size)) == SIZE:
        return pixels
    # At least a pixel: of an image that is 448 times as long as wide, the package leaves none, and fails.
    height, width = (max(1, round(side * (SIZE / longest))) for side in pixels.shape[1:])
    return torch.nn.functional.interpolate(
        pixels[None], size=(height, width), mode="bicubic", antialias=True, align_corners=False
    )[0]


def _padded(pixels: torch.Tensor) -> torch.Tensor:
    height, width = (SIZE - side for side in pixels.shape[1:])
    left, top = width // 2, height // 2
    return torch.nn.functional.pad(pixels, (left, width - left, top, height - top))


def _normalised(pixels: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return (pixels - mean) / std


@load_once
def _load(version: str, checkpoint: str | None, dtype: torch.dtype, device: torch.device) -> ClipEncoder:
    open_clip = require("open_clip", "rewards", "hpsv2")
    if checkpoint is not None and Path(checkpoint).is_file():
        path = Path(checkpoint)
    elif checkpoint is not None and not Path(checkpoint).is_dir():
        raise FileNotFoundError(f"hpsv2 needs a file or a folder as its checkpoint, but there is no {checkpoint}.")
    else:
        path = hub_file(checkpoint or REPOSITORY, FILES[version], "hpsv2", option="checkpoint")
    weights: Any = load_weights(path)
    weights = weights.get("state_dict", weights)
    # Without memory or random weights: the checkpoint holds them all, of a model that was never another one's.
    with torch.device("meta"):
        model = open_clip.CLIP(**open_clip.get_model_config(ARCHITECTURE))
    try:
        model.load_state_dict(weights, strict=True, assign=True)
    except RuntimeError as error:
        raise ValueError(
            f"{path} is no checkpoint of HPSv2, of which the names and shapes are those of open_clip's "
            f"{ARCHITECTURE}: {' '.join(str(error).split())[:300]}"
        ) from error
    # The only buffer, which no checkpoint holds: what a text's tokens may not look at.
    model.attn_mask = torch.full((model.context_length, model.context_length), -math.inf).triu(1)
    return open_clip_encoder(model.to(device, dtype), _square, open_clip.tokenize)
