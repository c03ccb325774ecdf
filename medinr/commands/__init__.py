"""The subcommands: thin shells, one module each, with ``main(args) -> exit code``."""

import argparse
from typing import Any


def help_formatter() -> Any:
    """jsonargparse's formatter (types and defaults), which keeps the lines of descriptions and examples as they are."""
    from jsonargparse import DefaultHelpFormatter  # not at the head: ``medinr --help`` waits for no import

    class HelpFormatter(argparse.RawDescriptionHelpFormatter, DefaultHelpFormatter):
        pass

    return HelpFormatter


def command_parser(name: str, description: str, example: str) -> Any:
    """A jsonargparse parser whose mistakes become one line (see `messages`), with an example in its help."""
    from jsonargparse import ArgumentParser

    return ArgumentParser(
        prog=f"medinr {name}",
        description=description,
        epilog=f"example:\n  {example}",
        exit_on_error=False,
        allow_abbrev=False,
        formatter_class=help_formatter(),
    )
