"""Write the example workflows of the folder `comfyui`, and draw them.

    python tests/hosts/comfyui_workflows.py

The host shows a picture of the same name (JPEG) beside a workflow; the page of the documentation has some as PNG.
A workflow is written here as nodes in columns: a key, the kind, the values of widgets, and where inputs come from. The
saved form has widgets by their order and links by numbers. `to_prompt` turns it into what the host's server runs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kinvert.adapters.comfyui import NODES

FOLDER = Path(__file__).parents[2] / "comfyui" / "example_workflows"
PICTURES = Path(__file__).parents[2] / "docs" / "assets" / "comfyui"
ON_THE_PAGE = ("unsampler", "invert", "invert_as_noise", "extract_noise")
WIDGETS = ("INT", "FLOAT", "STRING")
SEEDS = ("seed", "noise_seed")

# Nodes of the host: inputs that are connected, widgets with their defaults, outputs.
HOST: dict[str, tuple[str, dict[str, Any], str]] = {
    "CheckpointLoaderSimple": ("", {"ckpt_name": "v1-5-pruned-emaonly.safetensors"}, "MODEL:MODEL CLIP:CLIP VAE:VAE"),
    "CLIPTextEncode": ("clip:CLIP", {"text": ""}, "CONDITIONING:CONDITIONING"),
    "LoadImage": ("", {"image": "example.png", "upload": "image"}, "IMAGE:IMAGE MASK:MASK"),
    "VAEEncode": ("pixels:IMAGE vae:VAE", {}, "LATENT:LATENT"),
    "VAEDecode": ("samples:LATENT vae:VAE", {}, "IMAGE:IMAGE"),
    "PreviewImage": ("images:IMAGE", {}, ""),
    "PreviewAny": ("source:*", {}, ""),
    "EmptyLatentImage": ("", {"width": 512, "height": 512, "batch_size": 1}, "LATENT:LATENT"),
    "KSamplerSelect": ("", {"sampler_name": "euler"}, "SAMPLER:SAMPLER"),
    "CFGGuider": ("model:MODEL positive:CONDITIONING negative:CONDITIONING", {"cfg": 1.0}, "GUIDER:GUIDER"),
    "SamplerCustom": (
        "model:MODEL positive:CONDITIONING negative:CONDITIONING sampler:SAMPLER sigmas:SIGMAS latent_image:LATENT",
        {"add_noise": False, "noise_seed": 0, "cfg": 1.0},
        "output:LATENT denoised_output:LATENT",
    ),
    "SamplerCustomAdvanced": (
        "noise:NOISE guider:GUIDER sampler:SAMPLER sigmas:SIGMAS latent_image:LATENT",
        {},
        "output:LATENT denoised_output:LATENT",
    ),
    "KSamplerAdvanced": (
        "model:MODEL positive:CONDITIONING negative:CONDITIONING latent_image:LATENT",
        {
            "add_noise": "disable", "noise_seed": 0, "steps": 20, "cfg": 1.0, "sampler_name": "euler",
            "scheduler": "normal", "start_at_step": 0, "end_at_step": 10000, "return_with_leftover_noise": "disable",
        },
        "LATENT:LATENT",
    ),
}  # fmt: skip


def kinds() -> dict[str, tuple[list[tuple[str, str]], dict[str, Any], list[tuple[str, str]]]]:
    """Inputs, widgets and outputs of every node, those of kinvert read off their specs."""

    def pairs(text: str) -> list[tuple[str, str]]:
        return [tuple(pair.split(":")) for pair in text.split()]  # type: ignore[misc]

    table = {kind: (pairs(sockets), widgets, pairs(outputs)) for kind, (sockets, widgets, outputs) in HOST.items()}
    for node in NODES:
        sockets = [(i.name, i.kind) for i in node.inputs if isinstance(i.kind, str) and i.kind not in WIDGETS]
        widgets = {
            i.name: i.settings.get("default") if isinstance(i.kind, str) else _first(i)
            for i in node.inputs
            if not isinstance(i.kind, str) or i.kind in WIDGETS
        }
        table[node.key] = (sockets, widgets, [(o.name, o.kind) for o in node.outputs])  # type: ignore[arg-type]
    return table


def _first(one: Any) -> str:
    return "normal" if one.name == "scheduler" else one.kind()[0]


KINDS = kinds()
TITLES = {node.key: node.title for node in NODES}

Graph = dict[str, tuple[int, str, dict[str, Any], dict[str, str]]]
"""Key -> (column, kind, values of widgets that differ from the defaults, input -> "key.output")."""


def common(source: bool = True, changed: str = "a photo of a dog") -> Graph:
    """The nodes that all workflows begin with."""
    nodes: Graph = {
        "checkpoint": (0, "CheckpointLoaderSimple", {}, {}),
        "prompt": (1, "CLIPTextEncode", {"text": "a photo of a cat"}, {"clip": "checkpoint.CLIP"}),
        "negative": (1, "CLIPTextEncode", {}, {"clip": "checkpoint.CLIP"}),
    }
    if changed:
        nodes["changed"] = (1, "CLIPTextEncode", {"text": changed}, {"clip": "checkpoint.CLIP"})
    if source:
        nodes["image"] = (0, "LoadImage", {}, {})
        nodes["latent"] = (1, "VAEEncode", {}, {"pixels": "image.IMAGE", "vae": "checkpoint.VAE"})
    return nodes


def shown(latent: str, report: str = "") -> Graph:
    """Decode a latent and show it, and a report."""
    nodes: Graph = {
        "decoded": (4, "VAEDecode", {}, {"samples": latent, "vae": "checkpoint.VAE"}),
        "picture": (4, "PreviewImage", {}, {"images": "decoded.IMAGE"}),
    }
    if report:
        nodes["report"] = (3, "PreviewAny", {}, {"source": report})
    return nodes


UP = {
    "model": "checkpoint.MODEL", "positive": "prompt.CONDITIONING", "negative": "negative.CONDITIONING",
    "latent_image": "latent.LATENT",
}  # fmt: skip
DOWN = {"model": "checkpoint.MODEL", "positive": "changed.CONDITIONING", "negative": "negative.CONDITIONING"}
SIGMAS: Graph = {"sigmas": (1, "KinvertScheduler", {}, {"model": "checkpoint.MODEL"})}

WORKFLOWS: dict[str, Graph] = {
    "unsampler": {
        **common(),
        "unsampler": (2, "KinvertUnsampler", {}, UP),
        "sampler": (3, "KSamplerAdvanced", {}, DOWN | {"latent_image": "unsampler.latent"}),
        **shown("sampler.LATENT", "unsampler.report"),
    },
    "invert": {
        **common(),
        **SIGMAS,
        "invert": (2, "KinvertInvert", {}, UP | {"sigmas": "sigmas.sigmas"}),
        "euler": (2, "KSamplerSelect", {}, {}),
        "sampler": (
            3,
            "SamplerCustom",
            {},
            DOWN | {"sampler": "euler.SAMPLER", "sigmas": "invert.sigmas", "latent_image": "invert.latent"},
        ),
        **shown("sampler.output", "invert.report"),
    },
    "invert_as_noise": {
        **common(),
        **SIGMAS,
        "invert": (2, "KinvertInvert", {}, UP | {"sigmas": "sigmas.sigmas"}),
        "euler": (2, "KSamplerSelect", {}, {}),
        "guider": (2, "CFGGuider", {}, DOWN),
        "empty": (2, "EmptyLatentImage", {}, {}),
        "sampler": (
            3,
            "SamplerCustomAdvanced",
            {},
            {
                "noise": "invert.noise", "guider": "guider.GUIDER", "sampler": "euler.SAMPLER",
                "sigmas": "invert.sigmas", "latent_image": "empty.LATENT",
            },
        ),
        **shown("sampler.output", "invert.report"),
    },
    "extract_noise": {
        **common(),
        **SIGMAS,
        "extract": (2, "KinvertExtractNoise", {"sampler_name": "euler_ancestral"}, UP | {"sigmas": "sigmas.sigmas"}),
        "sampler": (
            3,
            "SamplerCustom",
            {},
            DOWN | {"sampler": "extract.sampler", "sigmas": "extract.sigmas", "latent_image": "extract.latent"},
        ),
        **shown("sampler.output", "extract.report"),
    },
    "rf_inversion": {
        **common(),
        **SIGMAS,
        "rf": (2, "KinvertRFInversion", {}, UP | {"sigmas": "sigmas.sigmas"}),
        "sampler": (
            3,
            "SamplerCustom",
            {},
            DOWN | {"sampler": "rf.sampler", "sigmas": "rf.sigmas", "latent_image": "rf.latent"},
        ),
        **shown("sampler.output", "rf.report"),
    },
    "round_trip": {
        **common(changed=""),
        "trip": (2, "KinvertRoundTrip", {"sampler_name": "heun"}, UP),
        "rms": (3, "PreviewAny", {}, {"source": "trip.rms"}),
        **shown("trip.latent", "trip.report"),
    },
    "variations": {
        **common(source=False, changed=""),
        "noise": (1, "KinvertNoisyLatent", {}, {}),
        "other": (1, "KinvertNoisyLatent", {"seed": 1}, {}),
        "mixed": (2, "KinvertSlerpLatents", {"factor": 0.2}, {"latents1": "noise.latent", "latents2": "other.latent"}),
        "strength": (
            2,
            "KinvertGetSigma",
            {"steps": 20, "end_at_step": 20},
            {"model": "checkpoint.MODEL"},
        ),
        "empty": (2, "EmptyLatentImage", {}, {}),
        "start": (
            3,
            "KinvertInjectNoise",
            {},
            {"latents": "empty.LATENT", "noise": "mixed.latent", "strength": "strength.sigma"},
        ),
        "sampler": (
            3,
            "KSamplerAdvanced",
            {"cfg": 7.0},
            DOWN | {"positive": "prompt.CONDITIONING", "latent_image": "start.latent"},
        ),
        **shown("sampler.LATENT"),
    },
    "sampler_and_scheduler": {
        **common(source=False, changed=""),
        **SIGMAS,
        "kind": (2, "KinvertSampler", {"sampler_name": "dpmpp_2m_sde", "options": "eta=0.5, solver_type=heun"}, {}),
        "empty": (2, "EmptyLatentImage", {}, {}),
        "sampler": (
            3,
            "SamplerCustom",
            {"add_noise": True, "cfg": 7.0},
            DOWN
            | {
                "positive": "prompt.CONDITIONING", "sampler": "kind.sampler", "sigmas": "sigmas.sigmas",
                "latent_image": "empty.LATENT",
            },
        ),
        **shown("sampler.output"),
    },
}  # fmt: skip


def height(kind: str, connected: dict[str, str]) -> int:
    sockets, widgets, outputs = KINDS[kind]
    lines = max(len(sockets) + sum(name in widgets for name in connected), len(outputs)) + len(widgets)
    return 50 + 24 * lines + (90 if kind in ("PreviewImage", "PreviewAny", "LoadImage", "CLIPTextEncode") else 0)


def saved(graph: Graph) -> dict[str, Any]:
    """Return a workflow as the host's page saves it."""
    ids = {key: number for number, key in enumerate(graph, 1)}
    bottoms: dict[int, int] = {}
    links: list[list[Any]] = []
    nodes: list[dict[str, Any]] = []
    for key, (column, kind, values, inputs) in graph.items():
        sockets, widgets, outputs = KINDS[kind]
        # A widget can be connected as well; it keeps its place among the values.
        entries: list[dict[str, Any]] = [{"name": name, "type": type_, "link": None} for name, type_ in sockets]
        for name in inputs:
            if name in widgets:
                entries.append({"name": name, "type": "FLOAT", "link": None, "widget": {"name": name}})
        for slot, entry in enumerate(entries):
            if entry["name"] in inputs:
                source, _, output = inputs[entry["name"]].partition(".")
                names = [name for name, _ in KINDS[graph[source][1]][2]]
                number = len(links) + 1
                entry["link"] = number
                type_ = KINDS[graph[source][1]][2][names.index(output)][1]
                links.append([number, ids[source], names.index(output), ids[key], slot, type_])
        shown_values: list[Any] = []
        for name, default in widgets.items():
            shown_values.append(values.get(name, default))
            if name in SEEDS:
                shown_values.append("fixed")
        tall, top = height(kind, inputs), bottoms.get(column, 60)
        bottoms[column] = top + tall + 50
        nodes.append({
            "id": ids[key], "type": kind, "pos": [40 + 380 * column, top], "size": [320, tall], "flags": {},
            "order": ids[key] - 1, "mode": 0, "inputs": entries,
            "outputs": [{"name": n, "type": t, "links": [], "slot_index": i} for i, (n, t) in enumerate(outputs)],
            "properties": {"Node name for S&R": kind}, "widgets_values": shown_values,
        })  # fmt: skip
    by_id = {node["id"]: node for node in nodes}
    for number, source, output, target, slot, type_ in links:
        by_id[source]["outputs"][output]["links"].append(number)
        if by_id[target]["inputs"][slot]["type"] == "*":
            by_id[target]["inputs"][slot]["type"] = type_  # as the page does when it connects
    return {
        "last_node_id": len(nodes), "last_link_id": len(links), "nodes": nodes, "links": links, "groups": [],
        "config": {}, "extra": {}, "version": 0.4,
    }  # fmt: skip


