"""PickScore (https://huggingface.co/papers/2305.01569): a CLIP ViT-H/14 trained on what people preferred."""

from dataclasses import dataclass
from typing import Any, ClassVar

from PIL.Image import Image

from slas_trl.rewards.base import ModelReward, check_pairs
from slas_trl.rewards.clip_score import load_clip


@dataclass(frozen=True)
class PickScore(ModelReward):
    """
    PickScore as its authors define it: the cosine of image and text times the model's exp(logit_scale).

    Texts longer than 77 tokens are cut off there. Images are resized to 224 on their shorter side and cropped to the
    square in the middle, so that nothing outside of it counts.

    Args:
        model (`str`, *optional*, defaults to `"yuvalkirstain/PickScore_v1"`):
            Hub id or folder of its weights.
        processor (`str`, *optional*, defaults to `"laion/CLIP-ViT-H-14-laion2B-s32B-b79K"`):
            Hub id or folder of its tokenizer and preprocessing.

    Returns:
        `list[float]`: in [-100, 100], mostly 16 to 26. Flow-GRPO divides by 26, which matters for the weights of a
        weighted sum only.

    Raises:
        `FileNotFoundError`: for a model or a processor that cannot be had, with where to put it.
        `ValueError`: for numbers of prompts and images that differ, and for what is no CLIP.
    """

    default_name: ClassVar[str] = "pick_score"
    model: str = "yuvalkirstain/PickScore_v1"
    processor: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"

    def __call__(self, prompts: list[str], images: list[Image], **columns: Any) -> list[float | None]:
        check_pairs(prompts, images)
        if not images:
            return []
        encoder = load_clip(
            self.model, None, self.torch_dtype, self.torch_device, processor=self.processor, needed_by="pick_score"
        )
        return (encoder.logit_scale.exp() * encoder.cosines(prompts, images, self.batch_size)).tolist()


pick_score = PickScore()
