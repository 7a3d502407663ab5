"""What all tests share: one thread, a SIGINT that is not ignored, and little to search for garbage."""

import gc
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


@pytest.fixture(autouse=True, scope="session")
def imported_objects_are_not_searched():
    """
    A trainer collects garbage when it begins; looking through what the imports and the collected tests made, which
    stays anyway, would take longer than most of the tiny runs.
    """
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A Hub on this machine, see `tests.local_hub`."""
    from tests.local_hub import HubServer  # diffusers, not for tests that do without

    with HubServer(tmp_path_factory.mktemp("hub")) as server:
        yield server


@pytest.fixture
def online(server):
    """This process talks to `server`, where the repository `REPO` is not there yet."""
    from huggingface_hub import HfApi

    from tests.local_hub import REPO

    with server.in_process() as patch:
        yield patch
        server.heal()
        HfApi(token="hf_good").delete_repo(REPO, missing_ok=True)
