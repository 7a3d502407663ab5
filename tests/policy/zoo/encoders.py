"""Tokenizers, language models, autoencoders and pictures that several families share."""

from typing import Any

import torch
from diffusers import AutoencoderKLQwenImage
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLProcessor,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil


SPECIAL_TOKENS = (
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
CHAT_TEMPLATE = """\
{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content if message.content is string else message.content | map(attribute="text") | join }}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def byte_tokenizer() -> Qwen2Tokenizer:
    """One token for each byte, and those of a chat."""
    vocabulary = {"<|endoftext|>": 0, **{byte: i for i, byte in enumerate(sorted(ByteLevel.alphabet()), 1)}}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=[], chat_template=CHAT_TEMPLATE)
    tokenizer.add_tokens(list(SPECIAL_TOKENS), special_tokens=True)
    return tokenizer


class ImageProcessorOnly(Qwen2VLProcessor):
    """Without the processor for videos, which needs torchvision."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> type:
        return type(argument)


def vision_language_processor() -> Qwen2VLProcessor:
    pictures = Qwen2VLImageProcessorPil(size={"shortest_edge": 28 * 28, "longest_edge": 56 * 56})
    return ImageProcessorOnly(image_processor=pictures, tokenizer=byte_tokenizer(), video_processor=None)


DECODER: dict[str, Any] = {
    "vocab_size": 264,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 1024,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
VISION_TOKENS = {
    "vision_start_token_id": 259,
    "vision_end_token_id": 260,
    "image_token_id": 261,
    "video_token_id": 262,
}


def qwen25_vl() -> Qwen2_5_VLForConditionalGeneration:
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    config = Qwen2_5_VLConfig(text_config={**DECODER, "rope_parameters": ROPE}, vision_config=vision, **VISION_TOKENS)
    return Qwen2_5_VLForConditionalGeneration(config)


def qwen3() -> Qwen3Model:
    return Qwen3Model(Qwen3Config(**DECODER))


def qwen3_causal() -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM(Qwen3Config(**DECODER))


def mistral3() -> Mistral3ForConditionalGeneration:
    vision = {
        "model_type": "pixtral",
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "image_size": 28,
        "patch_size": 14,
    }
    config = Mistral3Config(text_config={"model_type": "mistral", **DECODER}, vision_config=vision)
    return Mistral3ForConditionalGeneration(config)


def video_autoencoder(halvings: int = 1) -> AutoencoderKLQwenImage:
    """Of Qwen-Image; it makes the sides `2**halvings` times smaller."""
    return AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=4,
        dim_mult=[1] * (halvings + 1),
        num_res_blocks=0,
        temperal_downsample=[False] * halvings,
        latents_mean=[0.1, -0.1, 0.2, 0.0],
        latents_std=[1.0, 1.5, 0.5, 1.0],
    )


def pictures(count: int, size: int = 16) -> list[Image.Image]:
    """Different ones, of noise."""
    noise = torch.randint(
        0, 256, (count, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(5)
    )
    return [Image.fromarray(each.numpy()) for each in noise]
