"""Python for a model card: it loads the result of a run with plain diffusers, and makes a picture."""

from typing import Any

from ..run_files import adapter_file
from .escaping import as_python
from .facts import Place, RunFacts


LINE = 88  # columns


def quick_start(facts: RunFacts, place: Place) -> str:
    """Python that loads the result from `place`, and makes the first picture of the gallery."""
    sample = facts.samples[0] if facts.samples else None
    inputs = sample.inputs if sample else {}
    lines = _imports(facts, bool(inputs) and place.on_hub)
    lines += ["", *_base(facts, place), *(["# From the folder of this card:"] if place.location == "." else [])]
    lines += _weights(facts, place)
    lines += ['pipe.to("cuda" if torch.cuda.is_available() else "cpu")', ""]
    images = {name: f'load_image("{name}.png")' for name in facts.picture_arguments}
    images |= {name: _loaded(paths, place) for name, paths in inputs.items()}
    arguments = {
        "prompt": as_python(sample.prompt if sample else facts.prompt),
        **images,
        **({"output_type": '"pil"'} if facts.output == "frames" else {}),
        **_written(facts.call),
        "generator": f"torch.Generator().manual_seed({sample.seed if sample else 0})",
    }
    if facts.picture_arguments and not inputs:
        lines += ["# Of your own picture:"]
    first = "frames[0][0]" if facts.output == "frames" else f"{facts.output}[0]"
    lines += [f"image = {_call('pipe', arguments, wrapped=True)}.{first}"]
    # Not over the reader's own picture.
    return "\n".join([*lines, f'image.save("{"edited" if facts.picture_arguments else "image"}.png")'])


def _imports(facts: RunFacts, downloads: bool) -> list[str]:
    classes = {_pipeline(facts)} - {"load_shapes_pipeline"} | set([] if facts.adapter else facts.denoisers.values())
    lines = ["import torch"]
    lines += [f"from diffusers import {', '.join(sorted(classes))}"] if classes else []
    lines += ["from diffusers.utils import load_image"] if facts.picture_arguments else []
    lines += ["from huggingface_hub import hf_hub_download"] if downloads else []
    return lines + (["from slas_trl.shapes import load_shapes_pipeline"] if facts.base.embedded else [])


def _pipeline(facts: RunFacts) -> str:
    """The code that makes the pipeline: its own class, as of a base model's parts another one may have been made."""
    import diffusers  # takes seconds

    own = facts.base.pipeline
    return "load_shapes_pipeline" if facts.base.embedded else own if own in dir(diffusers) else "DiffusionPipeline"


def _precision(facts: RunFacts) -> dict[str, str]:
    dtype = facts.base.dtype
    return {"torch_dtype": f"torch.{dtype}"} if dtype in ("bfloat16", "float16") else {}


def _base(facts: RunFacts, place: Place) -> list[str]:
    base, make = facts.base, _pipeline(facts)
    if base.embedded:
        return [f"pipe = {_call(make, _precision(facts))}"]
    source = base.hub_id or (None if place.on_hub else base.folder) or f"path/to/{base.name or 'base-model'}"
    arguments = {"": as_python(source), **_written(base.init_kwargs), **_precision(facts)}
    note = [] if base.hub_id else [f"# The {base.pipeline} that was trained, which is not on the Hub:"]
    return [*note, f"pipe = {_call(f'{make}.from_pretrained', arguments)}"]


def _weights(facts: RunFacts, place: Place) -> list[str]:
    lines, names = [], list(facts.denoisers)
    source = {"": as_python(place.location)} | _written({"revision": place.revision} if place.revision else {})
    for name, kind in facts.denoisers.items():
        # diffusers looks for the first one's file too, but in the main branch.
        is_other = name != names[0]
        file = _written({"weight_name": adapter_file(name, names)}) if is_other or place.revision else {}
        if not facts.adapter:
            arguments = {**source, "subfolder": as_python(name), **_precision(facts)}
            lines += [f"pipe.{name} = {_call(f'{kind}.from_pretrained', arguments)}"]
        elif facts.loads_lora:
            into = {f"load_into_{name}": "True"} if is_other else {}
            lines += [_call("pipe.load_lora_weights", {**source, **file, **into})]
        else:
            arguments = {**source, "prefix": "None", "use_safetensors": "True", **file}
            lines += [_call(f"pipe.{name}.load_lora_adapter", arguments)]
    return lines


def _loaded(paths: str | list[str], place: Place) -> str:
    """Python that reads pictures of the repository, or of the folder."""
    if isinstance(paths, list):
        return f"[{', '.join(_loaded(path, place) for path in paths)}]"
    if not place.on_hub:
        return f"load_image({as_python(f'{place.location}/{paths}')})"
    # Not the picture's address, which of a private repository cannot be read without the token.
    branch = f", revision={as_python(place.revision)}" if place.revision else ""
    return f"load_image(hf_hub_download({as_python(place.location)}, filename={as_python(paths)}{branch}))"


def _written(values: dict[str, Any]) -> dict[str, str]:
    return {name: as_python(value) for name, value in values.items()}


def _call(function: str, arguments: dict[str, str], wrapped: bool = False) -> str:
    """Python that calls it with this code as its arguments, the one without a name first; many have a line each."""
    written = [f"{name}={code}" if name else code for name, code in arguments.items()]
    line = f"{function}({', '.join(written)})"
    if not wrapped and len(line) <= LINE:
        return line
    return f"{function}(\n" + "".join(f"    {argument},\n" for argument in written) + ")"
