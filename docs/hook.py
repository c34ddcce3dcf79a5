"""MkDocs hook: what the registries know is put where a page has `<!-- samplers -->`, `<!-- schedules -->`,
`<!-- elsewhere -->` or `<!-- nodes -->`, and what was measured where it has `<!-- inversion -->`, `<!-- baselines -->`,
`<!-- budgets -->`, `<!-- costs -->`, `<!-- performance -->`, `<!-- dtypes -->`, `<!-- flow -->`, `<!-- versions -->`,
`<!-- environments -->`, `<!-- bits -->`, `<!-- forensics -->`, `<!-- preimages -->`, `<!-- invbench -->`,
`<!-- comfyui -->` or, with the name of a claim, `<!-- claims NAME -->`. The page of the architecture has
`<!-- layers -->` and `<!-- routes -->`, and that on k-diffusion `<!-- functions -->`, which are read off the code, the
page on diffusers `<!-- agreement -->`, `<!-- diffusers_trips -->` and `<!-- diffusers_memory -->`, the page of choices
`<!-- round_trips -->` and `<!-- method_costs -->`.

Docstrings give the equations, Plans the properties, `benchmarks/results` the measurements.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import json
import math
import re
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import kinvert as ki
from kinvert.adapters.comfyui import NODES
from kinvert.adapters.k_diffusion.faces import FACES, function_name
from kinvert.analysis import properties, weak_order
from kinvert.inversion import ROUTES
from kinvert.rules import SamplerEntry
from kinvert.rules.names import SAMPLERS_ELSEWHERE, SCHEDULES_ELSEWHERE

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by MkDocs with the text of every page."""
    pages = (
        samplers,
        schedules,
        elsewhere,
        inversion,
        reversible,
        baselines,
        budgets,
        costs,
        performance,
        dtypes,
        flow,
        bits,
        forensics,
        invbench,
        preimages,
    )
    hosts = (agreement, diffusers_trips, diffusers_memory, comfyui, nodes, functions)
    for render in (*pages, versions, environments, layers, routes, *hosts, round_trips, method_costs):
        marker = f"<!-- {render.__name__} -->"
        if marker in markdown:
            markdown = markdown.replace(marker, render())
    markdown = re.sub(r"<!-- claims (\w+) -->", lambda match: claims(match[1]), markdown)
    markdown = re.sub(r"^```python .+$", "```python", markdown, flags=re.MULTILINE)  # `python notest`, for the tests
    return re.sub(r"^```text\n(.*?)^```$", output, markdown, flags=re.MULTILINE | re.DOTALL)


def output(match: re.Match[str]) -> str:
    """Mark an output that has a line of prose, such as an error message, which may go on below."""
    return match[0].replace("text", "{ .text .prose }", 1) if max(map(len, match[1].splitlines())) > 100 else match[0]


def samplers() -> str:
    """An overview table, then a section for each family and in it one for each rule."""
    rules: dict[type, list[SamplerEntry]] = {}
    for entry in ki.SAMPLERS.values():
        rules.setdefault(entry.rule, []).append(entry)
    orders, trips = (json.loads((RESULTS / f"{name}.json").read_text()) for name in ("order", "round_trip"))
    rows, sections = [], []
    for module in dict.fromkeys(rule.__module__ for rule in rules):
        sections.append(family(sys.modules[module].__doc__ or ""))
        for rule, entries in rules.items():
            if rule.__module__ == module:
                names = [entry.name for entry in entries]
                rows += [overview(entry, "-".join(names), orders["samplers"], trips["samplers"]) for entry in entries]
                sections += ["### " + ", ".join(f"`{name}`" for name in names), description(rule), options(entries)]
    head = ["sampler", "order", "measured", "weak", "evaluations", "remembers", "noises", "unsamples"]
    head += [f"{n} steps" for n in trips["steps"]]
    versions = ", ".join(f"{name} {version}" for name, version in trips["versions"].items())
    return "\n\n".join([table(head, rows), f"Measured with {versions}, on a CPU.", *sections])


def family(doc: str) -> str:
    """The heading and the text of a family: its module's docstring, headed by the subject of the first sentence."""
    doc = inspect.cleandoc(doc)
    title = re.split(r": |, | `| for | in ", doc.partition("\n")[0])[0].removesuffix(".")
    text = doc.removeprefix(f"{title}: ")
    return f"## {title}\n\n{text[0].upper()}{text[1:]}"


def overview(entry: SamplerEntry, anchor: str, orders: dict[str, Any], trips: dict[str, Any]) -> Sequence[str]:
    """One line of the table: what the Plan says, and what was measured."""
    rule = ki.sampler(entry.name)
    order, trip = orders.get(entry.name), trips.get(entry.name)
    psnr = (trip["psnr"].values() if "psnr" in trip else ["-", "-"]) if trip else ["not yet", "not yet"]
    return [
        f"[`{entry.name}`](#{anchor})",
        str(rule.ode_order),
        f"{order['order']:.1f}".replace("-0.0", "0.0") if order else "-",
        weak(rule),
        *character(entry, rule),
        *(value if isinstance(value, str) else f"{value:.1f}" for value in psnr),
    ]


