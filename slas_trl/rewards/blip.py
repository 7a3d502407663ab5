"""ImageReward: what people prefer among pictures for the same prompt, by a BLIP that reads both together."""

import re
from dataclasses import dataclass
from math import isqrt
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from ..images import to_rgb
from .aesthetics import linear_head, load_strictly
from .base import ModelReward, hub_file, in_batches, load_once, load_weights
from .clip import MEAN, STD


if TYPE_CHECKING:
    from transformers import BlipTextConfig, BlipVisionConfig

_MAX_TOKENS = 35
_SCORE_MEAN, _SCORE_STD = 0.16717362830052426, 1.0333394966054072  # before normalization, over its training set

# From the names of the checkpoint to those of transformers' BLIP; the text encoder's are the same.
_VISION_NAMES = (
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
    ImageReward (https://huggingface.co/papers/2304.05977): a vision transformer sees the square in the middle of the
    picture, BLIP's text encoder reads the first 33 tokens of the prompt and looks at what was seen, and a linear head
    scores its first token. Over its training set the scores have mean 0 and standard deviation 1. They are those of
    the `image-reward` package, which is not needed.

    Args:
        model (`str`, *optional*, defaults to `"zai-org/ImageReward"`):
            Repository or folder with `ImageReward.pt`, or a file with the same tensors.
        tokenizer (`str`, *optional*, defaults to `"google-bert/bert-base-uncased"`):
            Repository or folder with BERT's `vocab.txt`, in lower case.
    """

    default_name = "image_reward"
    measures = "which picture of a prompt people would prefer, by the model ImageReward"
    blind_to = "prompts after 33 tokens; what the center crop removes; languages other than English"
    model: str = "zai-org/ImageReward"
    tokenizer: str = "google-bert/bert-base-uncased"

    def _scores(self, prompts: list[str], images: list[Image.Image]) -> list[float]:
        device, dtype = self.torch_device, self.torch_dtype
        scorer, tokenizer = _load(self.model, self.tokenizer, device, dtype)
        scores = []
        for batch in in_batches(list(zip(prompts, images, strict=True)), self.batch_size):
            texts, pictures = zip(*batch, strict=True)
            options = {"padding": "max_length", "truncation": True, "max_length": _MAX_TOKENS, "return_tensors": "pt"}
            tokens = tokenizer(list(texts), **options).to(device)
            pixels = torch.stack([to_pixels(picture, scorer.image_size) for picture in pictures])
            scores += scorer(tokens["input_ids"], tokens["attention_mask"], pixels.to(device, dtype)).tolist()
        return scores


class Scorer(torch.nn.Module):
    """
    The model of a checkpoint, from the tensors that the `image-reward` package gives these names, and of their sizes.
    Raises `ValueError` when some do not fit, with their `source`.
    """

    def __init__(self, weights: dict[str, torch.Tensor], source: str):
        super().__init__()
        from transformers import BlipTextModel, BlipVisionModel

        weights = {name: tensor for name, tensor in weights.items() if not _NOT_NEEDED.match(name)}
        prefixes = ("blip.visual_encoder.", "blip.text_encoder.", "mlp.layers.")
        vision, text, head = (
            {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
            for prefix in prefixes
        )
        try:
            vision_config, text_config = _vision_config(vision), _text_config(text)
        except KeyError as error:
            raise ValueError(f"{source} is not a checkpoint of ImageReward: it does not hold {error}.") from error
        self.image_size: Any = vision_config.image_size
        self.vocabulary = text_config.vocab_size
        self.vision: torch.nn.Module = BlipVisionModel(vision_config)
        self.text: torch.nn.Module = BlipTextModel(text_config, add_pooling_layer=False)
        for theirs, ours in _VISION_NAMES:
            vision = {name.replace(theirs, ours): tensor for name, tensor in vision.items()}
        load_strictly(self.vision, vision, source, "BLIP's vision transformer")
        load_strictly(self.text, text, source, "BLIP's text encoder")
        self.head = linear_head(text_config.hidden_size, head, source)
        self.eval().requires_grad_(False)

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
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    return (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def _vision_config(weights: dict[str, torch.Tensor]) -> "BlipVisionConfig":
    from transformers import BlipVisionConfig

    width, _, _, patch = weights["patch_embed.proj.weight"].shape
    return BlipVisionConfig(
        hidden_size=width,
        intermediate_size=weights["blocks.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=_layers(weights, r"blocks\.(\d+)\."),
        num_attention_heads=max(width // 64, 1),
        image_size=patch * isqrt(weights["pos_embed"].shape[1] - 1),
        patch_size=patch,
        layer_norm_eps=1e-6,  # not 1e-5, the default in transformers
    )


def _text_config(weights: dict[str, torch.Tensor]) -> "BlipTextConfig":
    from transformers import BlipTextConfig

    vocabulary, width = weights["embeddings.word_embeddings.weight"].shape
    return BlipTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        encoder_hidden_size=weights["encoder.layer.0.crossattention.self.key.weight"].shape[1],
        intermediate_size=weights["encoder.layer.0.intermediate.dense.weight"].shape[0],
        num_hidden_layers=_layers(weights, r"encoder\.layer\.(\d+)\."),
        num_attention_heads=max(width // 64, 1),  # BERT's 12, and not 8, the default in transformers
        max_position_embeddings=weights["embeddings.position_embeddings.weight"].shape[0],
        layer_norm_eps=1e-12,
        is_decoder=True,  # it has cross attention; its self attention looks both ways nevertheless
    )


def _layers(weights: dict[str, torch.Tensor], pattern: str) -> int:
    return len({found[1] for name in weights if (found := re.match(pattern, name))})


@load_once
def _load(model: str, tokenizer: str, device: torch.device, dtype: torch.dtype) -> tuple[Scorer, Any]:
    from transformers import BertTokenizer

    path = hub_file(model, "ImageReward.pt")
    # Not from_pretrained, which makes a tokenizer without words where it finds no file.
    bert = BertTokenizer(vocab=str(hub_file(tokenizer, "vocab.txt")))
    scorer = Scorer(load_weights(path), str(path))
    if len(bert) > (known := scorer.vocabulary):
        raise ValueError(f"The tokenizer {tokenizer} has {len(bert)} tokens, and the model knows {known}: use BERT's.")
    scorer.vision.to(dtype)
    scorer.text.to(dtype)
    return scorer.to(device), bert


image_reward = ImageReward()
