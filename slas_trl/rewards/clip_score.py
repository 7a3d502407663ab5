"""
CLIPScore: cosine of a CLIP's image and text features (https://huggingface.co/papers/2104.08718), and how the rewards
that are built on a CLIP load and run one.

Both libraries' models are read: a repository or folder with `open_clip_config.json` by open_clip, any other by
transformers. Where there are both, open_clip's is the one that the authors trained, with its own preprocessing (the
resizing of `apple/DFN5B-CLIP-ViT-H-14-378` squashes, for example).

transformers' images are prepared by its PIL backend, whether or not torchvision is there: it resizes 8-bit pixels as
OpenAI's own preprocessing does, and a score must not change because a package was installed.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from PIL.Image import Image
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel, PreTrainedConfig

from slas_trl.images import to_rgb
from slas_trl.rewards.base import ModelReward, check_pairs, in_batches, load_once, missing_checkpoint, require


OPEN_CLIP_CONFIG = "open_clip_config.json"


@dataclass(frozen=True)
class ClipScore(ModelReward):
    """
    Cosine of a CLIP's features of image and text.

    Texts longer than the model's context (77 tokens, mostly) are cut off there. Images of any mode are converted to
    RGB, which drops transparency.

    Args:
        model (`str`, *optional*, defaults to `"openai/clip-vit-large-patch14"`):
            Hub id or folder of a CLIP of transformers or of open_clip; or the name of an architecture of open_clip,
            such as "ViT-B-32", together with `pretrained`.
        pretrained (`str`, *optional*):
            Tag of weights that open_clip knows for that architecture, or a file of them.

    Returns:
        `list[float]`: in [-1, 1], and neither times 100 nor times 2.5; images that fit have about 0.2 to 0.4.

    Raises:
        `FileNotFoundError`: for a model that cannot be had, with where to put it.
        `ImportError`: for a model of open_clip without open_clip.
        `ValueError`: for numbers of prompts and images that differ, and for what is no CLIP.
    """

    default_name: ClassVar[str] = "clip_score"
    model: str = "openai/clip-vit-large-patch14"
    pretrained: str | None = None

    def __call__(self, prompts: list[str], images: list[Image], **columns: Any) -> list[float | None]:
        check_pairs(prompts, images)
        if not images:
            return []
        encoder = load_clip(self.model, self.pretrained, self.torch_dtype, self.torch_device)
        return encoder.cosines(prompts, images, self.batch_size).tolist()


clip_score = ClipScore()


class ClipEncoder:
    """
    A CLIP together with its preprocessing.

    Args:
        model (`torch.nn.Module`): with an attribute `logit_scale`.
        prepare (`Callable`): RGB images to pixel values `(N, 3, H, W)`.
        tokenize (`Callable`): texts to a tensor of tokens, or a dictionary of such, the arguments of `embed_text`.
        embed_image (`Callable`): pixel values to features `(N, D)`.
        embed_text (`Callable`): tokens to features `(N, D)`.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        prepare: Callable[[list[Image]], torch.Tensor],
        tokenize: Callable[[list[str]], Any],
        embed_image: Callable[[torch.Tensor], torch.Tensor],
        embed_text: Callable[[Any], torch.Tensor],
    ):
        self.model = model.eval().requires_grad_(False)
        self.prepare, self.tokenize, self.embed_image, self.embed_text = prepare, tokenize, embed_image, embed_text
        # Rewards run in threads, and a fast tokenizer fails when two of them set its truncation at once.
        self._tokenizing = threading.Lock()

    @property
    def logit_scale(self) -> torch.Tensor:
        """Logarithm of what cosines were multiplied by in training."""
        return self.model.logit_scale.float()  # type: ignore[operator]

    def images(self, images: Sequence[Image], batch_size: int) -> torch.Tensor:
        """Unit vectors `(N, D)` in float32."""
        weights = self.model.logit_scale

        def features(batch: Sequence[Image]) -> torch.Tensor:
            pixels = self.prepare([to_rgb(image) for image in batch])
            return self.embed_image(pixels.to(weights.device, weights.dtype))  # type: ignore[call-overload]

        return self._unit_vectors(images, batch_size, features)

    def texts(self, texts: Sequence[str], batch_size: int) -> torch.Tensor:
        """Unit vectors `(N, D)` in float32."""

        def features(batch: Sequence[str]) -> torch.Tensor:
            with self._tokenizing:
                tokens = self.tokenize(list(batch))
            return self.embed_text(tokens.to(self.model.logit_scale.device))

        return self._unit_vectors(texts, batch_size, features)

    def cosines(self, prompts: Sequence[str], images: Sequence[Image], batch_size: int) -> torch.Tensor:
        """
        Cosine of each image with its prompt `(N,)` in float32. A prompt that several images share is embedded once.
        """
        row = {text: i for i, text in enumerate(dict.fromkeys(prompts))}
        texts = self.texts(list(row), batch_size)
        return (self.images(images, batch_size) * texts[[row[prompt] for prompt in prompts]]).sum(-1)

    def _unit_vectors(self, items: Sequence, batch_size: int, features: Callable[[Any], torch.Tensor]) -> torch.Tensor:
        # Not under the autocast of a training step: half a precision is more than the difference of good images.
        with torch.no_grad(), torch.autocast(self.model.logit_scale.device.type, enabled=False):  # type: ignore
            parts = [features(batch).float() for batch in in_batches(items, batch_size)]
            return torch.nn.functional.normalize(torch.cat(parts), dim=-1)


