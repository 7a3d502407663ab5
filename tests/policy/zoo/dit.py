"""Diffusion transformers with cross attention or joint attention: from PixArt-Σ to HiDream."""

import torch
from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderDC,
    BriaPipeline,
    BriaTransformer2DModel,
    CogVideoXDDIMScheduler,
    CogView3PlusPipeline,
    CogView3PlusTransformer2DModel,
    CogView4Pipeline,
    CogView4Transformer2DModel,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    HiDreamImagePipeline,
    HiDreamImageTransformer2DModel,
    HunyuanDiT2DModel,
    HunyuanDiTPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    PRXPipeline,
    SanaPipeline,
    SanaTransformer2DModel,
    UniPCMultistepScheduler,
)
from diffusers.models.transformers.transformer_prx import PRXTransformer2DModel
from diffusers.pipelines.prx.pipeline_prx import TextPreprocessor
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizer,
    CLIPTextModelWithProjection,
    GlmConfig,
    GlmModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5GemmaConfig,
    T5GemmaEncoder,
    T5GemmaModuleConfig,
)

from tests.policy.zoo.family import Family
from tests.policy.zoo.language_models import (
    DECODER,
    LETTERS,
    autoencoder_8x,
    byte_tokenizer,
    filled,
    gemma2_model,
    gemma_tokenizer,
    llama_tokenizer,
    umt5_encoder,
)
from tests.tiny_pipelines import autoencoder, clip_config, clip_tokenizer, finished, t5_encoder, t5_tokenizer


def sana() -> SanaPipeline:
    torch.manual_seed(0)
    transformer = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=16,
        sample_size=8,
    )
    blocks = ("ResBlock", "ResBlock", "EfficientViTBlock")
    vae = AutoencoderDC(
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
    scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return finished(
        SanaPipeline(
            tokenizer=gemma_tokenizer(),
            text_encoder=gemma2_model(),
            vae=vae,
            transformer=transformer,
            scheduler=scheduler,
        )
    )


def pixart_sigma() -> PixArtSigmaPipeline:
    torch.manual_seed(0)
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,  # with the learned variance, which the pipeline drops
        num_layers=2,
        cross_attention_dim=16,
        sample_size=8,
        caption_channels=16,
    )
    return finished(
        PixArtSigmaPipeline(
            tokenizer=t5_tokenizer(),
            text_encoder=t5_encoder(),
            vae=autoencoder(4),
            transformer=transformer,
            scheduler=DPMSolverMultistepScheduler(),
        )
    )


def aura_flow() -> AuraFlowPipeline:
    torch.manual_seed(0)
    transformer = AuraFlowTransformer2DModel(
        sample_size=8,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pos_embed_max_size=16,
    )
    return finished(
        AuraFlowPipeline(
            tokenizer=t5_tokenizer(),
            text_encoder=umt5_encoder(),
            vae=autoencoder(4),
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
        )
    )


def hunyuan_dit() -> HunyuanDiTPipeline:
    torch.manual_seed(0)
    transformer = HunyuanDiT2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
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
    bert = BertConfig(
        vocab_size=128, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=77,
    )  # fmt: skip
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS]
    scheduler = DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.03,
        beta_schedule="scaled_linear",
        clip_sample=False,
        prediction_type="v_prediction",
        steps_offset=1,
    )
    return finished(
        HunyuanDiTPipeline(
            vae=autoencoder_8x(4),
            text_encoder=BertModel(bert),
            tokenizer=BertTokenizer(vocab={token: i for i, token in enumerate(tokens)}),
            transformer=transformer,
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
            text_encoder_2=t5_encoder(),
            tokenizer_2=t5_tokenizer(),
        )
    )


def cogview3_plus() -> CogView3PlusPipeline:
    torch.manual_seed(0)
    transformer = CogView3PlusTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        text_embed_dim=16,
        time_embed_dim=16,
        condition_dim=4,
        pos_embed_max_size=8,
        sample_size=8,
    )
    scheduler = CogVideoXDDIMScheduler(
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        snr_shift_scale=4.0,
        timestep_spacing="trailing",
        clip_sample=False,
    )
    return finished(
        CogView3PlusPipeline(
            tokenizer=t5_tokenizer(),
            text_encoder=t5_encoder(),
            vae=autoencoder(4),
            transformer=transformer,
            scheduler=scheduler,
        )
    )


