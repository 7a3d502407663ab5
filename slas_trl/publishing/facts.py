"""The facts of a run, in `model_card.json` beside every set of weights: the card is rendered from them."""

import json
import re
import sys
import time
from collections.abc import Container, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from .. import run_files


PACKAGES = ("slas-trl", "torch", "diffusers", "transformers", "trl", "peft", "accelerate", "datasets")
CACHED = re.compile(r"models--([\w.-]+?)--([\w.-]+)")  # folder of a repository in the Hub's cache


@dataclass
class Base:
    """The model that was trained."""

    pipeline: str  # class of the pipeline, such as "FluxPipeline"
    hub_id: str | None = None
    embedded: bool = False  # whether it comes with this package
    name: str | None = None  # of the folder it was loaded from
    folder: str | None = None  # that folder as seen from the working folder; not in a card for the Hub
    init_kwargs: dict[str, Any] = field(default_factory=dict)  # of `from_pretrained`, those that select weights
    dtype: str = "float32"  # of the denoiser's weights
    license: str | None = None  # this and the next two as its own card says
    license_name: str | None = None
    license_link: str | None = None


@dataclass
class RewardOnCard:
    """A reward; its weight is 0 if it was held out."""

    name: str
    weight: float
    blind_to: str | None = None
    measures: str | None = None


@dataclass
class Sample:
    """A prompt and its pictures, by their paths in the run's folder; the seed is that of both."""

    prompt: str
    after: str
    before: str | None = None
    seed: int = 0
    inputs: dict[str, str | list[str]] = field(default_factory=dict)  # pictures to edit, by argument of the call

    @property
    def paths(self) -> list[str]:
        inputs = [path for value in self.inputs.values() for path in ([value] if isinstance(value, str) else value)]
        return [*inputs, *filter(None, [self.before]), self.after]


@dataclass
class Metric:
    """A mean over `prompts` prompts, the half width of its 95% interval, and the mean before training."""

    name: str
    value: float
    half_width: float | None = None
    prompts: int | None = None
    before: float | None = None


@dataclass
class Evaluation:
    how: str  # one or two sentences: which prompts, how many pictures, which sampler, what ± is
    rows: list[list[str]]  # the table, its head first
    metrics: list[Metric] = field(default_factory=list)  # the same as numbers, for the metadata
    prompts_are: str = "evaluation"  # or "held-out" or "training"


@dataclass
class Place:
    """Where the card's code loads the weights from: a folder, or `on_hub` a repository and its branch."""

    location: str = "."
    revision: str | None = None
    on_hub: bool = False


@dataclass
class RunFacts:
    """All that the card says of a run. Paths are relative to the run's folder."""

    name: str  # of the model
    base: Base
    adapter: bool  # whether the result is a LoRA adapter; otherwise it is whole denoisers
    denoisers: dict[str, str]  # component and class of each that was trained, the first one first
    loads_lora: bool = True  # whether the pipeline has `load_lora_weights`; if not, denoisers have `load_lora_adapter`
    picture_arguments: list[str] = field(default_factory=list)  # of the call, for pipelines that edit
    output: str = "images"  # field of the pipeline's output: "images", "image" or "frames"
    call: dict[str, Any] = field(default_factory=dict)  # its arguments beside the prompt, such as steps and guidance
    prompt: str = ""  # for the quick start, if there are no samples
    rewards: list[RewardOnCard] = field(default_factory=list)
    settings: list[list[Any]] = field(default_factory=list)  # name, value and meaning of each that makes the result
    step: int = 0  # updates made
    max_steps: int = 0  # updates planned; the card of a run under way says so
    dataset: str | None = None  # of the prompts: a Hub id, a file's name, or "shapes"
    dataset_on_hub: bool = False
    train_prompts: int = 0  # how many
    started_from: str | None = None  # the adapter that training went on from
    other_adapters: list[str] = field(default_factory=list)  # of the pipeline, without which the result is another
    evaluation: Evaluation | None = None
    samples: list[Sample] = field(default_factory=list)
    sheet: str | None = None  # path of the comparison
    curves: str | None = None  # path
    calibration: str | None = None  # path of the panel
    reading: str | None = None  # what the panel says of the rewards
    ema_decay: float | None = None  # where the weights are a moving average
    versions: dict[str, str] = field(default_factory=dict)  # of packages, by name
    tags: list[str] = field(default_factory=list)  # further ones for the Hub
    place: Place = field(default_factory=Place)  # for which the card beside these facts was rendered
    written: float = field(default_factory=time.time)  # seconds since the epoch

    @property
    def of_shapes(self) -> bool:
        """Whether scores and pictures are of the embedded pipeline's own prompts, whatever those of training were."""
        return self.base.embedded and self.evaluation is not None and self.evaluation.prompts_are == "held-out"

    @property
    def pictures(self) -> list[str]:
        """Paths of all pictures that the card shows."""
        paths = [path for sample in self.samples for path in sample.paths]
        return list(dict.fromkeys(filter(None, [*paths, self.sheet, self.curves, self.calibration])))

    def keep_pictures(self, files: Container[str]) -> None:
        """Leave out those that are not among `files`."""
        self.samples = [sample for sample in self.samples if all(path in files for path in sample.paths)]
        for name in ("sheet", "curves", "calibration"):
            if getattr(self, name) not in files:
                setattr(self, name, None)

    def write(self, folder: Path) -> None:
        run_files.write_text(folder / run_files.FACTS, json.dumps(asdict(self), indent=2) + "\n")