@load_once
def load_clip(
    model: str,
    pretrained: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    processor: str | None = None,
    needed_by: str = "clip_score",
) -> ClipEncoder:
    """
    A CLIP of transformers or open_clip, loaded once.

    Args:
        model (`str`): as for [`ClipScore`].
        pretrained (`str`, *optional*): as for [`ClipScore`].
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`): Of the weights.
        device (`torch.device` or `str`, *optional*, defaults to `"cpu"`): Where they go.
        processor (`str`, *optional*): For transformers: where tokenizer and preprocessing are, if not with the model.
        needed_by (`str`, *optional*, defaults to `"clip_score"`): The reward, for messages.
    """
    if "/" not in model and not Path(model).is_dir():
        return _open_clip(model, _known(model, pretrained, needed_by), dtype, device, needed_by)
    if pretrained:
        raise ValueError(
            f"{needed_by} has weights of {model} itself, but pretrained={pretrained!r} as well, which belongs to an "
            "architecture of open_clip such as ViT-B-32. Leave it out."
        )
    if _has_open_clip_config(model, needed_by):
        schema = "local-dir" if Path(model).is_dir() else "hf-hub"
        return _open_clip(f"{schema}:{model}", None, dtype, device, needed_by)
    return _transformers_clip(model, processor or model, dtype, device, needed_by)


def open_clip_encoder(model: torch.nn.Module, prepare: Callable[[Image], torch.Tensor], tokenizer: Any) -> ClipEncoder:
    """One whose model is of open_clip; `prepare` takes an image at a time."""
    return ClipEncoder(
        model,
        lambda images: torch.stack([prepare(image) for image in images]),
        tokenizer,
        model.encode_image,  # type: ignore[arg-type]
        model.encode_text,  # type: ignore[arg-type]
    )


def _has_open_clip_config(model: str, needed_by: str) -> bool:
    if Path(model).is_dir():
        return (Path(model) / OPEN_CLIP_CONFIG).is_file()
    try:
        hf_hub_download(model, OPEN_CLIP_CONFIG)
    except EntryNotFoundError:  # not there; or offline, and not in the cache, as transformers will say if it must
        return False
    except Exception as error:  # no such repository, gated, no valid id
        raise FileNotFoundError(missing_checkpoint(needed_by, model, error, option="model")) from error
    return True


