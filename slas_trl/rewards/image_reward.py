"""ImageReward: what people prefer among pictures for the same prompt, by a BLIP that reads both together."""

import re
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from PIL import Image

from slas_trl.images import to_rgb
from slas_trl.rewards.aesthetic import linear_head, load_strictly
from slas_trl.rewards.base import ModelReward, check_pairs, fetch_all, hub_file, in_batches, load_once, load_weights


if TYPE_CHECKING:
    from transformers import BlipTextConfig, BlipVisionConfig

_MAX_TOKENS = 35
# Of the scores before this normalisation, over its training set.
_MEAN, _STD = 0.16717362830052426, 1.0333394966054072
# CLIP's, which this BLIP was trained with too.
_PIXEL_MEAN, _PIXEL_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

# From the names of the checkpoint to those of transformers' BLIP; the text encoder's are the same.
_VISION_NAMES = (
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^blocks\.(\d+)\.norm([12])\.", r"encoder.layers.\1.layer_norm\2."),
    (r"^blocks\.(\d+)\.attn\.qkv\.", r"encoder.layers.\1.self_attn.qkv."),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"encoder.layers.\1.self_attn.projection."),
    (r"^blocks\.(\d+)\.mlp\.", r"encoder.layers.\1.mlp."),
    (r"^norm\.", "post_layernorm."),
)
# Projections for BLIP's contrastive loss, which the score does not go through, and the numbers 0, 1, 2, ...
_NOT_NEEDED = {
    "blip.text_encoder.embeddings.position_ids",
    "blip.text_proj.bias",
    "blip.text_proj.weight",
    "blip.vision_proj.bias",
    "blip.vision_proj.weight",
}


@dataclass(frozen=True)
class ImageReward(ModelReward):
    """
    ImageReward (https://huggingface.co/papers/2304.05977): a vision transformer sees the picture, BLIP's text encoder
    reads the prompt and looks at what was seen, and a linear head scores its first token. Trained on rankings of
    pictures for the same prompt.

    The scores are those of the `image-reward` package, which need not be installed: its weights work in transformers'
    BLIP as well.

    Args:
        model (`str`, *optional*, defaults to `"zai-org/ImageReward"`):
            Repository or folder with `ImageReward.pt`, or a file with the same tensors.
        tokenizer (`str`, *optional*, defaults to `"google-bert/bert-base-uncased"`):
            Repository or folder with BERT's `vocab.txt`, in lower case.
    """

    default_name: ClassVar[str] = "image_reward"
    model: str = "zai-org/ImageReward"
    tokenizer: str = "google-bert/bert-base-uncased"

    @torch.no_grad()
    def __call__(self, prompts: list[str], images: list[Image.Image], **columns: Any) -> list[float | None]:
        """
        Args:
            prompts (`list[str]`): English, of which the first 33 tokens are read.
            images (`list[PIL.Image.Image]`): one for each prompt, of any size; the square in the middle is looked at.
            columns: ignored.

        Returns:
            `list[float]`: of mean 0 and standard deviation 1 over its training set, so mostly between -2 and 2.

        Raises:
            `FileNotFoundError`: when a file cannot be had, with where it is and where to put it.
            `ValueError`: for numbers of prompts and images that differ, and weights that do not fit.
        """
        check_pairs(prompts, images)
        device, dtype = self.torch_device, self.torch_dtype
        scorer, tokenizer = _load(self.model, self.tokenizer, device, dtype)
        scores = []
        for batch in in_batches(list(zip(prompts, images, strict=True)), self.batch_size):
            texts, pictures = zip(*batch, strict=True)
            tokens = tokenizer(
                list(texts), padding="max_length", truncation=True, max_length=_MAX_TOKENS, return_tensors="pt"
            ).to(device)
            pixels = torch.stack([to_pixels(picture, scorer.image_size) for picture in pictures])
            scores += scorer(tokens["input_ids"], tokens["attention_mask"], pixels.to(device, dtype)).tolist()
        return scores


