"""ImageReward: what people prefer among pictures for the same prompt, by a BLIP that reads both together."""

import re
from dataclasses import dataclass
from math import isqrt
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import BertTokenizer, BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from ..images import to_rgb
from .aesthetics import linear_head
from .base import ModelReward, hub_file, in_batches, load_once, load_weights, put_weights
from .clip import normalized


_SCORE_MEAN, _SCORE_STD = 0.16717362830052426, 1.0333394966054072  # before normalization, over its training set

# From the names of the checkpoint to those of transformers' BLIP; within the text encoder they are the same.
_NAMES = (
    *(("blip.visual_encoder.", "vision."), ("blip.text_encoder.", "text."), ("mlp.layers.", "head.")),
    *(("cls_token", "embeddings.class_embedding"), ("pos_embed", "embeddings.position_embedding")),
    *(("patch_embed.proj", "embeddings.patch_embedding"), ("blocks.", "encoder.layers.")),
    *(("norm1.", "layer_norm1."), ("norm2.", "layer_norm2."), ("norm.", "post_layernorm.")),
    *((".attn.qkv.", ".self_attn.qkv."), (".attn.proj.", ".self_attn.projection.")),
)
# Projections for BLIP's contrastive loss, which the score does not go through, and the numbers 0, 1, 2, ...
_NOT_NEEDED = re.compile(r"blip\.((text|vision)_proj\.(weight|bias)|text_encoder\.embeddings\.position_ids)$")


@dataclass(frozen=True)
class ImageReward(ModelReward):
    """
    ImageReward (https://huggingface.co/papers/2304.05977), with the scores of the `image-reward` package, which is not
    needed: over its training set of mean 0 and standard deviation 1. It sees the square in the middle of the picture,
    and reads the first 33 tokens of the prompt.

    Args:
        model (`str`, *optional*): Repository or folder with `ImageReward.pt`, or a file with the same tensors.
        tokenizer (`str`, *optional*): Repository or folder with BERT's `vocab.txt`, in lower case.
    """

    default_name = "image_reward"
    measures = "which picture of a prompt people would prefer, by the model ImageReward"
    blind_to = "prompts after 33 tokens; what the center crop removes; languages other than English"
    model: str = "zai-org/ImageReward"
    tokenizer: str = "google-bert/bert-base-uncased"

    def _scores(self, prompts: list[str], images: list[Image.Image], columns: dict[str, Any]) -> list[float]:
        device, dtype = self.torch_device, self.torch_dtype
        scorer, tokenizer = _load(self.model, self.tokenizer, device, dtype)
        options = {"padding": "max_length", "truncation": True, "max_length": 35, "return_tensors": "pt"}
        scores = []
        for batch in in_batches(list(zip(prompts, images, strict=True)), self.batch_size):
            texts, pictures = zip(*batch, strict=True)
            tokens = tokenizer(list(texts), **options).to(device)
            pixels = torch.stack([to_pixels(picture, scorer.vision.config.image_size) for picture in pictures])
            scores += scorer(tokens["input_ids"], tokens["attention_mask"], pixels.to(device, dtype)).tolist()
        return scores


image_reward = ImageReward()


class Scorer(torch.nn.Module):
    """The model of a checkpoint: of the sizes that its tensors `weights` have, by the names in `_NAMES`."""

    def __init__(self, weights: dict[str, torch.Tensor]):
        super().__init__()
        self.vision: Any = BlipVisionModel(_vision_config(weights))
        self.text: Any = BlipTextModel(_text_config(weights), add_pooling_layer=False)
        self.head = linear_head(self.text.config.hidden_size)

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
        """Scores `(B,)`, in float32, of tokens `(B, L)`, a mask that is 0 for padding, and pixels `(B, 3, S, S)`."""
        seen = self.vision(pixel_values=pixels).last_hidden_state
        read = self.text(input_ids=tokens, attention_mask=mask, encoder_hidden_states=seen).last_hidden_state
        return (self.head(read[:, 0].float()).squeeze(-1) - _SCORE_MEAN) / _SCORE_STD


def to_pixels(image: Image.Image, size: int) -> torch.Tensor:
    """The square `(3, size, size)` in the middle, once the short side is `size` long; normalized as for CLIP."""
    image = to_rgb(image)
    short = min(image.size)
    width, height = (int(size * side / short) for side in image.size)  # of a long side, the fraction is cut off
    left, top = round((width - size) / 2), round((height - size) / 2)
    image = image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))
    return normalized(torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255)


def _vision_config(weights: dict[str, torch.Tensor]) -> BlipVisionConfig:
    width, _, _, patch = weights["vision.embeddings.patch_embedding.weight"].shape
    return BlipVisionConfig(
        hidden_size=width,
        intermediate_size=weights["vision.encoder.layers.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=_layers(weights, r"vision\.encoder\.layers\.(\d+)\."),
        num_attention_heads=max(width // 64, 1),
        image_size=patch * isqrt(weights["vision.embeddings.position_embedding"].shape[1] - 1),
        patch_size=patch,
        layer_norm_eps=1e-6,  # not 1e-5, the default in transformers
    )


def _text_config(weights: dict[str, torch.Tensor]) -> BlipTextConfig:
    vocabulary, width = weights["text.embeddings.word_embeddings.weight"].shape
    return BlipTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        encoder_hidden_size=weights["text.encoder.layer.0.crossattention.self.key.weight"].shape[1],
        intermediate_size=weights["text.encoder.layer.0.intermediate.dense.weight"].shape[0],
        num_hidden_layers=_layers(weights, r"text\.encoder\.layer\.(\d+)\."),
        num_attention_heads=max(width // 64, 1),  # BERT's 12, and not 8, the default in transformers
        max_position_embeddings=weights["text.embeddings.position_embeddings.weight"].shape[0],
        layer_norm_eps=1e-12,
        is_decoder=True,  # it has cross attention; its self attention looks both ways nevertheless
    )


def _layers(weights: dict[str, torch.Tensor], pattern: str) -> int:
    return len({found[1] for name in weights if (found := re.match(pattern, name))})


@load_once
def _load(model: str, tokenizer: str, device: torch.device, dtype: torch.dtype) -> tuple[Scorer, Any]:
    path = hub_file(model, "ImageReward.pt")
    # Not from_pretrained, which makes a tokenizer without words where it finds no file.
    bert = BertTokenizer(vocab=str(hub_file(tokenizer, "vocab.txt")))
    weights = {}
    for name, tensor in load_weights(path).items():
        if not _NOT_NEEDED.match(name):
            for theirs, ours in _NAMES:
                name = name.replace(theirs, ours)
            weights[name] = tensor
    try:
        scorer = Scorer(weights)
    except KeyError as error:
        raise ValueError(f"{path} does not fit ImageReward: it has no {error}.") from error
    put_weights(scorer, weights, path, "ImageReward")
    scorer.head.float()
    scorer.vision.to(dtype)
    scorer.text.to(dtype)
    return scorer.to(device), bert
