"""Qwen-Image, its editing pipelines, and Z-Image."""

from typing import Any

import diffusers
from transformers import Qwen2VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from .encoders import (
    SMALL,
    a_picture_each,
    autoencoder_qwen,
    byte_tokenizer,
    pictures,
    qwen3,
    qwen25_vl,
    with_language_model,
)
from .family import Family


# The editing pipelines resize their images to 1024² pixels; their autoencoder makes 64 tokens of them.
HALVINGS, EDIT_SIZE = 6, {"height": 256, "width": 256}
GUIDANCE = {"true_cfg_scale": 3.0, "negative_prompt": ["blurry", "dark"]}


class ImageProcessorOnly(Qwen2VLProcessor):
    """Without the processor for videos, which needs torchvision."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> type:
        return type(argument)


def qwen_image(kind: type = diffusers.QwenImagePipeline, halvings: int = 1, **parts: Any) -> Any:
    transformer = diffusers.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 4, 8),
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, shift_terminal=0.02
    )
    return with_language_model(kind, transformer, scheduler, qwen25_vl(), vae=autoencoder_qwen(halvings), **parts)


def qwen_image_edit(kind: type = diffusers.QwenImageEditPipeline) -> Any:
    images = Qwen2VLImageProcessorPil(size={"shortest_edge": 28 * 28, "longest_edge": 56 * 56})
    processor = ImageProcessorOnly(image_processor=images, tokenizer=byte_tokenizer(), video_processor=None)
    return qwen_image(kind, HALVINGS, processor=processor)


def z_image() -> diffusers.ZImagePipeline:
    transformer = diffusers.ZImageTransformer2DModel(
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
    return with_language_model(
        diffusers.ZImagePipeline, transformer, diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), qwen3()
    )


FAMILIES = {
    "qwen-image": Family("Qwen-Image", qwen_image, {**SMALL, **GUIDANCE}),
    "qwen-image-edit": Family(
        "Qwen-Image-Edit", qwen_image_edit, {**EDIT_SIZE, **GUIDANCE}, "image editing", a_picture_each
    ),
    "qwen-image-edit-plus": Family(
        "Qwen-Image-Edit-Plus",
        lambda: qwen_image_edit(diffusers.QwenImageEditPlusPipeline),
        {**EDIT_SIZE, "true_cfg_scale": 3.0, "negative_prompt": "blurry"},
        "image editing",
        lambda count: {"image": pictures(2)},  # of one sample
        one_prompt=True,
    ),
    "z-image": Family(
        "Z-Image", z_image, {**SMALL, "max_sequence_length": 128, "guidance_scale": 3.0, "cfg_normalization": True}
    ),
}
