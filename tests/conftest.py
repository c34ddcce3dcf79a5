"""One thread in each process of tests, so that parallel processes do not fight over the cores.

What is pinned hides what breaks elsewhere. KINVERT_TEST_THREADS=0 leaves torch's threads as they are, any other number
sets them: `make test-threads` runs the suite so.

Every test starts with the same state of torch's generator: what draws from it is no other in each run.

The garbage collector leaves alone what stands when the tests begin: 13,000 tests and all that is imported, which it
would look through again and again.

No test has a deadline, which a busy machine exceeds.

Ctrl-C is ignored in what a shell starts in the background. Tests press it, so they start with Python's own handler.
"""

import gc
import os
import signal
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

if threads := int(os.environ.get("KINVERT_TEST_THREADS", "1")):
    torch.set_num_threads(threads)

settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One thread in any case: what is compared is equal but for rounding, which other threads change."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Seed the generator that is used if nobody gives a seed."""
    torch.manual_seed(0)


def pytest_collection_finish() -> None:
    """Take what stands now out of the collector's sight."""
    gc.collect()
    gc.freeze()
