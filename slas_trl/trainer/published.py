"""Adapters to begin from, in a run's folder or on the Hub."""

from pathlib import Path
from typing import Any, cast

import yaml
from diffusers import DiffusionPipeline
from diffusers.loaders.lora_base import LoraBaseMixin
from diffusers.utils import logging
from huggingface_hub import HfApi, ModelCard, hf_hub_download
from huggingface_hub.errors import HFValidationError, RemoteEntryNotFoundError, RepositoryNotFoundError
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file

from .. import hub
from ..policy.doctor import denoisers_of
from ..quick_start import ADAPTER_FILE, adapter_file
from .lora import carries_adapter, takes_adapter


def load_adapter(pipe: DiffusionPipeline, source: str, token: str | None = None) -> None:
    """
    Load a LoRA adapter as plain diffusers does; that of a second denoiser too, if [`save_weights`] has written one.

    Args:
        pipe ([`~diffusers.DiffusionPipeline`]): the pipeline that it was trained on.
        source (`str`): a folder, a `.safetensors` file, or a Hub id, which may end in `"@branch"`.
        token (`str`, *optional*): for a private repository, by default that of `hf auth login`.

    Raises:
        `ValueError`, `FileNotFoundError`: when there is none, or it does not fit.
    """
    if Path(source).is_dir() and not list(Path(source).glob("*.safetensors")):
        raise FileNotFoundError(f"{source} holds no adapter: there is no .safetensors file in it.")
    names = list(denoisers_of(pipe))
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)  # it also warns of text encoders that an adapter rightly leaves alone
    try:
        for name in names:
            file = _file_of(source, adapter_file(name, names), token)
            if file is None and name == names[0]:
                file = _only_file(source, token, {adapter_file(other, names) for other in names})
            if file is not None or name == names[0]:
                _load_into(pipe, name, names, source, file, token)
    finally:
        logging.set_verbosity(verbosity)


def _load_into(pipe: Any, name: str, names: list[str], source: str, file: Path | None, token: str | None) -> None:
    denoiser = pipe.components[name]
    if not takes_adapter(denoiser):
        raise ValueError(f"{source} cannot be loaded: diffusers has no adapters for {type(denoiser).__name__}.")
    # Where the file that we know is not there, diffusers takes the one that looks most like an adapter.
    place, revision = _place_of(source)
    options: dict[str, Any] = {"revision": revision, "token": token}
    if file is not None:
        place, options = str(file.parent), {"weight_name": file.name}
    into = {} if name == names[0] else {f"load_into_{name}": True}
    try:
        if isinstance(pipe, LoraBaseMixin):
            cast(Any, pipe).load_lora_weights(place, **options, **into)
        else:
            denoiser.load_lora_adapter(place, prefix=None, use_safetensors=True, **options)
    except Exception as error:  # of the file, the Hub or the network: too many kinds to name
        why = str(error).rstrip(".")
        raise ValueError(
            f"could not load the adapter {source} into a {type(pipe).__name__}: {why}. Was it trained on this model?"
        ) from error
    if not carries_adapter(denoiser):  # keys that it does not know, diffusers leaves out
        raise ValueError(f"{source} holds no weights that fit this pipeline. Was it trained from another one?")
    if file is None:
        return
    # A pipeline without methods for adapters has none for text encoders, and its files no prefix.
    prefix = f"{names[0]}." if isinstance(pipe, LoraBaseMixin) else ""
    keys = {key.removeprefix(prefix) for key in load_file(file) if key.startswith(prefix) and ".lora_A." in key}
    loaded = get_peft_model_state_dict(denoiser, adapter_name=list(denoiser.peft_config)[-1])
    if left_out := sorted(keys - loaded.keys()):
        raise ValueError(
            f"{source} does not fit this pipeline: it changes {len(left_out)} layers that {name} does not have, such "
            f"as {left_out[0].partition('.lora_A.')[0]}. Was it trained from another one?"
        )


def base_model_of(source: str, token: str | None = None) -> str | None:
    """
    The model on the Hub that an adapter's card says it was trained on; `None` if the card names none, or there is no
    card.

    Args:
        source, token (`str`): as for [`load_adapter`].

    Raises:
        `ValueError`: when there is no such adapter.
    """
    file = _file_of(source, "README.md", token)
    if file is None:
        return None
    try:
        base = ModelCard.load(file, ignore_metadata_errors=True).data.get("base_model")
    except (ValueError, yaml.YAMLError):  # somebody's own
        return None
    if isinstance(base, list):
        base = base[0] if len(base) == 1 else None
    return base if isinstance(base, str) else None


def _only_file(source: str, token: str | None, others: set[str]) -> Path | None:
    """
    Of a repository where no file has the usual name: the one that is at its root and not among `others`. diffusers
    would look for it in the main branch of a public one.
    """
    if Path(source).exists():
        return None
    repo_id, revision = _place_of(source)
    try:
        names = HfApi(token=token).list_repo_files(repo_id, revision=revision)
    except Exception as error:  # of the network, or what is no answer of the Hub
        raise ValueError(f"could not see what is in the repository {source}: {hub.reason(error)}") from error
    names = [name for name in names if name.endswith(".safetensors") and "/" not in name and name not in others]
    return _file_of(source, names[0], token) if len(names) == 1 else None


def _place_of(source: str) -> tuple[str, str | None]:
    """The folder, file or repository, and the repository's branch."""
    if Path(source).exists():
        return source, None
    repo_id, _, branch = source.partition("@")
    return repo_id, branch or None


def _file_of(source: str, name: str, token: str | None) -> Path | None:
    """A file of a folder, or of a repository on the Hub, if it is there."""
    path = Path(source)
    if path.is_file():
        return path if name == ADAPTER_FILE else None
    if path.is_dir():
        return path / name if (path / name).is_file() else None
    try:
        repo_id, revision = _place_of(source)
        return Path(hf_hub_download(repo_id, name, revision=revision, token=token))
    except RemoteEntryNotFoundError:
        return None
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ValueError(
            f"there is no folder {source!r} here, and no repository of that name on the Hub, or none that this token "
            "may read."
        ) from error
    except hub.FAILURES as error:
        raise ValueError(
            f"there is no folder {source!r} here, and it could not be had from the Hub: {hub.reason(error)}"
        ) from error