def to_prompt(workflow: dict[str, Any]) -> dict[str, Any]:
    """Return what the server runs, from the saved form alone."""
    links = {number: [str(source), slot] for number, source, slot, *_ in workflow["links"]}
    prompt = {}
    for node in workflow["nodes"]:
        inputs: dict[str, Any] = {}
        values = iter(node["widgets_values"])
        for name in KINDS[node["type"]][1]:
            inputs[name] = next(values)
            if name in SEEDS:
                next(values)
        inputs |= {entry["name"]: links[entry["link"]] for entry in node["inputs"] if entry["link"] is not None}
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


COLORS = {
    "MODEL": "#b39ddb", "CLIP": "#c9a800", "VAE": "#e57373", "CONDITIONING": "#e69138", "LATENT": "#d65db1",
    "IMAGE": "#4f8fd6", "SIGMAS": "#5fa55a", "SAMPLER": "#8a8a5c", "NOISE": "#8d8d8d", "GUIDER": "#4aa3a3",
    "STRING": "#77aa77", "FLOAT": "#88a0a0", "MASK": "#81c784",
}  # fmt: skip


def draw(workflow: dict[str, Any], path: Path) -> None:
    """Draw a saved workflow."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import FancyBboxPatch

    nodes = {node["id"]: node for node in workflow["nodes"]}
    right = max(n["pos"][0] + n["size"][0] for n in nodes.values()) + 40
    low = max(n["pos"][1] + n["size"][1] for n in nodes.values()) + 40
    figure, axes = plt.subplots(figsize=(right / 130, low / 130))
    axes.set(xlim=(0, right), ylim=(low, 10))
    axes.axis("off")

    def place(node: dict[str, Any], slot: int, out: bool) -> tuple[float, float]:
        return node["pos"][0] + (node["size"][0] if out else 0), node["pos"][1] + 46 + 24 * slot

    for _, source, output, target, slot, kind in workflow["links"]:
        (x0, y0), (x1, y1) = place(nodes[source], output, True), place(nodes[target], slot, False)
        bend = max(40.0, abs(x1 - x0) / 2)
        t = [i / 40 for i in range(41)]
        xs = [
            (1 - s) ** 3 * x0 + 3 * (1 - s) ** 2 * s * (x0 + bend) + 3 * (1 - s) * s**2 * (x1 - bend) + s**3 * x1
            for s in t
        ]
        ys = [(1 - s) ** 2 * (1 + 2 * s) * y0 + s**2 * (3 - 2 * s) * y1 for s in t]
        axes.plot(xs, ys, color=COLORS.get(kind, "#999999"), lw=1.6, zorder=1)
    for node in nodes.values():
        (x, y), (w, h) = node["pos"], node["size"]
        ours = node["type"].startswith("Kinvert")
        style = "round,pad=0,rounding_size=8"
        axes.add_patch(FancyBboxPatch((x, y), w, h, boxstyle=style, fc="#f4f4f4", ec="#555555", lw=0.8, zorder=2))
        axes.add_patch(
            FancyBboxPatch(
                (x, y), w, 26, boxstyle=style, fc="#f6c36b" if ours else "#cfd8dc", ec="#555555", lw=0.8, zorder=3
            )
        )
        title = TITLES.get(node["type"], node["type"])
        axes.text(x + 10, y + 18, title, fontsize=7.5, weight="bold", zorder=4)
        for out, slots in ((False, node["inputs"]), (True, node["outputs"])):
            for i, slot in enumerate(slots):
                px, py = place(node, i, out)
                axes.plot([px], [py], "o", ms=4, color=COLORS.get(slot["type"], "#999999"), zorder=5)
                axes.text(
                    px + (-9 if out else 9), py + 4, slot["name"], fontsize=6, ha="right" if out else "left", zorder=4
                )
        top = y + 40 + 24 * max(len(node["inputs"]), len(node["outputs"]))
        names = [n for w_ in KINDS[node["type"]][1] for n in ([w_, ""] if w_ in SEEDS else [w_])]
        pairs = [(n, v) for n, v in zip(names, node["widgets_values"], strict=True) if n and n != "upload"]
        for i, (name, value) in enumerate(pairs):
            if len(str(value)) < 25:  # else there is no room
                axes.text(x + 12, top + 14 + 22 * i, name, fontsize=6, color="#666666", zorder=4)
            axes.text(x + w - 12, top + 14 + 22 * i, str(value)[:40], fontsize=6, ha="right", zorder=4)
    options: dict[str, Any] = {"metadata": {"Software": None}} if path.suffix == ".png" else {}
    figure.savefig(path, dpi=90, bbox_inches="tight", pad_inches=0.05, **options)
    plt.close(figure)


def main() -> None:
    for folder in (FOLDER, PICTURES):
        folder.mkdir(parents=True, exist_ok=True)
    for name, graph in WORKFLOWS.items():
        workflow = saved(graph)
        (FOLDER / f"{name}.json").write_text(json.dumps(workflow, indent=1) + "\n")
        draw(workflow, FOLDER / f"{name}.jpg")
        if name in ON_THE_PAGE:
            draw(workflow, PICTURES / f"{name}.png")


if __name__ == "__main__":
    main()
