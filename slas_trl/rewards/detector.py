"""Does a picture show the objects, numbers, colors and positions that were asked for? GenEval's checks."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..images import to_rgb
from .base import ModelReward, from_hub, in_batches, load_once, load_pretrained
from .clip import load_clip
from .geneval import COLORS, Detection, Specification, canonical, judge, read_specification


_TEMPLATES = ("a photo of a {} {}", "a photo of a {}-colored {}", "a photo of a {} object")


@dataclass(frozen=True)
class ObjectDetector(ModelReward):
    """
    GenEval's checks with any of transformers' models for object detection or instance segmentation: which objects, how
    many, of which color (by CLIP), on which side of each other. Demands are columns "include", "exclude" and "tag", or
    a column "metadata" of such rows or their JSON, in [GenEval's format](https://github.com/djghosh13/geneval):

        {"tag": "position", "include": [{"class": "dog", "count": 1},
                                        {"class": "cat", "count": 1, "color": "black", "position": ["left of", 0]}]}

    "reward" is the share of demands that are met, see [`~slas_trl.rewards.geneval.judge`]; "strict" is GenEval's
    verdict, 0 or 1; both are `None` for a row without demands. The detector is not that of the published numbers.

    Args:
        model (`str`, *optional*): Repository or folder. With masks, colors are judged without the background.
        clip (`str`, *optional*): Repository or folder of the CLIP that names colors, loaded when one is asked for.
        strict (`bool`, *optional*, defaults to `False`): The reward is GenEval's verdict, 1 or 0.
        threshold, counting_threshold (`float`, *optional*, default to `0.3`, `0.9`):
            Confidence from which an object counts, and where numbers are asked for: GenEval's. RT-DETR needs less.

    Raises:
        `ValueError`: for a missing column, a row that is not understood, and classes that the detector does not know.
    """

    default_name = "object_detector"
    measures = "whether an object detector finds what was asked for: objects, their number, color and place"
    blind_to = "all but the objects of the detector's classes, and how they are drawn"
    model: str = "facebook/mask2former-swin-small-coco-instance"
    clip: str = "openai/clip-vit-large-patch14"
    strict: bool = False
    threshold: float = 0.3
    counting_threshold: float = 0.9

    def _scores(self, prompts: list[str], images: list[Image.Image], columns: dict[str, Any]) -> dict[str, list]:
        wanted = _specifications(self.__name__, len(prompts), columns)
        asked = set().union(*(specification.names for specification in wanted.values()))
        if asked and (unknown := asked - (known := self._known_classes())):
            raise ValueError(f"The detector of {self.__name__} has no class {min(unknown)!r}, but {sorted(known)}.")
        rgb = {i: to_rgb(images[i]) for i in wanted}
        found = self._detect(rgb, {i: specification.names for i, specification in wanted.items()})

        graded: list[float | None] = [None] * len(images)
        strict: list[float | None] = [None] * len(images)
        for i, specification in wanted.items():
            colors = partial(self._colors, rgb[i])
            share, right = judge(specification, found[i], colors, self.threshold, self.counting_threshold)
            graded[i], strict[i] = share, float(right)
        return {"reward": list(strict) if self.strict else graded, "strict": strict}

    def _known_classes(self) -> set[str]:
        model, _ = _load_detector(self.model, self.torch_device, self.torch_dtype)
        return {canonical(name) for name in model.config.id2label.values()}

    def _detect(self, images: dict[int, Image.Image], names: dict[int, set[str]]) -> dict[int, list[Detection]]:
        # A batch is of images of one size: padding would make an object depend on what else is in the batch.
        found, sizes = {}, {i: image.size for i, image in images.items()}
        for size in sorted({*sizes.values()}):
            for batch in in_batches([i for i in sizes if sizes[i] == size], self.batch_size):
                objects = self._run([images[i] for i in batch], [names[i] for i in batch])
                found.update(zip(batch, objects, strict=True))
        return found

    def _run(self, images: list[Image.Image], names: list[set[str]]) -> list[list[Detection]]:
        model, processor = _load_detector(self.model, self.torch_device, self.torch_dtype)
        inputs = processor(images=images, return_tensors="pt").to(self.torch_device, self.torch_dtype)
        output = model(**inputs)
        for key, value in output.items():
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                output[key] = value.float()
        options: dict[str, Any] = {"threshold": min(self.threshold, self.counting_threshold)}
        if "masks_queries_logits" in output or "pred_masks" in output:
            read, process = _instances, processor.post_process_instance_segmentation
            if "return_binary_maps" in inspect.signature(process).parameters:  # not DETR's
                options["return_binary_maps"] = True
        else:
            read, process = _boxes, processor.post_process_object_detection
        results = process(output, target_sizes=[image.size[::-1] for image in images], **options)
        return [read(model, result, asked) for result, asked in zip(results, names, strict=True)]

    def _colors(self, image: Image.Image, group: Sequence[Detection]) -> list[str]:
        """The most likely of `COLORS` for each object of a class."""
        clip = load_clip(self.clip, None, self.torch_dtype, self.torch_device)
        name = canonical(group[0].label)
        texts = [template.format(color, name) for color in COLORS for template in _TEMPLATES]
        words = clip.texts(texts, self.batch_size).reshape(len(COLORS), len(_TEMPLATES), -1).mean(1)
        seen = clip.images([cut_out(image, one) for one in group], self.batch_size)
        nearest = (seen @ torch.nn.functional.normalize(words, dim=-1).T).argmax(1)
        return [COLORS[index] for index in nearest.tolist()]


object_detector = ObjectDetector()


def cut_out(image: Image.Image, one: Detection) -> Image.Image:
    """An object's part of a picture, on gray where its mask tells it from the background."""
    if one.mask is not None:
        gray = Image.new("RGB", image.size, (0x99, 0x99, 0x99))
        image = Image.composite(image, gray, Image.fromarray(np.asarray(one.mask, dtype=bool)))
    left, top = (min(max(int(low), 0), size - 1) for low, size in zip(one.box[:2], image.size, strict=True))
    right, bottom = (int(np.ceil(high)) for high in one.box[2:])
    return image.crop((left, top, max(left + 1, min(right, image.width)), max(top + 1, min(bottom, image.height))))


def _specifications(name: str, n: int, columns: dict[str, Any]) -> dict[int, Specification]:
    present = {key: columns[key] for key in ("include", "exclude", "tag") if columns.get(key) is not None}
    rows = columns.get("metadata")
    if rows is None and not present.keys() & {"include", "exclude"}:
        there = sorted(columns.keys() - {"completions"})
        raise ValueError(f"{name} needs a column metadata, or include and exclude, as GenEval has; there are {there}.")
    if rows is None:
        rows = [{key: values[i] for key, values in present.items()} for i in range(n)]
    wanted = {i: read_specification(row) for i, row in enumerate(rows)}
    return {i: specification for i, specification in wanted.items() if specification is not None}


def box_of(mask: np.ndarray) -> tuple[float, float, float, float]:
    """Around all that is in a mask `(H, W)`."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def _boxes(model: Any, result: dict[str, torch.Tensor], asked: set[str]) -> list[Detection]:
    labels = [model.config.id2label[index] for index in result["labels"].tolist()]
    found = zip(labels, result["scores"].tolist(), result["boxes"].tolist(), strict=True)
    return [Detection(label, score, tuple(box)) for label, score, box in found if canonical(label) in asked]


def _instances(model: Any, result: dict[str, Any], asked: set[str]) -> list[Detection]:
    """Objects of these classes with their masks, and the boxes around these."""
    found, maps = [], result["segmentation"]
    for index, segment in enumerate(result["segments_info"]):
        label = model.config.id2label[segment["label_id"]]
        if canonical(label) in asked:
            mask = (maps[index] > 0.5 if maps.ndim == 3 else maps == segment["id"]).cpu().numpy()
            if mask.any():
                found.append(Detection(label, float(segment["score"]), box_of(mask), mask))
    return found


@load_once
def _load_detector(name: str, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoImageProcessor, AutoModelForObjectDetection
    from transformers import AutoModelForUniversalSegmentation as AutoModelForSegmentation

    with from_hub(name):
        config = AutoConfig.from_pretrained(name)
        segments = "Segmentation" in "".join(config.architectures or ())
        model = load_pretrained(AutoModelForSegmentation if segments else AutoModelForObjectDetection, name, dtype)
        processor = AutoImageProcessor.from_pretrained(name, backend="pil")  # as without torchvision
    return model.to(device), processor
