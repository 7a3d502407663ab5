"""CLIPScore and PickScore, how well a picture fits its prompt; and the CLIP of all rewards that have one."""

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

from ..images import to_rgb
from .base import ModelReward, from_hub, hub_file, in_batches, load_once, load_pretrained, require


MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of OpenAI's pixel values


def normalized(pixels: torch.Tensor) -> torch.Tensor:
    """Pixel values `(3, H, W)` from [0, 1] to what OpenAI's CLIP was trained with."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return (pixels - mean) / std


@dataclass(frozen=True)
class ClipScore(ModelReward):
    """
    CLIPScore (https://huggingface.co/papers/2104.08718): the cosine of a CLIP's features of image and text, in
    [-1, 1], and neither times 100 nor times 2.5. Texts are cut off at the model's context, mostly 77 tokens.

    Args:
        model (`str`, *optional*): Of transformers or open_clip, Hub id or folder; or an architecture, as "ViT-B-32".
        pretrained (`str`, *optional*): Weights of that architecture: a tag that open_clip knows, or a file.
    """

    default_name = "clip_score"
    measures = "how well a picture fits its prompt, by CLIP"
    blind_to = "counts, left and right, what has which color; prompts after 77 tokens; what the center crop removes"
    model: str = "openai/clip-vit-large-patch14"
    pretrained: str | None = None

    def _scores(self, prompts: list[str], images: list[Image], columns: dict[str, Any]) -> list[float]:
        encoder = load_clip(self.model, self.pretrained, self.torch_dtype, self.torch_device)
        return encoder.cosines(prompts, images, self.batch_size).tolist()


@dataclass(frozen=True)
class PickScore(ModelReward):
    """
    PickScore (https://huggingface.co/papers/2305.01569), a CLIP ViT-H/14 trained on what people preferred: the cosine
    of image and text times the model's exp(logit_scale), mostly 16 to 26; Flow-GRPO divides by 26. Texts are cut off
    at 77 tokens, and only the square in the middle of an image counts.

    Args:
        model (`str`, *optional*): Hub id or folder of its weights.
        processor (`str`, *optional*): Hub id or folder of its tokenizer and preprocessing.
    """

    default_name = "pick_score"
    measures = "which picture of a prompt people would prefer, by the model PickScore"
    blind_to = "what the center crop removes; detail below 224 pixels"
    model: str = "yuvalkirstain/PickScore_v1"
    processor: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"

    def _scores(self, prompts: list[str], images: list[Image], columns: dict[str, Any]) -> list[float]:
        encoder = load_clip(self.model, None, self.torch_dtype, self.torch_device, processor=self.processor)
        scale = encoder.model.logit_scale.float().exp()
        return (scale * encoder.cosines(prompts, images, self.batch_size)).tolist()


clip_score, pick_score = ClipScore(), PickScore()


@dataclass(eq=False)
class ClipEncoder:
    """A CLIP of transformers together with its preprocessing."""

    model: Any  # with `logit_scale`, the logarithm of what cosines were multiplied by in training
    prepare: Callable[[list[Image]], torch.Tensor]  # RGB images to pixel values `(N, 3, H, W)`
    tokenize: Callable[[list[str]], Any]  # texts to tokens, a tensor or a dictionary of such
    _tokenizing: Any = field(default_factory=threading.Lock)

    def embed_images(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.model.get_image_features(pixel_values=pixels).pooler_output

    def embed_texts(self, tokens: Any) -> torch.Tensor:
        return self.model.get_text_features(**tokens).pooler_output

    def images(self, images: Sequence[Image], batch_size: int) -> torch.Tensor:
        """Unit vectors `(N, D)` in float32."""
        like = self.model.logit_scale
        pixels = (self.prepare([to_rgb(image) for image in batch]) for batch in in_batches(images, batch_size))
        return self._unit_vectors(self.embed_images(some.to(like.device, like.dtype)) for some in pixels)

    def texts(self, texts: Sequence[str], batch_size: int) -> torch.Tensor:
        # Rewards run in threads, and a fast tokenizer fails when two of them set its truncation at once.
        with self._tokenizing:
            tokens = [self.tokenize(list(batch)) for batch in in_batches(texts, batch_size)]
        return self._unit_vectors(self.embed_texts(some.to(self.model.logit_scale.device)) for some in tokens)

    def cosines(self, prompts: Sequence[str], images: Sequence[Image], batch_size: int) -> torch.Tensor:
        """Cosine of each image with its prompt `(N,)` in float32. A prompt of several images is embedded once."""
        row = {text: i for i, text in enumerate(dict.fromkeys(prompts))}
        texts = self.texts(list(row), batch_size)
        return (self.images(images, batch_size) * texts[[row[prompt] for prompt in prompts]]).sum(-1)

    def _unit_vectors(self, features: Iterable[torch.Tensor]) -> torch.Tensor:
        # Not under the autocast of a training step: half a precision is more than the difference of good images.
        with torch.no_grad(), torch.autocast(self.model.logit_scale.device.type, enabled=False):
            return torch.nn.functional.normalize(torch.cat([some.float() for some in features]), dim=-1)


class OpenClipEncoder(ClipEncoder):
    """A CLIP of open_clip; its `prepare` takes an image at a time."""

    def __init__(self, model: Any, prepare: Callable[[Image], torch.Tensor], tokenize: Callable[[list[str]], Any]):
        model.eval().requires_grad_(False)
        super().__init__(model, lambda images: torch.stack([prepare(image) for image in images]), tokenize)
        self.embed_images, self.embed_texts = model.encode_image, model.encode_text


@load_once
def load_clip(
    model: str,
    pretrained: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    processor: str | None = None,
) -> ClipEncoder:
    """
    A CLIP as [`ClipScore`] names it, by open_clip where there is an `open_clip_config.json`, else by transformers;
    `processor` has its preprocessing, if the model has not.
    """
    folder = Path(model).is_dir()
    if "/" not in model and not folder:
        return _open_clip(model, pretrained, dtype, device)
    if pretrained:
        raise ValueError(f"{model} has weights itself: leave out pretrained={pretrained!r}, which is for ViT-B-32.")
    try:
        hub_file(model, "open_clip_config.json")
    except FileNotFoundError:  # or there is no such model, as transformers will say
        return _transformers_clip(model, processor or model, dtype, device)
    return _open_clip(f"{'local-dir' if folder else 'hf-hub'}:{model}", None, dtype, device)


def _open_clip(name: str, pretrained: str | None, dtype: torch.dtype, device: torch.device | str) -> ClipEncoder:
    open_clip = require("open_clip", "rewards")
    tagged = open_clip.get_pretrained_cfg(name, pretrained) if pretrained else {}
    # Without its own activation function, a model's features are slightly wrong.
    options = {"pretrained": pretrained, "force_quick_gelu": tagged.get("quick_gelu", False), "weights_only": True}
    with from_hub(tagged.get("hf_hub", "").rstrip("/") or name.partition(":")[2] or name):
        try:
            model, prepare = open_clip.create_model_from_pretrained(name, **options)
            tokenizer = open_clip.get_tokenizer(name)
        except RuntimeError as error:
            raise FileNotFoundError(f"With pretrained={pretrained!r}, open_clip says: {error}") from error
    return OpenClipEncoder(model.to(device, dtype), prepare, tokenizer)


def _transformers_clip(name: str, processor: str, dtype: torch.dtype, device: torch.device | str) -> ClipEncoder:
    model = load_pretrained(CLIPModel, name, dtype)
    with from_hub(processor):
        image_processor = AutoImageProcessor.from_pretrained(processor, backend="pil")  # as without torchvision
        tokenizer = AutoTokenizer.from_pretrained(processor)
    options = {"padding": True, "return_tensors": "pt", "return_token_type_ids": False, "truncation": True}
    tokenize = partial(tokenizer, max_length=model.config.text_config.max_position_embeddings, **options)

    def prepare(images: list[Image]) -> torch.Tensor:
        # Said, not guessed: an image that is three pixels high looks like one with its channels first.
        return image_processor(images, return_tensors="pt", input_data_format="channels_last")["pixel_values"]

    return ClipEncoder(model.to(device), prepare, tokenize)
