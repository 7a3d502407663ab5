"""What all tests share: one thread, and a SIGINT that is not ignored."""

import os
import signal


# One thread for each process, this one and those that tests start: two processes of several threads each stand in each
# other's way, and sums over another number of threads differ in their last bits. Before torch is imported.
os.environ["OMP_NUM_THREADS"] = "1"


import pytest  # noqa: E402
import torch  # noqa: E402


torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def interruptible():
    """A shell starts what is in the background with SIGINT ignored, and processes started from here would inherit "
    "it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