def weak(rule: ki.Rule) -> str:
    """The weak order of a sampler that draws noise."""
    try:
        noisy = properties(rule).stochastic
    except ValueError:  # it has no Plan
        return "-"
    return f"{weak_order(rule, steps=(40, 80, 160)):.1f}".replace("-0.0", "0.0") if noisy else "-"


def character(entry: SamplerEntry, rule: ki.Rule) -> Sequence[str]:
    """Evaluations, memory, draws, and whether it runs upwards or with which option it does."""
    try:
        p = properties(rule)
    except ValueError:  # it has no Plan: it chooses its steps on the way
        return ["varies", "-", "-", "yes"]
    counts = [str(n) for n in (p.evaluations_per_step, p.memory, p.draws)]
    if p.unsamples:
        return [*counts, "yes"]
    works = properties(rule.quiet()).unsamples
    switch = ", ".join(f"{name}={value!r}".replace("=0.0", "=0") for name, value in rule.noise_options.items())
    return [*counts, f"with `{switch}`" if works else "no"]


def options(entries: list[SamplerEntry]) -> str:
    """The options of a rule and their defaults, a column for each name under which the rule is registered."""
    if not entries[0].options:
        return "No options."
    head = ["option", *(f"`{entry.name}`" for entry in entries)]
    rows = [[f"`{key}`", *(f"`{plain(entry.options[key])}`" for entry in entries)] for key in entries[0].options]
    return table(head, rows)


def plain(value: Any) -> str:
    """The value of an option: itself, or the name it has."""
    return str(getattr(value, "name", None) or repr(value))


def schedules() -> str:
    """A section for each schedule."""
    needs = {"bounds": "`sigma_min` and `sigma_max`", "levels": "the model's levels", "nothing": "nothing of the model"}
    parts = []
    for entry in ki.SCHEDULES.values():
        given = ", ".join(f"`{key}={value!r}`" for key, value in entry.options.items()) or "none"
        parts += [f"## `{entry.name}`", description(entry.function)]
        parts += [f"Built from the number of steps and {needs[entry.needs]}. Options: {given}."]
    return "\n\n".join(parts)


def elsewhere() -> str:
    """A line for each name of another host that says something else than the name here."""
    rows = []
    for name, found in (SAMPLERS_ELSEWHERE | SCHEDULES_ELSEWHERE).items():
        sampler = f"`{found.rule}`" if found.sampler else ""
        schedule = f"`{found.sigmas}`" if found.schedule else ""
        rows.append([f"`{name}`", sampler, schedule, found.note])
    return table(["elsewhere", "sampler", "schedule", ""], rows)


def inversion() -> str:
    """A table for each file of measurements, headed by the model."""
    parts = []
    for path in sorted(RESULTS.glob("inversion-*.json")):
        report = json.loads(path.read_text())
        measured = {
            tuple(r[key] for key in ("sampler", "steps", "cfg", "samples", "method")): r for r in report["rows"]
        }
        order = list(ki.SAMPLERS)
        cells = [key[:4] for key in measured if key[4] == "auto"]
        cells.sort(key=lambda cell: (order.index(cell[0].partition(":")[0]), *cell[2:], cell[1]))
        head = [
            "sampler",
            "steps",
            "cfg",
            "inverted",
            "error",
            "fixed point",
            "Anderson",
            "unsampled",
            "evaluations a step",
            "to check",
        ]
        counts = ", ".join(str(n) for n in sorted({r["samples"] for r in report["rows"]}))
        versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
        _, model, dtype = path.stem.split("-")
        goals = ", ".join(f"{t:g}" for t in sorted({r["tolerance"] for r in report["rows"] if "tolerance" in r}))
        parts += [f"### `{model}`, {dtype}", table(head, [inverted(cell, measured) for cell in cells])]
        parts += [
            f"`python benchmarks/exact_inversion.py --model {model} --dtype {dtype} --count {counts}`; rms at most "
            f"{goals}; {versions}, on a CPU."
        ]
    return "\n\n".join(parts)


CHOICES = ("euler", "dpmpp_2m", "heun", "dpm_2", "leapfrog", "rk4")


def round_trips() -> str:
    """The round trip of the samplers that the page of choices compares."""
    measured = json.loads((RESULTS / "round_trip.json").read_text())["samplers"]
    rows = []
    for name in CHOICES:
        psnr = measured[name]["psnr"]
        cost = str(properties(ki.sampler(name)).evaluations_per_step)
        rows.append([f"`{name}`", *(f"{psnr[steps]:.0f} dB" for steps in ("20", "50")), cost])
    return table(["sampler", "20 steps", "50 steps", "evaluations a step"], rows)


def method_costs() -> str:
    """What exact inversion costs, a line for each sampler and cfg, a column for each number of steps."""
    report = json.loads((RESULTS / "inversion-digits-float64.json").read_text())
    found = {(r["sampler"], r["cfg"], r["steps"]): r for r in report["rows"] if r["method"] == "auto"}
    rows = []
    for name, cfg in (("euler", 1.0), ("heun", 1.0), ("dpmpp_2m", 1.0), ("euler", 3.0), ("euler", 7.5)):
        cells = [found[name, cfg, steps] for steps in (10, 20, 50)]
        shown = [f"{r['median_evaluations_per_step']:.0f} ({r['converged']} of {r['samples']})" for r in cells]
        rows.append([f"`{name}`", f"{cfg:g}", *shown])
    return table(["sampler", "cfg", "10 steps", "20 steps", "50 steps"], rows)


