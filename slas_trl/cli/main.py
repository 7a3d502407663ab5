"""The command `slas-trl`. Nothing heavy is imported here: `slas-trl --help` answers at once."""

import argparse
import os
import signal
import sys
from collections.abc import Sequence

from .. import __version__
from .launch import BAD_INPUT, call_script, launch, split_options


COMMANDS = {
    "train": "fine-tune a text-to-image pipeline; without arguments, the embedded one",
    "doctor": "check that a training could start: takes the options of train, keeps nothing",
    "compare": "train several kinds of advantages with the same noise, and compare them",
    "prompts": "score prompts by how much the rewards of their images differ",
    "serve-reward": "serve a reward over HTTP, to trainings on this or other machines",
    "generate": "make pictures with a pipeline, with or without a trained adapter",
    "push": "put a run on the Hub: its adapter, model card and pictures",
    "env": "print versions and devices, for a bug report",
}

_received: list[int] = []  # signals that this process should end by


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run `slas-trl` with this command line, by default the process's own, which then handles signals, too. Returns the
    exit status: 2 for bad input, after one message on stderr; 130 for Ctrl-C; or that of the script.
    """
    if argv is None and os.name != "nt":
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, _end)
        try:
            return main(sys.argv[1:])
        finally:
            if _received:  # whatever threads are left, such as a reward's
                sys.stdout.flush()
                os._exit(128 + _received[0])
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="slas-trl",
        description="Super-Linear Advantage Shaping: reinforcement learning for diffusers pipelines.",
        epilog="slas-trl COMMAND --help lists a command's own options.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"slas-trl {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, summary in COMMANDS.items():
        subparsers.add_parser(name, help=summary, add_help=False)
    # Only the first word is ours; the rest is the script's to parse, its --help included.
    command = parser.parse_args(argv[:1]).command
    if command is None:
        parser.print_help()
        return 0
    return run_script(command, argv[1:])


def _end(number: int, frame: object) -> None:
    """The first signal unwinds what is under way, a second one ends it at once."""
    if _received:
        os._exit(128 + number)
    _received.append(number)
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    os.write(2, f"slas-trl: ended by {signal.Signals(number).name}.\n".encode())
    raise SystemExit(128 + number)


def run_script(command: str, argv: list[str]) -> int:
    """Run `slas_trl.scripts.<command>`, and return its exit status, or that of its error, which is printed."""
    module = f"slas_trl.scripts.{command.replace('-', '_')}"
    try:
        options, rest = split_options(argv) if command == "train" else ({}, argv)
        if options and not {"-h", "--help"} & set(rest):
            return launch(module, options, rest)
        return call_script(module, rest)
    except KeyboardInterrupt:
        print(f"slas-trl {command}: interrupted.", file=sys.stderr)
        return 130
    except BAD_INPUT as error:
        if os.environ.get("SLAS_TRL_DEBUG") == "1":
            raise
        message = str(error) or type(error).__name__
        print(f"slas-trl {command}: error: {message}\n(SLAS_TRL_DEBUG=1 shows where.)", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
