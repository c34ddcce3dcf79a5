"""How results show themselves in a terminal and in a notebook.

`brief` makes the one line of a `repr`, `html` the parts of a card, `thumbnails` small pictures of tensors, `charts` a
curve, and `registry` the dictionaries of names that print as a table. Nothing here knows a result: each result says in
`__repr__` and `_repr_html_` what of it is shown.
"""

from kinvert.showing import brief as brief
from kinvert.showing import charts as charts
from kinvert.showing import html as html
from kinvert.showing import registry as registry
from kinvert.showing import thumbnails as thumbnails

__all__ = ["brief", "charts", "html", "registry", "thumbnails"]