def reversible() -> str:
    """What the reversible samplers miss, a line for each, precision after precision."""
    report = json.loads((RESULTS / "reversible.json").read_text())
    dtypes = list(dict.fromkeys(row["dtype"] for row in report["rows"]))
    lines: dict[tuple[str, int], list[str]] = {}
    for row in report["rows"]:
        name, *options = row["sampler"].split(", ")
        key = f"{name}({options[0]})" if options else name, row["steps"]
        line = lines.setdefault(key, [f"`{key[0]}`", str(row["steps"])])
        line.append(f"{row['error']:.1e} ({row['predicted']:.1e})")
        if row["dtype"] == dtypes[0]:
            alone = f"{row['alone']:.1e}"
        if row["dtype"] == dtypes[-1]:
            line.append(alone)
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    head = ["sampler", "steps", *dtypes, "without the auxiliary state"]
    return f"{table(head, lines.values())}\n\n`python benchmarks/reversible_samplers.py`; {versions}, on a CPU."


def inverted(cell: tuple[Any, ...], measured: dict[tuple[Any, ...], dict[str, Any]]) -> Sequence[str]:
    """One line: what `invert` found, then other methods and plain unsampling where they were measured."""
    name, steps, cfg, samples = cell
    base, _, options = name.partition(":")
    auto = measured[*cell, "auto"]
    unsampled = measured.get((*cell, "unsample"))
    others = [measured.get((*cell, method)) for method in ("picard", "anderson")]
    return [
        f"`{base}({options})`" if options else f"`{base}`",
        str(steps),
        f"{cfg:g}",
        f"{auto['converged']} of {samples}",
        f"{auto['median_error']:.1e}",
        *(f"{other['converged']} of {samples}" if other else "-" for other in others),
        f"{unsampled['median_error']:.1e}" if unsampled else "-",
        f"{auto['median_evaluations_per_step']:.1f}",
        f"{auto['checking_per_step']:.1f}",
    ]


def baselines() -> str:
    """A line for each published inversion, and one for `invert`, with a column for each number of steps and cfg."""
    report = json.loads((RESULTS / "baselines.json").read_text())
    exact = json.loads((RESULTS / "inversion-digits-float64.json").read_text())["rows"]
    wanted = {"sampler": "euler", "method": "auto", "samples": 8}
    exact = [row | {"baseline": "invert"} for row in exact if wanted.items() <= row.items()]
    rows: dict[str, dict[tuple[int, float], dict[str, Any]]] = {}
    for row in [*report["rows"], *exact]:
        rows.setdefault(row["baseline"], {})[row["steps"], row["cfg"]] = row
    columns = sorted({(row["steps"], row["cfg"]) for row in report["rows"]})
    lines = []
    for name, found in rows.items():
        costs = [found[key]["median_evaluations_per_step"] for key in columns if key in found]
        lines.append([f"`{name}`", _range(costs), *(_error(found.get(key)) for key in columns)])
    head = ["baseline", "evaluations a step", *(f"{steps} steps, cfg {cfg:g}" for steps, cfg in columns)]
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    return f"{table(head, lines)}\n\n`python benchmarks/published_inversions.py`; {versions}, on a CPU."


