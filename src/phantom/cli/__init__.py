"""The command line, `phantom ...`: each command parses its arguments, calls one function and prints the result.

Progress goes to stderr, results to stdout. Exit codes: 0 success, 1 failure, 2 wrong input, 75 interrupted with
its progress saved. Slow imports are inside the commands that need them, so that `--help` is fast.
"""

from __future__ import annotations

import signal
import sys
import traceback

import typer

# In the order of --help.
from phantom.cli import settings, stages, data, pipeline, generation, serving  # noqa: F401  # isort: skip
from phantom.cli import benchmarks, judge, votes, study, checkpoints  # noqa: F401  # isort: skip
from phantom import logs
from phantom.cli.shared import app
from phantom.cores import let_idle_threads_sleep
from phantom.cost import gpu_hours
from phantom.errors import Interrupted, StageFailed, UserError, raise_terminated, write_outcome
from phantom.orchestration.privacy import no_telemetry
from phantom.progress import say

TYPER_INTERRUPTED = 130  # typer's return value for a KeyboardInterrupt that a command does not catch


def main() -> None:
    """Runs the command line and exits with the command's exit code."""
    no_telemetry()
    let_idle_threads_sleep()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # even if started in the background, with SIGINT ignored
    signal.signal(signal.SIGTERM, raise_terminated)
    code, error = _run()
    # A parent such as `phantom run` prints the error itself.
    if not write_outcome(code, error, gpu_hours()) and error:
        say(error, "error")
    sys.stdout.flush()
    sys.exit(code)


def _run() -> tuple[int, str]:
    """The exit code and, if there is one, the error line."""
    usage_error = typer.BadParameter.__mro__[2]  # ClickException, which typer does not export
    try:
        logs.configure()
        code = int(app(prog_name="phantom", standalone_mode=False) or 0)
        return (1, "interrupted") if code == TYPER_INTERRUPTED else (code, "")
    except (UserError, Interrupted, StageFailed) as error:
        return error.exit_code, str(error)
    except usage_error as error:  # type: ignore[misc]
        message = error.format_message()
        command = f"{error.ctx.command_path}: " if getattr(error, "ctx", None) else ""
        return 2, message and command + message  # empty where help was shown instead
    except ModuleNotFoundError as error:
        package = (error.name or str(error)).partition(".")[0]
        if package == "phantom":
            raise
        return 1, f"{package} is not installed here: `make install`, or the extra train or orchestrate"
    except Exception as error:
        say(traceback.format_exc().rstrip(), "error")
        return 1, f"{type(error).__name__}: {error}"
