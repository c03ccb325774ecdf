"""The subcommands: thin shells, one module each, with ``main(args) -> exit code``."""

from typing import Any


def command_parser(name: str, description: str, example: str) -> Any:
    """A jsonargparse parser whose mistakes become one line (see `messages`), with an example in its help."""
    import argparse

    from jsonargparse import ArgumentParser

    class Formatter(argparse.RawDescriptionHelpFormatter):
        """Keeps the example's lines as they are."""

    return ArgumentParser(
        prog=f"medinr {name}",
        description=description,
        epilog=f"example:\n  {example}",
        exit_on_error=False,
        allow_abbrev=False,
        formatter_class=Formatter,
    )
