"""What a node is: a key, inputs, outputs, and one function. The host's classes are made of it by `to_class`."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Input", "Node", "Output", "choice", "for_users", "to_class"]


@dataclass(frozen=True)
class Input:
    """An input of a node.

    Attributes:
        name: the name of the function's argument.
        kind: the host's type, such as "MODEL" or "FLOAT", or a function that returns the names to choose from.
        tooltip: what it is, in a sentence.
        settings: the host's settings of its widget, such as `default`, `min`, `max` and `step`.
        optional: whether it may be left unconnected.
    """

    name: str
    kind: str | Callable[[], Sequence[str]]
    tooltip: str
    settings: dict[str, Any] = field(default_factory=dict)
    optional: bool = False

    def v1(self) -> tuple[Any, dict[str, Any]]:
        """Return the input as the host's `INPUT_TYPES` has it."""
        kind = self.kind if isinstance(self.kind, str) else list(self.kind())
        return kind, {**self.settings, "tooltip": self.tooltip}


@dataclass(frozen=True)
class Output:
    """An output of a node: its name, the host's type, and what it is."""

    name: str
    kind: str
    tooltip: str


@dataclass(frozen=True)
class Node:
    """A node. Its key is for ever: workflows name it.

    Attributes:
        key: the name in workflows.
        title: the name that users see.
        category: where it stands in the host's menu.
        description: what it does, in a few sentences.
        inputs: in the order of the node.
        outputs: in the order of what `function` returns.
        function: takes the inputs by keyword, returns a tuple with the outputs.
    """

    key: str
    title: str
    category: str
    description: str
    inputs: tuple[Input, ...]
    outputs: tuple[Output, ...]
    function: Callable[..., tuple[Any, ...]]


def choice(*names: str) -> Callable[[], Sequence[str]]:
    """Return the kind of an input that is one of a few names, the first by default."""
    return lambda: names


def for_users(message: str) -> str:
    """Return an error message with nodes in place of the functions that it names."""
    message = re.sub(r"ki\.sampler\('(\w+)', ([^()]*)\)", r"Sampler (kinvert) with \1 and the options \2", message)
    return message.replace("use extract_noise", "use Extract Noise (kinvert)")


def to_class(node: Node) -> type:
    """Return the class by which the host knows a node."""

    def input_types(cls: type) -> dict[str, dict[str, Any]]:
        """Return the inputs; asked when the host lists its nodes, so that the names to choose from are complete."""
        required = {i.name: i.v1() for i in node.inputs if not i.optional}
        optional = {i.name: i.v1() for i in node.inputs if i.optional}
        return {"required": required, **({"optional": optional} if optional else {})}

    def run(self: object, **inputs: Any) -> tuple[Any, ...]:
        try:
            return node.function(**inputs)
        except (TypeError, ValueError) as error:
            text = for_users(str(error))
            if type(error) not in (TypeError, ValueError) or text == str(error):
                raise
            raise type(error)(text) from error

    return type(
        node.key,
        (),
        {
            "__doc__": node.description,
            "DESCRIPTION": node.description,
            "INPUT_TYPES": classmethod(input_types),
            "RETURN_TYPES": tuple(output.kind for output in node.outputs),
            "RETURN_NAMES": tuple(output.name for output in node.outputs),
            "OUTPUT_TOOLTIPS": tuple(output.tooltip for output in node.outputs),
            "FUNCTION": "run",
            "CATEGORY": node.category,
            "run": run,
        },
    )
