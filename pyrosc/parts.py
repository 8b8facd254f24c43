"""What a part is: a small module that a story is handed by name.

Any ``nn.Module`` can be a part. These things make it a better one, and each may be
left out:

    sizes                        what it fixes for the others, such as {"n_latent": 10}
    uses                         which of those it was built for, so that replacing one says what else must be
    build(schema, sizes, parts)  makes what depends on the data's genes and levels, and on other parts
    start(cells)                 sets values from data, once, before the first fit
    arguments                    what it was made with, as JSON, so that a Fit can be saved

``Part`` has them all, doing nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from .cells import Cells
from .schema import Schema


class Part(nn.Module):
    """A part that remembers its arguments.

    Parameters
    ----------
    **arguments : JSON values
        What the constructor was given, by name; the constructor called with them makes
        the part again.
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        self.arguments = {k: v.item() if hasattr(v, "item") else v for k, v in arguments.items()}

    @property
    def sizes(self) -> dict[str, int]:
        """Sizes that this part fixes for the others."""
        return {}

    @property
    def uses(self) -> tuple[str, ...]:
        """Sizes of other parts that this one was built for."""
        return ()

    def build(self, schema: Schema, sizes: Mapping[str, int], parts: Mapping[str, nn.Module]) -> None:
        """Make what depends on genes and levels; called once, when the Program is made."""

    def start(self, cells: Cells) -> None:
        """Set values from data; called once, before the first fit."""

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v!r}" for k, v in self.arguments.items())
