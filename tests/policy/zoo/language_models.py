"""What several families of the zoo share: language models as text encoders, their tokenizers, an 8x VAE."""

import string
from typing import Any, TypeVar

import torch
from diffusers import AutoencoderKL
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    ByT5Tokenizer,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    LlamaTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3VLConfig,
    Qwen3VLModel,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)


Module = TypeVar("Module", bound=torch.nn.Module)

LETTERS = [*string.ascii_letters, *string.digits, *string.punctuation]

# Of every decoder-only text encoder; hidden size 16, and as many tokens as the largest of the vocabularies below.
DECODER: dict[str, Any] = {
    "vocab_size": 264,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def byte_tokenizer(**options: Any) -> Qwen2Tokenizer:
    """Qwen's, with the 256 bytes for a vocabulary and a chat template of its form."""
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(ByteLevel.alphabet())]
    template = (
        "{% macro text(c) %}{{ c if c is string else c | map(attribute='text') | join }}{% endmacro %}"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ text(m.content) }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return Qwen2Tokenizer(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=[],
        extra_special_tokens=["<|im_start|>", "<|im_end|>"],
        chat_template=template,
        **options,
    )


def gemma_tokenizer() -> GemmaTokenizer:
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *LETTERS]
    return GemmaTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], add_bos_token=True)


def llama_tokenizer() -> LlamaTokenizer:
    tokens = ["<unk>", "<s>", "</s>", "▁", *LETTERS]
    return LlamaTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], add_bos_token=True)


def byt5_tokenizer() -> ByT5Tokenizer:
    return ByT5Tokenizer(extra_ids=0)


def byt5_encoder() -> T5EncoderModel:
    return T5EncoderModel(T5Config(vocab_size=264, d_model=16, d_ff=32, d_kv=8, num_layers=1, num_heads=2))


def umt5_encoder() -> UMT5EncoderModel:
    return UMT5EncoderModel(UMT5Config(vocab_size=32, d_model=16, d_ff=32, d_kv=8, num_layers=1, num_heads=2))


def gemma2_model() -> Gemma2Model:
    return Gemma2Model(Gemma2Config(**DECODER, head_dim=8, query_pre_attn_scalar=8))


def qwen2_5_vl(num_hidden_layers: int = 2) -> Qwen2_5_VLForConditionalGeneration:
    text = {
        **DECODER,
        "num_hidden_layers": num_hidden_layers,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6},
    }
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "patch_size": 14,
        "out_hidden_size": 16,
        "fullatt_block_indexes": [0],
    }
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config=text,
            vision_config=vision,
            image_token_id=260,
            video_token_id=261,
            vision_start_token_id=262,
            vision_end_token_id=263,
        )  # fmt: skip
    )


def qwen3_vl(num_hidden_layers: int = 2) -> Qwen3VLModel:
    text = {
        **DECODER,
        "num_hidden_layers": num_hidden_layers,
        "head_dim": 8,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e6},
    }
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": 16,
        "num_position_embeddings": 4,
        "deepstack_visual_indexes": [0],
    }
    return Qwen3VLModel(Qwen3VLConfig(text_config=text, vision_config=vision))


def filled(module: Module) -> Module:
    """Weights that start at zero, such as those of gates, drawn at random: behind a closed gate nothing is trained."""
    for parameter in module.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return module


def autoencoder_8x(latent_channels: int, **config: Any) -> AutoencoderKL:
    """For pipelines that take a factor of 8 between latents and pictures for granted."""
    return AutoencoderKL(
        block_out_channels=(4,) * 4,
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=2,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        sample_size=32,
        **{"shift_factor": 0.0, "scaling_factor": 1.0, **config},
    )