def _range(values: Sequence[float]) -> str:
    low, high = (f"{value:.1f}".removesuffix(".0") for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def _error(row: dict[str, Any] | None) -> str:
    if row is None:
        return "-"
    return f"{row['median_error']:.1e}" + (f" ({row['exact_to_1e-6']})" if row["exact_to_1e-6"] else "")


ALLOWED = 8e-6  # about what the default tolerance allows in float32: smaller errors are not compared
Row = dict[str, Any]


def budgets() -> str:
    """A table for each network, output and number of steps: `invert` and the best of the others at each budget."""
    report = json.loads((RESULTS / "budgets.json").read_text())
    panels: dict[tuple[Any, ...], list[Row]] = {}
    for row in report["rows"]:
        panels.setdefault((row["network"], row["output"] != "float32", row["steps"]), []).append(row)
    parts = []
    for (network, rounded, steps), rows in sorted(panels.items()):
        keys = sorted({(list(ki.SAMPLERS).index(r["sampler"]), r["cfg"]) for r in rows if r["method"] == "invert"})
        limits = sorted({row["budget"] for row in rows if row["budget"] is not None})
        lines: list[list[str]] = []
        lost = []
        for place, cfg in keys:
            sampler = list(ki.SAMPLERS)[place]
            found = against([row for row in rows if (row["sampler"], row["cfg"]) == (sampler, cfg)], limits)
            lines += [[f"`{sampler}`", f"{cfg:g}", *line] for line in found]
            where = [str(limit) for limit, cell in zip(limits, found[1][1:], strict=False) if "**" in cell]
            lost += [f"`{sampler}` at cfg {cfg:g} with {', '.join(where)}"] if where else []
        if keys:
            head = ["sampler", "cfg", "", *(str(limit) for limit in limits), "no limit given"]
            title = (
                f"**`{network}`, {steps} steps{', output rounded to bfloat16' * rounded}**, {rows[0]['samples']} images"
            )
            parts += [title, table(head, lines)]
            parts += [f"Not on the front: {'; '.join(lost) or 'nowhere'}{' evaluations a step' * bool(lost)}."]
    named = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    return "\n\n".join([*parts, f"`python benchmarks/budgets.py`; {named}, on a CPU."])


def bits() -> str:
    """The messages that were read: a table for each model without attacks, then one for each with them."""
    report = json.loads((RESULTS / "bits.json").read_text())
    places = {key: list(dict.fromkeys(row[key] for row in report["rows"])) for key in ("model", "method")}
    known = [row for row in report["rows"] if (row["cfg"], row["knowledge"], row["method"]) == (3, "known", "unsample")]
    strength = {row["attack"]: -row["bits"][0] for row in reversed(known)}  # of the first model
    shares = {"bits": 3, "whole": 2, "tpr": 2, "auc": 3}  # and their digits
    head = ["reader", "by", "bits right", "whole messages", "TPR at FPR 1 %", "AUC", "evaluations a step"]
    parts = []
    for attacked, model in itertools.product((False, True), places["model"]):
        rows = [row for row in report["rows"] if row["model"] == model]
        rows = [r for r in rows if ((r["sampler"], r["cfg"]) == ("euler", 3) if attacked else r["attack"] == "none")]
        rows = [row for row in rows if not attacked or row["method"] != "aidi"]
        first = ("attack",) if attacked else ("sampler", "cfg")
        rows.sort(
            key=lambda row: (
                attacked and strength[row["attack"]],
                row["sampler"] != "euler",
                row["cfg"],
                row["knowledge"] == "blind",
                places["method"].index(row["method"]),
            )
        )
        lines = [
            [
                *(f"{row[name]:g}" if name == "cfg" else str(row[name]) for name in first),
                row["knowledge"],
                "`invert`, at most 11" if row["method"] == "invert_11" else f"`{row['method']}`",
                *(with_ends(row[name], digits) for name, digits in shares.items()),
                f"{row['evaluations']:.1f}",
            ]
            for row in rows
        ]
        title = f"**`{model}`, {rows[0]['images']} images{', `euler` at cfg 3, attacked' * attacked}**"
        parts += [title, table([*first, *head], lines)]
    named = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    return "\n\n".join([*parts, f"`python benchmarks/bits.py`; {named}, on a CPU."])


def forensics() -> str:
    """How well a round trip tells generated images from held-out ones."""
    report = json.loads((RESULTS / "bits.json").read_text())
    lines = [
        [
            f"`{row['model']}`",
            f"{row['images'] // 2} and {row['images'] // 2}",
            f"{row['cfg']:g}",
            "with its label" if row["label"] else "without a label",
            *(f"{error:.3f}" for error in row["errors"]),
            with_ends(row["auc"], 2),
        ]
        for row in report["forensics"]
    ]
    return table(["model", "images", "made at cfg", "read", "error of generated", "of held-out", "AUC"], lines)


def invbench() -> str:
    """The tables that the report of the preset "inversion" writes as `overview.md`."""
    path = RESULTS / "invbench.md"
    return path.read_text() if path.exists() else "The commands above write the tables, to `report/overview.md`."


CLAIMS = {  # what a line of a table stands for, what a column does, and the format of a value
    "reversible": ("line, dtype", "steps", ".1e"),
    "parameters": ("line", "measure", ".2g"),
    "orders": ("line", "", ".2f"),
    "guidance": ("line", "cfg", ".1e"),
    "few_steps": ("line", "steps", ".1e"),
    "iterations": ("line, cfg", "iterations", ".1e"),
    "distances": ("cfg", "iteration", ".1e"),
    "renoise": ("line", "model", ".1f"),
    "correlation": ("line", "measure", ".3f"),
    "latents": ("line, cfg", "measure", ".1e"),
}
SHOWN = {"distances": lambda row: row["iteration"] in (1, 2, 5, 10)}  # some rows of a long one


def claims(name: str) -> str:
    """What was measured of a published claim: medians over the images with their intervals."""
    report = json.loads((RESULTS / f"claims-{name}.json").read_text())
    head, column, form = CLAIMS[name]
    keys = head.split(", ")
    rows = list(filter(SHOWN.get(name), report["rows"]))
    columns = list(dict.fromkeys(str(row[column]) if column else "measured" for row in rows))
    lines: dict[tuple[str, ...], dict[str, str]] = {}
    for row in rows:
        line = lines.setdefault(tuple(plain_value(row[key]) for key in keys), {})
        line[str(row[column]) if column else "measured"] = claimed(row, form)
        if column == "measure" and "amplification" in row:
            line["rounding grows by"] = f"{row['amplification']:.0e}"
    columns += ["rounding grows by"] if any("rounding grows by" in line for line in lines.values()) else []
    texts = [[*key, *(cells.get(one, "-") for one in columns)] for key, cells in lines.items()]
    titles = [f"{column} {one.removesuffix('.0')}" if re.match(r"[\d.]+$", one) else one for one in columns]
    images = " or ".join(str(count) for count in dict.fromkeys(row["images"] for row in rows))
    named = ", ".join(f"{key} {report['versions'][key]}" for key in ("kinvert", "torch", "python"))
    return f"{table([*keys, *titles], texts)}\n\n`{report['command']}`; {images} images; {named}, on a CPU."


def plain_value(value: Any) -> str:
    """A setting: names of methods as code, numbers without zeros behind them."""
    return f"{value:g}" if isinstance(value, float | int) else str(value)


def claimed(row: Row, form: str) -> str:
    """A value and the ends of its interval; how many images came back to 1e-6, where there are any."""
    if row["value"] is None:
        return "not finite"
    value, low, high = (f"{row[key]:{form}}" for key in ("value", "low", "high"))
    came = f" ({row['exact']})" if row.get("exact") else ""
    return f"{value} \\[{low}, {high}\\]{came}"


def preimages() -> str:
    """How many images have several latents, a line for each model and cfg, a column for each number of steps."""
    report = json.loads((RESULTS / "preimages.json").read_text())
    cells: dict[tuple[str, float], dict[int, list[Row]]] = {}
    for row in report["axes"]:
        cells.setdefault((row["model"], row["cfg"]), {}).setdefault(row["steps"], []).append(row)
    steps = sorted({row["steps"] for row in report["axes"]})
    lines = []
    for (model, cfg), found in cells.items():
        line = [f"`{model}`", f"{cfg:g}"]
        for n in steps:
            counts = [row["latents"] for row in found.get(n, [])]
            several = sum(count > 1 for count in counts)
            most = f", up to {max(counts)}{' or more' * (max(counts) == 4)}" if several else ""
            line.append(f"{several} of {len(counts)}{most}" if counts else "-")
        lines.append(line)
    named = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    text = table(["model", "cfg", *(f"{n} steps" for n in steps)], lines)
    return f"{text}\n\n`python benchmarks/preimages.py --axes`; {named}, on a CPU."


def with_ends(values: list[float], digits: int) -> str:
    """A number and the ends of its interval."""
    value, low, high = (f"{one:.{digits}f}" for one in values)
    return value if low == high else f"{value} \\[{low}, {high}\\]"


def against(rows: list[Row], limits: list[int]) -> list[list[str]]:
    """Two lines of a table of budgets. What is better than `invert` for the same cost or less is bold."""
    mine = {row["budget"]: row for row in rows if row["method"] == "invert"}
    others = [row for row in rows if row["method"] != "invert"]
    first, second = ["`invert`"], ["best other"]
    for limit in limits:
        row = mine.get(limit)
        first.append(f"{row['median_error']:.1e}, {row['worst_error']:.1e}" if row else "-")
        cells = []
        for which in ("median_error", "worst_error"):
            best = min((other[which] for other in others if other["budget"] <= limit), default=math.inf)
            behind = row is not None and max(best, ALLOWED) < 0.97 * row[which]
            cells.append(f"**{best:.1e}**" if behind else f"{best:.1e}")
        second.append(", ".join(cells))
    row = mine.get(None)
    spent = f"{row['evaluations']:.1f} ({row['converged']} of {row['samples']})" if row else "-"
    first.append(f"{row['median_error']:.1e}, {row['worst_error']:.1e} after {spent}" if row else "-")
    return [first, [*second, ""]]


def costs() -> str:
    """What the default limit takes, a line for each sampler, dtype and schedule."""
    lines = []
    rows: list[Row] = json.loads((RESULTS / "budgets.json").read_text())["cost"]
    order = list(ki.SAMPLERS)
    rows.sort(key=lambda row: (row["cfg"], order.index(row["sampler"]), row["dtype"], row["lowest_sigma"]))
    for row in rows:
        tol = "default" if row["tolerance"] is None else f"{row['tolerance']:g}"
        line = [f"`{row['sampler']}`", row["dtype"], f"{row['lowest_sigma']:g}", f"{row['cfg']:g}", str(row["steps"])]
        line += [tol, f"{row['evaluations']:.1f}", f"{row['most_evaluations']:.1f}"]
        lines.append([*line, f"{row['converged']} of {row['samples']}", f"{row['worst_error']:.1e}"])
    head = ["sampler", "states", "to sigma", "cfg", "steps", "tolerance", "median", "most", "converged", "worst error"]
    return f"{table(head, lines)}\n\n`python benchmarks/budgets.py --cost`."


def performance() -> str:
    """A table of counts and one of times for each device that was measured."""
    parts = []
    for path in sorted(RESULTS.glob("overhead-*.json")):
        report = json.loads(path.read_text())
        rows = report["rows"]
        device = path.stem.partition("-")[2].upper()
        head = ["sampler", "", "operations", "passes", "of the least", "new tensors", "host reads in a run"]
        counted = [
            [
                *(f"`{r['sampler']}`", r["who"], f"{r['operations']:g}", f"{r['passes']:g}"),
                *(f"{r['passes'] / r['least_passes']:.2f}", f"{r['created']:g}", str(r["synchronisations"])),
            ]
            for r in rows
        ]
        parts += ["## Operations and passes over memory", COUNTS, table(head, counted)]
        shapes = report["shapes"]
        sizes = [f"{size} {tuple(shapes[size])}" for size in shapes]
        times = [[f"`{r['sampler']}`", r["who"], *(timed(r, rows, size) for size in shapes)] for r in rows]
        parts += [f"## Times on a {device}", TIMES.format(**report), table(["sampler", "", *sizes], times)]
        noise = [[f"{s} {tuple(shapes[s])}", f"{n['brownian'] / n['white']:.1f}"] for s, n in report["noise"].items()]
        head = ["`dpmpp_2m_sde`", "time with Brownian noise, of that with white noise"]
        versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
        parts += [
            table(head, noise),
            compilation(report["compile_ms"]),
            f"`python benchmarks/overhead.py`; {versions}; {report['machine']}.",
        ]
    return "\n\n".join(parts)


def dtypes() -> str:
    """A line for each dtype of x and of the network, a column for each way of asking it."""
    report = json.loads((RESULTS / "dtypes.json").read_text())
    cells: dict[tuple[str, str], dict[str, list[dict[str, Any]]]] = {}
    for row in report["rows"]:
        cells.setdefault((row["x"], row["network"]), {}).setdefault(row["way"], []).append(row)
    ways = list(dict.fromkeys(row["way"] for row in report["rows"]))
    verbs = ", ".join(f"`{verb}`" for verb in dict.fromkeys(row["verb"] for row in report["rows"]))
    lines = [[*(f"`{name}`" for name in key), *(_verdicts(found[way]) for way in ways)] for key, found in cells.items()]
    head = ["x", "network", "adapter", "function that returns the network's dtype", "... x's dtype", "network as it is"]
    source = f"`python benchmarks/mixed_dtypes.py`, torch {report['torch']}"
    note = f"Of {verbs}, without and with autocast to bfloat16; {source}."
    return f"{table(head, lines)}\n\n{note}"


def _verdicts(rows: list[dict[str, Any]]) -> str:
    """The commonest verdict, and where there is another one."""
    common = statistics.mode(row["verdict"] for row in rows)
    others: dict[str, list[str]] = {}
    for autocast in (False, True):
        part = [row for row in rows if row["autocast"] is autocast]
        where = " under autocast" if autocast else ""
        if part and len({row["verdict"] for row in part}) == 1 and part[0]["verdict"] != common:
            others.setdefault(part[0]["verdict"], []).append(f"all{where}")
            continue
        for row in part:
            if row["verdict"] != common:
                others.setdefault(row["verdict"], []).append(f"`{row['verb']}`{where}")
    return "; ".join([common, *(f"{said}: {', '.join(where)}" for said, where in others.items())])


def flow() -> str:
    """A line for each sampler on flow levels: what it runs as, and what came out down from t = 1 and up to it."""
    report = json.loads((RESULTS / "flow.json").read_text())
    rows = []
    for name, found in report["samplers"].items():
        cells = [cell for direction in ("down", "up") for cell in flow_cells(found[direction], direction, report)]
        rows.append([f"`{name}`", found["rule"] if found["rule"] == "as it is" else f"`{found['rule']}`", *cells])
    head = ["sampler", "runs", "down: mean", "std", "mixture", "order", "up: mean", "std", "mixture", "order"]
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    return f"{table(head, rows)}\n\n`python benchmarks/flow_samplers.py`; {versions}, on a CPU."


def flow_cells(row: dict[str, Any], direction: str, report: dict[str, Any]) -> list[str]:
    """Mean and standard deviation of Gaussian data, of the mixture, and the order; a dash where a run is refused."""
    if "refused" in row:
        return ["-"] * 4
    (mean, std), mixture = (row["gaussian"][key] for key in ("mean", "std")), row["mixture"]["std"]
    wanted, usual, order = row["wanted"]["std"], 1.0 if direction == "up" else report["data"][1], row.get("order")
    ends_above = f" for {wanted:.3f}" if abs(wanted - usual) > 1e-3 else ""
    found = [f"{value:.3f}".replace("-0.000", "0.000") if abs(value) < 100 else f"{value:.0e}" for value in (mean, std)]
    spread = f"{mixture:.3f}" if mixture < 100 else f"{mixture:.0e}"
    return [found[0], found[1] + ends_above, spread, "-" if order is None else f"{order:.1f}"]


def agreement() -> str:
    """A line for each scheduler of diffusers and its options: the sampler that equals it, and how nearly."""
    report = json.loads((RESULTS / "diffusers.json").read_text())
    rows, reasons = [], list(dict.fromkeys(row["reason"] for row in report["rows"] if row["reason"]))
    for row in report["rows"]:
        note = f" ({reasons.index(row['reason']) + 1})" if row["reason"] else ""
        cells = [f"`{row['scheduler']}`", row["options"], f"{row['pipeline']}, {row['steps']}", f"`{row['sampler']}`"]
        rows.append([*cells, f"{row['difference']:.0e}{note}"])
    head = ["diffusers", "options", "pipeline, steps", "kinvert", "difference"]
    notes = "\n".join(f"{i}. {reason}." for i, reason in enumerate(reasons, 1))
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    return f"{table(head, rows)}\n\n{notes}\n\n`{report['command']}`; {versions}, on a CPU."


COUNTS = """Per step, without the denoiser and the noise source: operations on tensors as large as x, bytes that they
read and write in units of x (passes), the same relative to one kernel for each input of the denoiser and each update,
and tensors of x's size that are created; and reads of the device by the host in a run of 50 steps. *By hand* are loops
of PyTorch operations for one sampler each, in place wherever it can be done at all, over the denoiser's outputs too
(`benchmarks/best_case.py`)."""
TIMES = """Microseconds a step above a denoiser that hands out tensors it has, and relative to the loop by hand: the
median of {repetitions} runs of {steps} steps in random order, in float32. The machine was shared; times of the same
code differ by some 20%."""


def compilation(milliseconds: dict[str, list[float]]) -> str:
    """How long it takes to compile, in a sentence."""
    plans, kernels = ([pair[i] for pair in milliseconds.values()] for i in (0, 1))
    slowest = max(milliseconds, key=lambda name: milliseconds[name][0])
    return (
        f"A Plan of 1,000 steps is compiled in {milliseconds['euler'][0]:.0f} ms for `euler`, "
        f"{statistics.median(plans):.0f} in the median of all samplers and {max(plans):.0f} for the slowest, "
        f"`{slowest}`. Its kernels are laid out before the first run, in {milliseconds['euler'][1]:.0f}, "
        f"{statistics.median(kernels):.0f} and at most {max(kernels):.0f} ms. Both are kept for the next run."
    )


def timed(row: dict[str, Any], rows: list[dict[str, Any]], size: str) -> str:
    """A time, and its ratio to the loop by hand."""
    hand = next(r for r in rows if r["sampler"] == row["sampler"] and r["who"] == "by hand")
    return f"{row[f'us_{size}']:.0f} ({row[f'us_{size}'] / hand[f'us_{size}']:.1f} x)"


def versions() -> str:
    """A line for each environment in which the suite was run, and the names of the tests that failed."""
    report = json.loads((RESULTS / "versions.json").read_text())
    lines, failed = [], []
    for row in report["rows"]:
        found = row["versions"]
        others = ", ".join(f"{name} {version}" for name, version in found.items() if name not in ("python", "torch"))
        lines.append([row["kind"], found["python"], found["torch"], others])
        lines[-1] += [str(row[what]) for what in ("files", "passed", "failed", "error", "skipped")]
        failed += [f"- {row['kind']}, Python {found['python']}: `{name}`" for name in row["failures"]]
    head = ["", "Python", "torch", "with", "files of tests", "passed", "failed", "errors", "skipped"]
    return "\n".join([table(head, lines), "", *(["Failed:", "", *failed] if failed else ["None failed."])])


def environments() -> str:
    """A line for each condition, and under the table what differs."""
    report = json.loads((RESULTS / "environments.json").read_text())
    lines, notes = [], []
    inputs = {row["like"] for row in report["rows"]} - {"baseline"}  # other images, to compare others with
    for row in report["rows"]:
        if row["condition"] in inputs:
            lines.append([f"`{row['condition']}`", f"{row['what']}: to compare with", "-", "-", row["end"]])
            continue
        what = row["what"] if row["like"] == "baseline" else f"{row['what']} (against `{row['like']}`)"
        line = [f"`{row['condition']}`", what]
        for dtype in ("float32", "float64"):
            found = row.get(dtype)
            if found is None:
                line.append("-")
                continue
            share = f"{found['differ']} of {found['calls']}" if found["differ"] else "none"
            worst = found["worst"] if isinstance(found["worst"], str) else f"{found['worst']:.0e}"
            line.append(f"{share} ({worst})")
            kinds = ", ".join(f"{n} {kind}" for kind, n in found["kinds"].items())
            more = "; ".join(f"`{example}`" for example in found["examples"][:2])
            notes += [f"- `{row['condition']}`, {dtype}: {kinds}. E.g. {more}"] if found["differ"] else []
        lines.append([*line, row["end"]])
    head = ["condition", "", "calls that differ in float32 (worst value)", "in float64", "process"]
    named = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    calls = next(row for row in report["rows"] if "float32" in row)["float32"]
    intro = f"{calls['calls']} calls in each dtype, of which {calls['refused']} are refused, with the same words."
    source = f"`python benchmarks/environments.py`; {named}, on a CPU."
    return "\n\n".join([intro, table(head, lines), *(["What differs:", "\n".join(notes)] if notes else []), source])


def diffusers_trips() -> str:
    """A line for each way up in a pipeline of diffusers."""
    report = json.loads((RESULTS / "diffusers_inversion.json").read_text())
    rows = []
    for row in report["round_trips"]:
        done = "-" if row["converged"] is None else f"{row['converged']} of {row['images']}"
        rows.append([f"{row['cfg']:g}", str(row["steps"]), f"`{row['method']}`", f"{row['median']:.1e}"])
        rows[-1] += [f"{row['worst']:.1e}", f"{row['psnr']:.1f}", f"{row['evaluations']:.0f}", done]
    head = ["cfg", "steps", "way up", "error, median", "worst", "PSNR (dB)", "evaluations", "converged"]
    return "\n\n".join([table(head, rows), f"Error in parts of the size of the image. {_host_source(report)}"])


def diffusers_memory() -> str:
    """A line for each sampler: the memory of an inversion, in latents."""
    report = json.loads((RESULTS / "diffusers_inversion.json").read_text())
    found = {(row["sampler"], row["steps"]): row for row in report["memory"]}
    steps = sorted({n for _, n in found})
    head = ["sampler", *(f"{n} steps: latents" for n in steps), *(f"{n} steps: evaluations" for n in steps)]
    rows = []
    for name in dict.fromkeys(sampler for sampler, _ in found):
        cells = [f"{found[name, n]['latents']:.0f}" for n in steps]
        rows.append([f"`{name}`", *cells, *(str(found[name, n]["evaluations"]) for n in steps)])
    return "\n\n".join([table(head, rows), _host_source(report)])


def _host_source(report: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    return f"`python benchmarks/diffusers_inversion.py`; {versions}, on a CPU."


def comfyui() -> str:
    """What was measured in ComfyUI: for each check the number of cases, and the one nearest to what is allowed."""
    files = sorted(RESULTS.glob("comfyui-*.json"), key=lambda path: [int(n) for n in re.findall(r"\d+", path.stem)])
    found = [json.loads(path.read_text()) for path in files]
    rows = []
    for check in dict.fromkeys(row["check"] for result in found for row in result["rows"]):
        cells = []
        for result in found:
            mine = [row for row in result["rows"] if row["check"] == check and row["most"] is not None]
            near = max(mine, key=lambda row: row["value"] / row["most"] if row["most"] else row["value"])
            good = sum(row["value"] <= row["most"] for row in mine)
            number = f", {near['value']:.1e} of {near['most']:g}" if near["most"] else ""
            cells.append(f"{good} of {len(mine)}{number}")
        rows.append([check.replace("_", " "), *cells])
    return table(["check", *(f"ComfyUI {result['about']['ComfyUI']}" for result in found)], rows)


def nodes() -> str:
    """The nodes of ComfyUI: their inputs, outputs and descriptions."""
    text = []
    for node in NODES:
        lines = [[f"`{i.name}`", "optional" * i.optional, i.tooltip] for i in node.inputs]
        outputs = [[f"`{o.name}`", o.kind, o.tooltip] for o in node.outputs]
        text += [f"### {node.title}", node.description]
        text += [table(["input", "", ""], lines), table(["output", "type", ""], outputs)]
    return "\n\n".join(text)


def layers() -> str:
    """The layers of imports, as the test has them, without the modules that only remember an old name."""
    root = Path(__file__).parent.parent
    tree = ast.parse((root / "tests" / "test_layers.py").read_text())
    found = next(
        node for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "LAYERS"
    )
    files = {path.stem: path.read_text() for path in (root / "kinvert").glob("*.py")}
    rows: list[list[str]] = []
    for names in ast.literal_eval(found.value):
        shown = [f"`{name}`" for name in sorted(names) if not files.get(name, "").startswith('"""The old name of')]
        rows.append([str(len(rows)), ", ".join(shown)])
    return table(["", "modules and packages"], rows)


def routes() -> str:
    """The routes of `invert`, and for each the numbers that tune it, with their reasons."""
    head, text = ["route", "which runs", "solves", "methods"], []
    rows = []
    for route in ROUTES:
        accepts = (inspect.getdoc(route.accepts) or "").removeprefix("Tell whether ").removesuffix(".")
        methods = ", ".join(f"`{name}`" for name in route.methods)
        rows.append(
            [f"`{type(route).__name__}`", accepts, f"a {route.scope}".replace("a closed", "nothing: closed"), methods]
        )
        doc = inspect.getdoc(route) or ""
        summary, _, fields = doc.partition("\nAttributes:\n")
        text.append(f"**`{type(route).__name__}`**: {summary.strip()}")
        values = {name: getattr(route, name) for name in vars(route)}
        lines = []
        for names, meaning in re.findall(r"^    (\w[\w, ]*): (.*(?:\n     +.*)*)", fields, re.MULTILINE):
            given = ", ".join(short(values[name]) for name in names.split(", "))
            lines.append([f"`{names}`", given, re.sub(r"\s+", " ", meaning)])
        text.append(table(["field", "value", "meaning"], lines))
    return "\n\n".join([table(head, rows), *text])


def short(value: Any) -> str:
    """The value of a field of a route in a table: a rule or a solver by its class and what was changed."""
    if isinstance(value, tuple):
        return ", ".join(map(short, value))
    fields = {f.name: f.default for f in dataclasses.fields(value)} if dataclasses.is_dataclass(value) else {}
    if not fields:
        return f"`{value!r}`"
    changed = [
        f"{key}={new!r}"
        for key, default in fields.items()
        if key != "named" and (new := getattr(value, key)) != default
    ]
    return f"`{type(value).__name__}({', '.join(changed)})`"


def functions() -> str:
    """The functions of k-diffusion, with their arguments."""
    rows = [[f"`{function_name(face.sampler)}`", f"`{face.signature}`"] for face in FACES.values()]
    return table(["function", "arguments"], rows)


def description(documented: Any) -> str:
    """A docstring up to its lists of arguments, which the API pages show."""
    return re.split(r"\n\n(?:Args|Attributes|Raises|Returns):", inspect.getdoc(documented) or "")[0]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
