"""The program `dslc`: its commands, exit statuses and internal errors."""

from __future__ import annotations

import atexit
import gc
import os
import sys
import traceback
from importlib import import_module
from keyword import iskeyword
from typing import Annotated

import typer

from backends import VERSION

# In the order of `dslc --help`; each is a module of `dslc.commands`.
COMMANDS = (
    "check", "show", "plan", "dryrun", "calibrate", "doctor", "graph", "passes", "diff", "build",
    "kernels", "tune", "tokenizer", "train", "launch", "study", "eval", "generate", "serve",
    "bench-serve", "plot", "import", "export", "init", "schema", "ops", "explain",
)  # fmt: skip
FORMER = {"sample": "generate"}  # former names

EXAMPLES = """
\b
Examples:
  dslc init my_model                       start a small spec of your own
  dslc check my_model.yaml                 every error at once, with its place
  dslc show deepseek_v3                    modules, parameters, FLOPs, cache bytes
  dslc build specs/deepseek_v3.yaml        write the package build/deepseek_v3
  dslc build deepseek_v3 --set params.n_routed_experts=128 -o build/v3_128
  dslc kernels deepseek_v3 --target sm_90  its compiled Triton kernels, without a GPU
  dslc train deepseek_v3_mini --data data/tinyshakespeare.txt --out runs/mini
  dslc serve runs/mini                     the API of OpenAI, and a chat page
  dslc import DeepSeek-V3 --to v3_bf16     published weights, verified, in BF16
  dslc graph deepseek_v3_tiny --block MLA  the equations as the compiler sees them
  dslc diff deepseek_v2_236b deepseek_v3   what differs between two models

\b
Exit status: 0 success, 1 wrong input, 2 wrong usage, 70 internal error, 130 interrupted.
"""


def print_version(wanted: bool) -> None:
    if wanted:
        print(f"dslc {VERSION}")
        raise typer.Exit


def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=print_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    pass


def application(word: str) -> typer.Typer:
    """The program as its first argument needs it: with the one command of that name, or with all.

    A command imports what it takes to declare its options, which the others need not wait for.
    """
    app = typer.Typer(
        name="dslc",
        help="Compiles declarative specs of DeepSeek-V3-class models to readable PyTorch packages.",
        epilog=EXAMPLES,
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    )
    app.callback()(options)
    for name in [word] if word in COMMANDS else [*COMMANDS, *FORMER]:
        module = FORMER.get(name, name).replace("-", "_")
        command = import_module(f"dslc.commands.{module}{'_' * iskeyword(module)}")
        app.command(name, epilog=command.EXAMPLES, hidden=name in FORMER)(command.run)
    return app


def main() -> None:
    """Runs the command line and exits; no traceback unless DSLC_DEBUG is set."""
    # The process lives for half a second: garbage collection would take a sixth of it, and a
    # collection at its end searches in vain what is freed next.
    gc.disable()
    atexit.register(gc.freeze)
    # Threads that wait for one another in a loop keep other runs on the machine from the cores:
    # of two trainings at once each was tens of times slower. Threads that sleep at once cost a
    # training alone on the machine almost half of its speed, so GNU's wait for some microseconds.
    # Read when torch is loaded.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    try:
        status = run()
    except KeyboardInterrupt:
        status = 130
    except Exception as error:
        if os.environ.get("DSLC_DEBUG"):
            traceback.print_exc()
        status = report(error)
    finally:
        gc.enable()
    sys.exit(status)


def report(error: Exception) -> int:
    """Prints an error that no command expected; returns the exit status."""
    from runtime.train.memory import shortage

    message = shortage(error)
    if message is not None:
        print(f"dslc: {message}", file=sys.stderr)
        return 1
    print(
        f"dslc: internal error: {type(error).__name__}: {error}\n"
        "This is a bug in dslc, not in your spec. Please report it with the spec and the "
        "command; DSLC_DEBUG=1 prints the traceback.",
        file=sys.stderr,
    )
    return 70


def run() -> str | int | None:
    """Runs the command and flushes its output; returns the exit status."""
    status: str | int | None = 0
    try:
        try:
            application(" ".join(sys.argv[1:2]))(prog_name="dslc")
        except SystemExit as stop:
            status = stop.code
        sys.stdout.flush()
    except OSError as error:
        # Python flushes again at exit: let that succeed.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
        if not isinstance(error, BrokenPipeError):  # the reader has left, which is not an error
            print(f"dslc: cannot write standard output: {error.strerror}", file=sys.stderr)
    return status
