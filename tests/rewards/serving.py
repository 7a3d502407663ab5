"""`slas-trl serve-reward` as a process, its application in a thread, and a server that answers what a test says."""

import contextlib
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


ROOT = Path(__file__).parents[2]
HERE = "tests.rewards.served_rewards"
COMMAND = (
    "import sys; from slas_trl.cli.main import main; from slas_trl.scripts import serve_reward; "
    "sys.argv.insert(1, 'serve-reward'); serve_reward._GRACE_SECONDS = {}; sys.exit(main())"
)


class ServedProcess:
    """The command, started, killed or stopped, and started again at the same port."""

    def __init__(self, *argv: str, log: Path, grace: float = 30, **environ: str):
        self.argv, self.environ, self.log, self.grace = argv, environ, log, grace
        self.port = 0
        self.start()

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*(sys.executable, "-c", COMMAND.format(self.grace)), *self.argv, "--port", str(self.port)],
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT), **self.environ},
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        line = self.process.stdout.readline()
        found = re.search(r"Serving (\S+) at (http://127\.0\.0\.1:(\d+)) ", line)
        assert found, line + self.log.read_text()
        self.name, self.url, self.port = found[1], found[2], int(found[3])

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.kill()


@contextlib.contextmanager
def served(reward, token: str | None = None, **limits: int) -> Iterator[str]:
    """The URL of a reward that is served by a thread."""
    import uvicorn

    from slas_trl.rewards.server import make_app
    from slas_trl.rewards.wire import Limits
    from slas_trl.scripts.serve_reward import listen

    listener = listen("127.0.0.1", 0)
    listener.listen()
    server = uvicorn.Server(uvicorn.Config(make_app(reward, Limits(**limits), token), log_level="error"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        status, body, *headers = self.server.answer(self.path, self.headers, content)
        if status is None:
            with contextlib.suppress(OSError):  # the client is gone
                for line in [b"HTTP/1.1 200 OK\r\n", *[b"Drip: 1\r\n"] * round(20 * body)]:
                    time.sleep(self.wfile.write(line) and 0.05)
            return
        self.send_response(status)
        for name, value in [*headers, ("Content-Length", str(len(body)))]:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def answering(*answers: tuple | Callable) -> Iterator[ThreadingHTTPServer]:
    """
    A server that gives these answers, the last one again and again: (status, body, header...), or (`None`, seconds)
    in which headers drip; or what a function of path, headers and body returns. `seen` is the number of requests.
    """

    def answer(*request):
        server.seen += 1
        given = answers[min(server.seen, len(answers)) - 1]
        return given(*request) if callable(given) else given

    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.seen, server.answer, server.url = 0, answer, f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
