"""CLIPScore and PickScore: how well a picture fits its prompt, by the cosine of a CLIP's features."""

from dataclasses import dataclass

from PIL.Image import Image

from .base import ModelReward
from .clip import load_clip


@dataclass(frozen=True)
class ClipScore(ModelReward):
    """
    CLIPScore (https://huggingface.co/papers/2104.08718): the cosine of a CLIP's features of image and text, in
    [-1, 1], and neither times 100 nor times 2.5. Texts are cut off at the model's context, mostly 77 tokens.

    Args:
        model (`str`, *optional*, defaults to `"openai/clip-vit-large-patch14"`):
            Hub id or folder of a CLIP of transformers or of open_clip; or the name of an architecture of open_clip,
            such as "ViT-B-32", together with `pretrained`.
        pretrained (`str`, *optional*):
            Tag of weights that open_clip knows for that architecture, or a file of them.
    """

    default_name = "clip_score"
    measures = "how well a picture fits its prompt, by CLIP"
    blind_to = (
        "counts, left and right, which color belongs to what; prompts after 77 tokens; what the center crop removes"
    )
    model: str = "openai/clip-vit-large-patch14"
    pretrained: str | None = None

    def _scores(self, prompts: list[str], images: list[Image]) -> list[float]:
        encoder = load_clip(self.model, self.pretrained, self.torch_dtype, self.torch_device)
        return encoder.cosines(prompts, images, self.batch_size).tolist()


@dataclass(frozen=True)
class PickScore(ModelReward):
    """
    PickScore (https://huggingface.co/papers/2305.01569), a CLIP ViT-H/14 trained on what people preferred: the cosine
    of image and text times the model's exp(logit_scale), mostly 16 to 26; Flow-GRPO divides by 26. Texts are cut off
    at 77 tokens, and only the square in the middle of an image counts.

    Args:
        model (`str`, *optional*, defaults to `"yuvalkirstain/PickScore_v1"`):
            Hub id or folder of its weights.
        processor (`str`, *optional*, defaults to `"laion/CLIP-ViT-H-14-laion2B-s32B-b79K"`):
            Hub id or folder of its tokenizer and preprocessing.
    """

    default_name = "pick_score"
    measures = "which picture of a prompt people would prefer, by the model PickScore"
    blind_to = "what the center crop removes; detail below 224 pixels"
    model: str = "yuvalkirstain/PickScore_v1"
    processor: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"

    def _scores(self, prompts: list[str], images: list[Image]) -> list[float]:
        encoder = load_clip(self.model, None, self.torch_dtype, self.torch_device, processor=self.processor)
        return (encoder.logit_scale.exp() * encoder.cosines(prompts, images, self.batch_size)).tolist()


clip_score, pick_score = ClipScore(), PickScore()
