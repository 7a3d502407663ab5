"""Diffusion transformers with cross attention or joint attention: from PixArt-Σ to HiDream."""

import diffusers
import transformers
from diffusers.models.transformers.transformer_prx import PRXTransformer2DModel
from diffusers.pipelines.prx.pipeline_prx import TextPreprocessor
from transformers.models.t5gemma.modeling_t5gemma import T5GemmaEncoder

from tests.tiny_pipelines import clip_config, clip_tokenizer, t5_encoder, t5_tokenizer

from .encoders import (
    DECODER,
    FLUX,
    HEADS,
    LETTERS,
    MEDIUM,
    SMALL,
    autoencoder_8x,
    byte_tokenizer,
    filled,
    gemma2,
    gemma_tokenizer,
    numbered,
    umt5_encoder,
    with_language_model,
    with_t5,
)
from .family import Family


def sana() -> diffusers.SanaPipeline:
    transformer = diffusers.SanaTransformer2DModel(
        **HEADS,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=16,
        sample_size=8,
    )
    blocks = ("ResBlock", "ResBlock", "EfficientViTBlock")
    vae = diffusers.AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=blocks,
        decoder_block_types=blocks,
        encoder_block_out_channels=(8,) * 3,
        decoder_block_out_channels=(8,) * 3,
        encoder_layers_per_block=(1,) * 3,
        decoder_layers_per_block=(1,) * 3,
        encoder_qkv_multiscales=((), (), (5,)),
        decoder_qkv_multiscales=((), (), (5,)),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        scaling_factor=0.41407,
    )
    scheduler = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    return with_language_model(
        diffusers.SanaPipeline, transformer, scheduler, gemma2(), tokenizer=gemma_tokenizer(), vae=vae
    )


def pixart_sigma() -> diffusers.PixArtSigmaPipeline:
    transformer = diffusers.PixArtTransformer2DModel(
        **HEADS,
        in_channels=4,
        out_channels=8,  # with the learned variance, which the pipeline drops
        num_layers=2,
        cross_attention_dim=16,
        sample_size=8,
        caption_channels=16,
    )
    return with_t5(diffusers.PixArtSigmaPipeline, transformer, diffusers.DPMSolverMultistepScheduler())


def aura_flow() -> diffusers.AuraFlowPipeline:
    transformer = diffusers.AuraFlowTransformer2DModel(
        **HEADS,
        sample_size=8,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pos_embed_max_size=16,
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.73)
    return with_t5(diffusers.AuraFlowPipeline, transformer, scheduler, text_encoder=umt5_encoder())


def hunyuan_dit() -> diffusers.HunyuanDiTPipeline:
    transformer = diffusers.HunyuanDiT2DModel(
        **HEADS,
        in_channels=4,
        patch_size=2,
        sample_size=4,
        hidden_size=16,
        num_layers=4,  # fewer have no skip connection, which the last layer takes from the first
        mlp_ratio=2.0,
        cross_attention_dim=16,
        cross_attention_dim_t5=16,
        pooled_projection_dim=16,
    )
    bert = transformers.BertConfig(
        vocab_size=128, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=77,
    )  # fmt: skip
    scheduler = diffusers.DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.03,
        beta_schedule="scaled_linear",
        clip_sample=False,
        prediction_type="v_prediction",
        steps_offset=1,
    )
    return diffusers.HunyuanDiTPipeline(
        vae=autoencoder_8x(4),
        text_encoder=transformers.BertModel(bert),
        tokenizer=transformers.BertTokenizer(vocab=numbered(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS])),
        transformer=transformer,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        text_encoder_2=t5_encoder(),
        tokenizer_2=t5_tokenizer(),
    )


# Of both transformers of CogView.
COGVIEW = {
    **HEADS,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "text_embed_dim": 16,
    "time_embed_dim": 16,
    "condition_dim": 4,
    "pos_embed_max_size": 8,
    "sample_size": 8,
}


def cogview3_plus() -> diffusers.CogView3PlusPipeline:
    scheduler = diffusers.CogVideoXDDIMScheduler(
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        snr_shift_scale=4.0,
        timestep_spacing="trailing",
        clip_sample=False,
    )
    return with_t5(diffusers.CogView3PlusPipeline, diffusers.CogView3PlusTransformer2DModel(**COGVIEW), scheduler)


