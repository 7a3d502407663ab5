"""What a configuration makes of its arguments, and what it refuses."""

from dataclasses import fields
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from trl import TrlParser

from slas_trl import SLASConfig
from slas_trl.advantages import AdvantageOptions
from slas_trl.scripts.arguments import parse
from slas_trl.trainer.card_facts import SETTINGS
from slas_trl.trainer.slas_config import REMOVED


def config(**arguments) -> SLASConfig:
    return SLASConfig(**{"output_dir": "unused", "use_cpu": True, **arguments})


def parsed(tmp_path: Path, yaml: str, *argv: str) -> SLASConfig:
    """As `slas-trl train --config config.yaml` reads it."""
    path = tmp_path / "config.yaml"
    path.write_text(yaml)
    return TrlParser([SLASConfig]).parse_args_and_config(["--config", str(path), *argv])[0]


def test_defaults_are_those_of_the_method():
    args = config()
    assert (args.scale_rewards, args.gamma, args.advantage_clip) == ("batch", 0.5, 5.0)
    assert (args.epsilon, args.epsilon_high, args.beta, args.num_iterations) == (1e-4, None, 0.0, 1)
    assert (args.batch_std_of, args.shaping_baseline, args.gamma_schedule) == ("centered", "mean", "constant")
    assert not args.logging_nan_inf_filter and not args.remove_unused_columns and args.report_to == []


@pytest.mark.parametrize(
    ("given", "steps", "images", "micro_steps"),
    [
        # 8 chunks of 8 images; 9 of 10 steps are trained; one update for all of it.
        ({}, 8, 64, 72),
        ({"num_generations": 4}, 4, 32, 36),
        ({"generation_batch_size": 32}, 4, 32, 36),
        ({"generation_batch_size": 24, "steps_per_generation": 3}, 3, 24, 27),
        ({"num_inference_steps": 5}, 8, 64, 32),
        ({"num_inference_steps": 5, "train_final_step": True}, 8, 64, 40),
        ({"timestep_fraction": 0.5}, 8, 64, 32),  # 4 of 9
        ({"timestep_fraction": 0.01}, 8, 64, 8),  # one at least
        ({"sde_window_size": 4, "timestep_fraction": 0.5}, 8, 64, 16),
        ({"num_iterations": 3}, 8, 64, 72),  # one update for each pass
        ({"gradient_accumulation_steps": 9, "num_iterations": 2}, 8, 64, 9),
    ],
)
def test_the_rollout_follows_from_what_is_given(given, steps, images, micro_steps):
    args = config(**given)
    assert (args.steps_per_generation, args.generation_batch_size) == (steps, images)
    assert args.gradient_accumulation_steps == micro_steps


@pytest.mark.parametrize(
    ("given", "numbers_and_fix"),
    [
        ({"generation_batch_size": 20}, ["generation_batch_size", "20", "use 24"]),
        ({"generation_batch_size": 32, "steps_per_generation": 8}, ["steps_per_generation", "32", "8 × 8 images"]),
        ({"per_device_train_batch_size": 3, "steps_per_generation": 4}, ["12 images", "steps_per_generation=8"]),
        ({"num_generations": 6, "steps_per_generation": 2}, ["num_generations", "16 images", "=3 or a multiple"]),
        ({"gradient_accumulation_steps": 7}, ["gradient_accumulation_steps", "(7)", "72 micro-steps"]),
        ({"sde_window_size": 10}, ["sde_window_size (10)", "9 trainable"]),
        ({"sde_window_size": 3, "sde_window_start": 7}, ["sde_window_size (3)", "9 trainable"]),
    ],
)
def test_what_does_not_divide_is_refused_with_both_numbers_and_the_fix(given, numbers_and_fix):
    with pytest.raises(ValueError) as error:
        config(**given)
    assert all(text in str(error.value) for text in numbers_and_fix)


OUT_OF_RANGE = {
    **dict.fromkeys(("noise_schedule", "gamma_schedule", "hacking_action", "kl_reference"), ["sideways"]),
    **dict.fromkeys(("num_iterations", "num_inference_steps", "steps_per_generation", "generation_batch_size"), [0]),
    **dict.fromkeys(("per_device_train_batch_size", "gradient_accumulation_steps", "num_generations_eval"), [0]),
    **dict.fromkeys(("sde_window_size", "height", "fisher_update_steps", "save_steps"), [0]),
    **dict.fromkeys(("beta", "gamma", "gamma_max", "noise_level", "max_grad_norm", "weight_decay", "seed"), [-1.0]),
    **dict.fromkeys(("epsilon", "epsilon_high", "kl_threshold", "learning_rate"), [-1e-5]),
    **dict.fromkeys(("timestep_fraction", "min_effective_share"), [0.0, 1.1]),
    **{"num_generations": [1], "ema_decay": [1.0], "adam_beta1": [1.0], "eta": [-1.0, 1.5], "advantage_clip": [0.0]},
    "num_inference_steps": [1],  # only the final step, which is not trained
    "sde_window_start": [2],  # without a size
    "auto_find_batch_size": [True],
    "adam_epsilon": [0.0],  # 0 / 0 where a gradient is 0, as those of half of LoRA's matrices are at first
    "pipeline_kwargs": ["strength", {"generator": None}, {"cfg": float("inf")}],
    "model_init_kwargs": [[1]],
    "lr_scheduler_kwargs": [{"min_lr": float("nan")}],
    "torch_compile_mode": ["nonsense"],
    "report_to": ["no_such_tracker"],
    "max_steps": [0],
    "num_train_epochs": [0, -1],
    "reward_weights": [[1.0, float("nan")], (1.0, float("inf"))],
}
# What is no number, and schedules that do not begin within their range
REFUSED = [(name, {name: value}) for name, values in OUT_OF_RANGE.items() for value in values]
REFUSED += [("height", {"height": 512.5}), ("beta", {"beta": True}), ("beta", {"beta": None})]
REFUSED += [("gamma_max", {"gamma_schedule": name, "gamma": 0.5, "gamma_max": 0.4}) for name in ("trust_region", "kl")]


