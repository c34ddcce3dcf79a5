"""One thread in each process of tests, so that parallel processes do not fight over the cores.

What is pinned hides what breaks elsewhere. KINVERT_TEST_THREADS=0 leaves torch's threads as they are, any other number
sets them: `make test-threads` runs the suite so.
"""

import os

import torch

if threads := int(os.environ.get("KINVERT_TEST_THREADS", "1")):
    torch.set_num_threads(threads)
