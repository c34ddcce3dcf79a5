"""The nodes as the host reads them, and the folder for its `custom_nodes`."""

from __future__ import annotations

import importlib.util
import inspect
import json
import tomllib
from pathlib import Path
from typing import Any

import pytest

import kinvert as ki
from kinvert.adapters.comfyui import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS, NODES
from kinvert.adapters.comfyui.spec import Node, for_users, to_class

ROOT = Path(__file__).parents[3]
PACK = ROOT / "comfyui"
INPUTS = {
    "KinvertUnsampler": "model steps end_at_step cfg sampler_name scheduler normalize positive negative latent_image "
    "sigmas? sampler?",
    "KinvertRoundTrip": "model steps end_at_step cfg sampler_name scheduler normalize positive negative latent_image "
    "sigmas? sampler?",
    "KinvertInvert": "model sampler_name sigmas cfg tolerance max_evaluations positive negative latent_image sampler?",
    "KinvertExtractNoise": "model sampler_name sigmas cfg path seed positive negative latent_image sampler?",
    "KinvertRFInversion": "model sigmas cfg gamma eta until seed positive negative latent_image",
    "KinvertSampler": "sampler_name options?",
    "KinvertScheduler": "model scheduler steps denoise?",
    "KinvertSlerpLatents": "latents1 factor latents2? mask?",
    "KinvertGetSigma": "model sampler_name scheduler steps start_at_step end_at_step",
    "KinvertInjectNoise": "latents strength noise? mask?",
    "KinvertNoisyLatent": "source seed width height batch_size channels?",
}
OUTPUTS = {
    "KinvertUnsampler": "LATENT NOISE STRING",
    "KinvertRoundTrip": "LATENT FLOAT STRING",
    "KinvertInvert": "LATENT NOISE SIGMAS STRING",
    "KinvertExtractNoise": "LATENT SAMPLER SIGMAS STRING",
    "KinvertRFInversion": "LATENT SAMPLER SIGMAS STRING",
    "KinvertSampler": "SAMPLER",
    "KinvertScheduler": "SIGMAS",
    "KinvertSlerpLatents": "LATENT",
    "KinvertGetSigma": "FLOAT",
    "KinvertInjectNoise": "LATENT",
    "KinvertNoisyLatent": "LATENT",
}
"""Keys, inputs and outputs are for ever, and in this order: saved workflows have them."""


def test_keys_inputs_and_outputs_stay() -> None:
    assert {n.key: " ".join(i.name + "?" * i.optional for i in n.inputs) for n in NODES} == INPUTS
    assert {n.key: " ".join(o.kind for o in n.outputs) for n in NODES} == OUTPUTS


@pytest.mark.usefixtures("comfy")
@pytest.mark.parametrize("node", NODES, ids=lambda node: node.key)
def test_the_host_can_read_a_node(node: Node) -> None:
    cls: Any = NODE_CLASS_MAPPINGS[node.key]
    given = cls.INPUT_TYPES()
    assert [*given["required"], *given.get("optional", {})] == [i.name for i in node.inputs]
    assert [*inspect.signature(node.function).parameters] == [i.name for i in node.inputs]
    for kind, settings in (given["required"] | given.get("optional", {})).values():
        assert (isinstance(kind, str) and kind.isupper()) or (isinstance(kind, list) and kind)
        assert settings["tooltip"].endswith(".")
        if kind in ("INT", "FLOAT"):
            assert settings["min"] <= settings["default"] <= settings["max"]
    assert len(cls.RETURN_TYPES) == len(cls.RETURN_NAMES) == len(cls.OUTPUT_TOOLTIPS)
    assert cls.FUNCTION == "run" and cls.CATEGORY and node.description == cls.DESCRIPTION
    assert NODE_DISPLAY_NAME_MAPPINGS[node.key].endswith("(kinvert)")


@pytest.mark.usefixtures("comfy")
def test_every_sampler_and_schedule_is_offered() -> None:
    names = NODE_CLASS_MAPPINGS["KinvertSampler"].INPUT_TYPES()["required"]["sampler_name"][0]  # type: ignore[attr-defined]
    assert names == list(ki.SAMPLERS)
    names = NODE_CLASS_MAPPINGS["KinvertScheduler"].INPUT_TYPES()["required"]["scheduler"][0]  # type: ignore[attr-defined]
    assert names[:3] == ["even", "long", "twice"] and {*ki.SCHEDULES} <= {*names}


