"""
`slas-trl train` in several processes: accelerate's own launcher, by TRL's option `--accelerate_config` and
accelerate's own ones. Those are split off, and everything else is the script's.

Errors come back through files: the processes that were started write theirs down, see [`slas_trl.cli.worker`], and one
of them is reported, rather than the traces of all.
"""

import json
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any


CONFIGS = Path(__file__).parents[1] / "accelerate_configs"

# Those of `accelerate launch` that a command line varies; the rest belongs into the YAML file that it names.
NUMBERS = ("num_processes", "num_machines", "machine_rank", "main_process_port")
OPTIONS = ("accelerate_config", *NUMBERS, "main_process_ip", "gpu_ids")

# Seconds in which interrupted processes may end by themselves: they finish their update, and write a checkpoint.
PATIENCE = 3600


def split_options(argv: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """
    Take the launcher's options, as `--name value` or `--name=value`, out of a command line.

    Returns them by name, and the rest. Raises `ValueError` for one without a value, or with a word for a number.
    """
    options: dict[str, str] = {}
    rest: list[str] = []
    words = iter(argv)
    for word in words:
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or name not in OPTIONS:
            rest.append(word)
            continue
        value = value if equals else next(words, "")
        if not value or value.startswith("--"):
            raise ValueError(f"--{name} needs a value after it.")
        if name in NUMBERS and not value.isdecimal():
            raise ValueError(f"--{name} must be a whole number, got {value!r}.")
        options[name] = value
    return options, rest


def find_config(name: str) -> Path:
    """The YAML file itself, or the shipped one of this name."""
    if Path(name).is_file():
        return Path(name)
    known = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
    if name not in known:
        raise ValueError(
            f"There is no accelerate configuration {name!r}: expected one of {', '.join(known)}, or a YAML file that "
            "`accelerate config` wrote."
        )
    return CONFIGS / f"{name}.yaml"


def launch(module: str, options: dict[str, str], argv: Sequence[str]) -> int:
    """
    Run a script in the processes that `options` ask for, one for each accelerator by default.

    Args:
        module (`str`): Its module, such as `"slas_trl.scripts.train"`, which has a function `main(argv)`.
        options (`dict[str, str]`): What [`split_options`] took out of the command line.
        argv (`Sequence[str]`): Command line of the script.

    Returns the exit status: 0, or that of the process which failed first, after its message on stderr. Raises
    `ValueError` for options that do not go together, and `KeyboardInterrupt` after Ctrl-C, once all processes ended.
    """
    import torch
    import yaml

    path = find_config(options.get("accelerate_config", "multi_gpu"))
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict) or "distributed_type" not in config:
        raise ValueError(f"{path} is no accelerate configuration: there is no 'distributed_type' in it.")
    settings: dict[str, Any] = {**config, **options}
    machines = int(settings.get("num_machines", 1))
    gpus = options["gpu_ids"].count(",") + 1 if "gpu_ids" in options else max(1, torch.accelerator.device_count())
    processes = int(settings.get("num_processes", gpus * machines))
    _check(settings, machines, processes, path.stem)

    words = ["--config_file", str(path), "--num_processes", str(processes), "--module"]
    if machines == 1 and "main_process_port" not in settings:
        words += ["--main_process_port", "0"]  # any that is free
    for name in OPTIONS:
        if name in options and name not in ("accelerate_config", "num_processes"):
            words += [f"--{name}", options[name]]
    if config["distributed_type"] == "NO":
        _become([*words, module, *argv])
    return _start(words, module, argv)


