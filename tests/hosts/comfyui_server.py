"""Workflows through the server of ComfyUI, from a clean start: the pack of this repository beside three tiny nodes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
ROOT = HERE.parent.parent

STUBS = """
import importlib.util, sys
sys.path.insert(0, {here!r})
import comfyui_models
sys.meta_path.append(comfyui_models._Stubs())
"""

TINY = """
import sys
sys.path.insert(0, {here!r})
import torch
import comfyui_models as m


class TinyModel:
    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "run", "tiny"
    INPUT_TYPES = classmethod(lambda cls: {{"required": {{"kind": (["eps", "v", "flow"],)}}}})
    def run(self, kind):
        return (m.model(kind),)


class TinyPrompt:
    RETURN_TYPES, FUNCTION, CATEGORY = ("CONDITIONING",), "run", "tiny"
    INPUT_TYPES = classmethod(lambda cls: {{"required": {{"value": ("FLOAT", {{"default": 0.3}})}}}})
    def run(self, value):
        return (m.conditioning(value),)


class TinyImage:
    RETURN_TYPES, FUNCTION, CATEGORY = ("LATENT",), "run", "tiny"
    INPUT_TYPES = classmethod(lambda cls: {{"required": {{"model": ("MODEL",)}}}})
    def run(self, model):
        return (m.image(model),)


class TinySave:
    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "run", "tiny", True
    INPUT_TYPES = classmethod(lambda cls: {{"required": {{"latent": ("LATENT",), "name": ("STRING", {{"default": "x"}})}},
                                          "optional": {{"report": ("STRING", {{"forceInput": True}})}}}})
    def run(self, latent, name, report=""):
        torch.save(latent["samples"], {out!r} + "/" + name + ".pt")
        open({out!r} + "/" + name + ".txt", "w").write(report)
        return {{}}


class Clip:
    def tokenize(self, text):
        return text

    def encode_from_tokens_scheduled(self, tokens):
        return m.conditioning(0.1 + 0.01 * (len(tokens) + sum(map(ord, tokens)) % 50))


class Vae:
    # each pixel of a latent is the mean of 8 x 8 pixels

    def encode(self, pixels):
        small = torch.nn.functional.avg_pool2d(pixels.movedim(-1, 1), 8)
        return 10 * torch.cat([small, small.mean(1, keepdim=True)], 1) - 5

    def decode(self, latent):
        return (0.1 * latent[:, :3] + 0.5).clamp(0, 1).movedim(1, -1).repeat_interleave(8, 1).repeat_interleave(8, 2)


class TinyCheckpoint:
    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL", "CLIP", "VAE"), "run", "tiny"
    INPUT_TYPES = classmethod(lambda cls: {{"required": {{"ckpt_name": ("STRING", {{}})}}}})
    def run(self, ckpt_name):
        return m.model(), Clip(), Vae()


