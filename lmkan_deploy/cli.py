"""The command line. Exit codes: 0 done; 1 the answers differ; 2 a mistake in the input or the call, or a defect
of this package; 129, 130 or 143 interrupted. They are the same where stdout's reader ends early, and where stdout
or stderr is closed.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import traceback
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer

from lmkan_deploy.commands.bench import bench
from lmkan_deploy.commands.build import build
from lmkan_deploy.commands.export import export
from lmkan_deploy.commands.help import MAX_WIDTH, Command, Group
from lmkan_deploy.commands.inspect import inspect
from lmkan_deploy.commands.optimize import OptimizeCommand, optimize
from lmkan_deploy.commands.package import package
from lmkan_deploy.commands.plugins import plugins
from lmkan_deploy.commands.run import run
from lmkan_deploy.commands.serve import serve
from lmkan_deploy.commands.terminal import keep_output_open
from lmkan_deploy.commands.verify import verify
from lmkan_deploy.errors import LmkanError, VerificationError
from lmkan_deploy.version import __version__

app = typer.Typer(
    name="lmkan-deploy",
    help="Run lookup multivariate Kolmogorov-Arnold networks (lmKANs) in production.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    cls=Group,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": MAX_WIDTH},
)

_UsageError: Any = typer.BadParameter.__base__
"""What typer raises for a wrong call; its public name depends on typer's release."""

_state = {"debug": False}


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lmkan-deploy {__version__}")
        raise typer.Exit


@app.callback()
def main_options(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show an error's traceback and PyTorch's messages.")
    ] = False,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the release and exit."),
    ] = False,
) -> None:
    """Options before the command."""
    _state["debug"] = debug
    if debug:
        logging.getLogger("lmkan_deploy").setLevel(logging.DEBUG)


for _command in (export, optimize, build, verify, run, bench, inspect, serve, package):
    app.command(cls=OptimizeCommand if _command is optimize else Command)(_command)
app.add_typer(plugins)


_ENDING = (signal.SIGTERM, signal.SIGHUP)


def _end(number: int, _: FrameType | None) -> NoReturn:
    """Ends the process as an exception does, so that staged files are removed."""
    for other in _ENDING:  # a second one would cut the removal short
        signal.signal(other, signal.SIG_IGN)
    sys.exit(128 + number)


def main() -> None:
    """Entry point: turns errors into one line and an exit code."""
    # ONNX Runtime's packages send usage data to Microsoft, which is for the user to allow.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    keep_output_open()
    for number in _ENDING:
        if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
            signal.signal(number, _end)
    try:
        sys.exit(app(sys.argv[1:] or ["--help"], prog_name="lmkan-deploy", standalone_mode=False))
    except VerificationError as error:
        _fail(error, str(error), 1)
    except LmkanError as error:
        _fail(error, str(error), 2)
    except _UsageError as error:
        command = "lmkan-deploy" if error.ctx is None else error.ctx.command_path
        _fail(error, f"{error.format_message().rstrip('.')}; see {command} --help", 2)
    except MemoryError as error:
        _fail(error, f"expected more memory, found too little: {error}", 2)
    except OSError as error:
        _fail(error, f"{error.filename or 'system error'}: {error.strerror}", 2)
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)
    except Exception as error:  # with Python's own exit code 1, it would say that answers differ
        what = ": ".join(filter(None, (type(error).__name__, str(error).strip().rstrip("."))))
        fix = "this is a defect of lmkan-deploy: run again with --debug and report it"
        _fail(error, f"unexpected {what}; {fix}", 2)


def _fail(error: Exception, message: str, code: int) -> NoReturn:
    if _state["debug"]:
        traceback.print_exception(error)
        sys.exit(code)
    typer.echo(f"error: {' '.join(line.strip() for line in message.splitlines())}", err=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
