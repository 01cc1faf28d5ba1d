"""`phantom ...`: reads arguments, calls one function, shows what it returns.

Progress goes to stderr, results to stdout. Exit codes: 0 done, 1 the work failed, 2 the input is wrong, 75 interrupted
after saving. What is slow to import is imported by the command that needs it.
"""

from __future__ import annotations

import signal
import sys
import traceback

import typer

from phantom.cli import settings, stages, pipeline, generation, benchmarks  # noqa: F401  # isort: skip  (--help has their order)
from phantom.cli.shared import app
from phantom.errors import Interrupted, StageFailed, UserError
from phantom.orchestration.privacy import no_telemetry
from phantom.progress import say

CTRL_C = 130  # what typer makes of it in a command that does not


def main() -> None:
    """Runs the command line and exits with its code."""
    no_telemetry()
    for number in (signal.SIGINT, signal.SIGTERM):  # also where a shell has started this with SIGINT ignored
        signal.signal(number, signal.default_int_handler)
    code, error = _run()
    # Inside `phantom run` the line is left to it; else it is ours to say.
    from phantom.errors import leave_outcome

    if not leave_outcome(code, error) and error:
        say(error)
    sys.stdout.flush()
    sys.exit(code)


def _run() -> tuple[int, str]:
    """Exit code and error line of this call."""
    wrong_usage = typer.BadParameter.__mro__[2]  # typer's base of everything that is wrong with the arguments
    try:
        code = int(app(prog_name="phantom", standalone_mode=False) or 0)
        return (1, "interrupted") if code == CTRL_C else (code, "")
    except (UserError, Interrupted, StageFailed) as error:
        return error.exit_code, str(error)
    except wrong_usage as error:  # type: ignore[misc]
        said = error.format_message()
        where = f"{error.ctx.command_path}: " if getattr(error, "ctx", None) else ""
        return 2, said and where + said  # nothing is said where help was shown instead
    except ModuleNotFoundError as error:
        package = (error.name or str(error)).partition(".")[0]
        if package == "phantom":
            raise
        return 1, f"{package} is not installed here: `make install`, or the extra train or orchestrate"
    except Exception as error:
        traceback.print_exc()
        return 1, f"{type(error).__name__}: {error}"
