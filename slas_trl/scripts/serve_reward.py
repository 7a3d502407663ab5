"""`slas-trl serve-reward`: a reward over HTTP, for trainings that ask it as "remote:url=..."."""

import argparse
import os
import socket
import sys
import threading
from collections.abc import Sequence
from dataclasses import fields

from PIL import Image

from ..rewards.base import RewardFunc, require
from ..rewards.call import call_reward
from ..rewards.http import is_loopback
from ..rewards.resolve import resolve_reward, reward_name
from ..rewards.wire import TOKEN_VARIABLE, Limits, check_token


_GRACE_SECONDS = 30  # for requests that are being scored when it is stopped

HELP = {
    "max_batch_size": "images of a request (default: %(default)s)",
    "max_image_pixels": "pixels of an image (default: %(default)s)",
    "max_request_bytes": "length of a request (default: %(default)s)",
    "max_waiting": "requests that wait while one is scored; others are told to come again (default: %(default)s)",
    "no_warm_up": "do not score a gray picture first, by which the model is loaded before the first request",
    "until_stdin_closes": "end when the program that started it is gone",
}


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="slas-trl serve-reward",
        description="Serve a reward over HTTP. Trainings ask it by --reward_funcs remote:url=http://HOST:PORT.",
        allow_abbrev=False,
    )
    parser.add_argument("name", metavar="NAME", help="the reward, as for --reward_funcs: hpsv2, my_rewards.py:taste")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0: all (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one (default: 8000)")
    parser.add_argument("--token", help=f"what clients have to know; other users do not see {TOKEN_VARIABLE}")
    for field in fields(Limits):
        parser.add_argument(f"--{field.name}", type=int, default=field.default, help=HELP[field.name])
    for flag in ("no_warm_up", "until_stdin_closes"):
        parser.add_argument(f"--{flag}", action="store_true", help=HELP[flag])
    given = parser.parse_args(argv)
    limits = Limits(**{field.name: getattr(given, field.name) for field in fields(Limits)})
    for name, limit in vars(limits).items():
        if limit < (least := int(name != "max_waiting")):
            raise ValueError(f"--{name} must be at least {least}, got {limit}.")
    token = check_token(given.token if given.token is not None else os.environ.get(TOKEN_VARIABLE) or None)
    if token is None and not is_loopback(given.host):
        advice = f"set {TOKEN_VARIABLE} here and where the training runs, or listen at 127.0.0.1."
        raise ValueError(f"--host {given.host} can be reached from other machines, so it needs a token: {advice}")
    if given.until_stdin_closes:
        threading.Thread(target=lambda: sys.stdin.read() or os._exit(0), daemon=True).start()
    for package in ("uvicorn", "fastapi"):  # before a model is loaded
        require(package, "serve")
    reward = resolve_reward(given.name)
    listener = listen(given.host, given.port)  # a port in use is reported at once, too
    if not given.no_warm_up:
        warm_up(reward)
    serve(listener, reward, limits, token)


def listen(host: str, port: int) -> socket.socket:
    """A bound socket, which does not listen yet."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a server that was killed leaves connections
    try:
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        raise OSError(f"cannot listen at --host {host}, --port {port}: {error}.") from error
    return listener


def warm_up(reward: RewardFunc) -> None:
    """Load the model, by a picture. Raises what a missing package or checkpoint raises."""
    try:
        call_reward(reward, ["a gray picture"], [Image.new("RGB", (256, 256), (128, 128, 128))], {})
    except (ImportError, FileNotFoundError):
        raise
    except Exception as error:
        said = f"A gray picture could not be scored ({type(error).__name__}: {error}), which may be its prompt."
        print(said, file=sys.stderr)


def serve(listener: socket.socket, reward: RewardFunc, limits: Limits, token: str | None) -> None:
    """Until Ctrl-C or SIGTERM; the request that is being scored is answered first."""
    import uvicorn

    from ..rewards.server import make_app

    options: dict = {"http": "h11", "h11_max_incomplete_event_size": 2**16, "ws": "none", "lifespan": "off"}
    options |= {"log_level": "warning", "access_log": False, "timeout_graceful_shutdown": _GRACE_SECONDS}
    config = uvicorn.Config(make_app(reward, limits, token), **options)
    listener.listen(config.backlog)
    host, port = listener.getsockname()[:2]
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    print(f"Serving {reward_name(reward)} at {url} (health: {url}/health). Ctrl-C ends it.", flush=True)
    uvicorn.Server(config).run(sockets=[listener])
