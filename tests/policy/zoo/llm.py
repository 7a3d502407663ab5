"""Diffusion transformers that read their prompt with a language model: Lumina 2, HunyuanImage, Krea 2 and more."""

import diffusers
import transformers
from diffusers.models.transformers.transformer_bria_fibo import BriaFiboTransformer2DModel
from diffusers.pipelines.ideogram4.pipeline_ideogram4 import QWEN3_VL_ACTIVATION_LAYERS

from tests.tiny_pipelines import autoencoder, clip_config, clip_tokenizer

from .encoders import (
    DECODER,
    FLUX,
    HEADS,
    MEDIUM,
    SMALL,
    autoencoder_8x,
    autoencoder_flux2,
    autoencoder_qwen,
    filled,
    gemma2,
    gemma_tokenizer,
    qwen3,
    qwen3_vl,
    qwen25_vl,
    with_language_model,
)
from .family import Family


def lumina2() -> diffusers.Lumina2Pipeline:
    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=4,
        in_channels=4,
        hidden_size=16,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(64, 8, 8),
        cap_feat_dim=16,
    )
    scheduler, parts = diffusers.FlowMatchEulerDiscreteScheduler(shift=6.0), {"tokenizer": gemma_tokenizer()}
    return with_language_model(
        diffusers.Lumina2Pipeline, transformer, scheduler, gemma2(), vae=autoencoder_8x(4), **parts
    )


def hunyuan_image() -> diffusers.HunyuanImagePipeline:
    transformer = diffusers.HunyuanImageTransformer2DModel(
        in_channels=4,
        out_channels=4,
        **HEADS,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=16,
        text_embed_2_dim=16,
        rope_axes_dim=(4, 4),
    )
    vae = diffusers.AutoencoderKLHunyuanImage(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(32, 32),
        layers_per_block=1,
        spatial_compression_ratio=2,
        sample_size=16,
        scaling_factor=0.75,
    )
    byt5 = transformers.T5Config(vocab_size=264, d_model=16, d_ff=32, d_kv=8, num_layers=1, num_heads=2)
    pipe = with_language_model(
        diffusers.HunyuanImagePipeline,
        transformer,
        diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0),
        qwen25_vl(layers=3),  # the pipeline reads the last hidden state but two
        vae=vae,
        text_encoder_2=transformers.T5EncoderModel(byt5),
        tokenizer_2=transformers.ByT5Tokenizer(extra_ids=0),
        # Its momentum makes a step's guidance depend on the steps before.
        guider=diffusers.AdaptiveProjectedMixGuidance(adaptive_projected_guidance_start_step=0),
        ocr_guider=diffusers.AdaptiveProjectedMixGuidance(adaptive_projected_guidance_start_step=2),
    )
    pipe.tokenizer_max_length = 200  # the system prompt and some more: the vocabulary is of single bytes
    pipe.tokenizer_2_max_length = 16
    return pipe


def kandinsky5() -> diffusers.Kandinsky5T2IPipeline:
    transformer = diffusers.Kandinsky5Transformer3DModel(
        in_text_dim=16,
        in_text_dim2=16,
        time_dim=16,
        model_dim=16,
        ff_dim=32,
        num_text_blocks=1,
        num_visual_blocks=1,
        axes_dims=(4, 2, 2),
    )
    clip = clip_config()
    clip.max_position_embeddings = 77
    pipe = with_language_model(
        diffusers.Kandinsky5T2IPipeline,
        filled(transformer),
        diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0),
        qwen25_vl(),
        vae=autoencoder_8x(4),
        text_encoder_2=transformers.CLIPTextModel(clip),
        tokenizer_2=clip_tokenizer(),
    )
    pipe.resolutions = [(32, 32)]
    return pipe


def ovis_image() -> diffusers.OvisImagePipeline:
    transformer = diffusers.OvisImageTransformer2DModel(**FLUX, out_channels=16, axes_dims_rope=(4, 4, 8))
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
    return with_language_model(diffusers.OvisImagePipeline, transformer, scheduler, qwen3())


def krea2() -> diffusers.Krea2Pipeline:
    transformer = diffusers.Krea2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        **HEADS,
        num_key_value_heads=1,
        intermediate_size=32,
        timestep_embed_dim=16,
        text_hidden_dim=16,
        num_text_layers=2,
        text_num_attention_heads=2,
        text_num_key_value_heads=2,
        text_intermediate_size=32,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 2, 2),
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    parts = {"vae": autoencoder_qwen(), "text_encoder_select_layers": (1, 2)}
    return with_language_model(diffusers.Krea2Pipeline, transformer, scheduler, qwen3_vl(), **parts)


