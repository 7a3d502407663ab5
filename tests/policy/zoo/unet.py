"""Stable Diffusion 1, 2 and XL, and InstructPix2Pix: U-Nets under schedules of betas."""

from typing import Any

import diffusers
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from tests.tiny_pipelines import autoencoder, clip_config, clip_tokenizer

from .encoders import SMALL, a_picture_each, pictures
from .family import Family


BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def unet(**changes: Any) -> diffusers.UNet2DConditionModel:
    config: dict[str, Any] = {
        "block_out_channels": (4, 8),
        "layers_per_block": 1,
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 16,
        "attention_head_dim": 2,
        "norm_num_groups": 2,
    }
    return diffusers.UNet2DConditionModel(**{**config, **changes})


def one_encoder() -> dict[str, Any]:
    return {
        "vae": autoencoder(4),
        "text_encoder": CLIPTextModel(clip_config()),
        "tokenizer": clip_tokenizer(),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


def two_encoders() -> dict[str, Any]:
    return {
        "vae": autoencoder(4),
        "text_encoder": CLIPTextModel(clip_config()),
        "tokenizer": clip_tokenizer(),
        "text_encoder_2": CLIPTextModelWithProjection(clip_config()),
        "tokenizer_2": clip_tokenizer(),
        "scheduler": diffusers.EulerDiscreteScheduler(**BETAS, timestep_spacing="leading", steps_offset=1),
    }


def xl_unet(**changes: Any) -> diffusers.UNet2DConditionModel:
    return unet(
        cross_attention_dim=32,  # of both encoders
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16,  # sizes and crops, and the pooled embedding
        **changes,
    )


def stable_diffusion() -> diffusers.StableDiffusionPipeline:
    scheduler = diffusers.PNDMScheduler(**BETAS, set_alpha_to_one=False, skip_prk_steps=True, steps_offset=1)
    return diffusers.StableDiffusionPipeline(unet=unet(), scheduler=scheduler, **one_encoder())


def stable_diffusion_pag() -> diffusers.StableDiffusionPAGPipeline:
    scheduler = diffusers.DPMSolverMultistepScheduler(**BETAS, steps_offset=1)
    return diffusers.StableDiffusionPAGPipeline(
        unet=unet(), scheduler=scheduler, **one_encoder(), pag_applied_layers="mid"
    )


def stable_diffusion_inpainting() -> diffusers.StableDiffusionInpaintPipeline:
    scheduler = diffusers.DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    denoiser = unet(in_channels=9)  # with the picture's latents and the mask
    return diffusers.StableDiffusionInpaintPipeline(unet=denoiser, scheduler=scheduler, **one_encoder())


def stable_diffusion_2() -> diffusers.StableDiffusionPipeline:
    scheduler = diffusers.DDIMScheduler(
        **BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1, prediction_type="v_prediction"
    )
    denoiser = unet(use_linear_projection=True)
    return diffusers.StableDiffusionPipeline(unet=denoiser, scheduler=scheduler, **one_encoder())


def stable_diffusion_xl() -> diffusers.StableDiffusionXLPipeline:
    return diffusers.StableDiffusionXLPipeline(unet=xl_unet(), **two_encoders())


def instruct_pix2pix() -> diffusers.StableDiffusionInstructPix2PixPipeline:
    scheduler = diffusers.EulerAncestralDiscreteScheduler(**BETAS)
    denoiser = unet(in_channels=8)
    return diffusers.StableDiffusionInstructPix2PixPipeline(unet=denoiser, scheduler=scheduler, **one_encoder())


def instruct_pix2pix_xl() -> diffusers.StableDiffusionXLInstructPix2PixPipeline:
    return diffusers.StableDiffusionXLInstructPix2PixPipeline(unet=xl_unet(in_channels=8), **two_encoders())


FAMILIES = {
    "sd": Family("Stable Diffusion 1", stable_diffusion, {**SMALL, "guidance_scale": 5.0}),
    "sd-pag": Family(
        "Stable Diffusion 1 (perturbed-attention guidance)",
        stable_diffusion_pag,
        {**SMALL, "guidance_scale": 5.0, "pag_scale": 2.0},
    ),
    "sd2": Family(
        "Stable Diffusion 2 (v-prediction)",
        stable_diffusion_2,
        {**SMALL, "guidance_scale": 3.0, "guidance_rescale": 0.7},
    ),
    "sdxl": Family("Stable Diffusion XL", stable_diffusion_xl, {**SMALL, "guidance_scale": 5.0}),
    "sd-inpaint": Family(
        "Stable Diffusion inpainting",
        stable_diffusion_inpainting,
        {**SMALL, "guidance_scale": 5.0},
        "image editing",
        lambda count: {"image": pictures(count), "mask_image": [image.convert("L") for image in pictures(count)]},
    ),
    "pix2pix": Family(
        "InstructPix2Pix",
        instruct_pix2pix,
        {"guidance_scale": 5.0, "image_guidance_scale": 1.5},
        "image editing",
        a_picture_each,
    ),
    "pix2pix-xl": Family(
        "InstructPix2Pix XL",
        instruct_pix2pix_xl,
        {**SMALL, "guidance_scale": 5.0, "image_guidance_scale": 1.5},
        "image editing",
        a_picture_each,
    ),
}
