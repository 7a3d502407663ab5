"""
What is known of a run: what it trained and how, how well the result does, and the pictures that show it.

The trainer gathers it for the model card, and keeps it as JSON beside the card, so that the card can be written anew
for another place: `runs/shapes` becomes `user/shapes` in its code when a run is pushed.
"""

from collections.abc import Container
from dataclasses import asdict, dataclass, field, replace
from typing import Any


FACTS_FILE = "model_card.json"  # stays in the run's folder


@dataclass
class Base:
    """
    What was trained from.

    Attributes:
        pipeline (`str`): class of the pipeline, such as `"FluxPipeline"`.
        hub_id (`str`, *optional*): where it is on the Hub; `None` if it is not there, or nobody knows.
        embedded (`bool`): whether it is the one that comes with this package.
        name (`str`, *optional*): of the folder it was loaded from; its own name only, no path.
        folder (`str`, *optional*): that folder as seen from where the run was started; not for the Hub.
        init_kwargs (`dict[str, Any]`): arguments of `from_pretrained` that belong to the model, such as `variant`.
        dtype (`str`): of the denoiser's weights, such as `"bfloat16"`.
        license, license_name, license_link (`str`, *optional*): as its own card says.
    """

    pipeline: str
    hub_id: str | None = None
    embedded: bool = False
    name: str | None = None
    folder: str | None = None
    init_kwargs: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None


@dataclass
class Reward:
    """
    One reward.

    Attributes:
        name (`str`): in the logs.
        weight (`float`): 0 for one that was only watched.
        blind_to, measures (`str`, *optional*):
            see [`~rewards.blind_spots.BLIND_SPOTS`]; `None` for one that is not of this package.
    """

    name: str
    weight: float
    blind_to: str | None = None
    measures: str | None = None


@dataclass
class Sample:
    """
    A prompt and its pictures, by their paths in the run's folder; the seed is that of both. `inputs` are the pictures
    that were edited, by the argument of the pipeline's call: a path, or a list of them.
    """

    prompt: str
    after: str
    before: str | None = None
    seed: int = 0
    inputs: dict[str, str | list[str]] = field(default_factory=dict)

    @property
    def input_paths(self) -> list[str]:
        """All of them."""
        values = self.inputs.values()
        return [path for value in values for path in (value if isinstance(value, list) else [value])]


@dataclass
class Scheduler:
    """A diffusers class, and the values in which its configuration differs from what it takes of the base model's."""

    name: str
    changes: dict[str, Any] = field(default_factory=dict)


