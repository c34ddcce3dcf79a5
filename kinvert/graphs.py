"""The old name of `kinvert.engine.graphs`, which is `ki.graphs` too: the module that is imported here is that one."""

import sys
import warnings

from kinvert.engine import graphs

warnings.warn(
    "kinvert.graphs is now kinvert.engine.graphs; the old name goes with the next version",
    DeprecationWarning,
    stacklevel=2,
)
sys.modules[__name__] = graphs
