"""
A script in this process, or in several by accelerate's own launcher, whose options are split off the script's. Each of
several processes runs `python -m slas_trl.cli.launch MODULE [ARGUMENT ...]`.
"""

import argparse
import io
import logging
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast


if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure


# Errors that a user can do something about, reported in one message. Any other is a bug, and shows its traceback.
BAD_INPUT = (ValueError, TypeError, OSError, ImportError)
CONFIGS = Path(__file__).parents[1] / "accelerate_configs"
# Those of `accelerate launch` that a command line varies; the rest belongs into the YAML file that it names.
NUMBERS = ("num_processes", "num_machines", "machine_rank", "main_process_port")
OPTIONS = ("accelerate_config", *NUMBERS, "main_process_ip", "gpu_ids")
SIGNALS = (1, 2, 15)  # SIGHUP, SIGINT, SIGTERM: they end a run in an orderly way
SHUTDOWN_GRACE_SECONDS = 3600  # interrupted processes finish their update, and write a checkpoint


def call_script(module: str, argv: list[str]) -> int:
    """Import a script, call its `main`, and return the exit status."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a character that the terminal lacks is no reason to end a run
            stream.reconfigure(errors="replace")
    import_module("slas_trl.cli.quiet")
    sys.path.append(os.getcwd())  # so that "my_rewards:brightness" finds my_rewards.py there
    return import_module(module).main(argv) or 0


class Parser(argparse.ArgumentParser):
    """Raises `ValueError` for what it cannot parse."""

    def error(self, message: str):
        raise ValueError(f"{message}.")


def split_options(argv: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The launcher's options in a command line by name, and the rest. Raises `ValueError` for one without a value."""
    parser = Parser(add_help=False, allow_abbrev=False)
    for name in OPTIONS:
        parser.add_argument(f"--{name}", type=int if name in NUMBERS else str)
    given, rest = parser.parse_known_args(argv)
    return {name: str(value) for name, value in vars(given).items() if value is not None}, rest


def read_yaml(path: Path) -> dict[str, Any]:
    """The fields of a file. Raises `ValueError` where it is not YAML of `field: value` lines."""
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ValueError(f"{path} must hold 'field: value' lines, got {type(values).__name__}.")
    return values


def find_config(name: str) -> Path:
    """The YAML file itself, or the shipped one of this name."""
    known = {path.stem: path for path in sorted(CONFIGS.glob("*.yaml"))}
    if name not in known and not Path(name).is_file():
        raise ValueError(f"--accelerate_config: expected {', '.join(known)}, or a YAML file, got {name!r}.")
    return known.get(name) or Path(name)


def launch(module: str, options: dict[str, str], argv: Sequence[str]) -> int:
    """
    Run a script in the processes that `options` ask for, one for each accelerator by default. Returns the exit status,
    that of the process which failed first, after its message. Raises `ValueError` for options that do not go together,
    and `KeyboardInterrupt` after Ctrl-C, once all processes ended.
    """
    import torch

    path = find_config(options.get("accelerate_config", "multi_gpu"))
    settings = {"distributed_type": None, **read_yaml(path), **options}
    machines = int(settings.get("num_machines", 1))
    gpus = options["gpu_ids"].count(",") + 1 if "gpu_ids" in options else max(1, torch.accelerator.device_count())
    processes = int(settings.get("num_processes", gpus * machines))
    # Combinations that accelerate accepts silently, or that end in a hang.
    if processes < 1 or machines < 1 or processes % machines:
        raise ValueError(f"num_processes ({processes}) must be a positive multiple of num_machines ({machines}).")
    if settings["distributed_type"] in (None, "NO") and processes > 1:
        raise ValueError(f"{path}: distributed_type must be one for num_processes ({processes}), such as MULTI_GPU.")
    if machines > 1 and not (int(settings.get("machine_rank", machines)) < machines and "main_process_ip" in settings):
        raise ValueError(f"With {machines} machines, each needs --machine_rank (from 0 on) and --main_process_ip.")

    words = ["--config_file", str(path), "--num_processes", str(processes), "--module"]
    if machines == 1 and "main_process_port" not in settings:
        words += ["--main_process_port", "0"]  # any that is free
    for name in options.keys() - {"accelerate_config", "num_processes"}:
        words += [f"--{name}", options[name]]
    if settings["distributed_type"] == "NO":
        _become([*words, module, *argv])
    return _start([*words, __name__, module, *argv], module.rpartition(".")[2])


