"""How much people like a picture, whatever it was asked to show: LAION's aesthetic predictor."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import nn

from slas_trl.images import to_rgb
from slas_trl.rewards.base import (
    ModelReward,
    check_pairs,
    fetch_all,
    hub_file,
    in_batches,
    load_once,
    load_weights,
    pretrained,
)


@dataclass(frozen=True)
class Aesthetic(ModelReward):
    """
    LAION's aesthetic predictor, as DDPO (https://huggingface.co/papers/2305.13301) uses it: CLIP's image features, of
    length 1, and a linear head of five layers that was trained on ratings of photographs, drawings and logos.

    It does not read the prompt, so it needs another reward beside it, or a small share of the advantage.

    Args:
        model (`str`, *optional*, defaults to `"openai/clip-vit-large-patch14"`):
            CLIP in transformers' format: repository or folder. The head is made for the default.
        head (`str`, *optional*, defaults to `"trl-lib/ddpo-aesthetic-predictor"`):
            Repository or folder with `aesthetic-model.pth`, or a file with the same tensors under another name, such
            as LAION's `sac+logos+ava1-l14-linearMSE.pth`.
    """

    default_name: ClassVar[str] = "aesthetic"
    model: str = "openai/clip-vit-large-patch14"
    head: str = "trl-lib/ddpo-aesthetic-predictor"

    @torch.no_grad()
    def __call__(self, prompts: list[str], images: list[Image.Image], **columns: Any) -> list[float | None]:
        """
        Args:
            prompts (`list[str]`): not looked at.
            images (`list[PIL.Image.Image]`): one for each prompt, of any size.
            columns: ignored.

        Returns:
            `list[float]`: on the scale of the ratings, 1 to 10, of which most pictures are between 4 and 7.

        Raises:
            `FileNotFoundError`: when a file cannot be had, with where it is and where to put it.
            `ValueError`: for numbers of prompts and images that differ, and weights that do not fit.
        """
        check_pairs(prompts, images)
        device, dtype = self.torch_device, self.torch_dtype
        encoder, processor, head = _load(self.model, self.head, device, dtype)
        scores = []
        for batch in in_batches(images, self.batch_size):
            rgb = [to_rgb(image) for image in batch]
            # Said, not guessed: a picture three pixels high looks like one with its channels first.
            pixels = processor(rgb, return_tensors="pt", input_data_format="channels_last")["pixel_values"]
            features = encoder(pixel_values=pixels.to(device, dtype)).image_embeds.float()
            scores += head(nn.functional.normalize(features, dim=-1)).squeeze(-1).tolist()
        return scores


def linear_head(width: int, weights: dict[str, torch.Tensor], source: str) -> nn.Sequential:
    """
    The head that LAION's predictor has, and ImageReward: five linear layers with nothing but dropout between them,
    which is here for the numbers of the layers.

    Args:
        width (`int`): of the features.
        weights (`dict[str, torch.Tensor]`): "0.weight" and so on.
        source (`str`): where they come from, for the message.

    Raises:
        `ValueError`: for weights of another architecture.
    """
    head = nn.Sequential(
        nn.Linear(width, 1024),
        nn.Dropout(0.2),
        nn.Linear(1024, 128),
        nn.Dropout(0.2),
        nn.Linear(128, 64),
        nn.Dropout(0.1),
        nn.Linear(64, 16),
        nn.Linear(16, 1),
    )
    load_strictly(head, weights, source, "five linear layers: features, 1024, 128, 64, 16, 1")
    return head.float().eval().requires_grad_(False)


def load_strictly(module: nn.Module, weights: dict[str, torch.Tensor], source: str, what: str) -> None:
    """`load_state_dict`, with a message that says which file does not fit, and with what."""
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"{source} does not fit {what}. {' '.join(str(error).split())[:500]}") from error


@load_once
def _load(model: str, head: str, device: torch.device, dtype: torch.dtype) -> tuple[nn.Module, Any, nn.Module]:
    needed_by = Aesthetic.default_name
    path, (encoder, processor) = fetch_all(
        lambda: Path(head) if Path(head).is_file() else hub_file(head, "aesthetic-model.pth", needed_by, "head"),
        lambda: _load_clip(model, dtype),
    )
    weights = {name.removeprefix("layers."): tensor for name, tensor in load_weights(path).items()}
    scorer = linear_head(encoder.config.projection_dim, weights, f"{path}, as head of {needed_by} on {model},")
    return encoder.to(device), processor, scorer.to(device)


def _load_clip(model: str, dtype: torch.dtype) -> tuple[Any, Any]:
    from transformers import CLIPVisionModelWithProjection
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    class ImageEncoder(CLIPVisionModelWithProjection):
        # The other half of CLIP, which would be reported as unexpected, in a line for each tensor.
        _keys_to_ignore_on_load_unexpected = [r"^text_model\.", r"^text_projection\.", r"^logit_scale$"]

    name = Aesthetic.default_name
    encoder, info = pretrained(ImageEncoder, model, name, "model", dtype=dtype, output_loading_info=True)
    if info["missing_keys"]:
        raise ValueError(
            f"{model} is not a CLIP that {name} can use: it has no weights for {sorted(info['missing_keys'])[:5]}."
        )
    # Pillow resizes as it did when the head was trained; torchvision, where installed, gives slightly other pixels.
    processor = pretrained(CLIPImageProcessorPil, model, name, "model")
    return encoder.eval().requires_grad_(False), processor


aesthetic = Aesthetic()
