"""
Fine-tune an image-editing pipeline: the picture to edit is a column of the data set, and reaches pipeline and rewards.

    python examples/image_editing.py --dataset_name edits.jsonl
    python examples/image_editing.py --dataset_name edits.jsonl --model_name_or_path Qwen/Qwen-Image-Edit \
        --pipeline_kwargs '{"true_cfg_scale": 4.0, "negative_prompt": " "}'

`edits.jsonl` has a line for each edit, with a path that is relative to it:
{"prompt": "make it more colorful", "image": "photos/1.png"}. The two rewards, without a model of their own, ask for
vivid colors and for what is in the picture to stay where it is; your own take the same arguments. Any option of
`slas-trl train` may follow; what is not given is set by SETTINGS.
"""

import sys
from collections.abc import Sequence

import numpy as np
from PIL.Image import Image

from slas_trl.scripts.arguments import parse
from slas_trl.trainer import SLASTrainer
from slas_trl.trainer.prompts import load_prompts


SETTINGS = {
    "model_name_or_path": "black-forest-labs/FLUX.1-Kontext-dev",
    "model_init_kwargs": '{"torch_dtype": "bfloat16"}',
    "bf16": "true",
    "use_peft": "true",
    "lora_r": "32",
    "lora_alpha": "64",
    "learning_rate": "3e-4",
    "activation_checkpointing": "true",
    "offload_frozen_components": "true",
    "num_generations": "12",
    # A call is of one prompt and its picture, so a chunk has to lie within a group.
    "per_device_train_batch_size": "2",
    "num_inference_steps": "10",
    "sde_window_size": "3",
    "max_steps": "200",
    "output_dir": "runs/editing",
}


def vividness(prompts: list[str], images: list[Image], **columns) -> list[float]:
    """Mean difference between the strongest and the weakest channel of a pixel, in [0, 1]."""
    return [float(np.ptp(np.asarray(image.convert("RGB")), axis=-1).mean()) / 255 for image in images]


def layout(prompts: list[str], images: list[Image], image: list[Image], **columns) -> list[float]:
    """Correlation of the brightness of the picture made with that of the picture given, on a grid of 16 × 16."""
    return [float(np.corrcoef(_grid(made), _grid(given))[0, 1]) for made, given in zip(images, image, strict=True)]


def _grid(image: Image) -> np.ndarray:
    grid = np.asarray(image.convert("L").resize((16, 16)), dtype=np.float64).ravel()
    return grid + 1e-6 * np.arange(grid.size)  # a picture of one gray has a correlation too


def main(argv: Sequence[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    given = {word[2:].split("=")[0] for word in argv if word.startswith("--")}
    defaults = [part for name, value in SETTINGS.items() if name not in given for part in (f"--{name}", value)]
    script, lora, config = parse([*defaults, *argv], prog="image_editing.py")
    if script.dataset_name is None or script.model_name_or_path is None:
        raise SystemExit("--dataset_name is missing: a .jsonl file with the columns prompt and image.")
    trainer = SLASTrainer(
        script.model_name_or_path,
        [vividness, layout],
        config,
        train_dataset=load_prompts(script.dataset_name),
        peft_config=lora.peft_config(),
    )
    trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    trainer.save_model()
    print(f"Done: the adapter is in {config.output_dir}.")


if __name__ == "__main__":
    main()
