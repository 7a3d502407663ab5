"""A user's folder for the tests of the commands: a tiny model, prompts, rewards and `run.yaml`, with little to do."""

from pathlib import Path
from typing import Any

import yaml

from tests.tiny_pipelines import sd_pipeline


RUN = {
    "model_name_or_path": "model",
    "dataset_name": "prompts.txt",
    "num_generations": 4,
    "per_device_train_batch_size": 8,
    "steps_per_generation": 1,
    "num_inference_steps": 3,
    "height": 16,
    "width": 16,
    "max_steps": 2,
    "use_cpu": True,
    "output_dir": "run",
}
PROMPTS = ["a dot", "a box", "dots", "a bar"]
REWARDS = """
def darkness(prompts, images, **columns):
    return [1 - sum(image.convert("L").tobytes()) / (255 * image.width * image.height) for image in images]

def redness(prompts, images, **columns):
    return [sum(image.getchannel("R").tobytes()) / (255 * image.width * image.height) for image in images]
"""


def make_home(folder: Path, module: str, rewards: str = REWARDS, **settings: Any) -> Path:
    """The folder, with the rewards in a module of this name, which is one for each test file: modules are cached."""
    sd_pipeline().save_pretrained(folder / "model")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    (folder / f"{module}.py").write_text(rewards)
    (folder / "run.yaml").write_text(yaml.safe_dump({**RUN, "reward_funcs": [f"{module}:darkness"], **settings}))
    return folder
