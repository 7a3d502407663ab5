"""Pipelines and adapters by name: the embedded pipeline, folders, single files, and repositories on the Hub."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import diffusers
import torch
import yaml
from diffusers import DiffusionPipeline, PipelineQuantizationConfig
from diffusers.loaders import PeftAdapterMixin
from diffusers.loaders.lora_base import LoraBaseMixin
from diffusers.loaders.single_file_utils import fetch_diffusers_config, load_single_file_checkpoint
from diffusers.utils import logging
from huggingface_hub import ModelCard, snapshot_download
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file

from .policy.checks import DENOISERS, denoisers_of
from .run_files import ADAPTER, adapter_file
from .shapes.pipeline import ShapesPipeline, load_shapes_pipeline


EMBEDDED = "shapes"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def load_pipeline(name_or_path: str, init_kwargs: Mapping[str, Any] | None = None) -> DiffusionPipeline:
    """
    Load a pipeline: `"shapes"` for the embedded one, a folder, a file with all weights of a model, or a Hub id.

    `init_kwargs` are arguments of `from_pretrained` or `from_single_file`. `dtype` (or `torch_dtype`) may be a name
    such as "bfloat16", or one for each component, `quantization_config` the arguments of a
    `PipelineQuantizationConfig`. Raises `ValueError` when there is no such pipeline, or one without a denoiser, and
    for arguments that do not fit.
    """
    given, path = dict(init_kwargs or {}), Path(name_or_path)
    if path.is_dir() and name_or_path != EMBEDDED and not (path / "model_index.json").is_file():
        raise ValueError(f"{name_or_path!r} holds no diffusers pipeline: there is no model_index.json in it.")
    try:
        if "torch_dtype" in given:
            given["dtype"] = given.pop("torch_dtype")
        if "dtype" in given:
            given["dtype"] = _dtype(given["dtype"])
        if isinstance(quantization := given.get("quantization_config"), dict):
            given["quantization_config"] = PipelineQuantizationConfig(**quantization)
        if name_or_path == EMBEDDED:
            return load_shapes_pipeline(**{{"dtype": "torch_dtype"}.get(key, key): given[key] for key in given})
        if path.is_file():
            return _load_file(name_or_path, given)
        kind = _class_of(path) if path.is_dir() else DiffusionPipeline
        return kind.from_pretrained(name_or_path, **given)
    except Exception as error:  # from files, the Hub or devices: too many kinds to name
        why = f"{type(error).__name__}: {str(error).rstrip('.')}"
        options = f" with {', '.join(init_kwargs)}" if init_kwargs else ""  # not their values: a token
        raise ValueError(f"{name_or_path!r} cannot be loaded as a pipeline{options}: {why}.") from error


def _load_file(file: str, given: dict[str, Any]) -> DiffusionPipeline:
    """By the class that the base model's config names, which diffusers knows by the keys in the file."""
    config = given.get("config") or fetch_diffusers_config(load_single_file_checkpoint(file))
    repository = config["pretrained_model_name_or_path"] if isinstance(config, dict) else config
    name = cast(dict, DiffusionPipeline.load_config(repository))["_class_name"]
    return getattr(diffusers, name).from_single_file(file, **given)


def _class_of(folder: Path) -> type[DiffusionPipeline]:
    """`from_pretrained` knows the classes of diffusers, and does not say that a denoiser is missing."""
    name = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))["_class_name"]
    if not any((folder / denoiser / "config.json").is_file() for denoiser in DENOISERS):
        raise ValueError(f"there is no denoiser: no folder in it is one of {DENOISERS}, with a config.json")
    return ShapesPipeline if name == ShapesPipeline.__name__ else DiffusionPipeline


def _dtype(value: Any) -> Any:
    if isinstance(value, dict):
        return {component: _dtype(name) for component, name in value.items()}
    if isinstance(value, str) and value not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, but it is {value!r}.")
    return DTYPES[value] if isinstance(value, str) else value


def load_with_adapter(
    name: str | None, adapter: str | None, init_kwargs: Mapping[str, Any] | None = None, token: str | None = None
) -> DiffusionPipeline:
    """[`load_pipeline`], by default the embedded one, and [`load_adapter`] if an adapter is named."""
    if name is None and adapter is not None and (base := base_model_of(adapter, token)) is not None:
        raise ValueError(f"the adapter {adapter} was trained on {base}: add --model_name_or_path {base}.")
    pipe = load_pipeline(name or EMBEDDED, init_kwargs)
    if adapter is not None:
        load_adapter(pipe, adapter, token)
    return pipe


