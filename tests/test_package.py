"""What is published: the wheel, what an index shows, and the files about the project."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import kinvert as ki

ROOT = Path(__file__).parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def builder() -> ModuleType:
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# -- what an index shows -----------------------------------------------------------------------------------------------
def test_the_description_has_no_link_that_an_index_breaks() -> None:
    readme = (ROOT / "README.md").read_text()
    text = builder().description(readme)
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    assert all(re.match(r"[a-z]+://|#", target) for target in targets), targets
    assert len(re.findall(r"\]\((?!https?:|#)", readme)) > 20  # there are some to lose
    assert re.findall(r"^```.*?^```$", text, re.M | re.S) == re.findall(r"^```.*?^```$", readme, re.M | re.S)


def test_links_of_the_description() -> None:
    text = "[a](docs/a.md#b), [c](https://x.y/z), [d](#e), ![f g](h.png)\n```\n[a](b)\n```\n"
    assert builder().description(text) == "a, [c](https://x.y/z), [d](#e), *f g*\n```\n[a](b)\n```\n"
    completed = builder().description(text, "https://host/blob/main/")
    assert completed.startswith("[a](https://host/blob/main/docs/a.md#b), [c](https://x.y/z), [d](#e)")
    assert "![f g](https://host/blob/main/h.png)" in completed


# -- the wheel ---------------------------------------------------------------------------------------------------------
WITHOUT_EXTRAS = """
import sys
for name in ("click", "rich", "matplotlib", "PIL", "diffusers", "transformers", "accelerate", "submitit", "sklearn"):
    sys.modules[name] = None
import json, pathlib, warnings
import torch
import kinvert as ki
from kinvert import bench, folder

place = pathlib.Path(sys.argv[1])
here = pathlib.Path(ki.__file__).parent
assert here.parent == place / "installed", here
warnings.simplefilter("ignore", RuntimeWarning)
denoiser = ki.models.load("digits")
images, labels = ki.models.held_out("digits")
x = images[:1]
sigmas = ki.schedule("karras", 4, ki.levels.edm(denoiser.sigma_min, denoiser.sigma_max))[:-1]
guided = {"positive": {"label": labels[:1]}, "negative": {"label": 10 + 0 * labels[:1]}, "cfg": 1.5}
plan = ki.compile_plan("euler", sigmas)
latent = ki.unsample(denoiser, x, sigmas, **guided)
ki.sample(denoiser, latent, sigmas, **guided)
ki.invert(denoiser, x, sigmas, max_evals=20)
ki.extract_noise(denoiser, x, sigmas, sampler="euler_ancestral")
ki.round_trip(denoiser, x, sigmas)
ki.run(plan, denoiser, sigmas[0] * torch.randn(x.shape))
run = ki.stepwise(plan, latent)
while not run.done:
    run.send(denoiser(run.x, run.sigma))
ki.flow_sampler("euler")
ki.analysis.properties("heun")
ki.metrics.psnr(x, x + 0.1)
ki.guidance.Rescale(0.7)
bench.run([bench.Cell("gaussian", steps=2, count=1)], place / "results")
bench.compare(place / "results", place / "results")
torch.save(x[0], place / "x.pt")
(place / "in").mkdir()
(place / "x.pt").rename(place / "in" / "x.pt")
folder.invert_folder(place / "in", place / "out", bench.Cell("digits", steps=2, dtype="float32"))

def complaint(call):
    try:
        call()
    except BaseException as error:
        return f"{type(error).__name__}: {error}"

def report():
    from kinvert.bench import report
    report.write([place / "results"], place / "report")

def diffusers():
    import kinvert.adapters.diffusers as kd
    kd.denoiser

def images_of_a_folder():
    (place / "in" / "y.png").touch()
    folder.invert_folder(place / "in", place / "out2", bench.Cell("digits", steps=2, dtype="float32"))

def command():
    import kinvert.cli

print(json.dumps({
    "cli": complaint(command),
    "diffusers": complaint(diffusers),
    "slurm": complaint(lambda: bench.submit_cells([bench.Cell("gaussian")], place, workers=1)),
    "report": complaint(report),
    "images": complaint(images_of_a_folder),
}))
"""


def run(*command: str | Path, **how: Any) -> str:
    result = subprocess.run(command, capture_output=True, text=True, check=False, **how)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built without a network."""
    if importlib.util.find_spec("hatchling") is None:
        pytest.skip("hatchling, which builds the wheel, is not installed: pip install 'kinvert[dev]'")
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "hatchling", "build", "-d", out, cwd=ROOT)
    (found,) = out.glob("*.whl")
    return found


