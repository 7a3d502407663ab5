"""
How the rewards that are built on a CLIP load one, prepare pictures and texts for it, and compare them.

A repository or folder with `open_clip_config.json` is read by open_clip, which has the authors' own preprocessing; any
other by transformers, with its PIL backend, since a score must not change because torchvision was installed.
"""

import functools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from PIL.Image import Image
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel, PreTrainedConfig

from ..images import to_rgb
from .base import from_hub, in_batches, load_once, require


OPEN_CLIP_CONFIG = "open_clip_config.json"
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of OpenAI's pixel values


@dataclass(eq=False)
class ClipEncoder:
    """A CLIP together with its preprocessing."""

    model: Any  # with an attribute `logit_scale`
    prepare: Callable[[list[Image]], torch.Tensor]  # RGB images to pixel values `(N, 3, H, W)`
    tokenize: Callable[[list[str]], Any]  # texts to tokens, a tensor or a dictionary of such
    embed_image: Callable[[torch.Tensor], torch.Tensor]  # pixel values to features `(N, D)`
    embed_text: Callable[[Any], torch.Tensor]  # tokens to features `(N, D)`

    def __post_init__(self):
        self.model.eval().requires_grad_(False)
        # Rewards run in threads, and a fast tokenizer fails when two of them set its truncation at once.
        self._tokenizing = threading.Lock()

    @property
    def logit_scale(self) -> torch.Tensor:
        """Logarithm of what cosines were multiplied by in training."""
        return self.model.logit_scale.float()

    def images(self, images: Sequence[Image], batch_size: int) -> torch.Tensor:
        """Unit vectors `(N, D)` in float32."""
        weights = self.model.logit_scale

        def features(batch: Sequence[Image]) -> torch.Tensor:
            pixels = self.prepare([to_rgb(image) for image in batch])
            return self.embed_image(pixels.to(weights.device, weights.dtype))

        return self._unit_vectors(images, batch_size, features)

    def texts(self, texts: Sequence[str], batch_size: int) -> torch.Tensor:
        """Unit vectors `(N, D)` in float32."""

        def features(batch: Sequence[str]) -> torch.Tensor:
            with self._tokenizing:
                tokens = self.tokenize(list(batch))
            return self.embed_text(tokens.to(self.model.logit_scale.device))

        return self._unit_vectors(texts, batch_size, features)

    def cosines(self, prompts: Sequence[str], images: Sequence[Image], batch_size: int) -> torch.Tensor:
        """Cosine of each image with its prompt `(N,)` in float32. A prompt of several images is embedded once."""
        row = {text: i for i, text in enumerate(dict.fromkeys(prompts))}
        texts = self.texts(list(row), batch_size)
        return (self.images(images, batch_size) * texts[[row[prompt] for prompt in prompts]]).sum(-1)

    def _unit_vectors(self, items: Sequence, batch_size: int, features: Callable[[Any], torch.Tensor]) -> torch.Tensor:
        # Not under the autocast of a training step: half a precision is more than the difference of good images.
        with torch.no_grad(), torch.autocast(self.model.logit_scale.device.type, enabled=False):
            parts = [features(batch).float() for batch in in_batches(items, batch_size)]
            return torch.nn.functional.normalize(torch.cat(parts), dim=-1)


@load_once
def load_clip(
    model: str,
    pretrained: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    processor: str | None = None,
) -> ClipEncoder:
    """A CLIP as [`~slas_trl.rewards.ClipScore`] names it; `processor` has its preprocessing, if the model has not."""
    folder = Path(model).is_dir()
    if "/" not in model and not folder:
        return _open_clip(model, pretrained, dtype, device)
    if pretrained:
        raise ValueError(f"{model} has weights itself: leave out pretrained={pretrained!r}, which is for ViT-B-32.")
    if _has_open_clip_config(model):
        return _open_clip(f"{'local-dir' if folder else 'hf-hub'}:{model}", None, dtype, device)
    return _transformers_clip(model, processor or model, dtype, device)