def load_adapter(pipe: DiffusionPipeline, source: str, token: str | None = None) -> None:
    """
    Load a LoRA adapter as plain diffusers does, and that of a second denoiser, if the trainer has written one.
    `source` is a folder, a `.safetensors` file, or a Hub id, which may end in `"@branch"`, and `token` for a private
    repository, by default that of `hf auth login`.

    Raises:
        `ValueError`, `FileNotFoundError`: when there is none, or it does not fit.
    """
    names = list(denoisers_of(pipe))
    files = _adapter_files(source, names, token)
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)  # diffusers also warns of text encoders that an adapter does not change
    try:
        for name, file in files.items():
            _load_into(pipe, name, {} if name == names[0] else {f"load_into_{name}": True}, source, file)
    finally:
        logging.set_verbosity(verbosity)


def _load_into(pipe: Any, name: str, into: dict[str, Any], source: str, file: Path) -> None:
    denoiser, has_methods = pipe.components[name], isinstance(pipe, LoraBaseMixin)
    if not isinstance(denoiser, PeftAdapterMixin):
        raise ValueError(f"{source} cannot be loaded: diffusers has no adapters for {type(denoiser).__name__}.")
    try:
        if has_methods:
            cast(Any, pipe).load_lora_weights(str(file.parent), weight_name=file.name, **into)
        else:
            options: dict[str, Any] = {"weight_name": file.name, "prefix": None, "use_safetensors": True}
            denoiser.load_lora_adapter(str(file.parent), **options)
    except Exception as error:  # from the file or peft: too many kinds to name
        why = str(error).rstrip(".")
        raise ValueError(
            f"could not load the adapter {source} into a {type(pipe).__name__}: {why}. Was it trained on this model?"
        ) from error
    if not denoiser._hf_peft_config_loaded:  # diffusers leaves out keys that it does not know
        raise ValueError(f"{source} holds no weights that fit this pipeline. Was it trained from another one?")
    # A pipeline without methods for adapters has none for text encoders, and its files no prefix.
    prefix = f"{name.removesuffix('_2')}." if has_methods else ""
    keys = {key.removeprefix(prefix) for key in load_file(file) if key.startswith(prefix) and ".lora_A." in key}
    loaded = get_peft_model_state_dict(cast(Any, denoiser), adapter_name=denoiser.active_adapters()[-1])
    if left_out := sorted(keys - loaded.keys()):
        raise ValueError(f"{source} changes {len(left_out)} layers that {name} does not have, such as {left_out[0]}.")


def base_model_of(source: str, token: str | None = None) -> str | None:
    """
    The one model on the Hub that the card of an adapter, see [`load_adapter`], says it was trained on; `None` without
    any. Raises `ValueError` when there is no such adapter.
    """
    if Path(source).is_file() or not (card := _folder_of(source, token, "README.md") / "README.md").is_file():
        return None
    try:
        base = ModelCard.load(card, ignore_metadata_errors=True).data.get("base_model")
    except (ValueError, yaml.YAMLError):  # somebody's own
        return None
    base = base[0] if isinstance(base, list) and len(base) == 1 else base
    return base if isinstance(base, str) else None


def _adapter_files(source: str, names: list[str], token: str | None) -> dict[str, Path]:
    """The file of each denoiser that has one: by its usual name, or else the only one there."""
    if Path(source).is_file():
        return {names[0]: Path(source)}
    usual = {name: adapter_file(name, names) for name in names}
    folder = _folder_of(source, token, *usual.values())
    found = {name: folder / file for name, file in usual.items() if (folder / file).is_file()}
    if names[0] not in found:
        folder = _folder_of(source, token, "*.safetensors")
        others = [file for file in folder.glob("*.safetensors") if file.name not in usual.values()]
        if len(others) != 1:
            raise FileNotFoundError(f"{source} holds no adapter: no {ADAPTER}, and there are {len(others)} others.")
        found = {names[0]: others[0], **found}
    return found


def _folder_of(source: str, token: str | None, *patterns: str) -> Path:
    """The folder itself, or one with the files that match `patterns` at the root of a repository."""
    if Path(source).is_dir():
        return Path(source)
    repo_id, _, branch = source.partition("@")
    wanted: dict[str, Any] = {"allow_patterns": list(patterns), "ignore_patterns": ["*/*"]}
    try:
        return Path(snapshot_download(repo_id, revision=branch or None, token=token, **wanted))
    except (RepositoryNotFoundError, HFValidationError) as error:
        why = "no repository of that name on the Hub, or none that this token may read"
        raise ValueError(f"there is no folder {source!r} here, and {why}.") from error
    except Exception as error:  # from the network, or a malformed answer
        raise ValueError(f"there is no folder {source!r} here, and the Hub failed: {error}") from error
