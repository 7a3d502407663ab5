"""
`slas-trl serve-reward`: a reward over HTTP, for trainings that ask it as "remote:url=...". On a machine of its own, or
beside one, in an environment of its own.
"""

import argparse
import asyncio
import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from PIL import Image

from slas_trl.rewards.base import require
from slas_trl.rewards.by_name import RewardFunc, resolve_reward, reward_name
from slas_trl.rewards.calling import call_reward
from slas_trl.rewards.http_client import is_loopback
from slas_trl.rewards.server import Limits, make_app
from slas_trl.rewards.wire import TOKEN_VARIABLE, check_token


_HEADER_SECONDS = 20  # for a header to arrive, from when a connection begins or its last answer ends
_GRACE_SECONDS = 30  # for requests that are being scored when it is stopped

HELP = {
    "max_batch_size": "images of a request",
    "max_image_pixels": "pixels of an image",
    "max_request_bytes": "length of a request",
    "max_waiting": "requests that wait while another one is scored; further ones are told to come again",
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="slas-trl serve-reward",
        description="Serve a reward over HTTP. Trainings ask it by --reward_funcs remote:url=http://HOST:PORT.",
        allow_abbrev=False,
    )
    parser.add_argument("name", metavar="NAME", help="the reward, as for --reward_funcs: hpsv2, my_rewards.py:taste")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 is all (default: %(default)s)"
    )
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one (default: %(default)s)")
    parser.add_argument(
        "--token",
        help=f"what clients have to know; better in the environment, as {TOKEN_VARIABLE}, where other users of the "
        "machine cannot see it",
    )
    for field in fields(Limits):
        parser.add_argument(
            f"--{field.name}", type=int, default=field.default, help=f"{HELP[field.name]} (default: %(default)s)"
        )
    parser.add_argument(
        "--no_warm_up",
        action="store_true",
        help="do not score a grey picture first, by which the model is loaded before the first request",
    )
    given = parser.parse_args(argv)
    limits = Limits(**{field.name: getattr(given, field.name) for field in fields(Limits)})
    token = check_token(given.token if given.token is not None else os.environ.get(TOKEN_VARIABLE) or None)
    if token is None and not is_loopback(given.host):
        raise ValueError(
            f"--host {given.host} can be reached from other machines, so a token is needed: set {TOKEN_VARIABLE} here "
            "and where the training runs, or listen at 127.0.0.1 and forward the port with ssh."
        )
    if not 0 <= given.port < 65536:
        raise ValueError(f"--port must be from 0 to 65535, but it is {given.port}.")
    sys.path.append(str(Path.cwd()))  # as for `slas-trl train`
    require("uvicorn", "serve", "slas-trl serve-reward")
    require("fastapi", "serve", "slas-trl serve-reward")  # before a model is loaded
    reward = resolve_reward(given.name)
    listener = listen(given.host, given.port)  # a port in use is told at once, too
    if not given.no_warm_up:
        warm_up(reward)
    serve(listener, make_app(reward, limits, token), reward)


def listen(host: str, port: int) -> socket.socket:
    """A bound socket; connections are taken only once it listens."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a server that was killed leaves connections
    try:
        listener.bind(address)
    except OSError as error:
        raise OSError(f"cannot listen at {host}, port {port}: {error.strerror}.") from error
    return listener


def warm_up(reward: RewardFunc) -> None:
    """
    Loads the model.

    Raises:
        `ImportError`, `FileNotFoundError`: when a package or a checkpoint is missing.
    """
    try:
        call_reward(reward, ["a grey picture"], [Image.new("RGB", (256, 256), (128, 128, 128))], {})
    except (ImportError, FileNotFoundError):
        raise
    except Exception as error:  # it may need columns, or prompts of its own kind
        print(
            f"A grey picture could not be scored ({type(error).__name__}: {error}). If it is a reward that needs "
            "certain prompts or columns, this means nothing.",
            file=sys.stderr,
        )


def protocol() -> type[asyncio.Protocol]:
    """
    Uvicorn's by h11, which bounds a header's length. Its timer of connections that are kept alive runs from their
    beginning on, and until a whole header is there: they would stay for ever, until no file descriptors are left. Not
    `limit_concurrency`, which counts such connections and turns the honest ones away.
    """
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class ImpatientProtocol(H11Protocol):
        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self.timeout_keep_alive = _HEADER_SECONDS
            self.timeout_keep_alive_task = self.loop.call_later(_HEADER_SECONDS, self.timeout_keep_alive_handler)

        def data_received(self, data: bytes) -> None:
            self.conn.receive_data(data)
            self.handle_events()  # which ends the timer when a request begins

    return ImpatientProtocol


def serve(listener: socket.socket, app: object, reward: RewardFunc) -> None:
    """Until Ctrl-C, which comes out of here, or SIGTERM; the request that is being scored is answered first."""
    import uvicorn

    config = uvicorn.Config(
        app,  # type: ignore[arg-type]
        http=protocol(),
        ws="none",
        lifespan="off",
        h11_max_incomplete_event_size=2**16,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=_GRACE_SECONDS,
    )
    listener.listen(config.backlog)
    host, port = listener.getsockname()[:2]
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    print(f"Serving {reward_name(reward)} at {url} (health: {url}/health). Ctrl-C ends it.", flush=True)
    uvicorn.Server(config).run(sockets=[listener])
