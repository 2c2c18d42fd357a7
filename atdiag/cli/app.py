"""The command line. Imports nothing heavy: every command imports what it needs when called."""

from __future__ import annotations

import contextvars
import functools
import os
import re
import signal
import sys
from typing import Annotated, Any

import typer
from typer.main import get_command

from atdiag.cli import (
    cost,
    data,
    diagnose,
    doctor,
    experiments,
    fleet,
    helping,
    hooked,
    inspect,
    looks,
    probes,
    reproduce,
    runs,
    teachers,
)
from atdiag.cli.messages import (
    EXIT_FAULT,
    EXIT_INTERRUPTED,
    EXIT_PIPE,
    EXIT_TERMINATED,
    EXIT_USAGE,
    GROUPS,
    RESERVED,
    TYPED,
    as_typed,
    instead,
    say,
    stopped,
)
from atdiag.execution import torchrun


class _Commands(helping.CommandGroup):
    """Commands in groups, with ablations from entry points in the first."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the commands by group; the experiments after ``diagnose``, in the order in which they were added."""
        found = [name for name in self.commands if name not in RESERVED]
        first, *others = (name for name in RESERVED if name in self.commands)
        return [first, *found, *others]

    def panel(self, name: str) -> str:
        """Return the heading of a command."""
        return next((heading for heading, names in GROUPS.items() if name in names), next(iter(GROUPS)))


app = helping.App(
    _Commands,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Can this pre-trained teacher's attention be transferred to my ViT, and if not, what stands in the way?\n\n"
    "Everything runs at profile mini unless told otherwise: miniature teachers, embedded data, a CPU, minutes.",
)


# --- entry ---------------------------------------------------------------------------------------------------------


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"atdiag {version('atdiag')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


@functools.cache  # a process may call main again: commands are added only once, and take 0.2 s to build
def whole(app: typer.Typer) -> Any:
    """Return the whole command line, with the commands of other modules and other packages."""
    experiments.add_commands(app)
    diagnose.add_commands(app)
    reproduce.add_commands(app)
    inspect.add_commands(app)
    hooked.add_commands(app)
    probes.add_commands(app)
    looks.add_commands(app)
    app.command("pretrain")(teachers.pretrain)
    app.command("doctor")(doctor.doctor)
    cost.add_commands(app)
    app.add_typer(teachers.app, name="teachers")
    runs.app.command("watch")(fleet.watch)
    app.add_typer(runs.app, name="runs")
    app.add_typer(data.app, name="data")
    return get_command(app)


def main(arguments: list[str] | None = None) -> None:
    """Run the console script. Wrong input: one line, exit 2. A fault at run time: one line, exit 1."""
    for name in ("SIGTERM", "SIGUSR1"):  # clusters announce the end of a job by either
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), _terminate)
    if torchrun.world() > 1:
        _main_in_ranks(arguments)
    code = _run(arguments)
    if code in (EXIT_INTERRUPTED, EXIT_TERMINATED):
        say(_stopped(arguments))
    sys.exit(code)


def _run(arguments: list[str] | None) -> Any:
    """Run a command, and return its exit code."""
    code: Any
    TYPED.set(tuple(sys.argv[1:] if arguments is None else arguments))
    try:
        # Run in a copied context, so that what a command sets, such as the data folder, ends with it.
        run = functools.partial(whole(app), args=arguments, prog_name="atdiag", standalone_mode=False)
        code = contextvars.copy_context().run(run) or 0  # Ctrl-C is returned as 130
    except SystemExit as asked:  # SIGTERM
        code = asked.code
    except Exception as fault:
        code = _explain(fault)
    return code


def _stopped(arguments: list[str] | None) -> str:
    words = sys.argv[1:] if arguments is None else arguments
    return stopped(next(iter(words), ""), planned="--dry-run" in words)


