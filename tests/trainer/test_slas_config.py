"""What a configuration makes of its arguments, and what it refuses."""

from dataclasses import fields
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from trl import TrlParser

from slas_trl import SLASConfig
from slas_trl.advantages import AdvantageOptions
from slas_trl.trainer.card_facts import SETTINGS


def config(**arguments) -> SLASConfig:
    return SLASConfig(**{"output_dir": "unused", "use_cpu": True, **arguments})


def parsed(tmp_path: Path, yaml: str, *argv: str) -> SLASConfig:
    """As `slas-trl train --config config.yaml` reads it."""
    path = tmp_path / "config.yaml"
    path.write_text(yaml)
    return TrlParser([SLASConfig]).parse_args_and_config(["--config", str(path), *argv])[0]


# Rollouts


def test_defaults_are_those_of_the_method():
    args = config()
    assert (args.scale_rewards, args.gamma, args.advantage_clip) == ("batch", 0.5, 5.0)
    assert (args.epsilon, args.epsilon_high, args.beta, args.num_iterations) == (1e-4, None, 0.0, 1)
    assert (args.shape_order, args.batch_std_of, args.shaping_baseline) == ("scale_then_shape", "centered", "mean")
    assert not args.logging_nan_inf_filter and not args.remove_unused_columns and args.report_to == []


@pytest.mark.parametrize(
    ("given", "steps_per_generation", "generation_batch_size", "gradient_accumulation_steps"),
    [
        # 8 chunks of 8 images; 9 of 10 steps are trained; one update for all of it.
        ({}, 8, 64, 72),
        ({"num_generations": 4}, 4, 32, 36),
        ({"generation_batch_size": 32}, 4, 32, 36),
        ({"steps_per_generation": 3}, 3, 24, 27),
        ({"generation_batch_size": 24, "steps_per_generation": 3}, 3, 24, 27),
        ({"num_inference_steps": 5}, 8, 64, 32),
        ({"num_inference_steps": 5, "train_final_step": True}, 8, 64, 40),
        ({"timestep_fraction": 0.5}, 8, 64, 32),  # 4 of 9
        ({"timestep_fraction": 0.01}, 8, 64, 8),  # one at least
        ({"timestep_fraction": 0.99, "train_final_step": True}, 8, 64, 72),
        ({"sde_window_size": 3}, 8, 64, 24),
        ({"sde_window_size": 4, "timestep_fraction": 0.5}, 8, 64, 16),
        ({"num_iterations": 3}, 8, 64, 72),  # one update for each pass
        ({"gradient_accumulation_steps": 36}, 8, 64, 36),
        ({"gradient_accumulation_steps": 9, "num_iterations": 2}, 8, 64, 9),
    ],
)
def test_the_rollout_follows_from_what_is_given(
    given, steps_per_generation, generation_batch_size, gradient_accumulation_steps
):
    args = config(**given)
    assert args.steps_per_generation == steps_per_generation
    assert args.generation_batch_size == generation_batch_size
    assert args.gradient_accumulation_steps == gradient_accumulation_steps


@pytest.mark.parametrize(
    ("given", "numbers_and_fix"),
    [
        ({"generation_batch_size": 20}, ["20", "divisible by 8", "use 24"]),
        ({"generation_batch_size": 32, "steps_per_generation": 8}, ["32", "8 × 8 images", "give one of them"]),
        (
            {"per_device_train_batch_size": 3, "steps_per_generation": 4},
            ["12 images", "num_generations (8)", "Use steps_per_generation=8 or a multiple"],
        ),
        ({"num_generations": 6, "steps_per_generation": 2}, ["16 images", "num_generations (6)", "=3 or a multiple"]),
        ({"gradient_accumulation_steps": 7}, ["(7)", "72 micro-steps", "8 × 9", "Leave it out"]),
        ({"gradient_accumulation_steps": 144, "num_iterations": 2}, ["(144)", "72 micro-steps"]),
        ({"sde_window_size": 10}, ["sde_window_size (10)", "9 trainable", "num_inference_steps (10)"]),
        ({"sde_window_size": 3, "sde_window_start": 7}, ["(3) steps from 7", "9 trainable"]),
    ],
)
def test_what_does_not_divide_is_refused_with_both_numbers_and_the_fix(given, numbers_and_fix):
    with pytest.raises(ValueError) as error:
        config(**given)
    for text in numbers_and_fix:
        assert text in str(error.value)


def test_the_fix_that_an_error_names_works():
    config(generation_batch_size=24)
    config(per_device_train_batch_size=3, steps_per_generation=8)
    config(num_generations=6, steps_per_generation=3)
    config(gradient_accumulation_steps=None)


