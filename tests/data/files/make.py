"""Write the files of this kinvert's version; `python tests/data/files/make.py FOLDER`.

Run it once for a new version of files, into a new folder, and never again: the old files must stay readable as they are.
The folder `0` was written by kinvert before files had a version.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

import kinvert as ki
from kinvert.bench import Cell
from kinvert.folder import invert_folder


def main(folder: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    denoiser = ki.denoisers.Gaussian(0.0, torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64))
    levels = ki.levels.edm(0.1, 10.0)
    sigmas = ki.schedule("karras", 4, levels)
    x = torch.randn(2, 3, generator=generator, dtype=torch.float64)
    found = ki.invert(denoiser, x, sigmas[:-1], sampler="bdia", mask=torch.tensor([1.0, 1.0, 0.0]))
    found.save(folder / "inversion.safetensors")
    ki.extract_noise(denoiser, x, sigmas[:-1], generator=generator).save(folder / "noises.safetensors")
    ki.round_trip(denoiser, x, sigmas).save(folder / "round_trip.safetensors")
    ki.compile_plan("dpmpp_2m_sde", sigmas).save(folder / "plan.json")
    ki.Schedule(sigmas, "karras", levels).save(folder / "schedule.safetensors")
    shard(folder)
    latent(folder / "latent.safetensors")


def shard(folder: Path) -> None:
    source = folder / "source"
    source.mkdir(parents=True)
    x = torch.linspace(-1, 1, 16, dtype=torch.float64)
    torch.save(x, source / "x.pt")
    invert_folder(source, folder / "latents", Cell("gaussian", method="reversible", sampler="edict", steps=3))
    (source / "x.pt").unlink()
    source.rmdir()


def latent(path: Path) -> None:
    from kinvert.cli.latents import LatentFile, Record

    record = Record(
        verb="invert", model="models/sd15", call={"prompt": "a cat", "guidance_scale": 2.0}, steps=3, sampler="euler",
        options={}, coordinates="ve", sigmas=(10.0, 1.0, 0.1), schedule=None, dtype="float32", method="invert",
        limits=(None, 50), image=("cat.png", "0123"), size=(8, 8), result={"converged": True},
    )  # fmt: skip
    LatentFile(torch.arange(4.0).reshape(1, 1, 2, 2), record, {"y": torch.ones(1, 1, 2, 2)}).save(path)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
