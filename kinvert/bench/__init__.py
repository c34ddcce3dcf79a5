"""The reversibility benchmark: how well samplers run backwards, on a grid of settings.

`run(cells, folder)` measures, `load(folder)` reads, `compare` tells two folders apart, `kinvert bench` is the command.
`METHODS`, `PROBLEMS` and `kinvert.rules.register` take what is your own.
"""

from kinvert.bench.comparison import compare as compare
from kinvert.bench.folder import invert_folder as invert_folder
from kinvert.bench.grid import DTYPES as DTYPES
from kinvert.bench.grid import Cell as Cell
from kinvert.bench.grid import Grid as Grid
from kinvert.bench.grid import import_modules as import_modules
from kinvert.bench.grid import preset as preset
from kinvert.bench.grid import read_grid as read_grid
from kinvert.bench.methods import METHODS as METHODS
from kinvert.bench.methods import Job as Job
from kinvert.bench.problems import PROBLEMS as PROBLEMS
from kinvert.bench.problems import Problem as Problem
from kinvert.bench.record import measure as measure
from kinvert.bench.runner import run as run
from kinvert.bench.runner import submit_cells as submit_cells
from kinvert.bench.store import load as load
from kinvert.bench.tasks import UnfinishedError as UnfinishedError
