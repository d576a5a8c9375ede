"""The commands by name: `fastanila train` is `python -m fastanila.train`, and `fastanila` alone lists them."""

from __future__ import annotations

import importlib
import sys

from . import __version__
from .cli import exits, parsers

COMMANDS = {
    "train": "train an energy-based model with Langevin chains",
    "sample": "draw from a trained run: a picture, or the samples as arrays",
    "evaluate": "say how good a trained run is, and with --chains how well its chains mix",
    "compare": "train the same energy with several samplers, and compare the models",
    "ergodicity": "compute a sampler's law, its bias and how fast it forgets its start, on a grid",
}  #: by name, what each does, in a line


def listing() -> str:
    """What `fastanila --help` says."""
    width = max(map(len, COMMANDS))
    return "\n".join(
        [
            "usage: fastanila COMMAND [flags]",
            "",
            *(f"  {name:{width}}  {line}" for name, line in COMMANDS.items()),
            "",
            "`fastanila COMMAND --help` explains a command's flags. `python -m fastanila.COMMAND` is the same command.",
        ]
    )


def main(argv: list[str] | None = None) -> int:
    """Run the command that the first argument names, with the other arguments; its exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    if arguments and arguments[0] in COMMANDS:
        name, rest = arguments[0], arguments[1:]
        exits.end_at_once_on_interrupt()  # the module imports torch, which takes seconds
        if hasattr(parsers, name):  # train reads its own settings
            exits.begin(getattr(parsers, name)(), rest)
        return importlib.import_module(f".{name}", __package__).main(rest)
    return exits.exit_code(lambda: without_command(arguments))


def without_command(arguments: list[str]) -> int:
    """The listing or the version; `exits.Refused` for anything else."""
    if arguments == ["--version"]:
        exits.say(f"fastanila {__version__}")
    elif not arguments or arguments[0] in ("--help", "-h"):
        exits.say(listing())
    else:
        raise exits.Refused(f"command must be one of {', '.join(COMMANDS)}, got {arguments[0]!r}")
    return exits.DONE


if __name__ == "__main__":
    sys.exit(main())