def _become(words: list[str]) -> None:
    """Replace this process by the only one, in the environment that accelerate gives it."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_simple_launcher_cmd_env

    args = launch_command_parser().parse_args(words)
    line, environ = prepare_simple_launcher_cmd_env(_validate_launch_command(args)[0])
    os.execve(line[0], line, environ)


def _start(words: list[str], command: str) -> int:
    """Start the processes, wait for them, and return the exit status."""
    import torch
    from accelerate.commands.launch import launch_command, launch_command_parser
    from accelerate.utils import patch_environment
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # They log every process that ended, and every signal that is passed on; the one that matters is reported below.
    for part in ("agent.server.api", "multiprocessing.api"):
        logging.getLogger(f"torch.distributed.elastic.{part}").disabled = True
    environ = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(SHUTDOWN_GRACE_SECONDS)}
    if not torch.accelerator.is_available():
        environ["ACCELERATE_USE_CPU"] = "true"  # without it, each process would train by itself
    with patch_environment(**environ):
        args = launch_command_parser().parse_args(words)
        hung_up = "" if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else ",SIGHUP"  # ignored, it stays so
        args.signals_to_handle = f"SIGTERM,SIGINT,SIGQUIT{hung_up}"
        try:
            launch_command(args)
        except SignalException as end:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # pressed again and again
            return _ended(command, end.sigval)
        except ChildFailedError as error:
            return _report(command, error.failures)
    return 0


def _ended(command: str, number: int) -> int:
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    print(f"slas-trl {command}: ended by {signal.Signals(number).name}.", file=sys.stderr)
    return 128 + number


def _report(command: str, failures: "Mapping[int, ProcessFailure]") -> int:
    """Print the error that the others follow from, and return the exit status that belongs to it."""
    told = any(failure.exitcode - 128 in SIGNALS for failure in failures.values())

    # Bad input, or a kill, before what it led to in the others: a lost connection, its abort, the launcher's SIGTERM.
    def order(failed: tuple[int, Any]) -> tuple:
        code = failed[1].exitcode
        return code == -signal.SIGTERM, code == -signal.SIGABRT and told, code != 2, code > 0, failed[1].timestamp

    rank, failure = min(failures.items(), key=order)
    code, recorded = failure.exitcode, cast(Any, failure.message)  # a dictionary where `record` has left one
    if code - 128 in SIGNALS:  # one of them got it, and told the others
        return _ended(command, code - 128)
    if not isinstance(recorded, dict):
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
        print(f"slas-trl {command}: error: process {rank} {how}.", file=sys.stderr)
        return 128 - code if code < 0 else code
    if code != 2 or os.environ.get("SLAS_TRL_DEBUG") == "1":
        print(recorded["extraInfo"]["py_callstack"], file=sys.stderr)
    kind, _, text = recorded["message"].partition(": ")
    hint = "\n(SLAS_TRL_DEBUG=1 shows where.)" if code == 2 else ""
    print(f"slas-trl {command}: error: {text or kind} (process {rank}){hint}", file=sys.stderr)
    return code


def _work(module: str, argv: list[str]) -> int:
    """Run the script as one of several processes, and leave its error for the launcher."""
    from torch.distributed.elastic.multiprocessing.errors import record

    try:
        return record(call_script)(module, argv) or 0
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        return 2 if isinstance(error, BAD_INPUT) else 1


if __name__ == "__main__":
    sys.exit(_work(sys.argv[1], sys.argv[2:]))
