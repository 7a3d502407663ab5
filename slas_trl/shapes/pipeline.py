"""The small text-to-image pipeline that comes with the package: `StableDiffusion3Pipeline`, 32x32, without a T5."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import diffusers
import torch
import transformers
from diffusers import AutoencoderTiny, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from . import weights_folder


class ShapesPipeline(StableDiffusion3Pipeline):
    """
    [`~diffusers.StableDiffusion3Pipeline`] whose defaults suit the shapes world: 10 steps, no guidance, and no tokens
    for the T5 that it does not have. The LoRA methods are those of Stable Diffusion 3.
    """

    # Also spares `from_pretrained` of a saved pipeline the arguments `text_encoder_3=None, tokenizer_3=None`.
    _optional_components = [*StableDiffusion3Pipeline._optional_components, "text_encoder_3", "tokenizer_3"]

    # The parent's, with the types that these components have; diffusers compares them when it loads.
    def __init__(
        self,
        transformer: SD3Transformer2DModel,
        scheduler: FlowMatchEulerDiscreteScheduler,
        vae: AutoencoderTiny,
        text_encoder: CLIPTextModelWithProjection,
        tokenizer: CLIPTokenizer,
        text_encoder_2: CLIPTextModelWithProjection,
        tokenizer_2: CLIPTokenizer,
        text_encoder_3: Any = None,
        tokenizer_3: Any = None,
        image_encoder: Any = None,
        feature_extractor: Any = None,
    ):
        parts: tuple[Any, ...] = (transformer, scheduler, vae, text_encoder, tokenizer, text_encoder_2, tokenizer_2)
        super().__init__(*parts, text_encoder_3, tokenizer_3, image_encoder, feature_extractor)  # type: ignore[call-arg]

    def __call__(
        self,
        prompt: str | list[str] | None = None,
        *,
        num_inference_steps: int = 10,
        guidance_scale: float = 1.0,
        **kwargs: Any,
    ):
        """As the parent's, with other defaults, for prompts such as those of [`~slas_trl.shapes.shapes_prompts`]."""
        arguments: dict[str, Any] = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
        return super().__call__(prompt=prompt, **arguments, **kwargs)  # type: ignore[arg-type]

    def _get_t5_prompt_embeds(self, *args: Any, max_sequence_length: int = 0, **kwargs: Any) -> torch.Tensor:
        # Without a T5 the parent appends `max_sequence_length` tokens of zeros, 256 by default, to the 16 of the
        # CLIPs. The denoiser was trained without them, and they would cost ten times as much.
        return super()._get_t5_prompt_embeds(*args, max_sequence_length=0, **kwargs)


def load_shapes_pipeline(
    torch_dtype: torch.dtype = torch.float32, device: str | torch.device | None = None
) -> ShapesPipeline:
    """
    Load the text-to-image pipeline that comes with the package, to sample from or to train. No network is needed.
    Its components are in eval mode, without gradients, and it shows no progress bar.

    Args:
        torch_dtype (`torch.dtype`, *optional*, defaults to `torch.float32`): of all weights.
        device (`str` or `torch.device`, *optional*): where to put it; by default it stays on the CPU.

    Raises:
        `FileNotFoundError`: when the package was installed without its weights.
    """
    folder = weights_folder("pipeline")
    with quiet():
        pipe = ShapesPipeline.from_pretrained(
            folder, dtype=torch_dtype, text_encoder_3=None, tokenizer_3=None, local_files_only=True
        )
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval().requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    return pipe if device is None else pipe.to(device)


@contextmanager
def quiet() -> Iterator[None]:
    """Loading without progress bars, and without diffusers' warning of a value in `AutoencoderTiny`'s own config."""
    libraries = (diffusers.utils.logging, transformers.utils.logging)
    before = [(library, library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    try:
        for library in libraries:
            library.set_verbosity_error()
            library.disable_progress_bar()
        yield
    finally:
        for library, verbosity, bars in before:
            library.set_verbosity(verbosity)
            if bars:
                library.enable_progress_bar()
