"""The public surface: its names, that each module says what it offers, and that old names still answer."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import pkgutil
import re
import sys
import types
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

import kinvert as ki

ROOT = Path(__file__).parent.parent

# Every public name. A name that goes from here needs a face at its old place, and a line in CHANGELOG.md.
PUBLIC = {
    "kinvert": """
        SAMPLERS SCHEDULES Denoiser Edited Guided Inversion LogProb Plan Progress RoundTrip Rule Schedule Solving Stepwise
        Stop __version__ analysis compile_plan denoisers dequantize edit extract_noise flow_sampler graphs guidance inversion
        invert levels load log_prob metrics models noise optimal pictures plot
        round_trip rules run sample sampler schedule schedules slerp stepwise unsample
    """,
    "kinvert.adapters.comfyui": """
        NODES NODE_CLASS_MAPPINGS NODE_DISPLAY_NAME_MAPPINGS
    """,
    "kinvert.adapters.diffusers": """
        Inverted KinvertScheduler PipelineDenoiser Unsampled decode denoiser encode extract_noise invert round_trip
        unsample
    """,
    "kinvert.adapters.k_diffusion": """
        BatchedBrownianTree BrownianTreeNoiseSampler CompVisDenoiser CompVisVDenoiser Denoiser DiscreteEpsDDPMDenoiser
        DiscreteSchedule DiscreteVDDPMDenoiser OpenAIDenoiser VDenoiser append_dims append_zero default_noise_sampler
        external get_ancestral_step get_sigmas_exponential get_sigmas_karras get_sigmas_polyexponential get_sigmas_vp
        sample_dpm_2 sample_dpm_2_ancestral sample_dpm_adaptive sample_dpm_fast sample_dpmpp_2m sample_dpmpp_2m_sde
        sample_dpmpp_2s_ancestral sample_dpmpp_3m_sde sample_dpmpp_sde sample_euler sample_euler_ancestral sample_heun
        sample_lms sampling to_d utils
    """,
    "kinvert.analysis": """
        INVERTIBILITY REFERENCE Invertibility Properties amplification brownian_covariance explicit_inverse
        marginal_variances properties row_sums weak_order
    """,
    "kinvert.attacks": """
        blur crop_and_resize gaussian_noise jpeg quantize
    """,
    "kinvert.bench": """
        DTYPES METHODS PROBLEMS Cell Grid MethodResult Problem Setup UnfinishedError compare import_modules load
        measure preset read_grid run submit_cells
    """,
    "kinvert.bench.report": """
        read write
    """,
    "kinvert.denoisers": """
        BoundDenoiser Cfg Dataset Denoiser Gaussian GaussianMixture Guidance Guided Masked Preconditioned StepCfg
        expand from_edm from_eps from_v from_velocity from_x0 guide kept_cfg refuse_history resize_mask step_cfg
    """,
    "kinvert.engine": """
        Callback FusedRun Memory Progress Stepwise advance check_state combine drawn_noises fused_loop noise_for plain_loop run
        run_state stage_sigmas
    """,
    "kinvert.engine.graphs": """
        RECORDERS CapturedDenoiser CapturedRun Recorder Recording Steps capture captured_denoiser record_cuda_graphs
    """,
    "kinvert.guidance": """
        APG Branches CFGZeroStar Combination DynamicThreshold Function Interval Modifier Rescale
    """,
    "kinvert.inversion": """
        METHODS ROUTES Anderson Attempt Auto Continuation Damped Guess Inversion LevenbergMarquardt NewtonKrylov
        Picard Preimages Problem Reason Root RunLevenbergMarquardt Search Sequence Solver Solving StepSweeps
        Stop Sweeps Watcher baselines extract_noise invert preimages register_method
    """,
    "kinvert.inversion.baselines": """
        BASELINES Averaged aidi ddim_inversion direct_inversion dpm_solver_inversion easyinv fireflow flow_edit
        forward_first gnri null_text register_baseline renoise rf_inversion rf_solver sample_null_text steer uni_inv
    """,
    "kinvert.inversion.solvers": """
        Anderson Attempt Auto Continuation Damped Guess Judge LevenbergMarquardt NewtonKrylov Picard Problem Reason Root
        RunLevenbergMarquardt Search Sequence Solver StepSweeps Sweeps
    """,
    "kinvert.levels": """
        DiscreteLevels EDMLevels FlowLevels FlowTimes Levels TableLevels VDiffusionLevels edm flow flow_to_ve flux
        from_alphas_cumprod from_betas from_table resolution_mu stable_diffusion v_diffusion ve_to_flow
    """,
    "kinvert.metrics": """
        Per anderson auc autocorrelation bit_accuracy cosine dagostino ks kurtosis latent_metrics max_error mean mse nmse norm_score
        patch_correlation psnr radial_spectrum reconstruction_metrics skew spectrum_slope ssim std
        tpr_at_fpr
    """,
    "kinvert.models": """
        NAMES EmbeddedDenoiser held_out load variants
    """,
    "kinvert.noise": """
        Brownian Clipped Noise NoiseFunction NoiseSource Replay White bind brownian clipped default_noise derived_seed
        replay white
    """,
    "kinvert.optimal": """
        oss round_trip_schedule
    """,
    "kinvert.pictures": """
        IMAGES TENSORS image_files open_image pillow read save_image write
    """,
    "kinvert.plot": """
        coefficients contraction convergence differences images latents schedules
    """,
    "kinvert.reference": """
        SMALLEST_RTOL ErrorSplit solve_ode split_error
    """,
    "kinvert.rules": """
        BDIA DEIS DPM2 EDICT ERSDE IPNDM IPNDMV LCM LMS OBELM RES2S RES3S SAMPLERS CFGppUD10AB DDIMInverse
        DPM2Ancestral DPMAdaptive DPMFast DPMpp2M DPMpp2MCFGpp DPMpp2MSDE DPMpp2SAncestral DPMpp2SAncestralCFGpp
        DPMpp3MSDE DPMppSDE DirectInversion Euler EulerAncestral EulerAncestralCFGpp ExponentialAdams FireFlow Flow
        GradientEstimation GradientEstimationCFGpp Heun HeunPP2 HochbruckOstermann5 Krogstad4 LawsonRungeKutta
        Leapfrog McCallumFoster PhiRungeKutta PhiTableau RFSolver ResMultistep ResMultistepCFGpp Restart ReversibleHeun Rule RungeKutta SASolver SamplerEntry Seeds2 Seeds3
        ShARK StepBuilder Tableau UniInv UniPC interpolate register sampler slope weighted_sum
    """,
    "kinvert.schedules": """
        ALIGN_YOUR_STEPS DISCARD_PENULTIMATE SCHEDULES ScheduleEntry ays beta beta57 bong_tangent ddim_uniform
        exponential karras kl_optimal laplace leading linear_quadratic logit_normal normal polyexponential schedule
        sgm_uniform shift_terminal simple trailing vp
    """,
}  # fmt: skip


EXTRAS = [f"kinvert.adapters.{name}" for name in ("diffusers",) if importlib.util.find_spec(name) is None]
"""Adapters of programs that are not installed."""


def modules() -> Iterator[tuple[str, bool]]:
    """All modules by name, and whether each is a package."""
    yield "kinvert", True
    for module in pkgutil.walk_packages(ki.__path__, "kinvert."):
        if not module.name.endswith(".__main__") and not module.name.startswith(tuple(EXTRAS)):
            yield module.name, module.ispkg


MODULES = [name for name, _ in modules()]


def source(module: str) -> str:
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).read_text()


FACES = {name: new for name in MODULES for new in re.findall(r"= moved\(__name__, \"([\w.]+)\"\)", source(name))}
"""Old path of a module -> the new one."""


def renamed_names(module: str) -> dict[str, str]:
    """Old name -> full new name, of the names of a module that were renamed or moved."""
    for node in ast.walk(ast.parse(source(module))):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "moved_names":
            return ast.literal_eval(node.args[1])
    return {}


RENAMED = [(module, *pair) for module in MODULES if module not in FACES for pair in renamed_names(module).items()]
OFFERING = [name for name in MODULES if name not in FACES and "\n__all__ = " in source(name)]


def kind(name: str) -> tuple[int, list[str | int]]:
    """The place of a name in `__all__`: constants, classes, the rest, and numbers by their size."""
    rank = 0 if name.isupper() else 1 if name[0].isupper() else 2
    return rank, [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


@pytest.mark.parametrize("package", PUBLIC)
def test_the_public_names_are_these(package: str) -> None:
    assert sorted(importlib.import_module(package).__all__) == sorted(PUBLIC[package].split())


def test_every_module_says_what_it_offers() -> None:
    """But for those that only remember old names."""
    assert {*MODULES} - {*OFFERING} <= {*FACES, "kinvert.graphs"} | {module for module, _, _ in RENAMED}


@pytest.mark.parametrize("name", OFFERING)
def test_what_a_module_offers_is_there_and_sorted(name: str) -> None:
    module = importlib.import_module(name)
    assert list(module.__all__) == sorted(set(module.__all__), key=kind)
    for offered in module.__all__:
        assert hasattr(module, offered), offered
        assert not offered.startswith("_") or offered == "__version__", offered


@pytest.mark.parametrize("name", OFFERING)
def test_every_public_function_and_class_has_a_docstring(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__doc__
    for offered in module.__all__:
        value = getattr(module, offered)
        if (inspect.isclass(value) or inspect.isfunction(value)) and value.__module__.startswith("kinvert"):
            assert inspect.getdoc(value), offered


@pytest.mark.parametrize("name", [name for name, is_package in modules() if is_package])
def test_no_module_has_the_name_of_a_function_of_its_package(name: str) -> None:
    package = importlib.import_module(name)
    for module in pkgutil.iter_modules(package.__path__):
        value = getattr(package, module.name, None)
        assert value is None or isinstance(value, types.ModuleType), f"{name}.{module.name}"


@pytest.mark.parametrize("old", FACES)
def test_old_modules_answer_with_a_warning(old: str) -> None:
    new = importlib.import_module(FACES[old])
    for name in new.__all__:
        with pytest.warns(DeprecationWarning, match=rf"{old} is now {FACES[old]}"):
            assert getattr(importlib.import_module(old), name) is getattr(new, name)


def test_the_old_name_of_graphs_is_the_module_itself() -> None:
    """It is `ki.graphs` too, which must not warn."""
    sys.modules.pop("kinvert.graphs", None)
    with pytest.warns(DeprecationWarning, match=r"kinvert\.graphs is now kinvert\.engine\.graphs"):
        importlib.import_module("kinvert.graphs")
    assert ki.graphs is sys.modules["kinvert.engine.graphs"]


@pytest.mark.parametrize(("module", "old", "new"), RENAMED, ids=[f"{module}.{old}" for module, old, _ in RENAMED])
def test_old_names_of_a_module_answer_with_a_warning(module: str, old: str, new: str) -> None:
    where, _, name = new.rpartition(".")
    with pytest.warns(DeprecationWarning, match=rf"{module}.{old} is now {new}"):
        assert getattr(importlib.import_module(module), old) is getattr(importlib.import_module(where), name)


@pytest.mark.parametrize(
    "old", sorted({*FACES, *(module if module not in OFFERING else f"{module}.{name}" for module, name, _ in RENAMED)})
)
def test_old_names_stand_in_the_changelog(old: str) -> None:
    assert f"`{old}`" in (ROOT / "CHANGELOG.md").read_text()


def test_an_import_of_the_package_warns_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        importlib.reload(importlib.import_module("kinvert"))


VERBS = {
    name: getattr(ki, name)
    for name in ("sample", "unsample", "invert", "extract_noise", "edit", "round_trip", "run", "stepwise")
}


def table_of_arguments() -> dict[str, dict[str, str]]:
    """The table of docs/arguments.md: for each verb the default of every argument that it has."""
    lines = [line for line in (ROOT / "docs" / "arguments.md").read_text().splitlines() if line.startswith("| ")]
    head, _, *rows = [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines]
    return {verb: {row[0]: row[i] for row in rows if row[i]} for i, verb in enumerate(head) if i}


def test_the_table_of_arguments_is_what_the_verbs_take() -> None:
    """In the order of the signatures, so that what the verbs share is in the same order in each.

    What may be given by position comes first in a signature, but has one place in the table.
    """
    table = table_of_arguments()
    assert list(table) == list(VERBS)
    for name, verb in VERBS.items():
        parameters = inspect.signature(verb).parameters
        expected = {
            key: "required" if value.default is value.empty else repr(value.default)
            for key, value in parameters.items()
        }
        assert table[name] == expected, name
        for by_keyword in (False, True):
            kind = [key for key in expected if (parameters[key].kind is inspect.Parameter.KEYWORD_ONLY) is by_keyword]
            assert [key for key in table[name] if key in kind] == kind, name


@pytest.mark.parametrize("name", list(VERBS)[:6])
def test_what_is_not_data_is_given_by_keyword(name: str) -> None:
    parameters = inspect.signature(VERBS[name]).parameters.values()
    positional = [parameter.name for parameter in parameters if parameter.kind is not parameter.KEYWORD_ONLY]
    assert positional == ["denoiser", "x", "sigmas"]
