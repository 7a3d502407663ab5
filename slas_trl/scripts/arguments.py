"""What `slas-trl train` can be told, from the command line and from a YAML file."""

import difflib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, cast

import yaml
from peft import LoraConfig
from trl import TrlParser

from slas_trl import rewards
from slas_trl.advantages import check_number
from slas_trl.cli.launch import OPTIONS as LAUNCH_OPTIONS
from slas_trl.rewards.by_name import SEVERAL, masked
from slas_trl.shapes import WEIGHTS
from slas_trl.trainer import SLASConfig


# What `slas-trl train` does with the embedded pipeline, unless told otherwise. A YAML file and the command line, in
# this order, override each of them; no other model is touched by them.
SHAPES_SETTINGS: dict[str, object] = yaml.safe_load((WEIGHTS.parent / "train.yaml").read_text(encoding="utf-8"))


# Settings of the embedded pipeline that give way when another way of saying the same is chosen.
REPLACES = {
    "generation_batch_size": ("steps_per_generation",),
    "num_train_epochs": ("max_steps",),
    "num_inference_steps": ("sde_window_size", "sde_window_start"),
}


@dataclass
class SLASScriptArguments:
    """What `slas-trl train` trains, on what, and for which reward: see the help of each field."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Folder or Hub id of a diffusers pipeline. None is the embedded pipeline."},
    )
    adapter: str | None = field(
        default=None,
        metadata={"help": "Folder or Hub id (also user/adapter@branch) of a LoRA adapter to go on from."},
    )
    reward_funcs: list[str] | None = field(
        default=None,
        metadata={"help": "Names in slas_trl.rewards, package.module:function or file.py:function. May be several."},
    )
    eval_reward_funcs: list[str] | None = field(
        default=None, metadata={"help": "Held-out rewards: scored in evaluation, never trained on."}
    )
    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Prompts: a file (txt, jsonl, csv, tsv, parquet), 'shapes', or a Hub id."},
    )
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str = field(default="test", metadata={"help": "Split to evaluate on, where there is one."})
    eval_dataset_name: str | None = field(
        default=None,
        metadata={"help": "Prompts to evaluate on, where they are not a split of dataset_name."},
    )
    report_prompts: int | None = field(
        default=None,
        metadata={
            "help": "Number of prompts sampled before and after training for the report. None is all held-out ones "
            "of the embedded pipeline and 16 of any other's; 0 leaves this part out."
        },
    )
    report_images_per_prompt: int = field(default=4, metadata={"help": "Pictures of each prompt of the report."})

    def __post_init__(self):
        if isinstance(self.reward_funcs, str | dict):  # `reward_funcs: clip_score` in YAML
            self.reward_funcs = [cast(str, self.reward_funcs)]
        if isinstance(self.eval_reward_funcs, str | dict):
            self.eval_reward_funcs = [cast(str, self.eval_reward_funcs)]
        # Before all else that may be wrong: without the reward, the rest of a configuration is of no use.
        for name in [*(self.reward_funcs or []), *(self.eval_reward_funcs or [])]:
            if not isinstance(name, str):
                raise ValueError(
                    f"a reward must be a name, but YAML read {masked(repr(name))}: in 'hpsv2: version=v2.0', leave "
                    "out the space after the colon, or put all of it in quotes."
                )
            if not {":", "."} & set(name) and name not in rewards.NAMES:
                several = f" If these are several: {SEVERAL}" if "," in name else ""
                raise ValueError(
                    f"there is no reward {masked(name)!r}: expected one of {', '.join(rewards.NAMES)}, or "
                    f"package.module:function or file.py:function for one of your own.{several}"
                )
        check_number("report_prompts", self.report_prompts or 0, "[0, inf)")
        check_number("report_images_per_prompt", self.report_images_per_prompt, "[1, inf)")


@dataclass
class LoraArguments:
    """The LoRA adapter, by the names of [`~trl.ModelConfig`]."""

    use_peft: bool = field(default=False, metadata={"help": "Train a LoRA adapter rather than all weights."})
    lora_r: int = field(default=16, metadata={"help": "LoRA rank."})
    lora_alpha: int = field(default=32, metadata={"help": "LoRA scale, divided by the rank."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Has to be 0: see the error otherwise."})
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Layers to adapt. None is the attention projections."}
    )
    use_rslora: bool = field(default=False, metadata={"help": "Divide lora_alpha by the root of the rank."})

    def __post_init__(self):
        check_number("lora_r", self.lora_r, "[1, inf)")
        check_number("lora_alpha", self.lora_alpha, "(0, inf)")  # at 0 the adapter would do nothing
        if self.lora_dropout != 0:
            raise ValueError(
                f"lora_dropout must be 0, got {self.lora_dropout}: with dropout, the probabilities recorded while "
                "sampling are not those of the policy that is trained. Leave it out."
            )
        if isinstance(self.lora_target_modules, str):
            self.lora_target_modules = [self.lora_target_modules]

    def peft_config(self) -> LoraConfig | None:
        """The adapter's configuration, or `None` for full fine-tuning."""
        if not self.use_peft:
            return None
        targets, rank_stabilized = self.lora_target_modules, self.use_rslora
        return LoraConfig(
            r=self.lora_r, lora_alpha=self.lora_alpha, target_modules=targets, use_rslora=rank_stabilized
        )


