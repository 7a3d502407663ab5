"""`slas-trl env`: versions and devices, for a bug report."""

import argparse
import platform
from collections.abc import Sequence
from importlib.metadata import distributions

from .. import __version__


PACKAGES = (
    *("torch", "diffusers", "transformers", "accelerate", "peft", "trl", "datasets", "huggingface_hub", "safetensors"),
    *("numpy", "scipy", "pillow", "matplotlib"),
    *("torchvision", "open_clip_torch", "rapidocr", "deepspeed", "bitsandbytes", "tensorboard", "trackio", "wandb"),
)


def main(argv: Sequence[str]) -> None:
    argparse.ArgumentParser(prog="slas-trl env", description=__doc__).parse_args(argv)
    print("Copy and paste this into a bug report:\n")
    print(f"- slas-trl: {__version__}")
    print(f"- Python: {platform.python_version()}")
    print(f"- Platform: {platform.platform()}")
    for package in PACKAGES:
        found = next(iter(distributions(name=package)), None)  # however its name is spelled
        print(f"- {package}: {found.version if found else 'not installed'}")
    print(f"- Accelerators: {_accelerators()}")


def _accelerators() -> str:
    import torch

    if torch.cuda.is_available():
        return ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    return "Apple MPS" if torch.backends.mps.is_available() else "none, CPU only"