class Scorer(torch.nn.Module):
    """
    The model of a checkpoint of ImageReward. Its sizes are those of the tensors.

    Args:
        weights (`dict[str, torch.Tensor]`): by the names that the `image-reward` package gives them.
        source (`str`): where they come from, for messages.

    Raises:
        `ValueError`: when tensors are missing, of another size, or not known.
    """

    def __init__(self, weights: dict[str, torch.Tensor], source: str):
        super().__init__()
        from transformers import BlipTextModel, BlipVisionModel

        parts = {"blip.visual_encoder.": {}, "blip.text_encoder.": {}, "mlp.layers.": {}}
        unknown = []
        for name, tensor in weights.items():
            prefix = next(filter(name.startswith, parts), None)
            if prefix and name not in _NOT_NEEDED:
                parts[prefix][name.removeprefix(prefix)] = tensor
            elif name not in _NOT_NEEDED:
                unknown.append(name)
        if unknown:
            raise ValueError(f"{source} is not a checkpoint of ImageReward: it also holds {sorted(unknown)[:5]}.")
        vision, text, head = parts.values()
        try:
            vision_config, text_config = _vision_config(vision), _text_config(text)
        except KeyError as error:
            raise ValueError(f"{source} is not a checkpoint of ImageReward: it does not hold {error}.") from error
        self.image_size: Any = vision_config.image_size
        self.vocabulary = text_config.vocab_size
        self.vision: torch.nn.Module = BlipVisionModel(vision_config)
        self.text: torch.nn.Module = BlipTextModel(text_config, add_pooling_layer=False)
        vision = {_vision_name(name): tensor for name, tensor in vision.items()}
        load_strictly(self.vision, vision, source, "BLIP's vision transformer")
        load_strictly(self.text, text, source, "BLIP's text encoder")
        self.head = linear_head(text_config.hidden_size, head, source)
        self.eval().requires_grad_(False)

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
        """Scores `(B,)`, in float32, of tokens `(B, L)`, a mask that is 0 for padding, and pixels `(B, 3, S, S)`."""
        seen = self.vision(pixel_values=pixels).last_hidden_state
        read = self.text(input_ids=tokens, attention_mask=mask, encoder_hidden_states=seen).last_hidden_state
        return (self.head(read[:, 0].float()).squeeze(-1) - _MEAN) / _STD


def to_pixels(image: Image.Image, size: int) -> torch.Tensor:
    """The square `(3, size, size)` in the middle, once the short side is `size` long; normalised as for CLIP."""
    image = to_rgb(image)
    short = min(image.size)
    width, height = (int(size * side / short) for side in image.size)  # of a long side, the fraction is cut off
    left, top = round((width - size) / 2), round((height - size) / 2)
    image = image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    return (pixels - torch.tensor(_PIXEL_MEAN)[:, None, None]) / torch.tensor(_PIXEL_STD)[:, None, None]


def _vision_name(name: str) -> str:
    for pattern, replacement in _VISION_NAMES:
        name, found = re.subn(pattern, replacement, name)
        if found:
            break
    return name


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

    needed_by = ImageReward.default_name
    path, vocabulary = fetch_all(
        lambda: Path(model) if Path(model).is_file() else hub_file(model, "ImageReward.pt", needed_by, "model"),
        lambda: hub_file(tokenizer, "vocab.txt", needed_by, "tokenizer"),
    )
    # Not from_pretrained, which makes a tokenizer without words where it finds no file.
    bert = BertTokenizer(vocab=str(vocabulary))
    scorer = Scorer(load_weights(path), str(path))
    if len(bert) > (known := scorer.vocabulary):
        raise ValueError(f"The tokenizer {tokenizer} has {len(bert)} tokens, and the model knows {known}: use BERT's.")
    scorer.vision.to(dtype)
    scorer.text.to(dtype)
    return scorer.to(device), bert


image_reward = ImageReward()
