"""medinr: implicit neural representations of medical images and of the deformations between them."""

from typing import Any

__all__ = ["Result", "apply", "register"]


def __getattr__(name: str) -> Any:
    """`register`, `apply` and `Result` on first use: importing medinr does not wait for PyTorch."""
    if name in ("register", "Result"):
        from medinr.commands import register as module

        return getattr(module, name)
    if name == "apply":
        from medinr.commands.apply import apply

        return apply
    raise AttributeError(f"module 'medinr' has no attribute {name!r}")
