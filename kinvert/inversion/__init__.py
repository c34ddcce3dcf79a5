"""Exact inversion: the latent, or the noise, that a given sampler maps to a given image, with a certificate."""

from kinvert.inversion import baselines as baselines
from kinvert.inversion.continuation import Continuation as Continuation
from kinvert.inversion.extract import extract_noise as extract_noise
from kinvert.inversion.invert import invert as invert
from kinvert.inversion.result import Inversion as Inversion
from kinvert.inversion.solvers import Anderson as Anderson
from kinvert.inversion.solvers import Damped as Damped
from kinvert.inversion.solvers import NewtonKrylov as NewtonKrylov
from kinvert.inversion.solvers import Picard as Picard
from kinvert.inversion.solvers import Solver as Solver
from kinvert.inversion.stepwise import Auto as Auto
from kinvert.inversion.trajectory import StepSweeps as StepSweeps
from kinvert.inversion.trajectory import Sweeps as Sweeps