def _check(settings: dict[str, Any], machines: int, processes: int, name: str) -> None:
    """What accelerate takes in silence, or ends in a hang."""
    if processes < 1 or machines < 1:
        raise ValueError(f"There must be at least one process and one machine, got {processes} and {machines}.")
    if processes > 1 and settings["distributed_type"] == "NO":
        raise ValueError(
            f"{name} is for one process, but num_processes is {processes}; --accelerate_config multi_gpu is for more."
        )
    if processes % machines:
        raise ValueError(f"num_processes ({processes}) must be a multiple of num_machines ({machines}).")
    if machines > 1:
        for needed, what in (("machine_rank", "0, 1, ..., on each another"), ("main_process_ip", "that of rank 0")):
            if needed not in settings:
                raise ValueError(f"With {machines} machines, each needs --{needed} ({what}).")
        if int(settings["machine_rank"]) >= machines:
            raise ValueError(f"machine_rank ({settings['machine_rank']}) must be below num_machines ({machines}).")


def _become(words: list[str]) -> None:
    """Replace this process by the only one, in the environment that accelerate gives it."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_simple_launcher_cmd_env

    args = launch_command_parser().parse_args(words)
    line, environ = prepare_simple_launcher_cmd_env(_validate_launch_command(args)[0])
    os.execve(line[0], line, environ)


def _start(words: list[str], module: str, argv: Sequence[str]) -> int:
    """Start the processes, wait for them, and return the exit status."""
    import torch
    from accelerate.commands.launch import launch_command, launch_command_parser
    from accelerate.utils import patch_environment
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    command = module.rpartition(".")[2]
    # They tell of every process that ended, and of every signal that is passed on; what matters is told below.
    for part in ("agent.server.api", "multiprocessing.api"):
        logging.getLogger(f"torch.distributed.elastic.{part}").disabled = True
    environ = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(PATIENCE)}
    if not torch.accelerator.is_available():
        environ["ACCELERATE_USE_CPU"] = "true"  # without it, each process would train by itself
    with tempfile.TemporaryDirectory(prefix="slas-trl-") as folder, patch_environment(**environ):
        args = launch_command_parser().parse_args([*words, "slas_trl.cli.worker", folder, module, *argv])
        hung_up = "" if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else ",SIGHUP"  # ignored, it stays so
        args.signals_to_handle = f"SIGTERM,SIGINT,SIGQUIT{hung_up}"
        try:
            launch_command(args)
        except SignalException as end:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # pressed again and again
            if end.sigval == signal.SIGINT:
                raise KeyboardInterrupt from end
            return _ended(command, end.sigval)
        except ChildFailedError as error:
            return _report(command, Path(folder), {rank: each.exitcode for rank, each in error.failures.items()})
    return 0


def _ended(command: str, number: int) -> int:
    print(f"slas-trl {command}: ended by {signal.Signals(number).name}.", file=sys.stderr)
    return 128 + number


def _report(command: str, folder: Path, ended: dict[int, int]) -> int:
    """Print the error that the others follow from, and return the exit status that belongs to it."""
    errors = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")]
    # SIGTERM is what the launcher ends the others by.
    ended = {rank: code for rank, code in ended.items() if code != -signal.SIGTERM} or ended
    rank, code = min(ended.items(), key=lambda item: item[1])  # killed, that is negative, before lost connections
    if not errors or code < 0 and not any(error["status"] == 2 for error in errors):
        if code == 130:
            raise KeyboardInterrupt
        if code in (129, 143):  # SIGHUP or SIGTERM reached one of them, which told the others
            return _ended(command, code - 128)
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
        print(f"slas-trl {command}: error: process {rank} {how}.", file=sys.stderr)
        return 128 - code if code < 0 else code
    # Bad input before what it led to in the others, such as a lost connection.
    first = min(errors, key=lambda error: (error["status"] != 2, error["time"]))
    if first["status"] != 2 or os.environ.get("SLAS_TRL_DEBUG") == "1":
        print(first["traceback"], file=sys.stderr)
    message = f"slas-trl {command}: error: {first['message']}"
    if len(errors) < 2 or any(error["message"] != first["message"] for error in errors):
        message += f" (process {first['rank']})"
    hint = "\n(SLAS_TRL_DEBUG=1 shows where.)" if first["status"] == 2 else ""
    print(f"{message}{hint}", file=sys.stderr)
    return first["status"]
