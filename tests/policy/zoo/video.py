"""Video models as text-to-image models: Wan with one frame, LTX with one."""

import diffusers

from .encoders import HEADS, MEDIUM, umt5_encoder, with_t5
from .family import Family


def wan_transformer() -> diffusers.WanTransformer3DModel:
    return diffusers.WanTransformer3DModel(
        **HEADS,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    )


def wan(experts: int = 1) -> diffusers.WanPipeline:
    vae = diffusers.AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    second = {"transformer_2": wan_transformer(), "boundary_ratio": 0.875} if experts == 2 else {}
    return with_t5(diffusers.WanPipeline, wan_transformer(), scheduler, text_encoder=umt5_encoder(), vae=vae, **second)


def ltx() -> diffusers.LTXPipeline:
    transformer = diffusers.LTXVideoTransformer3DModel(
        **HEADS,
        in_channels=8,
        out_channels=8,
        cross_attention_dim=16,
        num_layers=2,
        caption_channels=16,
    )
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8),
        down_block_types=("LTXVideoDownBlock3D",) * 2,
        decoder_block_out_channels=(8, 8),
        layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        spatio_temporal_scaling=(True, False),
        decoder_spatio_temporal_scaling=(True, False),
        decoder_inject_noise=(False,) * 3,
        downsample_type=("conv", "conv"),
        upsample_residual=(False, False),
        upsample_factor=(1, 1),
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, base_image_seq_len=1024, shift_terminal=0.1
    )
    return with_t5(diffusers.LTXPipeline, transformer, scheduler, vae=vae)


ONE_FRAME = {**MEDIUM, "num_frames": 1, "max_sequence_length": 16}

FAMILIES = {
    "wan2.1": Family("Wan 2.1, one frame", wan, {**ONE_FRAME, "guidance_scale": 5.0}),
    "wan2.2": Family(
        "Wan 2.2, one frame, two experts",
        lambda: wan(experts=2),
        {**ONE_FRAME, "guidance_scale": 4.0, "guidance_scale_2": 3.0},
    ),
    "ltx": Family("LTX-Video, one frame", ltx, {**ONE_FRAME, "guidance_scale": 3.0}),
}
