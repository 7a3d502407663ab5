"""What `slas-trl train` can be told, from the command line and from a YAML file."""

import difflib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

import yaml
from diffusers import DiffusionPipeline
from peft import LoraConfig
from trl import TrlParser

from .. import rewards
from ..advantages import check_number, option
from ..cli.launch import OPTIONS as LAUNCH_OPTIONS
from ..cli.launch import Parser, read_yaml
from ..loading import EMBEDDED, load_with_adapter
from ..rewards.resolve import SEVERAL, masked
from ..shapes import WEIGHTS
from ..trainer import SLASConfig
from ..trainer.slas_config import refuse_removed


# Defaults of the embedded pipeline; no other model is touched by them.
SHAPES_SETTINGS: dict[str, Any] = yaml.safe_load((WEIGHTS.parent / "train.yaml").read_text(encoding="utf-8"))
# Those that give way when another way of saying the same is chosen.
REPLACES = {
    "generation_batch_size": ("steps_per_generation",),
    "num_train_epochs": ("max_steps",),
    "num_inference_steps": ("sde_window_size", "sde_window_start"),
    "reward_funcs": ("reward_weights",),
}


@dataclass
class SLASScriptArguments:
    """What `slas-trl train` trains, on what, and for which reward."""

    model_name_or_path: str | None = option(
        None, "Folder, file or Hub id of a pipeline. None, or 'shapes', is the embedded one."
    )
    adapter: str | None = option(None, "Folder or Hub id (also user/adapter@branch) of a LoRA adapter to go on from.")
    reward_funcs: list[str] | None = option(
        None, "Names in slas_trl.rewards, package.module:function or file.py:function."
    )
    eval_reward_funcs: list[str] | None = option(None, "Held-out rewards: scored in evaluation, never trained on.")
    dataset_name: str | None = option(None, "Prompts: a file (txt, jsonl, csv, tsv, parquet), 'shapes', or a Hub id.")
    dataset_train_split: str = option("train", "Split to train on.")
    dataset_test_split: str = option("test", "Split to evaluate on, where there is one.")
    eval_dataset_name: str | None = option(None, "Prompts to evaluate on, where they are not a split of dataset_name.")
    report_prompts: int | None = option(
        None, "Prompts of the report (the embedded pipeline's held-out ones, or 16). 0 leaves it out."
    )
    report_images_per_prompt: int = option(4, "Pictures of each prompt of the report.")

    def __post_init__(self):
        if self.model_name_or_path == EMBEDDED:
            self.model_name_or_path = None
        for name in ("reward_funcs", "eval_reward_funcs"):
            if isinstance(given := getattr(self, name), str | dict):  # `reward_funcs: clip_score` in YAML
                setattr(self, name, [given])
            for reward in getattr(self, name) or []:
                _check_reward(reward)
        check_number("report_prompts", self.report_prompts or 0, "[0, inf)")
        check_number("report_images_per_prompt", self.report_images_per_prompt, "[1, inf)")

    def named_rewards(self) -> list[str]:
        """`reward_funcs`. Raises `ValueError` without any."""
        if not self.reward_funcs:
            raise ValueError("--reward_funcs is missing: name one of slas_trl.rewards, or package.module:function.")
        return self.reward_funcs

    def load_pipeline(self, config: SLASConfig) -> DiffusionPipeline:
        """The pipeline, with the adapter to go on from."""
        kwargs = cast(dict, config.model_init_kwargs)
        return load_with_adapter(self.model_name_or_path, self.adapter, kwargs, config.hub_token)


def _check_reward(name: Any) -> None:
    if not isinstance(name, str):
        raise ValueError(
            f"a reward must be a name, but YAML read {masked(repr(name))}: leave out the space after the colon, as in "
            "'hpsv2:version=v2.0', or put all of it in quotes."
        )
    if not {":", "."} & set(name) and name not in rewards.NAMES:
        several = f" If these are several: {SEVERAL}" if "," in name else ""
        raise ValueError(
            f"there is no reward {masked(name)!r}: expected one of {', '.join(rewards.NAMES)}, or "
            f"package.module:function or file.py:function for one of your own.{several}"
        )


@dataclass
class LoraArguments:
    """The LoRA adapter, by the names of [`~trl.ModelConfig`]."""

    use_peft: bool = option(False, "Train a LoRA adapter rather than all weights.")
    lora_r: int = option(16, "LoRA rank.")
    lora_alpha: int = option(32, "LoRA scale, divided by the rank.")
    lora_dropout: float = option(0.0, "Has to be 0: it would change the policy.")
    lora_target_modules: list[str] | None = option(None, "Layers to adapt. None is the attention projections.")
    use_rslora: bool = option(False, "Divide lora_alpha by the root of the rank.")

    def __post_init__(self):
        check_number("lora_r", self.lora_r, "[1, inf)")
        check_number("lora_alpha", self.lora_alpha, "(0, inf)")  # at 0 the adapter would do nothing
        if isinstance(self.lora_target_modules, str):
            self.lora_target_modules = [self.lora_target_modules]

    def peft_config(self) -> LoraConfig | None:
        """The adapter's configuration, or `None` for full fine-tuning."""
        if not self.use_peft:
            return None
        given = {f.name.removeprefix("lora_"): getattr(self, f.name) for f in fields(self) if f.name != "use_peft"}
        return LoraConfig(**{{"alpha": "lora_alpha", "dropout": "lora_dropout"}.get(k, k): given[k] for k in given})


