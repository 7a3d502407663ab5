"""Diffusion transformers that read their prompt with a language model: Lumina 2, HunyuanImage, Krea 2 and more."""

import torch
from diffusers import (
    AdaptiveProjectedMixGuidance,
    AutoencoderKLFlux2,
    AutoencoderKLHunyuanImage,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    BriaFiboPipeline,
    ErnieImagePipeline,
    ErnieImageTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    HunyuanImagePipeline,
    HunyuanImageTransformer2DModel,
    Ideogram4Pipeline,
    Ideogram4Transformer2DModel,
    Kandinsky5T2IPipeline,
    Kandinsky5Transformer3DModel,
    Krea2Pipeline,
    Krea2Transformer2DModel,
    LongCatImagePipeline,
    LongCatImageTransformer2DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    OvisImagePipeline,
    OvisImageTransformer2DModel,
)
from diffusers.models.transformers.transformer_bria_fibo import BriaFiboTransformer2DModel
from diffusers.pipelines.ideogram4.pipeline_ideogram4 import QWEN3_VL_ACTIVATION_LAYERS
from transformers import (
    CLIPTextModel,
    Ministral3Config,
    Ministral3Model,
    Qwen3Config,
    Qwen3Model,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from tests.policy.zoo.family import Family
from tests.policy.zoo.language_models import (
    DECODER,
    autoencoder_8x,
    byt5_encoder,
    byt5_tokenizer,
    byte_tokenizer,
    filled,
    gemma2_model,
    gemma_tokenizer,
    qwen2_5_vl,
    qwen3_vl,
)
from tests.tiny_pipelines import autoencoder, clip_config, clip_tokenizer, finished


def lumina2() -> Lumina2Pipeline:
    torch.manual_seed(0)
    transformer = Lumina2Transformer2DModel(
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
    return finished(
        Lumina2Pipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
            vae=autoencoder_8x(4),
            text_encoder=gemma2_model(),
            tokenizer=gemma_tokenizer(),
        )
    )


def hunyuan_image() -> HunyuanImagePipeline:
    torch.manual_seed(0)
    transformer = HunyuanImageTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=16,
        text_embed_2_dim=16,
        rope_axes_dim=(4, 4),
    )
    vae = AutoencoderKLHunyuanImage(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(32, 32),
        layers_per_block=1,
        spatial_compression_ratio=2,
        sample_size=16,
        scaling_factor=0.75,
    )
    pipe = HunyuanImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        vae=vae,
        text_encoder=qwen2_5_vl(num_hidden_layers=3),  # the pipeline reads the last hidden state but two
        tokenizer=byte_tokenizer(),
        text_encoder_2=byt5_encoder(),
        tokenizer_2=byt5_tokenizer(),
        transformer=transformer,
        # Its momentum makes a step's guidance depend on the steps before.
        guider=AdaptiveProjectedMixGuidance(adaptive_projected_guidance_start_step=0),
        ocr_guider=AdaptiveProjectedMixGuidance(adaptive_projected_guidance_start_step=2),
    )
    pipe.tokenizer_max_length = 200  # the system prompt and some more: the vocabulary is of single bytes
    pipe.tokenizer_2_max_length = 16
    return finished(pipe)


def kandinsky5() -> Kandinsky5T2IPipeline:
    torch.manual_seed(0)
    transformer = Kandinsky5Transformer3DModel(
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
    pipe = Kandinsky5T2IPipeline(
        transformer=filled(transformer),
        vae=autoencoder_8x(4),
        text_encoder=qwen2_5_vl(),
        tokenizer=byte_tokenizer(),
        text_encoder_2=CLIPTextModel(clip),
        tokenizer_2=clip_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
    )
    pipe.resolutions = [(32, 32)]
    return finished(pipe)


def ovis_image() -> OvisImagePipeline:
    torch.manual_seed(0)
    transformer = OvisImageTransformer2DModel(
        in_channels=16,
        out_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 4, 8),
    )
    return finished(
        OvisImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
            vae=autoencoder(4),
            text_encoder=Qwen3Model(Qwen3Config(**DECODER, head_dim=8)),
            tokenizer=byte_tokenizer(),
            transformer=transformer,
        )
    )