DATACLASSES = (SLASScriptArguments, LoraArguments, SLASConfig)


class _Parser(TrlParser):
    """Raises what argparse would print under two screenfuls of usage before it leaves the process."""

    def error(self, message: str):
        raise ValueError(f"{message}.")


def parse(
    argv: Sequence[str], prog: str = "slas-trl train", one_process: bool = False
) -> tuple[SLASScriptArguments, LoraArguments, SLASConfig]:
    """
    Settings from the command line, over those of the YAML file after `--config`, over the defaults.

    Args:
        argv (`Sequence[str]`): Command line without the program's name.
        prog (`str`, *optional*, defaults to `"slas-trl train"`): The program's name.
        one_process (`bool`, *optional*, defaults to `False`): Whether to read a file for several as one of them does.

    Returns one instance of each of `DATACLASSES`. Raises `ValueError` for an unknown field, naming the nearest known
    one, and for values that do not fit; `FileNotFoundError` if there is no such YAML file.
    """
    parser = _Parser(
        list(DATACLASSES),
        prog=prog,
        description="Fine-tune a text-to-image pipeline. Without --model_name_or_path: the embedded one.",
        epilog="--config FILE reads any of these from a YAML file; the command line overrides it. Several processes: "
        + " ".join(f"--{name}" for name in LAUNCH_OPTIONS)
        + ", as in `accelerate launch`.",
        allow_abbrev=False,
    )
    # TrlParser does not know "--config=FILE".
    argv = [part for word in argv for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    values: dict[str, object] = {}
    rest = list(argv)
    if "--config" in argv:
        place = argv.index("--config")
        if place + 1 == len(argv):
            raise ValueError("--config needs the name of a YAML file after it.")
        values = read_yaml(argv[place + 1])
        rest = [*argv[:place], *argv[place + 2 :]]
        _refuse_unknown(values.keys() - {"env"}, f"field in {argv[place + 1]}", prefix="")
    given, unknown = parser.parse_known_args(rest)
    if unknown:
        options = [word[2:].split("=")[0].replace("-", "_") for word in unknown if word.startswith("--")]
        _refuse_unknown(options, "option", prefix="--")
        raise ValueError(f"unexpected {' '.join(unknown)!r}: every value follows the --name of a field.")

    chosen = values.keys() | {word[2:].split("=")[0].replace("-", "_") for word in rest if word.startswith("--")}
    adapter, of_a_new_one = given.adapter or values.get("adapter"), {f.name for f in fields(LoraArguments)}
    if adapter is not None and (clash := sorted(chosen & of_a_new_one)):
        raise ValueError(
            f"{', '.join(clash)} would be of a new adapter, but {adapter} has a configuration of its own; leave "
            f"{'it' if len(clash) == 1 else 'them'} out."
        )
    if given.model_name_or_path is None and values.get("model_name_or_path") is None:
        settings = {k: v for k, v in SHAPES_SETTINGS.items() if adapter is None or k not in of_a_new_one}
        if given.reward_funcs is not None or "reward_funcs" in values:
            del settings["reward_weights"]  # those of other rewards
        for name, replaced in REPLACES.items():
            if name in chosen:
                settings = {key: value for key, value in settings.items() if key not in replaced}
        parser.set_defaults_with_config(**settings)
    if one_process and {"generation_batch_size", "steps_per_generation"} <= values.keys():
        # The first is of all processes together, of which there would be more.
        os.environ.update(cast(dict, values.pop("env", {})))
        del values["generation_batch_size"]
        parser.set_defaults_with_config(**values)
        argv = rest
    script, lora, config = parser.parse_args_and_config(argv)
    return cast(SLASScriptArguments, script), cast(LoraArguments, lora), cast(SLASConfig, config)


def read_yaml(path: str) -> dict[str, Any]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}, which --config names.")
    try:
        config = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict) or not all(isinstance(key, str) for key in config):
        raise ValueError(f"{path} must hold 'field: value' lines, got {type(config).__name__}.")
    return config


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