def ernie_image() -> diffusers.ErnieImagePipeline:
    transformer = diffusers.ErnieImageTransformer2DModel(
        hidden_size=16,
        num_attention_heads=2,
        num_layers=2,
        ffn_hidden_size=32,
        in_channels=16,
        out_channels=16,
        text_in_dim=16,
        rope_axes_dim=(4, 2, 2),
    )
    ministral = transformers.Ministral3Model(transformers.Ministral3Config(**DECODER))
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=4.0)
    return with_language_model(
        diffusers.ErnieImagePipeline, filled(transformer), scheduler, ministral, vae=autoencoder_flux2()
    )


def longcat_image() -> diffusers.LongCatImagePipeline:
    transformer = diffusers.LongCatImageTransformer2DModel(
        **{**FLUX, "in_channels": 64}, pooled_projection_dim=16, axes_dims_rope=[4, 4, 8]
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    parts = {"vae": autoencoder(16), "text_processor": None}  # which would rewrite prompts
    pipe = with_language_model(diffusers.LongCatImagePipeline, transformer, scheduler, qwen25_vl(), **parts)
    pipe.tokenizer_max_length = 32
    return pipe


def bria_fibo() -> diffusers.BriaFiboPipeline:
    transformer = BriaFiboTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        **HEADS,
        joint_attention_dim=32,
        axes_dims_rope=[4, 2, 2],
        text_encoder_dim=16,
    )
    vae = diffusers.AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=16,
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    # The pipeline reads an empty prompt as token 128000.
    language_model = transformers.SmolLM3Config(**{**DECODER, "vocab_size": 128001, "tie_word_embeddings": True})
    scheduler, smol = (
        diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        transformers.SmolLM3ForCausalLM(language_model),
    )
    return with_language_model(diffusers.BriaFiboPipeline, transformer, scheduler, smol, vae=vae)


def ideogram4() -> diffusers.Ideogram4Pipeline:
    transformer, unconditional = (
        diffusers.Ideogram4Transformer2DModel(
            **HEADS,
            in_channels=16,
            num_layers=1,
            intermediate_size=32,
            adaln_dim=16,
            llm_features_dim=16 * len(QWEN3_VL_ACTIVATION_LAYERS),
            mrope_section=(2, 1, 1),
        )
        for _ in range(2)
    )
    qwen = qwen3_vl(layers=max(QWEN3_VL_ACTIVATION_LAYERS) + 1)
    parts = {"vae": autoencoder_flux2(), "unconditional_transformer": unconditional}  # which stays as it is
    return with_language_model(
        diffusers.Ideogram4Pipeline, transformer, diffusers.FlowMatchEulerDiscreteScheduler(), qwen, **parts
    )


# Where the tokens of a system prompt count, there are about 200: the vocabulary is of single bytes.
FAMILIES = {
    "lumina2": Family(
        "Lumina 2",
        lumina2,
        {
            **MEDIUM,
            "guidance_scale": 4.0,
            "cfg_trunc_ratio": 0.7,  # the last step is not guided
            "system_prompt": "draw",
            "max_sequence_length": 48,
        },
    ),
    "hunyuan-image": Family("HunyuanImage 2.1", hunyuan_image, SMALL),
    "kandinsky5": Family("Kandinsky 5 T2I", kandinsky5, {**MEDIUM, "guidance_scale": 3.5}),
    "ovis-image": Family("Ovis-Image", ovis_image, {**SMALL, "guidance_scale": 5.0, "max_sequence_length": 200}),
    "ernie-image": Family("ERNIE-Image", ernie_image, {**SMALL, "guidance_scale": 4.0}),
    # The pipeline guides only single pictures: its negative prompt is one, whatever the number of prompts.
    "longcat-image": Family(
        "LongCat-Image", longcat_image, {**SMALL, "guidance_scale": 1.0, "enable_prompt_rewrite": False}
    ),
    "bria-fibo": Family("Bria FIBO", bria_fibo, {**MEDIUM, "guidance_scale": 5.0}),
    "ideogram4": Family(
        "Ideogram 4",
        ideogram4,
        {**SMALL, "guidance_scale": 7.0, "guidance_schedule": None, "max_sequence_length": 64},
    ),
    "krea2": Family("Krea 2", krea2, {**SMALL, "guidance_scale": 4.5, "max_sequence_length": 200}),
}
