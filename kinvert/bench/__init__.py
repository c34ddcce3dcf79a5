"""The reversibility benchmark: how well samplers run backwards, on a grid of settings.

`run(cells, folder)` measures, `load(folder)` reads, `compare` shows how two folders differ, and `kinvert bench` is the
command. Add your own to `METHODS`, to `PROBLEMS`, and samplers by `kinvert.rules.register`.
"""

from kinvert._moved import moved_names
from kinvert.bench.grid import DTYPES, Cell, Grid, preset, read_grid
from kinvert.bench.measurement import measure
from kinvert.bench.methods import METHODS, MethodResult, Setup
from kinvert.bench.problems import PROBLEMS, Problem
from kinvert.bench.results import compare, load
from kinvert.bench.runner import run, submit_cells
from kinvert.jobs import UnfinishedError, import_modules

__all__ = [
    "DTYPES",
    "METHODS",
    "PROBLEMS",
    "Cell",
    "Grid",
    "MethodResult",
    "Problem",
    "Setup",
    "UnfinishedError",
    "compare",
    "import_modules",
    "load",
    "measure",
    "preset",
    "read_grid",
    "run",
    "submit_cells",
]

__getattr__ = moved_names(
    __name__, {"Job": "kinvert.bench.methods.Setup", "invert_folder": "kinvert.folder.invert_folder"}
)
