"""Tiny pipelines with random weights: real diffusers classes and tokenizers, no network, built in under a second."""

import math
import string

import diffusers
import torch
import transformers
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker


def clip_tokenizer() -> transformers.CLIPTokenizer:
    letters = [chr(c) for c in range(33, 127)]
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    return transformers.CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=[], model_max_length=16)


def clip_config(projection_dim: int = 16) -> transformers.CLIPTextConfig:
    return transformers.CLIPTextConfig(
        vocab_size=192,
        hidden_size=16,
        intermediate_size=32,
        projection_dim=projection_dim,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )


def t5_tokenizer() -> transformers.T5Tokenizer:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((c, -3.0) for c in string.ascii_lowercase)]
    return transformers.T5Tokenizer(vocab=pieces, extra_ids=0)


def t5_encoder(d_model: int = 16) -> transformers.T5EncoderModel:
    return transformers.T5EncoderModel(
        transformers.T5Config(
            vocab_size=32, d_model=d_model, d_ff=32, d_kv=8, num_layers=1, num_heads=2, decoder_start_token_id=0
        )
    )


def autoencoder(latent_channels: int, levels: int = 2) -> diffusers.AutoencoderKL:
    """It makes the sides `2 ** (levels - 1)` times smaller."""
    return diffusers.AutoencoderKL(
        block_out_channels=(4,) * levels,
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=2,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        sample_size=8 * levels,
        shift_factor=0.0,
        scaling_factor=1.0,
    )


def finished(pipe):
    """Evaluation mode, frozen and quiet, as a user would load it."""
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval().requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sd_pipeline(prediction_type: str = "epsilon") -> diffusers.StableDiffusionPipeline:
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(4, 8),
        layers_per_block=1,
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=2,
    )
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )
    return finished(
        diffusers.StableDiffusionPipeline(
            vae=autoencoder(4),
            text_encoder=transformers.CLIPTextModel(clip_config()),
            tokenizer=clip_tokenizer(),
            unet=unet,
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    )


def sd3_pipeline() -> diffusers.StableDiffusion3Pipeline:
    torch.manual_seed(0)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=32,
        pos_embed_max_size=8,
    )
    return finished(
        diffusers.StableDiffusion3Pipeline(
            transformer=transformer,
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=autoencoder(4),
            text_encoder=transformers.CLIPTextModelWithProjection(clip_config()),
            tokenizer=clip_tokenizer(),
            text_encoder_2=transformers.CLIPTextModelWithProjection(clip_config()),
            tokenizer_2=clip_tokenizer(),
            text_encoder_3=None,
            tokenizer_3=None,
        )
    )


def flux_pipeline() -> diffusers.FluxPipeline:
    torch.manual_seed(0)
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
    return finished(
        diffusers.FluxPipeline(
            transformer=transformer,
            scheduler=scheduler,
            vae=autoencoder(4),
            text_encoder=transformers.CLIPTextModel(clip_config()),
            tokenizer=clip_tokenizer(),
            text_encoder_2=t5_encoder(),
            tokenizer_2=t5_tokenizer(),
        )
    )


# Builder and the arguments of one call, by family.
PIPELINES = {
    "sd": (sd_pipeline, {"guidance_scale": 5.0, "height": 16, "width": 16}),
    "sd-v": (lambda: sd_pipeline("v_prediction"), {"guidance_scale": 3.0, "height": 16, "width": 16}),
    "sd3": (sd3_pipeline, {"guidance_scale": 4.5, "height": 16, "width": 16, "max_sequence_length": 8}),
    "flux": (flux_pipeline, {"guidance_scale": 3.5, "height": 16, "width": 16, "max_sequence_length": 8}),
}


def nan_in(vae: torch.nn.Module, *rows: int) -> None:
    """Let the decoder overflow in these images of each batch."""
    decode = vae.decode

    def broken(latents, *args, **kwargs):
        pixels = decode(latents, *args, **kwargs)[0].clone()
        pixels[list(rows)] = math.nan
        return (pixels,)

    vae.decode = broken


def with_safety_checker(pipe, threshold: float):
    """A real one, with random weights: below what a cosine can be it flags every picture, above it none."""
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    vision = transformers.CLIPVisionConfig(**sizes, image_size=16, patch_size=8, projection_dim=8)
    checker = StableDiffusionSafetyChecker(
        transformers.CLIPConfig(text_config=clip_config(8).to_dict(), vision_config=vision.to_dict(), projection_dim=8)
    )
    for weights in (checker.concept_embeds_weights, checker.special_care_embeds_weights):
        weights.data.fill_(threshold)
    size = {"height": 16, "width": 16}
    pipe.register_modules(
        safety_checker=checker.eval(),
        feature_extractor=transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=size, do_resize=True),
    )
    return pipe