def _known(model: str, pretrained: str | None, needed_by: str) -> str:
    """The tag or file of weights, if they fit an architecture of open_clip."""
    open_clip = require("open_clip", "rewards", needed_by)
    config = open_clip.get_model_config(model)
    if config is None:
        raise ValueError(
            f"{needed_by} has no model {model!r}: expected a Hub id (owner/name), a folder that exists, or an "
            "architecture of open_clip, as open_clip.list_models() has them."
        )
    tags = open_clip.list_pretrained_tags_by_model(model)
    if pretrained is None or not (pretrained in tags or Path(pretrained).is_file()):
        raise ValueError(
            f"{needed_by} needs weights for open_clip's {model}, but pretrained is {pretrained!r}. It must be a file, "
            f"or one of {', '.join(tags) or 'no tags'}."
        )
    tagged = open_clip.get_pretrained_cfg(model, pretrained)
    if tagged and tagged.get("quick_gelu", False) != config.get("quick_gelu", False):
        # open_clip warns, and computes features that are slightly wrong.
        raise ValueError(
            f"The weights {pretrained!r} of {model} were trained with another activation function. Use the "
            f"architecture {model.removesuffix('-quickgelu') if config.get('quick_gelu') else model + '-quickgelu'!r}."
        )
    return pretrained


def _open_clip(
    name: str, pretrained: str | None, dtype: torch.dtype, device: torch.device | str, needed_by: str
) -> ClipEncoder:
    open_clip = require("open_clip", "rewards", needed_by)
    try:
        model, prepare = open_clip.create_model_from_pretrained(name, pretrained=pretrained, weights_only=True)
        tokenizer = open_clip.get_tokenizer(name)
    except (OSError, RuntimeError) as error:
        if "loading state_dict" in str(error):  # weights of another architecture; it says which of them
            raise
        place = name.removeprefix("hf-hub:").removeprefix("local-dir:")
        if Path(place).is_dir():
            raise FileNotFoundError(
                f"{needed_by} finds no weights of open_clip in the folder {place}: {error}"
            ) from error
        tag = open_clip.get_pretrained_cfg(name, pretrained) if pretrained else {}
        repository = tag.get("hf_hub", "").rstrip("/") or place
        raise FileNotFoundError(missing_checkpoint(needed_by, repository, error, option="model")) from error
    return open_clip_encoder(model.to(device, dtype), prepare, tokenizer)


def _transformers_clip(
    name: str, processor: str, dtype: torch.dtype, device: torch.device | str, needed_by: str
) -> ClipEncoder:
    place = name
    try:
        config, _ = PreTrainedConfig.get_config_dict(name)
        if not config:
            raise OSError("there is no config.json.")
        if (kind := config.get("model_type")) != "clip":
            # from_pretrained would go on, with weights that it makes up.
            raise ValueError(f"{needed_by} needs a CLIP, but {name} is a model of transformers of type {kind!r}.")
        loaded: Any = CLIPModel.from_pretrained(name, dtype=dtype, output_loading_info=True)
        model, found = loaded
        place = processor
        tokenizer = AutoTokenizer.from_pretrained(processor)
        image_processor = AutoImageProcessor.from_pretrained(processor, backend="pil")
    except OSError as error:
        if Path(place).is_dir():
            raise FileNotFoundError(
                f"{needed_by} needs a CLIP of transformers (config.json, weights, tokenizer, preprocessor_config.json)"
                f" or of open_clip ({OPEN_CLIP_CONFIG}, weights) in the folder {place}: {error}"
            ) from error
        option = "model" if place == name else "processor"
        raise FileNotFoundError(missing_checkpoint(needed_by, place, error, option=option)) from error
    if missing := [*found["missing_keys"], *found["mismatched_keys"]]:
        raise ValueError(f"{needed_by}: the weights of {name} lack some of its config.json's model, as {missing[0]}.")
    length = model.config.text_config.max_position_embeddings

    def prepare(images: list[Image]) -> torch.Tensor:
        # Said, not guessed: an image that is three pixels high looks like one with its channels first.
        return image_processor(images, return_tensors="pt", input_data_format="channels_last")["pixel_values"]

    def tokenize(texts: list[str]) -> Any:
        return tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="pt")

    return ClipEncoder(
        model.to(device),  # type: ignore[arg-type]
        prepare,
        tokenize,
        lambda pixels: model.get_image_features(pixel_values=pixels).pooler_output,
        lambda tokens: (
            model.get_text_features(
                input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
            ).pooler_output
        ),
    )
