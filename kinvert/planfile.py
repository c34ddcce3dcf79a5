"""Rules and Plans as plain data, for files.

A rule is its public name, its class and all its options, so that a default that changes later changes no file. A rule
of your own is found by its registered name, or given to `ki.load(path, sampler=...)`.

A Plan is written as JSON that can be read: a row is a mapping from symbols to coefficients. `D0` and `U0` are outputs
of the denoiser, `n0` is a noise, and everything else is a value of the state.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from kinvert import rules
from kinvert.checks import is_number, unknown
from kinvert.forms import Denoised, Form, Noise, State, Symbol, Uncond
from kinvert.plan import Interval, Plan, Stage, Step
from kinvert.records import known_entries
from kinvert.rules import SAMPLERS, PhiTableau, Rule, Tableau
from kinvert.rules.base import options_of

__all__ = ["plan_of", "plan_tree", "rule_of", "rule_tree"]

_SYMBOLS = {"denoised": "D", "uncond": "U", "noise": "n"}
_MAKERS = {"D": Denoised, "U": Uncond, "n": Noise}
_NUMBERED = re.compile(r"([DUn])(\d+)")


# -- rules -------------------------------------------------------------------------------------------------------------
def rule_tree(rule: Rule) -> dict[str, Any]:
    """Return a rule as plain data: name, class, options."""
    options = {f.name: _option_tree(getattr(rule, f.name)) for f in options_of(rule)}
    return {"name": rule.name, "class": _class_name(type(rule)), "named": rule.named, "options": options}


def _class_name(cls: type) -> str:
    """Return the name of a class: of kinvert's own without its module, which may be another in the next version."""
    return cls.__name__ if cls.__module__.startswith("kinvert.") else f"{cls.__module__}.{cls.__qualname__}"


def _option_tree(value: Any) -> Any:
    if isinstance(value, Rule):
        return rule_tree(value)
    if isinstance(value, Tableau):
        rows = [[str(c) for c in row] for row in value.a]
        return {"name": value.name, "order": value.order, "a": rows, "b": [str(c) for c in value.b]}
    if isinstance(value, PhiTableau):
        return {"name": value.name, "order": value.order, "phi": value.rows}
    return value if value is None or isinstance(value, (bool, str)) or is_number(value) else repr(value)


def rule_of(tree: Mapping[str, Any], what: str, given: Rule | None = None) -> Rule:
    """Return the rule of `rule_tree`.

    Args:
        tree: the data.
        what: the file, for messages.
        given: the rule, if the caller has it.

    Raises:
        ValueError: the class of the rule is not known and no rule is given, the rule that is given is another one, or
            the rule has options that this version does not know.
    """
    wanted = dict(tree["options"])
    if given is not None:
        if rule_tree(given) != dict(tree):
            raise ValueError(
                f"sampler: {what} was made with {_described(tree)}, got {_described(rule_tree(given))}; give the same "
                "rule with the same options"
            )
        return given
    cls = _find(tree["name"], tree["class"])
    if cls is None:
        raise ValueError(
            f"{what} was made with {_described(tree)}, and no sampler of that class is registered here; import the "
            "module that registers it before, or give the rule: ki.load(path, sampler=rule)"
        )
    known = [f.name for f in options_of(cls)]
    for name in wanted:
        if name not in known:
            raise ValueError(f"{what}: {unknown(f'option of the sampler {cls.__name__}', name, known)}")
    options = {name: _option_of(value, what) for name, value in wanted.items()}
    return cls(**options, named=tree["named"])


def _described(tree: Mapping[str, Any]) -> str:
    options = ", ".join(f"{name}={value!r}" for name, value in tree["options"].items())
    return f"the sampler {tree['name']!r}, {tree['class']}({options})"


def _find(name: str, class_name: str) -> type[Rule] | None:
    """Return the class of a rule, by its registered name or by its own."""
    entry, own = SAMPLERS.get(name), getattr(rules, class_name, None)
    found = [entry.rule] if entry is not None else []
    found += [own] if isinstance(own, type) and issubclass(own, Rule) else []
    found += [one.rule for one in SAMPLERS.values()]
    return next((cls for cls in found if _class_name(cls) == class_name), None)


def _option_of(value: Any, what: str) -> Any:
    if not isinstance(value, Mapping):
        return value
    if "class" in value:
        return rule_of(value, what)
    if "phi" in value:
        return PhiTableau(value["name"], value["order"], value["phi"])
    rows = tuple(tuple(map(Fraction, row)) for row in value["a"])
    return Tableau(value["name"], value["order"], rows, tuple(map(Fraction, value["b"])))


# -- plans -------------------------------------------------------------------------------------------------------------
def plan_tree(plan: Plan) -> dict[str, Any]:
    """Return a Plan as plain data."""
    return {
        "sampler": rule_tree(plan.rule),
        "coordinates": plan.coordinates,
        "auxiliary": list(plan.auxiliary),
        "sigmas": list(plan.sigmas),
        "steps": [_step_tree(step) for step in plan.steps],
    }


def _step_tree(step: Step) -> dict[str, Any]:
    stages = [{"sigma": s.sigma, "input": _form_tree(s.input), "guided": s.guided} for s in step.stages]
    return {
        "index": step.index,
        "sigma": step.sigma,
        "sigma_next": step.sigma_next,
        "stages": stages,
        "noises": [list(interval) for interval in step.noises],
        "x": _form_tree(step.x),
        "memory": {name: _form_tree(form) for name, form in step.memory},
    }


def _form_tree(form: Form) -> dict[str, float]:
    return {_symbol_text(symbol): float(c) for symbol, c in form}


def _symbol_text(symbol: Symbol) -> str:
    if symbol.kind != "state":
        return f"{_SYMBOLS[symbol.kind]}{symbol.key}"
    name = str(symbol.key)
    return f"state {name}" if _NUMBERED.fullmatch(name) or name.startswith("state ") else name


def plan_of(tree: Mapping[str, Any], what: str, given: Rule | None = None) -> Plan:
    """Return the Plan of `plan_tree`, equal to the one that was written; see `rule_of`."""
    names = ("sampler", "coordinates", "auxiliary", "sigmas", "steps")
    entries = known_entries(what, tree, dict.fromkeys(names, True))
    return Plan(
        rule=rule_of(entries["sampler"], what, given),
        sigmas=tuple(entries["sigmas"]),
        steps=tuple(_step_of(step) for step in entries["steps"]),
        auxiliary=tuple(entries["auxiliary"]),
        coordinates=entries["coordinates"],
    )


def _step_of(tree: Mapping[str, Any]) -> Step:
    stages = (Stage(s["sigma"], _form_of(s["input"]), s["guided"]) for s in tree["stages"])
    return Step(
        index=tree["index"],
        sigma=tree["sigma"],
        sigma_next=tree["sigma_next"],
        stages=tuple(stages),
        noises=tuple(Interval(*interval) for interval in tree["noises"]),
        x=_form_of(tree["x"]),
        memory=tuple((name, _form_of(form)) for name, form in tree["memory"].items()),
    )


def _form_of(tree: Mapping[str, float]) -> Form:
    return Form({_symbol_of(text): c for text, c in tree.items()})


def _symbol_of(text: str) -> Symbol:
    if numbered := _NUMBERED.fullmatch(text):
        return _MAKERS[numbered[1]](int(numbered[2]))
    return State(text.removeprefix("state "))
