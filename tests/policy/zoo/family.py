"""One entry of the zoo: a tiny pipeline of real classes with random weights, and how to call it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from tests.tiny_pipelines import finished


@dataclass(frozen=True)
class Family:
    """
    Attributes:
        title: as the table in the documentation names it.
        make: makes the pipeline.
        call: arguments of one call beside prompt, generator and num_inference_steps.
        task: "text-to-image", "image-to-image" or "image editing".
        images: the images of one call by argument name, for a task that needs some; called with the number of prompts.
        one_prompt: whether a call takes a single prompt only; then its images are those of `num_images_per_prompt`.
    """

    title: str
    make: Callable[[], Any]
    call: dict[str, Any] = field(default_factory=dict)
    task: str = "text-to-image"
    images: Callable[[int], dict[str, Any]] = lambda count: {}
    one_prompt: bool = False

    def build(self) -> Any:
        """The pipeline, with the same weights every time, in evaluation mode and frozen."""
        torch.manual_seed(0)
        return finished(self.make())

    def arguments(self, prompts: list[str], **changes: Any) -> dict[str, Any]:
        """Arguments of a call that makes `len(prompts)` images, each with a seed of its own."""
        count = len(prompts)
        call = {"prompt": prompts, **self.call, **self.images(count)}
        if self.one_prompt:
            call |= {"prompt": prompts[0], "num_images_per_prompt": count}
        generators = [torch.Generator().manual_seed(seed) for seed in range(count)]
        return {**call, "num_inference_steps": 3, "output_type": "np", "generator": generators, **changes}
