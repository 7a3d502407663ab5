"""Python for a model card: it loads the result of a run with plain diffusers, and makes a picture."""

import re
from typing import TYPE_CHECKING, Any

from slas_trl.markdown import as_python


if TYPE_CHECKING:
    from slas_trl.run_facts import RunFacts

ADAPTER_FILE = "pytorch_lora_weights.safetensors"
LOADS_IMAGES = "from diffusers.utils import load_image"
DOWNLOADS = "from huggingface_hub import hf_hub_download"
FROM_HERE = "# From the folder of this card:"
LINE = 88  # columns


def adapter_file(name: str, names: list[str]) -> str:
    """
    The file of denoiser `name`'s adapter. A second denoiser's lies beside the first's under a name that
    `pipe.load_lora_weights` does not take for it, as it would take one in a subfolder of a repository.
    """
    return ADAPTER_FILE if name == names[0] else ADAPTER_FILE.replace(".", f"_{name}.")


def quick_start(facts: "RunFacts", location: str, revision: str | None = None, on_hub: bool = False) -> str:
    """
    Python that loads the result from `location`, a folder or, where it is `on_hub`, a Hub id, with plain diffusers,
    and makes a picture.
    """
    import diffusers  # takes seconds

    base, dtype = facts.base, facts.base.dtype
    # Of the repository's parts another pipeline may have been made, such as one that edits.
    pipeline = base.pipeline if base.pipeline in dir(diffusers) else "DiffusionPipeline"
    place = {"": location, **({"revision": revision} if revision else {})}
    precision = {"torch_dtype": _Name(f"torch.{dtype}")} if dtype in ("bfloat16", "float16") else {}
    classes = [] if base.embedded else [pipeline]
    classes += [] if facts.adapter else sorted(set(facts.denoisers.values()))
    scheduler = facts.scheduler
    classes += [scheduler.name] if scheduler is not None and scheduler.name in dir(diffusers) else []
    inputs = facts.samples[0].inputs if facts.samples else {}
    lines = ["import torch"]
    lines += [f"from diffusers import {', '.join(sorted(classes))}"] if classes else []
    lines += [LOADS_IMAGES] if facts.picture_arguments else []
    lines += [DOWNLOADS] if inputs and on_hub else []
    if base.embedded:
        lines += ["from slas_trl.shapes import load_shapes_pipeline", ""]
        lines += [f"pipe = {_call('load_shapes_pipeline', precision)}"]
    else:
        lines += [""] if base.hub_id else ["", f"# The {base.pipeline} that was trained, which is not on the Hub:"]
        source = base.hub_id or base.folder or f"path/to/{base.name or 'base-model'}"
        arguments = {"": source, **base.init_kwargs, **precision}
        lines += [f"pipe = {_call(f'{pipeline}.from_pretrained', arguments)}"]
    if scheduler is not None and scheduler.name in classes:
        arguments = {"": _Name("pipe.scheduler.config"), **scheduler.changes}
        lines += [f"pipe.scheduler = {_call(f'{scheduler.name}.from_config', arguments)}"]
    elif scheduler is not None:
        lines += [f"# Trained with a scheduler of its own, {scheduler.name}; put it in the place of pipe.scheduler."]
    if location == ".":
        lines += [FROM_HERE]
    for i, (name, kind) in enumerate(facts.denoisers.items()):
        # Of the first, diffusers finds the name, but looks for it in the main branch.
        file = {"weight_name": adapter_file(name, list(facts.denoisers))} if i or revision else {}
        if not facts.adapter:
            arguments = {**place, "subfolder": name, **precision}
            lines += [f"pipe.{name} = {_call(f'{kind}.from_pretrained', arguments)}"]
        elif facts.loads_lora:
            into = {f"load_into_{name}": True} if i else {}
            lines += [_call("pipe.load_lora_weights", {**place, **file, **into})]
        else:
            arguments = {**place, "prefix": None, "use_safetensors": True, **file}
            lines += [_call(f"pipe.{name}.load_lora_adapter", arguments)]
    lines += ['pipe.to("cuda" if torch.cuda.is_available() else "cpu")', ""]
    prompt, seed = (facts.samples[0].prompt, facts.samples[0].seed) if facts.samples else (facts.prompt, 0)
    images = {name: _Name(f'load_image("{name}.png")', "  # your own picture") for name in facts.picture_arguments}
    images |= {name: _Name(_loaded(paths, place, on_hub)) for name, paths in inputs.items()}
    pillow = {"output_type": "pil"} if facts.output == "frames" else {}
    noise = {"generator": _Name(f"torch.Generator().manual_seed({seed})")}
    arguments = {"prompt": prompt, **images, **pillow, **facts.call, **noise}
    first = "frames[0][0]" if facts.output == "frames" else f"{facts.output}[0]"
    lines += [f"image = {_call('pipe', arguments, one_line=False)}.{first}"]
    # Not over the reader's own picture.
    lines += [f'image.save("{"edited" if facts.picture_arguments else "image"}.png")']
    return "\n".join(lines)


def _loaded(paths: str | list[str], place: dict[str, Any], on_hub: bool) -> str:
    """Python that reads pictures of the repository, or of the folder."""
    if isinstance(paths, list):
        return f"[{', '.join(_loaded(path, place, on_hub) for path in paths)}]"
    if not on_hub:
        return f"load_image({as_python(place[''] + '/' + paths)})"
    # Not the picture's address, which of a private repository cannot be read without the token.
    arguments = {"": place[""], "filename": paths, **place}
    written = ", ".join(_argument(name, value, wrapped=False) for name, value in arguments.items())
    return f"load_image(hf_hub_download({written}))"


class _Name:
    """Code among values, and what is said of it at the end of its line."""

    def __init__(self, code: str, comment: str = ""):
        self.code, self.comment = code, comment


def _call(function: str, arguments: dict[str, Any], one_line: bool = True) -> str:
    """Python that calls it; the argument without a name comes first, and many have a line each."""
    line = f"{function}({', '.join(_argument(name, value, wrapped=False) for name, value in arguments.items())})"
    if one_line and len(line) <= LINE:
        return line
    lines = ""
    for name, value in arguments.items():
        comment = value.comment if isinstance(value, _Name) else ""
        lines += f"    {_argument(name, value, wrapped=True)},{comment}\n"
    return f"{function}(\n{lines})"


def _argument(name: str, value: Any, wrapped: bool) -> str:
    prefix = f"{name}=" if name else ""
    if isinstance(value, _Name):
        return prefix + value.code
    parts = _lines(value) if wrapped and isinstance(value, str) else [value]
    if len(parts) == 1:
        return prefix + as_python(value)
    return f"{prefix}(\n" + "".join(f"        {as_python(part)}\n" for part in parts) + "    )"


def _lines(text: str) -> list[str]:
    """The text in parts, cut between words."""
    lines = [""]
    for word in re.findall(r"\S*\s+|\S+", text):
        if lines[-1] and len(lines[-1] + word) > LINE - 12:
            lines.append("")
        lines[-1] += word
    return lines
