"""Stable Diffusion 3, FLUX and Chroma: multimodal transformers under flow matching."""

from typing import Any

import torch
from diffusers import (
    AutoencoderKLFlux2,
    ChromaPipeline,
    ChromaTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxImg2ImgPipeline,
    FluxKontextPipeline,
    SD3Transformer2DModel,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3Pipeline,
)
from transformers import CLIPTextModelWithProjection

from tests.tiny_pipelines import (
    autoencoder,
    clip_config,
    clip_tokenizer,
    finished,
    flux_pipeline,
    sd3_pipeline,
    t5_encoder,
    t5_tokenizer,
)

from .encoders import byte_tokenizer, mistral3, pictures, qwen3_causal
from .family import Family


SIZE = {"height": 16, "width": 16}
SHORT = {**SIZE, "max_sequence_length": 8}


def stable_diffusion_35() -> StableDiffusion3Pipeline:
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=32,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    return finished(
        StableDiffusion3Pipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=autoencoder(4),
            text_encoder=CLIPTextModelWithProjection(clip_config()),
            tokenizer=clip_tokenizer(),
            text_encoder_2=CLIPTextModelWithProjection(clip_config()),
            tokenizer_2=clip_tokenizer(),
            text_encoder_3=t5_encoder(d_model=32),
            tokenizer_3=t5_tokenizer(),
        )
    )


def stable_diffusion_3_image_to_image() -> StableDiffusion3Img2ImgPipeline:
    return finished(StableDiffusion3Img2ImgPipeline(**sd3_pipeline().components))


def flux_image_to_image() -> FluxImg2ImgPipeline:
    return finished(FluxImg2ImgPipeline(**flux_pipeline().components))


def flux_kontext() -> FluxKontextPipeline:
    return finished(FluxKontextPipeline(**flux_pipeline().components))


def flux_2_parts(layers: int, guidance_embeds: bool) -> dict[str, Any]:
    return {
        "transformer": Flux2Transformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16 * layers,
            timestep_guidance_channels=16,
            axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=guidance_embeds,
        ),
        "scheduler": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        "vae": AutoencoderKLFlux2(
            block_out_channels=(4, 4),
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=2,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            sample_size=16,
        ),
        "tokenizer": byte_tokenizer(),
    }


def flux_2() -> Flux2Pipeline:
    torch.manual_seed(0)
    pipe = Flux2Pipeline(**flux_2_parts(layers=2, guidance_embeds=True), text_encoder=mistral3())
    pipe.system_message = "Draw."  # the prompt is behind it, and has to be within max_sequence_length
    return finished(pipe)


def flux_2_klein() -> Flux2KleinPipeline:
    torch.manual_seed(0)
    return finished(Flux2KleinPipeline(**flux_2_parts(layers=2, guidance_embeds=False), text_encoder=qwen3_causal()))


def chroma() -> ChromaPipeline:
    torch.manual_seed(0)
    transformer = ChromaTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 4, 8),
        approximator_num_channels=16,
        approximator_hidden_dim=16,
        approximator_layers=1,
    )
    return finished(
        ChromaPipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=autoencoder(4),
            text_encoder=t5_encoder(),
            tokenizer=t5_tokenizer(),
        )
    )


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
        stable_diffusion_3_image_to_image,
        {**SHORT, "guidance_scale": 4.5, "strength": 0.7},
        "image-to-image",
        lambda count: {"image": pictures(count)},
    ),
    "flux": Family("FLUX.1", flux_pipeline, {**SHORT, "guidance_scale": 3.5}),
    "flux-cfg": Family(
        "FLUX.1 (true classifier-free guidance)",
        flux_pipeline,
        {**SHORT, "guidance_scale": 1.0, "negative_prompt": "blurry", "true_cfg_scale": 3.0},
    ),
    "flux-img2img": Family(
        "FLUX.1 image-to-image",
        flux_image_to_image,
        {**SHORT, "guidance_scale": 3.5, "strength": 0.7},
        "image-to-image",
        lambda count: {"image": pictures(count)},
    ),
    "kontext": Family(
        "FLUX.1 Kontext",
        flux_kontext,
        {**SHORT, "guidance_scale": 2.5, "max_area": 16 * 16, "_auto_resize": False},
        "image editing",
        lambda count: {"image": pictures(count)},
    ),
    "flux2": Family(
        "FLUX.2",
        flux_2,
        {**SIZE, "max_sequence_length": 64, "guidance_scale": 4.0, "text_encoder_out_layers": (1, 2)},
    ),
    "flux2-edit": Family(
        "FLUX.2 (with an image)",
        flux_2,
        {**SIZE, "max_sequence_length": 64, "guidance_scale": 4.0, "text_encoder_out_layers": (1, 2)},
        "image editing",
        lambda count: {"image": pictures(1, size=64)},
    ),
    "flux2-klein": Family(
        "FLUX.2 klein",
        flux_2_klein,
        {**SIZE, "max_sequence_length": 64, "guidance_scale": 4.0, "text_encoder_out_layers": (1, 2)},
    ),
    "chroma": Family("Chroma", chroma, {**SHORT, "guidance_scale": 3.0, "negative_prompt": ["blurry", "dark"]}),
}