@pytest.mark.parametrize(("name", "given"), REFUSED)
def test_a_value_out_of_range_is_refused_by_name(name, given):
    with pytest.raises((ValueError, TypeError), match=name):
        config(**given)


FLOATS = sorted(name for name, hint in get_type_hints(SLASConfig).items() if float in (hint, *get_args(hint)))


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_every_number_is_finite_on_both_ways_in(tmp_path, value):
    assert {"epsilon", "beta", "max_grad_norm", "guidance_scale", "kl_threshold", "learning_rate"} <= {*FLOATS}
    for name in FLOATS:
        with pytest.raises(ValueError):
            config(**{name: float(value)})
    for name in ("epsilon", "beta", "max_grad_norm", "reward_weights"):
        with pytest.raises(ValueError, match=name):
            parsed(tmp_path, "use_cpu: true\n", f"--{name}={value}")


def test_data_parallel_is_refused(monkeypatch):
    monkeypatch.setattr(SLASConfig, "n_gpu", 2)  # as on a machine with two, without a launcher
    with pytest.raises(ValueError, match="--num_processes 2"):
        config()


def test_what_the_schedules_have_by_default():
    assert config(gamma=2.0).fisher_interval is None
    assert config(gamma=2.0, gamma_schedule="ess", fisher_update_steps=7).fisher_interval == 7
    assert config(gamma_schedule="trust_region").fisher_interval == 20
    allowed = [config(gamma_schedule=schedule).allowed_kl for schedule in ("trust_region", "kl")]
    assert allowed == [3e-4, 1e-5]  # a bound is allowed more than a measurement
    assert config(gamma_schedule="kl", kl_threshold=1e-6).allowed_kl == 1e-6


@pytest.mark.parametrize("name", REMOVED)
def test_what_was_removed_names_what_to_use_instead(tmp_path, name):
    """As an argument, on the command line, and in a YAML file."""
    (path := tmp_path / "config.yaml").write_text(f"{name}: 3\n")
    with pytest.raises(ValueError, match=f"{name} was removed: "):
        config(**{name: 3})
    for argv in (["--config", str(path)], [f"--{name}", "3"], [f"--{name.replace('_', '-')}=3"]):
        with pytest.raises(ValueError, match=f"{name} was removed: "):
            parse(["--use_cpu", "true", *argv])


def test_yaml_and_command_line(tmp_path):
    args = parsed(
        tmp_path,
        """
        output_dir: unused
        use_cpu: true
        gamma: 0.25
        epsilon: 1e-5
        scale_rewards: false
        use_ema: true
        reward_weights: [1.0, 0.0]
        pipeline_kwargs: {max_sequence_length: 8}
        """,
        *("--num_generations", "4", "--noise_schedule", "cps", "--epsilon", "2e-5"),
    )
    assert (args.gamma, args.epsilon, args.scale_rewards, args.use_ema) == (0.25, 2e-5, "none", True)
    assert args.reward_weights == [1.0, 0.0] and args.pipeline_kwargs == {"max_sequence_length": 8}
    assert (args.num_generations, args.noise_schedule, args.gradient_accumulation_steps) == (4, "cps", 4 * 9)


@pytest.mark.parametrize("name", ["pipeline_kwargs", "model_init_kwargs"])
def test_dictionaries_may_be_json_strings(tmp_path, name):
    json = '{"max_sequence_length": 8, "negative_prompt": ""}'
    assert config(**{name: json}).to_dict()[name] == {"max_sequence_length": 8, "negative_prompt": ""}
    args = parsed(tmp_path, "use_cpu: true\n", f"--{name}", json)
    assert getattr(args, name) == {"max_sequence_length": 8, "negative_prompt": ""}


def test_every_field_has_a_help_text_that_can_be_printed():
    help_text = TrlParser([SLASConfig]).format_help()
    own = SLASConfig.__annotations__.keys() - {"_VALID_DICT_FIELDS"}
    assert all(f"--{name}" in help_text for name in own)
    assert all(SLASConfig.__dataclass_fields__[name].metadata["help"] for name in own)


def test_an_option_of_advantages_is_written_once(tmp_path):
    """It is an argument of the configuration and the command line, compared on resuming, and in the card."""
    names = {option.name for option in fields(AdvantageOptions)}
    settings = config().settings
    assert names <= settings.keys() and names <= {*SETTINGS}
    assert parsed(tmp_path, "use_cpu: true\n", "--batch_std_of=raw").batch_std_of == "raw"
    assert SLASConfig(str(tmp_path)).output_dir == str(tmp_path)