def test_an_index_takes_the_wheel_and_the_sdist(wheel: Path) -> None:
    if importlib.util.find_spec("twine") is None:
        pytest.skip("twine, which checks the packages, is not installed: pip install 'kinvert[dev]'")
    files = sorted(wheel.parent.iterdir())
    assert [path.suffix for path in files] == [".whl", ".gz"]
    text = run(sys.executable, "-m", "twine", "--no-color", "check", "--strict", *files)
    assert text.count("PASSED") == 2


def test_the_wheel_alone_has_every_verb_and_names_the_extras(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "installed"
    run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", target, wheel)
    assert (target / "kinvert" / "py.typed").exists()
    environment = {"PYTHONPATH": str(target), "OMP_NUM_THREADS": "1", "PATH": ""}
    said = run(sys.executable, "-c", WITHOUT_EXTRAS, tmp_path, cwd=tmp_path, env=environment)
    complaints = json.loads(said.splitlines()[-1])
    for extra, name in (("cli", "cli"), ("diffusers", "diffusers"), ("slurm", "slurm")):
        assert f"pip install 'kinvert[{name}]'" in complaints[extra], complaints[extra]
    for what in ("report", "images"):
        assert "pip install 'kinvert[cli]'" in str(complaints[what]), complaints[what]


def test_the_sdist_makes_the_same_wheel(wheel: Path, tmp_path: Path) -> None:
    (sdist,) = wheel.parent.glob("*.tar.gz")
    run("tar", "xzf", sdist, "-C", tmp_path)
    run(
        sys.executable,
        "-m",
        "hatchling",
        "build",
        "-t",
        "wheel",
        "-d",
        tmp_path / "dist",
        cwd=tmp_path / sdist.name[:-7],
    )
    (again,) = (tmp_path / "dist").glob("*.whl")
    assert again.read_bytes() == wheel.read_bytes()


def test_what_is_installed_fits_together() -> None:
    """`pip check`, of kinvert and what it needs; other packages of the environment are not ours."""
    result = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True, check=False)
    if "No module named pip" in result.stderr:
        pytest.skip("pip is not installed")
    names = {
        re.split(r"[^\w-]", text)[0] for text in (*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["cli"])
    }
    broken = [line for line in result.stdout.splitlines() if line.split()[0] in {"kinvert", *names}]
    assert not broken


# -- the files about the project ---------------------------------------------------------------------------------------
def test_versions_agree() -> None:
    citation = (ROOT / "CITATION.cff").read_text()
    assert PROJECT["version"] == ki.__version__
    assert f"\nversion: {ki.__version__}\n" in citation and f"name: {PROJECT['authors'][0]['name']}\n" in citation


def test_the_citation_is_complete() -> None:
    yaml = pytest.importorskip("yaml")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0" and citation["type"] == "software"
    assert citation["title"] and citation["message"] and citation["license"] == PROJECT["license"]
    assert all(set(author) == {"name"} for author in citation["authors"])  # an entity, no person
    known = {
        "cff-version",
        "message",
        "title",
        "type",
        "authors",
        "version",
        "license",
        "keywords",
        "abstract",
        "repository-code",
    }
    assert set(citation) <= known and isinstance(citation["version"], str)


def test_forms_and_workflows_are_yaml_and_run_what_the_readme_says() -> None:
    yaml = pytest.importorskip("yaml")
    for path in (*(ROOT / ".github").rglob("*.yml"), ROOT / ".pre-commit-config.yaml"):
        assert isinstance(yaml.safe_load(path.read_text()), dict), path
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]
    commands = {step["run"] for job in jobs.values() for step in job["steps"] if step.get("run", "").startswith("make")}
    assert commands == {"make test", "make test-oldest", "make test-newest", "make package", "make docs"}
    readme, makefile = (ROOT / "README.md").read_text(), (ROOT / "Makefile").read_text()
    for command in commands:
        assert f"`{command}`" in readme or f"\n{command} " in readme, command
        assert f"\n{command.removeprefix('make ')}:" in makefile, command
    pythons = jobs["test"]["strategy"]["matrix"]["python"]
    assert all(f"Programming Language :: Python :: {version}" in PROJECT["classifiers"] for version in pythons)


@pytest.mark.parametrize(
    "name",
    [
        *("CHANGELOG.md", "CITATION.cff", "CODE_OF_CONDUCT.md", "CONTRIBUTING.md", "LICENSE", "SECURITY.md"),
        *(".editorconfig", ".pre-commit-config.yaml", ".github/PULL_REQUEST_TEMPLATE.md"),
        *(".github/ISSUE_TEMPLATE/bug_report.yml", ".github/ISSUE_TEMPLATE/feature_request.yml"),
    ],
)
def test_the_project_has_the_files_that_readers_look_for(name: str) -> None:
    text = (ROOT / name).read_text()
    assert text.strip()
    for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", text) if name.endswith(".md") else ():
        assert ((ROOT / name).parent / target).exists(), target
