"""The groups that hold the commands: how complaints are printed, and which command is the default."""

from __future__ import annotations

import faulthandler
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click
import torch

import kinvert as ki
from kinvert.jobs import UnfinishedError
from kinvert.stops import Stopped, ignore_stops, is_command, raising_stops

__all__ = ["Commands", "WithDefault", "main"]


class Commands(click.Group):
    """A group in which the library's complaints about an input are usage errors, and a stop a sentence.

    There are no tracebacks. The exit status of a stop is 130 for Ctrl-C and 143 for SIGTERM.
    """

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run as a program; if stdout is closed, say so and end."""
        if sys.stdout is None:  # Python's sign for `>&-`
            if sys.stderr is not None:
                sys.stderr.write("Error: stdout is closed, so that nothing can be printed; use > /dev/null instead\n")
            sys.exit(2)
        if is_command() and sys.stderr is not None:
            faulthandler.enable(all_threads=False)  # a model may crash the process
        with raising_stops(signal.SIGINT, signal.SIGTERM):
            return super().main(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the chosen command, and turn the library's exceptions into messages."""
        try:
            with _plain_warnings():
                return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            ignore_stops()
            kept = getattr(stop, "kept", "") or "this was not finished; the same command starts it again"
            click.echo(f"Stopped: {kept}.", err=True)
            ctx.exit(stop.status if isinstance(stop, Stopped) else 128 + signal.SIGINT)
        except (TypeError, ValueError, ImportError) as error:
            raise click.UsageError(str(error)) from error
        except torch.cuda.OutOfMemoryError as error:
            said = str(error).partition(". ")[0]
            raise click.ClickException(
                f"{said}. Use --dtype float16, smaller images (--height, --width), or --device cpu"
            ) from error
        except UnfinishedError as error:
            raise click.ClickException(str(error)) from error
        except BrokenPipeError:  # the reader of the output has enough
            raise
        except OSError as error:
            raise click.UsageError(f"{error.filename}: {error.strerror}" if error.filename else str(error)) from error


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Print warnings as sentences, without the place in the code, which is not the user's."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: click.echo(f"Warning: {message}", err=True)
        yield


class WithDefault(click.Group):
    """A group that runs its command "run" if no command is named."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put "run" before the arguments, unless they name a command or ask for help."""
        if not args and ctx.resilient_parsing:  # the shell completes the name of a command
            return super().parse_args(ctx, args)
        if not args or args[0] not in (*self.commands, *ctx.help_option_names):
            args = ["run", *args]
        return super().parse_args(ctx, args)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(ki.__version__, prog_name="kinvert")
def main() -> None:
    """The noise behind an image: diffusion samplers, noise schedules, and both run backwards.

    Start with `kinvert demo`, which needs no model and no GPU; `kinvert doctor` says whether everything works. Ctrl-C
    says what is kept, and the same command goes on.
    """
