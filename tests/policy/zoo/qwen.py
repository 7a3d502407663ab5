"""Qwen-Image, its editing pipelines, and Z-Image."""

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)

from tests.tiny_pipelines import autoencoder, finished

from .encoders import (
    byte_tokenizer,
    pictures,
    qwen3,
    qwen25_vl,
    video_autoencoder,
    vision_language_processor,
)
from .family import Family


SIZE = {"height": 16, "width": 16}
# The editing pipelines resize their images to 1024² pixels; their autoencoder makes 64 tokens of them.
HALVINGS, EDIT_SIZE = 6, {"height": 256, "width": 256}
GUIDANCE = {"true_cfg_scale": 3.0, "negative_prompt": ["blurry", "dark"]}


def dynamic_shift() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, shift_terminal=0.02
    )


def qwen_transformer() -> QwenImageTransformer2DModel:
    return QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 4, 8),
    )


def qwen_image() -> QwenImagePipeline:
    torch.manual_seed(0)
    return finished(
        QwenImagePipeline(
            transformer=qwen_transformer(),
            scheduler=dynamic_shift(),
            vae=video_autoencoder(),
            text_encoder=qwen25_vl(),
            tokenizer=byte_tokenizer(),
        )
    )


def qwen_image_edit(cls: type = QwenImageEditPipeline) -> QwenImageEditPipeline | QwenImageEditPlusPipeline:
    torch.manual_seed(0)
    return finished(
        cls(
            transformer=qwen_transformer(),
            scheduler=dynamic_shift(),
            vae=video_autoencoder(HALVINGS),
            text_encoder=qwen25_vl(),
            tokenizer=byte_tokenizer(),
            processor=vision_language_processor(),
        )
    )


def z_image() -> ZImagePipeline:
    torch.manual_seed(0)
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    )
    return finished(
        ZImagePipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=autoencoder(4),
            text_encoder=qwen3(),
            tokenizer=byte_tokenizer(),
        )
    )


FAMILIES = {
    "qwen-image": Family("Qwen-Image", qwen_image, {**SIZE, **GUIDANCE}),
    "qwen-image-edit": Family(
        "Qwen-Image-Edit",
        qwen_image_edit,
        {**EDIT_SIZE, **GUIDANCE},
        "image editing",
        lambda count: {"image": pictures(count)},
    ),
    "qwen-image-edit-plus": Family(
        "Qwen-Image-Edit-Plus",
        lambda: qwen_image_edit(QwenImageEditPlusPipeline),
        {**EDIT_SIZE, "true_cfg_scale": 3.0, "negative_prompt": "blurry"},
        "image editing",
        lambda count: {"image": pictures(2)},  # of one sample
        one_prompt=True,
    ),
    "z-image": Family(
        "Z-Image", z_image, {**SIZE, "max_sequence_length": 128, "guidance_scale": 3.0, "cfg_normalization": True}
    ),
}
