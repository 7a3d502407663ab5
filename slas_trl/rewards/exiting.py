"""Whether the program is about to end, for threads that wait for something that may take long."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor

from slas_trl.rewards.base import load_once


CHECK_SECONDS = 0.2  # how often those who wait should ask


def program_ends() -> bool:
    """
    Whether the interpreter has begun to wait for the threads that are left. `atexit` would be too late for them: it is
    called once they have all ended.
    """
    try:
        return not _witness(os.getpid())[1].is_alive()
    except RuntimeError:  # no thread can be started any more
        return True


@load_once
def _witness(pid: int) -> tuple[ThreadPoolExecutor, threading.Thread]:
    """A thread with nothing to do: the interpreter ends those of pools first. A fork has none of its parent's."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="exit")
    return pool, pool.submit(threading.current_thread).result()
