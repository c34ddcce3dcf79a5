"""Reports of results: tables, figures, and a page that shows both.

`write` writes all of it. `tables` needs nothing else; `figures` and `write` need matplotlib: `pip install
'kinvert[cli]'`.
"""

from kinvert.bench.report.page import read, write

__all__ = ["read", "write"]
