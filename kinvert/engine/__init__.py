"""The engine: the one place where Plans, and rules, meet tensors."""

from kinvert.engine.contract import check_state as check_state
from kinvert.engine.fused import BLOCK as BLOCK
from kinvert.engine.fused import Constants as Constants
from kinvert.engine.fused import FusedRun as FusedRun
from kinvert.engine.fused import fused_loop as fused_loop
from kinvert.engine.loop import noise_for as noise_for
from kinvert.engine.loop import plain_loop as plain_loop
from kinvert.engine.loop import run as run
from kinvert.engine.loop import run_state as run_state
from kinvert.engine.step import Callback as Callback
from kinvert.engine.step import Memory as Memory
from kinvert.engine.step import Progress as Progress
from kinvert.engine.step import advance as advance
from kinvert.engine.step import combine as combine
from kinvert.engine.step import evaluate as evaluate
from kinvert.engine.step import stage_sigmas as stage_sigmas
