"""`slas-trl generate`: pictures of a prompt, from the embedded pipeline or any other, with or without an adapter."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="slas-trl generate", allow_abbrev=False, description=__doc__)
    parser.add_argument("--prompt", required=True, help="what to draw")
    parser.add_argument("--output", required=True, help="picture to write; several pictures make one sheet")
    model = "folder, file or Hub id of a pipeline (default: that of the adapter's card, or the embedded one)"
    parser.add_argument("--model_name_or_path", help=model)
    parser.add_argument("--adapter", help="folder or Hub id of a LoRA adapter, such as a run's output_dir")
    dtypes = ["float32", "bfloat16", "float16"]
    parser.add_argument("--dtype", choices=dtypes, default="float32", help="that of training (default: float32)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first picture, the next has the next one")
    parser.add_argument("--num_images", type=int, default=1, help="number of pictures (default: 1)")
    parser.add_argument("--num_inference_steps", type=int, help="denoising steps (default: the pipeline's)")
    parser.add_argument("--guidance_scale", type=float, help="guidance (default: the pipeline's)")
    return parser


def main(argv: Sequence[str]) -> None:
    args = make_parser().parse_args(argv)
    output = Path(args.output)
    if not args.prompt.strip():
        raise ValueError("--prompt is empty.")
    for name in ("num_images", "num_inference_steps"):
        if (number := getattr(args, name)) is not None and number < 1:
            raise ValueError(f"--{name} must be at least 1, got {number}.")
    if not output.parent.is_dir():
        raise FileNotFoundError(f"the folder {output.parent} of --output does not exist. Make it first.")
    if output.suffix.lower() not in Image.registered_extensions() or output.is_dir():
        raise ValueError(f"--output must be a file with the name of an image format, such as x.png, got {output}.")

    # Only now: these imports take seconds, and bad arguments should be reported before.
    import torch

    from ..loading import base_model_of, load_with_adapter
    from ..policy import call_pipeline
    from ..reports.samples import sample_grid

    model = args.model_name_or_path
    if model is None and args.adapter is not None and (model := base_model_of(args.adapter)) is not None:
        print(f"The card of {args.adapter} names {model} as its base model, which is used.")
    pipe: Any = load_with_adapter(model, args.adapter, {"dtype": args.dtype})
    if torch.cuda.is_available():
        pipe.to("cuda")
    prompts = [args.prompt] * args.num_images
    # One generator a picture: the second picture of a sheet is the first one of the next seed.
    generators = [torch.Generator().manual_seed(args.seed + i) for i in range(args.num_images)]
    call = {"num_inference_steps": args.num_inference_steps, "guidance_scale": args.guidance_scale}
    call |= {"prompt": prompts, "generator": generators}
    made, problems = call_pipeline(pipe, {name: value for name, value in call.items() if value is not None})
    for problem in filter(None, problems):
        raise ValueError(f"{problems.count(problem)} of {args.num_images} pictures show nothing: {problem}.")
    picture = made.images[0] if args.num_images == 1 else sample_grid(made.images, prompts)
    picture.save(output)
    print(f"Wrote {output}.")