@dataclass
class Metric:
    """A mean over `prompts` prompts after training, the ends of its 95% interval, and the mean before training."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    prompts: int | None = None
    before: float | None = None


@dataclass
class Evaluation:
    """
    Scores, as they were measured.

    Attributes:
        how (`str`): one or two sentences: which prompts, how many pictures, which sampler, what ± is.
        columns (`list[str]`): heads of the table, such as `["reward", "before", "after", "change"]`.
        rows (`list[list[str]]`): its cells, as text.
        metrics (`list[Metric]`): the same as numbers, for the metadata.
        prompts_are (`str`): `"held-out"`, `"evaluation"` or `"training"`.
    """

    how: str
    columns: list[str]
    rows: list[list[str]]
    metrics: list[Metric] = field(default_factory=list)
    prompts_are: str = "evaluation"


@dataclass
class RunFacts:
    """
    All that the card says of a run.

    Attributes:
        name (`str`): of the model; by default that of the folder or of the repository.
        base ([`Base`]): what was trained from.
        adapter (`bool`): whether the result is a LoRA adapter; otherwise it is whole denoisers.
        denoisers (`dict[str, str]`): component and class of each that was trained, the first one first:
            `{"transformer": "WanTransformer3DModel", "transformer_2": "WanTransformer3DModel"}`.
        loads_lora (`bool`):
            whether the pipeline has `load_lora_weights`; if not, its denoisers have `load_lora_adapter`.
        picture_arguments (`list[str]`): arguments of the call that are images, of pipelines that edit.
        scheduler ([`Scheduler`], *optional*): the pipeline's own, where it is not the base model's.
        output (`str`): field of the pipeline's output: `"images"` or `"frames"`.
        call (`dict[str, Any]`): arguments of the call beside the prompt, such as steps and guidance.
        prompt (`str`): one, for the quick start.
        rewards (`list[Reward]`): those trained on, and the held-out ones.
        settings (`dict[str, Any]`): name and value of the settings that make the result.
        meanings (`dict[str, str]`): what they are, by name.
        step (`int`): updates made.
        max_steps (`int`): updates planned; the card of a run under way says so.
        dataset (`str`, *optional*): of the prompts: a Hub id, a file's name, or that of the embedded set.
        dataset_on_hub (`bool`): whether `dataset` is a Hub id.
        train_prompts (`int`): how many.
        started_from (`str`, *optional*): the adapter that training went on from.
        beside (`list[str]`): names of other adapters that the pipeline had, without which the result is another.
        evaluation ([`Evaluation`], *optional*): the scores.
        samples (`list[Sample]`): pictures for the gallery.
        sheets (`list[str]`): paths of larger pictures: the comparison grid.
        curves, calibration (`str`, *optional*): paths of these plots.
        reading (`str`, *optional*): what the calibration panel says of the rewards, see [`~calibration.read_rewards`].
        hacking (`list[str]`, *optional*):
            warnings of reward hacking during training; `None` where there could be none, for want of evaluations.
        ema_decay (`float`, *optional*): where the weights are a moving average.
        versions (`dict[str, str]`): of the packages, by name.
        tags (`list[str]`): further ones for the Hub.
    """

    name: str
    base: Base
    adapter: bool
    denoisers: dict[str, str]
    loads_lora: bool = True
    picture_arguments: list[str] = field(default_factory=list)
    scheduler: Scheduler | None = None
    output: str = "images"
    call: dict[str, Any] = field(default_factory=dict)
    prompt: str = ""
    rewards: list[Reward] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    meanings: dict[str, str] = field(default_factory=dict)
    step: int = 0
    max_steps: int = 0
    dataset: str | None = None
    dataset_on_hub: bool = False
    train_prompts: int = 0
    started_from: str | None = None
    beside: list[str] = field(default_factory=list)
    evaluation: Evaluation | None = None
    samples: list[Sample] = field(default_factory=list)
    sheets: list[str] = field(default_factory=list)
    curves: str | None = None
    calibration: str | None = None
    reading: str | None = None
    hacking: list[str] | None = None
    ema_decay: float | None = None
    versions: dict[str, str] = field(default_factory=dict)
    tags: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "RunFacts":
        """The opposite of [`to_dict`]."""
        scores = data.get("evaluation")
        if scores is not None:
            scores = Evaluation(**{**scores, "metrics": [Metric(**metric) for metric in scores["metrics"]]})
        parts = {
            "base": Base(**data["base"]),
            "rewards": [Reward(**reward) for reward in data.get("rewards", [])],
            "samples": [Sample(**sample) for sample in data.get("samples", [])],
            "evaluation": scores,
            "scheduler": Scheduler(**data["scheduler"]) if data.get("scheduler") else None,
        }
        return cls(**{**data, **parts})

    def keep_pictures(self, files: Container[str]) -> None:
        """Forget those that are not among `files`."""
        self.samples = [
            sample if all(path in files for path in sample.input_paths) else replace(sample, inputs={})
            for sample in self.samples
            if sample.after in files and (sample.before is None or sample.before in files)
        ]
        self.sheets = [path for path in self.sheets if path in files]
        self.curves = self.curves if self.curves and self.curves in files else None
        self.calibration = self.calibration if self.calibration and self.calibration in files else None

    @property
    def of_shapes(self) -> bool:
        """Whether scores and pictures are of the embedded pipeline's own prompts, whatever those of training were."""
        return self.base.embedded and self.evaluation is not None and self.evaluation.prompts_are == "held-out"

    @property
    def pictures(self) -> list[str]:
        """Paths of all pictures that the card shows: those that are pushed with it."""
        gallery = [path for sample in self.samples for path in (*sample.input_paths, sample.before, sample.after)]
        paths = [*gallery, *self.sheets, self.curves, self.calibration]
        return list(dict.fromkeys(path for path in paths if path))


def spread(available: int, wanted: int) -> list[int]:
    """Places of those to show, not all at the beginning: prompts may be sorted, by category for one."""
    count = min(available, wanted)
    return [i * available // count for i in range(count)]
