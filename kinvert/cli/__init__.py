"""The command line, `kinvert`: a demo on real images, the benchmark, and lists of what there is to choose from.

Tables go to stdout and everything else to stderr; with `--json` stdout is JSON alone, with null for infinite numbers.
An input that cannot work ends with one line that says why and with exit status 2.
"""

try:
    import click as click
    import rich as rich
except ModuleNotFoundError as error:
    raise SystemExit(f"the command line needs {error.name}, which is not here: pip install 'kinvert[cli]'") from error

from kinvert.cli import benchmark, doctor, editing, listings, pipelines, runs, sampling, showing
from kinvert.cli.groups import main

__all__ = ["main"]

_COMMANDS = (
    *(runs.demo, pipelines.unsample, runs.invert, sampling.sample, editing.edit, showing.show),
    *(listings.samplers, listings.schedules, listings.plan, benchmark.bench_group, doctor.doctor),
)
for _command in _COMMANDS:
    main.add_command(_command)
