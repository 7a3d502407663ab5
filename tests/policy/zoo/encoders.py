"""What several families share: text encoders with their tokenizers, autoencoders and pictures."""

import string
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import transformers
from diffusers import AutoencoderKL, AutoencoderKLFlux2, AutoencoderKLQwenImage
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel

from tests.tiny_pipelines import autoencoder, t5_encoder, t5_tokenizer


Module = TypeVar("Module", bound=torch.nn.Module)

SMALL = {"height": 16, "width": 16}
MEDIUM = {"height": 32, "width": 32}
HEADS: dict[str, Any] = {"attention_head_dim": 8, "num_attention_heads": 2}
# Of transformers like FLUX's.
FLUX: dict[str, Any] = {
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 16,
}
# Of every decoder-only text encoder; as many tokens as the largest of the vocabularies below.
DECODER: dict[str, Any] = {
    "vocab_size": 264,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
LETTERS = [*string.ascii_letters, *string.digits, *string.punctuation]
CHAT_TEMPLATE = """\
{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content if message.content is string else message.content | map(attribute="text") | join }}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
# Numbered from 257.
CHAT_TOKENS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


def with_language_model(
    kind: Callable, transformer: torch.nn.Module, scheduler: Any, text_encoder: torch.nn.Module, **parts: Any
) -> Any:
    """A pipeline whose `text_encoder` reads bytes, unless `parts` has another tokenizer."""
    parts = {"vae": autoencoder(4), "tokenizer": byte_tokenizer(), **parts}
    return kind(transformer=transformer, scheduler=scheduler, text_encoder=text_encoder, **parts)


def with_t5(kind: Callable, transformer: torch.nn.Module, scheduler: Any, **parts: Any) -> Any:
    parts = {"text_encoder": t5_encoder(), "tokenizer": t5_tokenizer(), **parts}
    return with_language_model(kind, transformer, scheduler, **parts)


def numbered(tokens: list[str]) -> dict[str, int]:
    return {token: i for i, token in enumerate(tokens)}


def byte_tokenizer(**options: Any) -> transformers.Qwen2Tokenizer:
    """Qwen's: one token for each byte, and those of a chat."""
    vocabulary = numbered(["<|endoftext|>", *sorted(ByteLevel.alphabet())])
    tokenizer = transformers.Qwen2Tokenizer(vocab=vocabulary, merges=[], chat_template=CHAT_TEMPLATE, **options)
    tokenizer.add_tokens(list(CHAT_TOKENS), special_tokens=True)
    return tokenizer


def gemma_tokenizer() -> transformers.GemmaTokenizer:
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *LETTERS]
    return transformers.GemmaTokenizer(vocab=numbered(tokens), merges=[], add_bos_token=True)


def umt5_encoder() -> transformers.UMT5EncoderModel:
    return transformers.UMT5EncoderModel(
        transformers.UMT5Config(vocab_size=32, d_model=16, d_ff=32, d_kv=8, num_layers=1, num_heads=2)
    )


def gemma2() -> transformers.Gemma2Model:
    return transformers.Gemma2Model(transformers.Gemma2Config(**DECODER, query_pre_attn_scalar=8))


def qwen3() -> transformers.Qwen3Model:
    return transformers.Qwen3Model(transformers.Qwen3Config(**DECODER))


def _multimodal(layers: int, mrope_section: list[int]) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": mrope_section}
    return {**DECODER, "num_hidden_layers": layers, "rope_parameters": rope}


def qwen25_vl(layers: int = 2) -> transformers.Qwen2_5_VLForConditionalGeneration:
    config = transformers.Qwen2_5_VLConfig(
        text_config=_multimodal(layers, [1, 1, 2]),
        vision_config=VISION,
        vision_start_token_id=259,
        vision_end_token_id=260,
        image_token_id=261,
        video_token_id=262,
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def qwen3_vl(layers: int = 2) -> transformers.Qwen3VLModel:
    vision = {**VISION, "num_position_embeddings": 4, "deepstack_visual_indexes": [0]}
    return transformers.Qwen3VLModel(
        transformers.Qwen3VLConfig(text_config=_multimodal(layers, [2, 1, 1]), vision_config=vision)
    )


def filled(module: Module) -> Module:
    """Weights that start at zero, such as those of gates, drawn at random: behind a closed gate nothing is trained."""
    for parameter in module.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return module


def autoencoder_8x(latent_channels: int) -> AutoencoderKL:
    """For pipelines that take a factor of 8 between latents and pictures for granted."""
    return autoencoder(latent_channels, levels=4)


def autoencoder_flux2() -> AutoencoderKLFlux2:
    return AutoencoderKLFlux2(
        block_out_channels=(4, 4),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
        sample_size=16,
    )


def autoencoder_qwen(halvings: int = 1) -> AutoencoderKLQwenImage:
    """It makes the sides `2**halvings` times smaller."""
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
    generator = torch.Generator().manual_seed(5)
    noise = torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8, generator=generator)
    return [Image.fromarray(each.numpy()) for each in noise]


def a_picture_each(count: int) -> dict[str, Any]:
    return {"image": pictures(count)}