# Single values


@pytest.mark.parametrize(
    "name",
    ["scale_rewards", "shape_order", "batch_std_of", "shaping_baseline", "multi_objective_aggregation",
     "noise_schedule", "gamma_schedule"],
)  # fmt: skip
def test_an_unknown_choice_is_refused_with_the_known_ones(name):
    with pytest.raises(ValueError, match=rf"{name} must be one of \[.*\], but it is 'sideways'"):
        config(**{name: "sideways"})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_generations", 1),
        ("per_device_train_batch_size", 0),
        ("gradient_accumulation_steps", 0),
        ("num_iterations", 0),
        ("num_inference_steps", 0),
        ("steps_per_generation", 0),
        ("generation_batch_size", 0),
        ("num_generations_eval", 0),
        ("sde_window_size", 0),
        ("epsilon", 0.0),
        ("epsilon_high", -1e-4),
        ("gamma", -0.1),
        ("beta", -0.1),
        ("min_group_std", -1.0),
        ("timestep_fraction", 0.0),
        ("timestep_fraction", 1.1),
        ("ema_decay", 1.0),
        ("height", 0),
        ("width", -512),
        ("eta", -1.0),
        ("eta", 1.5),
        ("noise_level", -0.1),
        ("advantage_clip", 0.0),
        ("reward_weights", [1.0, float("nan")]),
        ("max_grad_norm", -1.0),
        ("weight_decay", -1.0),
        ("learning_rate", -1e-5),
        ("adam_beta1", 1.0),
        ("num_train_epochs", -1.0),
        ("save_steps", 0),
        ("seed", -1),
        ("num_inference_steps", 1),  # only the final step, which is not trained
        ("sde_window_start", 2),  # without a size
        ("auto_find_batch_size", True),
        ("adam_epsilon", 0.0),  # 0 / 0 where a gradient is 0, as those of half of LoRA's matrices are at first
        ("lr_scheduler_kwargs", {"min_lr": float("nan")}),
        ("pipeline_kwargs", {"cfg": float("inf")}),
        ("reward_weights", (1.0, float("inf"))),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=name):
        config(**{name: value})


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


@pytest.mark.parametrize(
    "given", [{"gamma": "0.5"}, {"height": 512.5}, {"num_generations": 8.0}, {"beta": True}, {"beta": None}]
)
def test_what_is_no_number_is_refused(given):
    with pytest.raises(TypeError, match=f"{min(given)} must be a (whole )?number"):
        config(**given)


def test_data_parallel_is_refused(monkeypatch):
    monkeypatch.setattr(SLASConfig, "n_gpu", 2)  # as on a machine with two, without a launcher
    with pytest.raises(ValueError, match="sees 2 GPUs.*accelerate launch --num_processes 2"):
        config()


@pytest.mark.parametrize(
    ("given", "meant"),
    [(True, "group"), (False, "none"), ("batch", "batch"), ("group", "group"), ("none", "none")],
)
def test_scale_rewards_may_be_a_bool_as_in_trl(given, meant):
    assert config(scale_rewards=given).scale_rewards == meant


# From files and the command line


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
        *("--num_generations", "4", "--noise_schedule", "cps", "--learning_rate", "3e-4"),
    )
    assert (args.gamma, args.epsilon, args.scale_rewards, args.use_ema) == (0.25, 1e-5, "none", True)
    assert args.reward_weights == [1.0, 0.0] and args.pipeline_kwargs == {"max_sequence_length": 8}
    assert (args.num_generations, args.noise_schedule, args.learning_rate) == (4, "cps", 3e-4)
    assert args.gradient_accumulation_steps == 4 * 9


def test_the_command_line_goes_before_the_file(tmp_path):
    assert parsed(tmp_path, "use_cpu: true\ngamma: 0.25\n", "--gamma", "1.0").gamma == 1.0


@pytest.mark.parametrize("argv", [[], ["--gama", "0.5"]])
def test_an_unknown_field_is_refused(tmp_path, argv):
    yaml = "use_cpu: true\n" if argv else "use_cpu: true\ngama: 0.5\n"
    with pytest.raises(ValueError, match="gama"):
        parsed(tmp_path, yaml, *argv)


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
    assert (
        parsed(tmp_path, "use_cpu: true\n", "--batch_std_of=raw", "--shaping_baseline=zero_sum").batch_std_of == "raw"
    )
    assert SLASConfig(str(tmp_path)).output_dir == str(tmp_path)
