"""Random numbers of several fits in one process, each as if it were alone."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import DataLoader

from medinr.callbacks.checkpoints import random_states, set_random_states
from medinr.errors import UserError


class Stream:
    """The random numbers of one fit: what `seed_everything` and the making of its parts left, kept apart from others.

    Steps draw from `generator`, which goes on where torch's own of that device was.
    """

    def __init__(self, states: Mapping[str, Any] | None = None) -> None:
        self.states = dict(states or random_states())
        self.device = torch.device("cpu")
        self.generator = torch.Generator()
        self.generator.set_state(self.states["torch"].cpu())

    def to(self, device: torch.device) -> None:
        """Draw on this device from now on.

        Raises:
            UserError: neither a CPU nor a CUDA device.
        """
        if device.type not in ("cpu", "cuda"):
            raise UserError(f"trainer.accelerator: expected cpu or cuda in a batch, found {device.type}; choose one")
        self.states = self.present()
        self.device = device
        self.generator = torch.Generator(device)
        cuda = self.states["cuda"]
        self.generator.set_state(self.states["torch"] if device.type == "cpu" else cuda[device.index or 0])

    def present(self) -> dict[str, Any]:
        """The states of all generators, as `RandomStates` keeps them."""
        now = {**self.states, "cuda": list(self.states["cuda"])}
        if self.device.type == "cpu":
            now["torch"] = self.generator.get_state()
        else:
            now["cuda"][self.device.index or 0] = self.generator.get_state()
        return now

    @contextmanager
    def everywhere(self) -> Iterator[None]:
        """Inside, Python's, NumPy's and torch's own generators are this fit's: for code that takes no generator."""
        before = random_states()
        set_random_states(self.present())
        try:
            yield
        finally:
            self.states = random_states()
            self.generator.set_state(
                self.states["torch"] if self.device.type == "cpu" else self.states["cuda"][self.device.index or 0]
            )
            set_random_states(before)


class Together(DataLoader[int]):
    """The loaders of several fits as one: it yields what each yields, and each draws its own random numbers.

    Making a loader's iterator draws a number, so each is made where the fit alone would make it. (Lightning makes one
    more of what is no DataLoader, to see whether it can.)
    """

    def __init__(self, loaders: Sequence[Any], streams: Sequence[Stream]) -> None:
        numbers: Any = range(min(len(loader) for loader in loaders))
        super().__init__(numbers, batch_size=None)
        self.loaders, self.streams = list(loaders), list(streams)

    def __iter__(self) -> Any:
        iterators: list[Iterable[Any]] = []
        for loader, stream in zip(self.loaders, self.streams, strict=True):
            with stream.everywhere():
                iterators.append(iter(loader))
        return (list(items) for items in zip(*iterators, strict=False))
