"""The model that the options of `slas-trl train` name."""

from typing import cast

from diffusers import DiffusionPipeline

from slas_trl.policy.doctor import load_pipeline
from slas_trl.scripts.arguments import SLASScriptArguments
from slas_trl.shapes import load_shapes_pipeline
from slas_trl.trainer import SLASConfig
from slas_trl.trainer.published import base_model_of, load_adapter


def make_pipeline(script: SLASScriptArguments, config: SLASConfig) -> DiffusionPipeline:
    """
    The pipeline, with the adapter to go on from.

    Raises:
        `ValueError`: when there is no such pipeline or adapter, or they do not fit each other.
    """
    name, adapter = script.model_name_or_path, script.adapter
    if name is None and adapter is not None and (base := base_model_of(adapter, config.hub_token)) is not None:
        raise ValueError(
            f"the adapter {adapter} was trained on {base}, not on the embedded pipeline: add --model_name_or_path "
            f"{base}."
        )
    pipe = load_shapes_pipeline() if name is None else load_pipeline(name, cast(dict, config.model_init_kwargs or {}))
    if adapter is not None:
        load_adapter(pipe, adapter, config.hub_token)
    return pipe
