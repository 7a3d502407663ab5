"""
The model card of a run: what it made, how to use it, how well it does, and what not to trust.

The trainer gathers the facts, [`RunFacts`]. They are kept as JSON beside the card, so that it can be written anew for
another place: `runs/shapes` becomes `user/shapes` in its code when a run is pushed.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


FACTS_FILE = "model_card.json"  # stays in the run's folder
CARD_FILE = "README.md"


@dataclass
class Base:
    """
    What was trained from.

    Attributes:
        pipeline (`str`): class of the pipeline, such as `"FluxPipeline"`.
        hub_id (`str`, *optional*): where it is on the Hub; `None` if it is not there, or nobody knows.
        embedded (`bool`): whether it is the one that comes with this package.
        name (`str`, *optional*): of the folder it was loaded from; its own name only, no path.
        init_kwargs (`dict[str, Any]`): arguments of `from_pretrained` that belong to the model, such as `variant`.
        dtype (`str`): of the denoiser's weights, such as `"bfloat16"`.
        license, license_name, license_link (`str`, *optional*): as its own card says.
    """

    pipeline: str
    hub_id: str | None = None
    embedded: bool = False
    name: str | None = None
    init_kwargs: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None


@dataclass
class Reward:
    """One reward: its name in the logs, its weight (0 for one that was only watched), and what it cannot see."""

    name: str
    weight: float
    blind_to: str | None = None  # None for one that is not of this package


@dataclass
class Sample:
    """A prompt and its pictures, by their paths in the run's folder; the seed is that of both."""

    prompt: str
    after: str
    before: str | None = None
    seed: int = 0


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
        loads_lora (`bool`): whether the pipeline has `load_lora_weights`; if not, its denoisers have `load_lora_adapter`.
        picture_arguments (`list[str]`): arguments of the call that are images, of pipelines that edit.
        output (`str`): field of the pipeline's output: `"images"` or `"frames"`.
        call (`dict[str, Any]`): arguments of the call beside the prompt, such as steps and guidance.
        prompt (`str`): one, for the quick start.
        rewards (`list[Reward]`): those trained on, and the held-out ones.
        settings (`dict[str, Any]`): name and value of the settings that make the result.
        step (`int`): updates made.
        max_steps (`int`): updates planned; the card of a run under way says so.
        dataset (`str`, *optional*): of the prompts: a Hub id, a file's name, or that of the embedded set.
        dataset_on_hub (`bool`): whether `dataset` is a Hub id.
        train_prompts (`int`): how many.
        started_from (`str`, *optional*): the adapter that training went on from.
        evaluation ([`Evaluation`], *optional*): the scores.
        samples (`list[Sample]`): pictures for the gallery.
        sheets (`list[str]`): paths of larger pictures: the comparison grid.
        curves, calibration (`str`, *optional*): paths of these plots.
        reading (`str`, *optional*): what the calibration panel says of the rewards, see [`~calibration.read_rewards`].
        hacking (`list[str]`): warnings of reward hacking during training.
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
    output: str = "images"
    call: dict[str, Any] = field(default_factory=dict)
    prompt: str = ""
    rewards: list[Reward] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    step: int = 0
    max_steps: int = 0
    dataset: str | None = None
    dataset_on_hub: bool = False
    train_prompts: int = 0
    started_from: str | None = None
    evaluation: Evaluation | None = None
    samples: list[Sample] = field(default_factory=list)
    sheets: list[str] = field(default_factory=list)
    curves: str | None = None
    calibration: str | None = None
    reading: str | None = None
    hacking: list[str] = field(default_factory=list)
    ema_decay: float | None = None
    versions: dict[str, str] = field(default_factory=dict)
    tags: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "RunFacts":
        """The opposite of [`to_dict`]."""
        raise NotImplementedError

    @property
    def pictures(self) -> list[str]:
        """Paths of all pictures that the card shows: those that are pushed with it."""
        raise NotImplementedError


def quick_start(facts: RunFacts, location: str, revision: str | None = None) -> str:
    """Python that loads the result from `location`, a folder or Hub id, with plain diffusers, and makes a picture."""
    raise NotImplementedError


def render(facts: RunFacts, location: str, revision: str | None = None, files: Sequence[tuple[str, str]] = ()) -> str:
    """
    The card as Markdown, with its metadata in YAML.

    Args:
        facts ([`RunFacts`]): what to say.
        location (`str`): folder or Hub id from which the quick start loads the result.
        revision (`str`, *optional*): branch of the repository, where it is not the main one.
        files (`Sequence[tuple[str, str]]`): what is in the repository: path, and what it is in a few words.
    """
    raise NotImplementedError
