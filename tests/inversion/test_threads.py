"""Every kind of inversion with torch's default threads: it ends, and it is what one thread finds.

In processes of their own, because a thread that waits for itself inside torch cannot be interrupted.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

LIMIT = 500  # seconds; the two processes take about 20, without neighbours

INVERT = """
import sys, warnings
import torch
import kinvert as ki

if sys.argv[1] == "1":
    torch.set_num_threads(1)
else:
    torch.set_num_threads(max(2, torch.get_num_threads()))
warnings.simplefilter("ignore")
gaussian = ki.denoisers.Gaussian(0.1, torch.linspace(0.3, 1.0, 8, dtype=torch.float64).reshape(2, 2, 2))

def pair(x, sigma):
    return ki.Guided(gaussian(x, sigma), 0.9 * gaussian(x, sigma))

GRID = [(1, 8), (1, 50), (2, 20), (8, 8), (8, 50)]
SOME = [(1, 50), (8, 8)]
KINDS = [("dpmpp_2m", "auto", GRID), ("euler", "auto", GRID), ("dpmpp_2m", "auto", [(16, 10)])]
KINDS += [(name, "auto", SOME) for name in ("heun", "rk4", "deis", "uni_pc", "o_belm", "dpmpp_2m_cfg_pp")]
KINDS += [("ipndm", "auto", [(2, 8), (8, 8)])]  # sweeps do not end there: through a base sampler
KINDS += [("euler", method, SOME) for method in ("anderson", "newton", "damped", "sweeps", "continuation", "picard")]
KINDS += [("euler_ancestral", "extract", SOME)]
found = {}
for sampler, method, sizes in KINDS:
    for batch, steps in sizes:
        for dtype in (torch.float32, torch.float64):
            x = torch.randn(batch, 2, 2, 2, generator=torch.Generator().manual_seed(batch)).to(dtype)
            sigmas = ki.schedules.karras(steps, 0.05, 10.0)[:-1]
            if method == "extract":
                random = torch.Generator().manual_seed(0)
                result = ki.extract_noise(gaussian, x, sigmas, sampler=sampler, generator=random)
            else:
                denoiser = pair if "cfg" in sampler else gaussian
                result = ki.invert(denoiser, x, sigmas, sampler=sampler, method=method, max_evals=40 * steps)
            key = f"{sampler} {method} {batch} x {steps} {dtype}"
            found[key] = (result.latent, result.converged, result.evaluations)
torch.save(found, sys.argv[2])
"""


def test_threads_change_nothing(tmp_path: Path) -> None:
    """Latents to rounding, what converged, and evaluations; one system of a sweep has up to 1000 unknowns."""
    environment = {
        name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
    }
    environment["OMP_WAIT_POLICY"] = "passive"  # threads that spin are slow beside other processes
    files = [tmp_path / threads for threads in ("1", "default")]
    processes = [
        subprocess.Popen([sys.executable, "-c", INVERT, file.name, str(file)], env=environment, stderr=subprocess.PIPE)
        for file in files
    ]
    try:
        for process in processes:
            _, error = process.communicate(timeout=LIMIT)
            assert process.returncode == 0, error.decode()[-2000:]
    finally:
        for process in processes:
            process.kill()
    one, more = (torch.load(file, weights_only=True) for file in files)
    assert one.keys() == more.keys()
    for key, (latent, converged, evaluations) in one.items():
        assert torch.equal(more[key][1], converged), key
        rounding = 1e-6 if latent.dtype == torch.float32 else 1e-9
        torch.testing.assert_close(more[key][0][converged], latent[converged], rtol=0, atol=rounding, msg=key)
        spent = torch.stack([more[key][2], evaluations]).double().sum(1)
        assert float((spent[0] / spent[1]).log().abs()) < 0.1, (key, spent.tolist())