def krea2() -> Krea2Pipeline:
    torch.manual_seed(0)
    transformer = Krea2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
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
    vae = AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    return finished(
        Krea2Pipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            vae=vae,
            text_encoder=qwen3_vl(),
            tokenizer=byte_tokenizer(),
            transformer=transformer,
            text_encoder_select_layers=(1, 2),
        )
    )


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


def ernie_image() -> ErnieImagePipeline:
    torch.manual_seed(0)
    transformer = ErnieImageTransformer2DModel(
        hidden_size=16,
        num_attention_heads=2,
        num_layers=2,
        ffn_hidden_size=32,
        in_channels=16,
        out_channels=16,
        text_in_dim=16,
        rope_axes_dim=(4, 2, 2),
    )
    return finished(
        ErnieImagePipeline(
            transformer=filled(transformer),
            vae=autoencoder_flux2(),
            text_encoder=Ministral3Model(Ministral3Config(**DECODER, head_dim=8)),
            tokenizer=byte_tokenizer(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=4.0),
        )
    )


def longcat_image() -> LongCatImagePipeline:
    torch.manual_seed(0)
    transformer = LongCatImageTransformer2DModel(
        in_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=[4, 4, 8],
    )
    pipe = LongCatImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=autoencoder(16),
        text_encoder=qwen2_5_vl(),
        tokenizer=byte_tokenizer(),
        text_processor=None,  # rewrites prompts
        transformer=transformer,
    )
    pipe.tokenizer_max_length = 32
    return finished(pipe)


def bria_fibo() -> BriaFiboPipeline:
    torch.manual_seed(0)
    transformer = BriaFiboTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=[4, 2, 2],
        text_encoder_dim=16,
    )
    vae = AutoencoderKLWan(
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
    language_model = SmolLM3Config(**{**DECODER, "vocab_size": 128001, "tie_word_embeddings": True})
    return finished(
        BriaFiboPipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            vae=vae,
            text_encoder=SmolLM3ForCausalLM(language_model),
            tokenizer=byte_tokenizer(),
        )
    )


def ideogram4() -> Ideogram4Pipeline:
    torch.manual_seed(0)

    def transformer() -> Ideogram4Transformer2DModel:
        return Ideogram4Transformer2DModel(
            in_channels=16,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            intermediate_size=32,
            adaln_dim=16,
            llm_features_dim=16 * len(QWEN3_VL_ACTIVATION_LAYERS),
            mrope_section=(2, 1, 1),
        )

    return finished(
        Ideogram4Pipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=autoencoder_flux2(),
            text_encoder=qwen3_vl(num_hidden_layers=max(QWEN3_VL_ACTIVATION_LAYERS) + 1),
            tokenizer=byte_tokenizer(),
            transformer=transformer(),
            unconditional_transformer=transformer(),  # which stays as it is
        )
    )


SMALL = {"height": 16, "width": 16}

# Where the tokens of a system prompt count, there are about 200: the vocabulary is of single bytes.
FAMILIES = {
    "lumina2": Family(
        "Lumina 2",
        lumina2,
        {
            "height": 32,
            "width": 32,
            "guidance_scale": 4.0,
            "cfg_trunc_ratio": 0.7,  # the last step is not guided
            "system_prompt": "draw",
            "max_sequence_length": 48,
        },
    ),
    "hunyuan-image": Family("HunyuanImage 2.1", hunyuan_image, SMALL),
    "kandinsky5": Family("Kandinsky 5 T2I", kandinsky5, {"height": 32, "width": 32, "guidance_scale": 3.5}),
    "ovis-image": Family("Ovis-Image", ovis_image, {**SMALL, "guidance_scale": 5.0, "max_sequence_length": 200}),
    "ernie-image": Family("ERNIE-Image", ernie_image, {**SMALL, "guidance_scale": 4.0}),
    # The pipeline guides only single pictures: its negative prompt is one, whatever the number of prompts.
    "longcat-image": Family(
        "LongCat-Image", longcat_image, {**SMALL, "guidance_scale": 1.0, "enable_prompt_rewrite": False}
    ),
    "bria-fibo": Family("Bria FIBO", bria_fibo, {"height": 32, "width": 32, "guidance_scale": 5.0}),
    "ideogram4": Family(
        "Ideogram 4",
        ideogram4,
        {**SMALL, "guidance_scale": 7.0, "guidance_schedule": None, "max_sequence_length": 64},
    ),
    "krea2": Family("Krea 2", krea2, {**SMALL, "guidance_scale": 4.5, "max_sequence_length": 200}),
}