def test_defaults_of_the_function_are_those_of_the_widget() -> None:
    for node in NODES:
        for name, parameter in inspect.signature(node.function).parameters.items():
            settings = next(i for i in node.inputs if i.name == name)
            assert settings.optional == (parameter.default is not inspect.Parameter.empty)
            if parameter.default not in (inspect.Parameter.empty, None):
                assert settings.settings["default"] == parameter.default


def test_errors_speak_of_nodes() -> None:
    text = for_users("x draws noise; use extract_noise, or ki.sampler('dpmpp_2m_sde', eta=0, s_noise=0), or 'heun'")
    assert text == (
        "x draws noise; use Extract Noise (kinvert), or Sampler (kinvert) with dpmpp_2m_sde and the options eta=0, "
        "s_noise=0, or 'heun'"
    )

    def fail(kind: str) -> tuple[Any, ...]:
        class OwnError(ValueError):
            pass

        errors = {"value": ValueError("use extract_noise"), "own": OwnError("use extract_noise"), "key": KeyError(1)}
        raise errors[kind]

    cls: Any = to_class(Node("A", "A", "a", "a", (), (), fail))
    with pytest.raises(ValueError, match="^use Extract Noise"):
        cls().run(kind="value")
    with pytest.raises(ValueError, match="^use extract_noise"):  # the error of another program stays as it is
        cls().run(kind="own")
    with pytest.raises(KeyError):
        cls().run(kind="key")


def test_the_folder_for_custom_nodes_offers_the_nodes() -> None:
    spec = importlib.util.spec_from_file_location("custom_nodes_kinvert", PACK / "__init__.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.NODE_CLASS_MAPPINGS is NODE_CLASS_MAPPINGS
    assert module.NODE_DISPLAY_NAME_MAPPINGS is NODE_DISPLAY_NAME_MAPPINGS


def test_its_project_file_has_what_the_registry_asks() -> None:
    own = tomllib.loads((PACK / "pyproject.toml").read_text())
    package = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    project, comfy = own["project"], own["tool"]["comfy"]
    assert "comfyui" not in project["name"].lower() and project["version"] == package["version"]
    assert project["requires-python"] == package["requires-python"]
    assert project["dependencies"] == (PACK / "requirements.txt").read_text().split("\n")[:-1]
    assert {"PublisherId", "DisplayName", "Icon"} <= {*comfy} and "Repository" in project["urls"]
    assert project["license"]


@pytest.mark.usefixtures("comfy")
@pytest.mark.parametrize("path", sorted((PACK / "example_workflows").glob("*.json")), ids=lambda p: p.stem)
def test_a_workflow_has_the_inputs_that_its_nodes_have(path: Path) -> None:
    """Widgets are saved by their order, and links by their slots."""
    workflow = json.loads(path.read_text())
    nodes = {node["id"]: node for node in workflow["nodes"]}
    specs = {node.key: node for node in NODES}
    for _, source, slot, target, into, kind in workflow["links"]:
        assert nodes[source]["outputs"][slot]["type"] == kind == nodes[target]["inputs"][into]["type"]
    for node in nodes.values():
        if node["type"] not in specs:
            continue
        spec = specs[node["type"]]
        widgets = [i for i in spec.inputs if not isinstance(i.kind, str) or i.kind in ("INT", "FLOAT", "STRING")]
        values = list(node["widgets_values"])
        for one in widgets:
            value = values.pop(0)
            if one.name == "seed":
                assert values.pop(0) in ("fixed", "randomize")
            if not isinstance(one.kind, str) and one.name != "scheduler":
                assert value in one.kind()
            if one.kind in ("INT", "FLOAT"):
                assert one.settings["min"] <= value <= one.settings["max"]
        assert values == []
        sockets = [i.name for i in spec.inputs if i not in widgets]
        assert [i["name"] for i in node["inputs"] if "widget" not in i] == sockets
        assert [o["type"] for o in node["outputs"]] == [o.kind for o in spec.outputs]


def test_every_node_has_a_workflow_with_a_picture() -> None:
    shown = set()
    for path in (PACK / "example_workflows").glob("*.json"):
        shown |= {node["type"] for node in json.loads(path.read_text())["nodes"]}
        assert path.with_suffix(".jpg").exists()
    assert {node.key for node in NODES} <= shown
