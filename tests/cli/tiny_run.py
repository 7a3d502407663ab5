"""A user's folder for the tests of the commands: a tiny model, prompts, rewards and `run.yaml`, with little to do."""

import contextlib
import logging
import os
import sys
import traceback
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, cast

import yaml

from slas_trl.cli.main import main
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
SMALL = [  # the same for the embedded pipeline
    *("--per_device_train_batch_size", "4", "--num_generations", "4", "--steps_per_generation", "1"),
    *("--num_inference_steps", "3"),
]
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


def forked(folder: Path, *argv: str, within: AbstractContextManager = contextlib.nullcontext()) -> int:  # noqa: B008
    """Run the command in a process that has all imports behind it; what it prints is in files. Returns its id."""
    if child := os.fork():
        return child
    status = 1
    try:
        os.chdir(folder)
        sys.argv = ["slas-trl", *argv]
        logging.getLogger().handlers.clear()  # pytest's
        with open("stderr", "w", buffering=1) as sys.stderr, open("stdout", "w", buffering=1) as sys.stdout, within:
            os.dup2(sys.stderr.fileno(), 2)
            status = main()
    except SystemExit as end:
        status = cast(int, end.code)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)