def _main_in_ranks(arguments: list[str] | None) -> None:
    """Run a command that torchrun has started several times: once, with the other processes as ranks of its training.

    Ends this process.
    """
    try:
        leads = torchrun.join()
        code = _run(arguments) if leads else torchrun.follow()
        if leads:
            if code in (EXIT_INTERRUPTED, EXIT_TERMINATED):
                say(_stopped(arguments))
            torchrun.dismiss(code)
    except SystemExit as asked:  # SIGTERM
        code = asked.code
    except Exception as fault:
        code = _explain(fault)
    sys.stdout.flush()
    sys.stderr.flush()
    if code:
        os._exit(code)  # a kernel of NCCL that waits for a lost rank would not let the process end
    sys.exit()


def _terminate(*_: Any) -> None:
    raise SystemExit(EXIT_TERMINATED)


def _with_value(fault: Any) -> str:
    """Return a usage error's message, with what was typed: pydantic's, by which Typer parses numbers, leaves it out."""
    message: str = fault.format_message()
    errors = getattr(fault.__cause__, "errors", None)
    if errors is None:
        return message
    return message.replace(fault.message, f"{errors()[0]['input']!r} ({fault.message[:1].lower()}{fault.message[1:]})")


def _explain(fault: Exception) -> int:
    """Report an error in one line, and return the exit code."""
    from atdiag.core.errors import UserError

    if isinstance(fault, UserError):
        say(as_typed(str(fault)))
        return EXIT_USAGE
    if hasattr(fault, "format_message"):  # a usage error from Click
        if type(fault).__name__ == "NoArgsIsHelpError":
            typer.echo(fault.format_message(), err=True)
            return EXIT_USAGE
        context = getattr(fault, "ctx", None)
        said = fault.format_message().replace("\n", " ").rstrip(".")
        if context and (better := _better(fault, said, context)):
            say(f"{said.partition(' (Possible')[0]}: type {better}")
            return EXIT_USAGE
        hint = f" (see '{context.command_path} --help')" if context else ""
        say(_with_value(fault).replace("\n", " ").rstrip(".") + hint)
        return EXIT_USAGE
    from atdiag.core.errors import FaultError, StoppedError
    from atdiag.core.runs import DamagedRunError

    if isinstance(fault, StoppedError):
        return EXIT_TERMINATED
    if isinstance(fault, BrokenPipeError):  # the reader of our output has closed the pipe, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # otherwise the interpreter complains again when it flushes
        return EXIT_PIPE
    if isinstance(fault, ImportError | MemoryError):
        what = "out of memory" if isinstance(fault, MemoryError) else f"this installation is incomplete ({fault})"
        say(what if isinstance(fault, MemoryError) else f"{what}: install atdiag again, in an environment of its own")
        return EXIT_FAULT
    if isinstance(fault, FaultError | DamagedRunError | OSError):
        say(as_typed(str(fault)))
        return EXIT_FAULT
    if os.environ.get("ATDIAG_DEBUG"):
        raise fault
    say(f"{type(fault).__name__}: {fault} (this is a bug in atdiag; ATDIAG_DEBUG=1 shows where)")
    return EXIT_FAULT


def _better(fault: Any, said: str, context: Any) -> str:
    """Return what to type in place of an unknown option, or of a file without one; empty if that can't be told."""
    known = [name for parameter in context.command.params for name in parameter.opts]
    if option := getattr(fault, "option_name", None):
        if context.info_name == "diagnose":  # unlike the experiments, it takes its teacher by place, and seeds by looks
            own = {"--teacher": "atdiag diagnose TEACHER, without --teacher", "--seeds": "--looks 5,8,12"}
            if option in own:
                return own[option]
        return instead(option, known)
    found = re.fullmatch(r"Got unexpected extra arguments? ?\(?s?\)? ?\((.+)\)", said)
    if found is None or "--teacher" not in known:
        return ""
    word = found[1].split()[0]
    name = "--data" if os.path.isdir(word) and "--data" in known else "--teacher"  # noqa: PTH112 - no other need of Path
    return f"{name} {word}"


if __name__ == "__main__":
    main()
