"""The groups that hold the commands: how complaints are printed, and which command is the default."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click
import torch

import kinvert as ki
from kinvert.jobs import UnfinishedError

__all__ = ["Commands", "WithDefault", "main"]


class Commands(click.Group):
    """A group in which the library's complaints about an input are usage errors, without a traceback."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run as a program; if stdout is closed, say so and end."""
        if sys.stdout is None:  # Python's sign for `>&-`
            if sys.stderr is not None:
                sys.stderr.write("Error: stdout is closed, so that nothing can be printed; use > /dev/null instead\n")
            sys.exit(2)
        return super().main(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the chosen command, and turn the library's exceptions into messages."""
        try:
            with _plain_warnings():
                return super().invoke(ctx)
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
        if not args or args[0] not in (*self.commands, *ctx.help_option_names):
            args = ["run", *args]
        return super().parse_args(ctx, args)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(ki.__version__, prog_name="kinvert")
def main() -> None:
    """The noise behind an image: diffusion samplers, noise schedules, and both run backwards.

    Start with `kinvert demo`, which needs no model and no GPU.
    """