def open_clip_encoder(model: torch.nn.Module, prepare: Callable[[Image], torch.Tensor], tokenizer: Any) -> ClipEncoder:
    """One whose model is of open_clip; `prepare` takes an image at a time."""

    def prepare_all(images: list[Image]) -> torch.Tensor:
        return torch.stack([prepare(image) for image in images])

    parts: Any = model
    return ClipEncoder(model, prepare_all, tokenizer, parts.encode_image, parts.encode_text)


def _has_open_clip_config(model: str) -> bool:
    if Path(model).is_dir():
        return (Path(model) / OPEN_CLIP_CONFIG).is_file()
    try:
        with from_hub(model):
            hf_hub_download(model, OPEN_CLIP_CONFIG)
    except FileNotFoundError as error:
        if isinstance(error.__cause__, EntryNotFoundError):  # or offline and not cached: transformers will say so
            return False
        raise
    return True


def _open_clip(name: str, pretrained: str | None, dtype: torch.dtype, device: torch.device | str) -> ClipEncoder:
    open_clip = require("open_clip", "rewards")
    config: Any = open_clip.get_model_config(name) if ":" not in name else None
    tagged = (open_clip.get_pretrained_cfg(name, pretrained) or {}) if config and pretrained else {}
    if tagged and tagged.get("quick_gelu", False) != config.get("quick_gelu", False):
        # open_clip warns, and computes features that are slightly wrong.
        other = name.removesuffix("-quickgelu") if config.get("quick_gelu") else f"{name}-quickgelu"
        raise ValueError(f"The weights {pretrained!r} are of another activation function than {name}: use {other!r}.")
    with from_hub(tagged.get("hf_hub", "").rstrip("/") or name.removeprefix("hf-hub:").removeprefix("local-dir:")):
        try:
            model, prepare = open_clip.create_model_from_pretrained(name, pretrained=pretrained, weights_only=True)
            tokenizer = open_clip.get_tokenizer(name)
        except RuntimeError as error:
            raise FileNotFoundError(f"With pretrained={pretrained!r}, open_clip says: {error}") from error
    return open_clip_encoder(model.to(device, dtype), prepare, tokenizer)


def _transformers_clip(name: str, processor: str, dtype: torch.dtype, device: torch.device | str) -> ClipEncoder:
    with from_hub(name):
        config, _ = PreTrainedConfig.get_config_dict(name)
        if not config:
            raise FileNotFoundError("there is no config.json.")
        if (kind := config.get("model_type")) != "clip":
            # from_pretrained would go on, with weights that it makes up.
            raise ValueError(f"Expected a CLIP, but {name} is a model of transformers of type {kind!r}.")
        loaded: Any = CLIPModel.from_pretrained(name, dtype=dtype, output_loading_info=True)
    model, found = loaded
    if missing := [*found["missing_keys"], *found["mismatched_keys"]]:
        raise ValueError(f"The weights of {name} lack some of its config.json's model, as {missing[0]}.")
    with from_hub(processor):
        image_processor = AutoImageProcessor.from_pretrained(processor, backend="pil")
    length = model.config.text_config.max_position_embeddings

    @functools.cache  # not needed by rewards that read no prompt
    def tokenizer() -> Any:
        with from_hub(processor):
            return AutoTokenizer.from_pretrained(processor)

    def prepare(images: list[Image]) -> torch.Tensor:
        # Said, not guessed: an image that is three pixels high looks like one with its channels first.
        return image_processor(images, return_tensors="pt", input_data_format="channels_last")["pixel_values"]

    def tokenize(texts: list[str]) -> Any:
        return tokenizer()(texts, padding=True, truncation=True, max_length=length, return_tensors="pt")

    def embed_text(tokens: Any) -> torch.Tensor:
        given = {name: tokens[name] for name in ("input_ids", "attention_mask")}
        return model.get_text_features(**given).pooler_output

    def embed_image(pixels: torch.Tensor) -> torch.Tensor:
        return model.get_image_features(pixel_values=pixels).pooler_output

    return ClipEncoder(model.to(device), prepare, tokenize, embed_image, embed_text)
