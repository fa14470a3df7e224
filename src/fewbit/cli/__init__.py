"""The `fewbit` program: one command a function, in the order that its help lists them."""

import sys

import typer

from fewbit.cli.files import benchmark, evaluate, export, measure, verify
from fewbit.cli.models import demo, formats, inspect, quantize
from fewbit.cli.pruning import prune
from fewbit.cli.search import sensitivity
from fewbit.cli.training import compress, finetune
from fewbit.errors import FewbitError

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Makes trained networks small and fast, and proves that what was evaluated is what runs.",
)
COMMANDS = (
    demo, inspect, sensitivity, prune, quantize, finetune, compress, export, verify, evaluate, benchmark, measure,
    formats,
)  # fmt: skip
for command in COMMANDS:
    app.command()(command)


def main() -> None:
    """The `fewbit` program: errors are one line and exit code 1, an interrupt is 130, wrong usage is 2."""
    try:
        app()
    except FewbitError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