def cogview4() -> diffusers.CogView4Pipeline:
    transformer = diffusers.CogView4Transformer2DModel(**COGVIEW, rope_axes_dim=(8, 8))
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.25, max_shift=0.75, time_shift_type="linear"
    )
    tokenizer = byte_tokenizer(padding_side="left", bos_token="<|im_start|>", add_bos_token=True)
    glm = transformers.GlmModel(transformers.GlmConfig(**DECODER))
    return with_language_model(diffusers.CogView4Pipeline, transformer, scheduler, glm, tokenizer=tokenizer)


def bria() -> diffusers.BriaPipeline:
    transformer = diffusers.BriaTransformer2DModel(**FLUX, axes_dims_rope=[4, 4, 8])
    return with_t5(
        diffusers.BriaPipeline, transformer, diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    )


class PlainText(TextPreprocessor):
    """Without ftfy, which the pipeline's own needs and which is no dependency of the package."""

    def basic_clean(self, text: str) -> str:
        return text


def prx() -> diffusers.PRXPipeline:
    transformer = PRXTransformer2DModel(
        in_channels=4, context_in_dim=16, hidden_size=16, mlp_ratio=2.0, num_heads=2, depth=2, axes_dim=[4, 4]
    )
    config = transformers.T5GemmaModuleConfig(**DECODER, query_pre_attn_scalar=8)
    t5_gemma = T5GemmaEncoder(transformers.T5GemmaConfig(encoder=config, decoder=config).encoder)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = with_language_model(
        diffusers.PRXPipeline, filled(transformer), scheduler, t5_gemma, tokenizer=gemma_tokenizer()
    )
    pipe.text_preprocessor = PlainText()
    return pipe


def hidream() -> diffusers.HiDreamImagePipeline:
    transformer = diffusers.HiDreamImageTransformer2DModel(
        **HEADS,
        patch_size=2,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        caption_channels=[16, 16],
        text_emb_dim=32,
        axes_dims_rope=(4, 2, 2),
        max_resolution=(8, 8),
        llama_layers=[0, 1],
    )
    llama_tokens = numbered(["<unk>", "<s>", "</s>", "▁", *LETTERS])
    pipe = with_language_model(
        diffusers.HiDreamImagePipeline,
        transformer,
        diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        transformers.CLIPTextModelWithProjection(clip_config()),
        tokenizer=clip_tokenizer(),
        text_encoder_2=transformers.CLIPTextModelWithProjection(clip_config()),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5_encoder(),
        tokenizer_3=t5_tokenizer(),
        text_encoder_4=transformers.LlamaForCausalLM(transformers.LlamaConfig(**DECODER, attn_implementation="eager")),
        tokenizer_4=transformers.LlamaTokenizer(vocab=llama_tokens, merges=[], add_bos_token=True),
    )
    pipe.default_sample_size = 8  # every picture is scaled to this area
    return pipe


SHORT = {**SMALL, "max_sequence_length": 16}
AS_ASKED = {"use_resolution_binning": False}  # not the nearest of the sizes that the model was trained with

FAMILIES = {
    "sana": Family(
        "Sana",
        sana,
        {**SHORT, **MEDIUM, **AS_ASKED, "guidance_scale": 4.5, "complex_human_instruction": None},
    ),
    "pixart-sigma": Family(
        "PixArt-Σ", pixart_sigma, {**SHORT, **AS_ASKED, "guidance_scale": 4.5, "clean_caption": False}
    ),
    "auraflow": Family("AuraFlow", aura_flow, {**SHORT, "guidance_scale": 3.5}),
    "hunyuan-dit": Family(
        "HunyuanDiT", hunyuan_dit, {**MEDIUM, **AS_ASKED, "guidance_scale": 5.0, "guidance_rescale": 0.7}
    ),
    "cogview3-plus": Family("CogView 3+", cogview3_plus, {**SHORT, "guidance_scale": 5.0}),
    "cogview4": Family("CogView 4", cogview4, {**SHORT, "guidance_scale": 5.0}),
    "bria": Family("Bria 3", bria, {**SHORT, "guidance_scale": 5.0}),
    # The pipeline guides only single pictures, for it makes two timesteps whatever the number of prompts.
    "prx": Family(
        "PRX",
        prx,
        {**SMALL, **AS_ASKED, "guidance_scale": 1.0, "skip_text_cleaning": True, "tokenizer_max_length": 16},
    ),
    "hidream": Family("HiDream-I1", hidream, {**SHORT, "guidance_scale": 5.0}),
}