NODE_CLASS_MAPPINGS = {{c.__name__: c for c in (TinyModel, TinyPrompt, TinyImage, TinySave, TinyCheckpoint)}}
"""


def link(source: str, output: int = 0) -> list[Any]:
    return [source, output]


def common(kind: str = "eps", steps: int = 10) -> dict[str, Any]:
    """The nodes that all workflows share."""
    return {
        "model": {"class_type": "TinyModel", "inputs": {"kind": kind}},
        "old": {"class_type": "TinyPrompt", "inputs": {"value": 0.3}},
        "new": {"class_type": "TinyPrompt", "inputs": {"value": 1.2}},
        "none": {"class_type": "TinyPrompt", "inputs": {"value": 0.1}},
        "image": {"class_type": "TinyImage", "inputs": {"model": link("model")}},
        "sigmas": {
            "class_type": "KinvertScheduler",
            "inputs": {"model": link("model"), "scheduler": "karras", "steps": steps, "denoise": 1.0},
        },
        "save image": {"class_type": "TinySave", "inputs": {"latent": link("image"), "name": "image"}},
    }


def invert(prompt: str) -> dict[str, Any]:
    """Invert with a prompt, sample with it and with another one."""
    nodes = common()
    nodes["invert"] = {
        "class_type": "KinvertInvert",
        "inputs": {
            "model": link("model"), "sampler_name": "dpmpp_2m", "sigmas": link("sigmas"), "cfg": 1.0, "tolerance": 0.0,
            "max_evaluations": 0, "positive": link(prompt), "negative": link("none"), "latent_image": link("image"),
        },
    }  # fmt: skip
    nodes["host"] = {"class_type": "KSamplerSelect", "inputs": {"sampler_name": "dpmpp_2m"}}
    for name in ("old", "new"):
        nodes[f"back {name}"] = {
            "class_type": "SamplerCustom",
            "inputs": {
                "model": link("model"), "add_noise": False, "noise_seed": 0, "cfg": 1.0, "positive": link(name),
                "negative": link("none"), "sampler": link("host"), "sigmas": link("invert", 2),
                "latent_image": link("invert"),
            },
        }  # fmt: skip
        nodes[f"save {name}"] = {
            "class_type": "TinySave",
            "inputs": {"latent": link(f"back {name}"), "name": name, "report": link("invert", 3)},
        }
    nodes["advanced"] = {
        "class_type": "KSamplerAdvanced",
        "inputs": {
            "model": link("model"), "add_noise": "disable", "noise_seed": 0, "steps": 10, "cfg": 1.0,
            "sampler_name": "dpmpp_2m", "scheduler": "karras", "positive": link("old"), "negative": link("none"),
            "latent_image": link("invert"), "start_at_step": 0, "end_at_step": 9,
            "return_with_leftover_noise": "enable",
        },
    }  # fmt: skip
    nodes["save advanced"] = {"class_type": "TinySave", "inputs": {"latent": link("advanced"), "name": "advanced"}}
    return nodes


def examples() -> Iterator[tuple[str, dict[str, Any]]]:
    """The example workflows as saved, as prompts for the tiny checkpoint."""
    from comfyui_workflows import FOLDER, to_prompt

    for path in sorted(FOLDER.glob("*.json")):
        prompt = to_prompt(json.loads(path.read_text()))
        for one in prompt.values():
            if one["class_type"] == "CheckpointLoaderSimple":
                one["class_type"] = "TinyCheckpoint"
        yield path.stem, prompt


def example_image(path: Path) -> None:
    from PIL import Image

    y, x = torch.meshgrid(torch.linspace(0, 6, 512), torch.linspace(0, 6, 512), indexing="ij")
    picture = torch.stack([x.sin(), y.cos(), (x + y).sin()], -1) * 100 + 128
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture.to(torch.uint8).numpy()).save(path)


class Server:
    """ComfyUI in a process of its own, with an empty folder of its own."""

    def __init__(self, checkout: Path, port: int, folder: Path) -> None:
        self.url, self.folder, self.checkout = f"http://127.0.0.1:{port}", folder, checkout
        packs = folder / "custom_nodes"
        (packs / "tiny").mkdir(parents=True)
        shutil.copytree(ROOT / "comfyui", packs / "kinvert")
        words = {"here": str(HERE), "out": str(folder)}
        (packs / "tiny" / "__init__.py").write_text(TINY.format(**words))
        (folder / "sitecustomize.py").write_text(STUBS.format(**words))
        path = os.pathsep.join([str(folder), str(ROOT)])
        command = [sys.executable, "main.py", "--cpu", "--port", str(port), "--base-directory", str(folder),
                   "--disable-auto-launch", "--database-url", "sqlite:///:memory:"]  # fmt: skip
        example_image(folder / "input" / "example.png")
        self.log = (folder / "server.log").open("w")
        self.process = subprocess.Popen(
            command, cwd=checkout, env={**os.environ, "PYTHONPATH": path}, stdout=self.log, stderr=subprocess.STDOUT
        )

    def get(self, path: str, data: Any = None) -> Any:
        body = None if data is None else json.dumps(data).encode()
        request = urllib.request.Request(self.url + path, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    def wait(self, seconds: float = 120.0) -> None:
        end = time.time() + seconds
        while time.time() < end:
            try:
                self.get("/system_stats")
                return
            except OSError:
                time.sleep(1)
                if self.process.poll() is not None:
                    break
        raise RuntimeError("the server did not start:\n" + (self.folder / "server.log").read_text()[-3000:])

    def run(self, prompt: dict[str, Any], seconds: float = 120.0) -> dict[str, Any]:
        answer = self.get("/prompt", {"prompt": prompt})
        end = time.time() + seconds
        while time.time() < end:
            history = self.get(f"/history/{answer['prompt_id']}")
            if history:
                return history[answer["prompt_id"]]
            time.sleep(0.3)
        raise RuntimeError("the workflow did not end")

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(30)
        self.log.close()


def run_server(checkout: Path, port: int) -> Iterator[tuple[str, float, float | None]]:
    """Start the server, ask it for the nodes, run the workflows."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        server = Server(checkout, port, folder)
        try:
            server.wait()
            about = server.get("/object_info")
            ours = [key for key in about if key.startswith("Kinvert")]
            yield f"{len(ours)} nodes of kinvert are offered", float(len(ours) != 11), 0
            result = server.run(invert("old"))
            yield (
                "invert, sample, edit: " + result["status"]["status_str"],
                float(result["status"]["status_str"] != "success"),
                0,
            )
            image, old, new, advanced = (torch.load(folder / f"{n}.pt") for n in ("image", "old", "new", "advanced"))
            size = image.square().mean().sqrt()
            yield "SamplerCustom restores the image", float((old - image).square().mean().sqrt() / size), 2e-4
            yield "KSamplerAdvanced restores the image", float((advanced - image).square().mean().sqrt() / size), 2e-4
            yield "another prompt changes it by", float((new - image).square().mean().sqrt() / size), None
            for example, prompt in examples():
                start = time.perf_counter()
                result = server.run(prompt)
                status = result["status"]["status_str"]
                took = time.perf_counter() - start
                yield f"example workflow {example}: {status}, {took:.1f} s", float(status != "success"), 0
                if status != "success":
                    print(json.dumps(result["status"])[:3000])
            wrong = invert("old")
            wrong["invert"]["inputs"]["sampler_name"] = "euler_ancestral"
            result = server.run(wrong)
            text = json.dumps(result["status"])
            yield "a stochastic sampler is an error with the fix", float("eta=0" not in text), 0
        except Exception:
            print((folder / "server.log").read_text()[-5000:])
            raise
        finally:
            server.close()
