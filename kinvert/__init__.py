"""kinvert: the noise behind an image.

Diffusion samplers and schedules as data, in both directions: `sample`, `unsample`, exact inversion by `invert` and
`extract_noise`, and measures of how well they did. `import kinvert as ki`; the names in `__all__` are the public ones.
"""

# ruff: noqa: E402
from kinvert.stops import watch_the_start

watch_the_start()  # before PyTorch is loaded, and only if this is the command

from kinvert import analysis as analysis
from kinvert import catalogue as catalogue  # the tables of the registries
from kinvert import denoisers as denoisers
from kinvert import guidance as guidance
from kinvert import inversion as inversion
from kinvert import levels as levels
from kinvert import metrics as metrics
from kinvert import models as models
from kinvert import noise as noise
from kinvert import optimal as optimal
from kinvert import pictures as pictures
from kinvert import plot as plot
from kinvert import rules as rules
from kinvert import schedules as schedules
from kinvert.coordinates import flow_sampler as flow_sampler
from kinvert.denoisers import Denoiser as Denoiser
from kinvert.denoisers import Guided as Guided
from kinvert.density import LogProb as LogProb
from kinvert.density import dequantize as dequantize
from kinvert.density import log_prob as log_prob
from kinvert.edits import Edited as Edited
from kinvert.edits import edit as edit
from kinvert.edits import slerp as slerp
from kinvert.engine import Progress as Progress
from kinvert.engine import Stepwise as Stepwise
from kinvert.engine import graphs as graphs
from kinvert.engine import run as run
from kinvert.engine.stepwise import stepwise as stepwise
from kinvert.inversion import Inversion as Inversion
from kinvert.inversion import Solving as Solving
from kinvert.inversion import Stop as Stop
from kinvert.inversion import extract_noise as extract_noise
from kinvert.inversion import invert as invert
from kinvert.loading import Schedule as Schedule
from kinvert.loading import load as load
from kinvert.plan import Plan as Plan
from kinvert.plan import compile_plan as compile_plan
from kinvert.roundtrip import RoundTrip as RoundTrip
from kinvert.roundtrip import round_trip as round_trip
from kinvert.rules import SAMPLERS as SAMPLERS
from kinvert.rules import Rule as Rule
from kinvert.rules import sampler as sampler
from kinvert.sampling import sample as sample
from kinvert.sampling import unsample as unsample
from kinvert.schedules import SCHEDULES as SCHEDULES
from kinvert.schedules import schedule as schedule

__version__ = "0.1.0"

__all__ = [
    "SAMPLERS",
    "SCHEDULES",
    "Denoiser",
    "Edited",
    "Guided",
    "Inversion",
    "LogProb",
    "Plan",
    "Progress",
    "RoundTrip",
    "Rule",
    "Schedule",
    "Solving",
    "Stepwise",
    "Stop",
    "__version__",
    "analysis",
    "compile_plan",
    "denoisers",
    "dequantize",
    "edit",
    "extract_noise",
    "flow_sampler",
    "graphs",
    "guidance",
    "inversion",
    "invert",
    "levels",
    "load",
    "log_prob",
    "metrics",
    "models",
    "noise",
    "optimal",
    "pictures",
    "plot",
    "round_trip",
    "rules",
    "run",
    "sample",
    "sampler",
    "schedule",
    "schedules",
    "slerp",
    "stepwise",
    "unsample",
]