DATACLASSES = (SLASScriptArguments, LoraArguments, SLASConfig)


class _TrlParser(Parser, TrlParser):
    """Raises what argparse would print under two screenfuls of usage."""


def parse(
    argv: Sequence[str],
    prog: str = "slas-trl train",
    one_process: bool = False,
    settings: Mapping[str, Any] | None = None,
) -> tuple[SLASScriptArguments, LoraArguments, SLASConfig]:
    """
    Settings from the command line, over those of the YAML file after `--config`, over the defaults.

    `argv` is without the program's name, which is `prog`; a command for `one_process` reads a file for several as one
    of them does; `settings` are in place of a YAML file, see [`take_config`].

    Raises:
        `ValueError`, `FileNotFoundError`: for unknown fields, values that do not fit, and no such YAML file.
    """
    description = "Fine-tune a text-to-image pipeline. Without --model_name_or_path: the embedded one."
    epilog = "--config FILE reads any of these from a YAML file; the command line overrides it. Several processes: "
    epilog += " ".join(f"--{name}" for name in LAUNCH_OPTIONS) + ", as in `accelerate launch`."
    texts = {"prog": prog, "description": description, "epilog": epilog}
    parser = _TrlParser(list(DATACLASSES), allow_abbrev=False, **texts)
    rest, values = take_config(argv) if settings is None else (list(argv), dict(settings))
    flags = flags_of(rest)
    refuse_removed(flags)
    given, unknown = parser.parse_known_args(rest)
    if unknown:
        _refuse_unknown(flags_of(unknown), "option", prefix="--")
        raise ValueError(f"unexpected {' '.join(unknown)!r}: every value follows the --name of a field.")
    chosen = values.keys() | flags.keys()
    adapter, of_a_new_one = given.adapter or values.get("adapter"), {f.name for f in fields(LoraArguments)}
    if adapter is not None and (clash := sorted(chosen & of_a_new_one)):
        raise ValueError(
            f"{', '.join(clash)} would be of a new adapter, but {adapter} has its own configuration. Leave it out."
        )
    if (given.model_name_or_path or values.get("model_name_or_path")) in (None, EMBEDDED):
        gone = {name for other in chosen & REPLACES.keys() for name in REPLACES[other]}
        gone |= of_a_new_one if adapter is not None else set()
        parser.set_defaults_with_config(**{k: v for k, v in SHAPES_SETTINGS.items() if k not in gone})
    if one_process and "steps_per_generation" in values:  # the other is of all processes together, of which it knows
        values.pop("generation_batch_size", None)
    os.environ.update({name: str(value) for name, value in (values.pop("env", None) or {}).items()})
    parser.set_defaults_with_config(**values)
    script, lora, config = cast(Any, parser.parse_args_into_dataclasses(rest))
    if one_process and config.world_size > 1:
        raise ValueError(f"{prog} runs in one process, but there are {config.world_size}. Start it alone.")
    return script, lora, config


def take_config(argv: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """The command line without `--config FILE`, and what is in that file, of known fields. Raises as [`parse`]."""
    parser = Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    given, rest = parser.parse_known_args(argv)
    values = {} if given.config is None else read_yaml(Path(given.config))
    refuse_removed(values)
    _refuse_unknown(values.keys() - {"env"}, f"field in {given.config}", prefix="")
    return rest, values


def flags_of(argv: Sequence[str]) -> dict[str, str]:
    """The word after each --name, by name."""
    words = [part for word in argv for part in (word.split("=", 1) if word.startswith("--") else [word])]
    return {w[2:].replace("-", "_"): after for w, after in zip(words, [*words[1:], ""], strict=False) if w[:2] == "--"}


def _refuse_unknown(names: Iterable[str], what: str, prefix: str) -> None:
    known = [f.name for dataclass in DATACLASSES for f in fields(dataclass) if f.init]
    for name in names:
        if name in LAUNCH_OPTIONS:
            where = "is for slas-trl train alone" if prefix else "goes on the command line, not into a file"
            raise ValueError(f"{prefix}{name} {where}: slas-trl train --{name} ...")
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {prefix}{nearest[0]}?" if nearest else ""
            raise ValueError(f"unknown {what}: {prefix}{name}.{hint} slas-trl train --help lists all of them.")
