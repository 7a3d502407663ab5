"""Stable Diffusion 3, FLUX and Chroma: multimodal transformers under flow matching."""

import diffusers
import torch
from transformers import Mistral3Config, Mistral3ForConditionalGeneration, Qwen3Config, Qwen3ForCausalLM

from tests.tiny_pipelines import flux_pipeline, sd3_pipeline, t5_encoder, t5_tokenizer

from .encoders import (
    DECODER,
    FLUX,
    HEADS,
    SMALL,
    a_picture_each,
    autoencoder_flux2,
    pictures,
    with_language_model,
    with_t5,
)
from .family import Family


SHORT = {**SMALL, "max_sequence_length": 8}
FLUX_2 = {**SMALL, "max_sequence_length": 64, "guidance_scale": 4.0, "text_encoder_out_layers": (1, 2)}


def stable_diffusion_35() -> diffusers.StableDiffusion3Pipeline:
    transformer = diffusers.SD3Transformer2DModel(
        **HEADS,
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=32,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    t5 = {"text_encoder_3": t5_encoder(d_model=32), "tokenizer_3": t5_tokenizer()}
    return diffusers.StableDiffusion3Pipeline(**{**sd3_pipeline().components, "transformer": transformer, **t5})


def flux_2(kind: type, text_encoder: torch.nn.Module) -> diffusers.Flux2Pipeline | diffusers.Flux2KleinPipeline:
    """Which reads two of the text encoder's layers."""
    transformer = diffusers.Flux2Transformer2DModel(
        **{**FLUX, "joint_attention_dim": 2 * 16},
        patch_size=1,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=kind is diffusers.Flux2Pipeline,
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
    return with_language_model(kind, transformer, scheduler, text_encoder, vae=autoencoder_flux2())


def flux_2_dev() -> diffusers.Flux2Pipeline:
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
    pipe = flux_2(diffusers.Flux2Pipeline, Mistral3ForConditionalGeneration(config))
    pipe.system_message = "Draw."  # the prompt is behind it, and has to be within max_sequence_length
    return pipe


def chroma() -> diffusers.ChromaPipeline:
    transformer = diffusers.ChromaTransformer2DModel(
        **FLUX,
        patch_size=1,
        axes_dims_rope=(4, 4, 8),
        approximator_num_channels=16,
        approximator_hidden_dim=16,
        approximator_layers=1,
    )
    return with_t5(diffusers.ChromaPipeline, transformer, diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))


FAMILIES = {
    "sd3": Family("Stable Diffusion 3", sd3_pipeline, {**SHORT, "guidance_scale": 4.5}),
    "sd3.5": Family("Stable Diffusion 3.5", stable_diffusion_35, {**SHORT, "guidance_scale": 4.5}),
    "sd3.5-slg": Family(
        "Stable Diffusion 3.5 (skip-layer guidance)",
        stable_diffusion_35,
        {**SHORT, "guidance_scale": 4.5, "skip_guidance_layers": [1], "skip_layer_guidance_stop": 0.7},
    ),
    "sd3-img2img": Family(
        "Stable Diffusion 3 image-to-image",
        lambda: diffusers.StableDiffusion3Img2ImgPipeline(**sd3_pipeline().components),
        {**SHORT, "guidance_scale": 4.5, "strength": 0.7},
        "image-to-image",
        a_picture_each,
    ),
    "flux": Family("FLUX.1", flux_pipeline, {**SHORT, "guidance_scale": 3.5}),
    "flux-cfg": Family(
        "FLUX.1 (true classifier-free guidance)",
        flux_pipeline,
        {**SHORT, "guidance_scale": 1.0, "negative_prompt": "blurry", "true_cfg_scale": 3.0},
    ),
    "flux-img2img": Family(
        "FLUX.1 image-to-image",
        lambda: diffusers.FluxImg2ImgPipeline(**flux_pipeline().components),
        {**SHORT, "guidance_scale": 3.5, "strength": 0.7},
        "image-to-image",
        a_picture_each,
    ),
    "kontext": Family(
        "FLUX.1 Kontext",
        lambda: diffusers.FluxKontextPipeline(**flux_pipeline().components),
        {**SHORT, "guidance_scale": 2.5, "max_area": 16 * 16, "_auto_resize": False},
        "image editing",
        a_picture_each,
    ),
    "flux2": Family("FLUX.2", flux_2_dev, FLUX_2),
    "flux2-edit": Family(
        "FLUX.2 (with an image)", flux_2_dev, FLUX_2, "image editing", lambda count: {"image": pictures(1, size=64)}
    ),
    "flux2-klein": Family(
        "FLUX.2 klein", lambda: flux_2(diffusers.Flux2KleinPipeline, Qwen3ForCausalLM(Qwen3Config(**DECODER))), FLUX_2
    ),
    "chroma": Family("Chroma", chroma, {**SHORT, "guidance_scale": 3.0, "negative_prompt": ["blurry", "dark"]}),
}