def read_facts(folder: Path) -> RunFacts:
    """The facts of the weights in `folder`. Raises `FileNotFoundError` or `ValueError` if they cannot be read."""
    file = folder / run_files.FACTS
    if not file.is_file():
        raise FileNotFoundError(f"{str(folder)!r} has no {run_files.FACTS}, which a run writes beside its weights.")
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        scores = data["evaluation"]
        data["evaluation"] = scores and Evaluation(**{**scores, "metrics": [Metric(**m) for m in scores["metrics"]]})
        data["base"], data["place"] = Base(**data["base"]), Place(**data["place"])
        data["rewards"] = [RewardOnCard(**reward) for reward in data["rewards"]]
        data["samples"] = [Sample(**sample) for sample in data["samples"]]
        return RunFacts(**data)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{str(file)!r} is damaged, or of another version of slas-trl ({error!r}).") from error


def base_of(pipe: Any, dtype: str, init_kwargs: Mapping[str, Any], embedded: Path) -> Base:
    """The pipeline's name on the Hub, or that of its folder. The one of this package lies in `embedded`."""
    chosen = {k: v for k, v in init_kwargs.items() if v is None or k in ("variant", "revision")}  # no path, no token
    base = Base(type(pipe).__name__, init_kwargs=chosen, dtype=dtype)
    if pipe.name_or_path is None:
        return base
    path = Path(pipe.name_or_path)
    if path == embedded:
        return replace(base, embedded=True, license="apache-2.0")
    if not path.exists():
        return replace(base, hub_id=pipe.name_or_path if is_hub_id(pipe.name_or_path) else None)
    if cached := [match for part in path.parts if (match := CACHED.fullmatch(part))]:
        return replace(base, hub_id="/".join(cached[-1].groups()))
    folder = local_name(path)
    return replace(base, name=path.resolve().name, folder=None if folder == "." else folder)


def is_hub_id(name: str) -> bool:
    """Whether this can be the name of a repository."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def local_name(folder: Path) -> str:
    """A folder as seen from the working folder, without the path to there; "." if it is elsewhere."""
    here, there = Path.cwd(), folder.resolve()
    return there.relative_to(here).as_posix() if there.is_relative_to(here) else "."


def output_of(pipe: Any) -> str:
    """The field of the pipeline's output that has the pictures: "images", "frames" or "image"."""
    for base in type(pipe).__mro__:
        for name, kind in vars(sys.modules[base.__module__]).items():
            if name.endswith("PipelineOutput") and is_dataclass(kind):
                return fields(kind)[0].name
    return "images"


def plain(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that can be written down: texts, numbers, and lists of them."""
    listed = {name: list(value) if isinstance(value, tuple) else value for name, value in arguments.items()}
    items = {name: value if isinstance(value, list) else [value] for name, value in listed.items()}
    simple = str | int | float | bool | None
    return {name: listed[name] for name in listed if all(isinstance(item, simple) for item in items[name])}


def versions() -> dict[str, str]:
    return {name: version(name) for name in PACKAGES}
