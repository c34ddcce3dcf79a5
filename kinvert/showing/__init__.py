"""How results show themselves in a terminal and in a notebook.

`brief` makes the one line of a `repr`, `html` the parts of a card, `thumbnails` small pictures of tensors, `charts` a
curve, and `registry` the dictionaries of names that print as a table. Nothing here knows a result: each result says in
`__repr__` and `_repr_html_` what of it is shown.
"""