def cogview4() -> CogView4Pipeline:
    torch.manual_seed(0)
    transformer = CogView4Transformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        text_embed_dim=16,
        time_embed_dim=16,
        condition_dim=4,
        pos_embed_max_size=8,
        sample_size=8,
        rope_axes_dim=(8, 8),
    )
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.25, max_shift=0.75, time_shift_type="linear"
    )
    return finished(
        CogView4Pipeline(
            tokenizer=byte_tokenizer(padding_side="left", bos_token="<|im_start|>", add_bos_token=True),
            text_encoder=GlmModel(GlmConfig(**DECODER, head_dim=8)),
            vae=autoencoder(4),
            transformer=transformer,
            scheduler=scheduler,
        )
    )


def bria() -> BriaPipeline:
    torch.manual_seed(0)
    transformer = BriaTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=[4, 4, 8],
    )
    return finished(
        BriaPipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            vae=autoencoder(4),
            text_encoder=t5_encoder(),
            tokenizer=t5_tokenizer(),
        )
    )


class PlainText(TextPreprocessor):
    """Without ftfy, which the pipeline's own needs and which is no dependency of the package."""

    def basic_clean(self, text: str) -> str:
        return text


def prx() -> PRXPipeline:
    torch.manual_seed(0)
    transformer = PRXTransformer2DModel(
        in_channels=4, context_in_dim=16, hidden_size=16, mlp_ratio=2.0, num_heads=2, depth=2, axes_dim=[4, 4]
    )
    t5_gemma = T5GemmaModuleConfig(**DECODER, head_dim=8, query_pre_attn_scalar=8)
    pipe = PRXPipeline(
        transformer=filled(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=T5GemmaEncoder(T5GemmaConfig(encoder=t5_gemma, decoder=t5_gemma).encoder),
        tokenizer=gemma_tokenizer(),
        vae=autoencoder(4),
    )
    pipe.text_preprocessor = PlainText()
    return finished(pipe)


def hidream() -> HiDreamImagePipeline:
    torch.manual_seed(0)
    transformer = HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=[16, 16],
        text_emb_dim=32,
        axes_dims_rope=(4, 2, 2),
        max_resolution=(8, 8),
        llama_layers=[0, 1],
    )
    pipe = HiDreamImagePipeline(
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        vae=autoencoder(4),
        text_encoder=CLIPTextModelWithProjection(clip_config()),
        tokenizer=clip_tokenizer(),
        text_encoder_2=CLIPTextModelWithProjection(clip_config()),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5_encoder(),
        tokenizer_3=t5_tokenizer(),
        text_encoder_4=LlamaForCausalLM(LlamaConfig(**DECODER, attn_implementation="eager")),
        tokenizer_4=llama_tokenizer(),
        transformer=transformer,
    )
    pipe.default_sample_size = 8  # every picture is scaled to this area
    return finished(pipe)


SMALL = {"height": 16, "width": 16}

FAMILIES = {
    "sana": Family(
        "Sana",
        sana,
        {
            "height": 32,
            "width": 32,
            "guidance_scale": 4.5,
            "use_resolution_binning": False,
            "max_sequence_length": 16,
            "complex_human_instruction": None,
        },
    ),
    "pixart-sigma": Family(
        "PixArt-Σ",
        pixart_sigma,
        {
            **SMALL,
            "guidance_scale": 4.5,
            "use_resolution_binning": False,
            "clean_caption": False,
            "max_sequence_length": 16,
        },
    ),
    "auraflow": Family("AuraFlow", aura_flow, {**SMALL, "guidance_scale": 3.5, "max_sequence_length": 16}),
    "hunyuan-dit": Family(
        "HunyuanDiT",
        hunyuan_dit,
        {"height": 32, "width": 32, "guidance_scale": 5.0, "guidance_rescale": 0.7, "use_resolution_binning": False},
    ),
    "cogview3-plus": Family("CogView 3+", cogview3_plus, {**SMALL, "guidance_scale": 5.0, "max_sequence_length": 16}),
    "cogview4": Family("CogView 4", cogview4, {**SMALL, "guidance_scale": 5.0, "max_sequence_length": 16}),
    "bria": Family("Bria 3", bria, {**SMALL, "guidance_scale": 5.0, "max_sequence_length": 16}),
    # The pipeline guides only single pictures, for it makes two timesteps whatever the number of prompts.
    "prx": Family(
        "PRX",
        prx,
        {
            **SMALL,
            "guidance_scale": 1.0,
            "use_resolution_binning": False,
            "skip_text_cleaning": True,
            "tokenizer_max_length": 16,
        },
    ),
    "hidream": Family("HiDream-I1", hidream, {**SMALL, "guidance_scale": 5.0, "max_sequence_length": 16}),
}
