"""The gate between a pipeline and whoever gets its pictures: rewards, files and trackers."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from diffusers import ModelMixin
from torch.utils import _pytree as pytree


FLAGS = ("nsfw_content_detected", "nsfw_detected")  # what diffusers' outputs call the verdicts of a safety checker


def call_pipeline(pipe: Any, call: dict[str, Any]) -> tuple[Any, list[str | None]]:
    """
    Call the pipeline, and find the pictures that show nothing of the policy: PIL makes black of NaN, and so does a
    safety checker of what it flags.

    Returns what the pipeline returned, and for each of its B images what is wrong with it, or `None`.
    """
    models = {name: part for name, part in pipe.components.items() if isinstance(part, ModelMixin)}
    decoders: dict[str, Any] = {name: model for name, model in models.items() if hasattr(model, "decode")}
    decoded: list[torch.Tensor] = []
    with ExitStack() as stack:
        for decoder in decoders.values():
            stack.enter_context(_noting_finite(decoder, decoded))
        output = pipe(**call)
    count = len(output[0])
    finite = torch.cat(decoded).tolist() if decoded else [True] * count
    if len(finite) != count:  # frames, tiles, or several at a time: nobody knows whose they are
        finite = [all(finite)] * count
    flags = [output[name] for name in FLAGS if name in output] if isinstance(output, dict) else []
    flagged = flags[0] if flags else [False] * count
    types = ", ".join(f"{name} in {decoder.dtype}" for name, decoder in decoders.items())
    broken = f"the decoder ({types}) made NaN or infinity; if it is not in float32, load it so"
    black = "the safety checker blackened it; load the pipeline with safety_checker=None"
    verdicts = zip(finite, flagged, strict=True)
    return output, [broken if not fine else black if is_flagged else None for fine, is_flagged in verdicts]


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Within, `owner.name` is `value`, past `__setattr__`: models and pipelines register what is assigned to them."""
    namespace, missing = vars(owner), object()
    before = namespace.get(name, missing)
    namespace[name] = value
    try:
        yield
    finally:
        namespace[name] = before
        if before is missing:
            del namespace[name]


def _noting_finite(decoder: Any, decoded: list[torch.Tensor]) -> AbstractContextManager[None]:
    """Within, `decoded` gets for each call of `decoder.decode` whether its samples are finite, `(B,)`."""
    decode = decoder.decode

    def noting(*args: Any, **kwargs: Any) -> Any:
        result = decode(*args, **kwargs)
        pixels = next(leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor))
        decoded.append(pixels.isfinite().flatten(1).all(1))
        return result

    return replaced(decoder, "decode", noting)
