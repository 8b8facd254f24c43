"""What a part is: a small module that a story is handed by name.

Any ``nn.Module`` can be a part. These things make it a better one, and each may be
left out:

    sizes                        what it fixes for the others, such as {"n_latent": 10}
    uses                         which of those it was built for, so that replacing one says what else must be
    build(schema, sizes, parts)  makes what depends on the data's genes and levels, and on other parts
    link(parts)                  takes references to other parts; renewed whenever one is replaced
    start(cells)                 sets values from data, once, before the first fit
    meet(cells)                  sets those of levels that cells mapped onto a fit bring along
    steps, warmup                how many steps a fit takes by default, and the share of them over which the KL weight
                                 rises, where it needs more than others
    arguments                    what it was made with (JSON, and parts), so that a Fit can be saved

``Part`` has them all, doing nothing.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from .cells import Cells
from .schema import Schema

_BY_NAME = inspect.Parameter.KEYWORD_ONLY


def whole(name: str, value: Any, least: int = 1) -> int:
    """An argument that is a whole number, or a ValueError that names it."""
    if isinstance(value, bool) or not hasattr(value, "__index__") or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, not {value!r}")
    return int(value)


def positive(name: str, value: Any, what: str = "") -> float:
    """An argument that is a positive number, or a ValueError that names it and says what it is."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"{name} must be a positive number, not {value!r}" + (f": it is {what}" if what else ""))
    return float(value)


class Part(nn.Module):
    """A part that remembers its arguments.

    Parameters
    ----------
    **arguments : JSON values, or parts
        What the constructor was given, by name; the constructor called with them makes
        the part again.
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        for name, value in arguments.items():
            if getattr(value, "ndim", 0) > 0:
                raise ValueError(
                    f"argument {name} of a part is an array, and a file keeps arguments as JSON: leave it out of "
                    "super().__init__() and keep it as a buffer, self.register_buffer(...), which is saved too"
                )
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

    def link(self, parts: Mapping[str, nn.Module]) -> None:
        """Take references to other parts, unregistered (``self.refer``)."""

    def refer(self, **parts: nn.Module | None) -> None:
        """Keep parts as attributes without making them parts of this one."""
        self.__dict__.update(parts)

    def start(self, cells: Cells) -> None:
        """Set values from data; called once, before the first fit."""

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Part:
        """The part that a file describes; ``tensors`` are its own in that file, by name."""
        return cls(**arguments)

    def extra_repr(self) -> str:
        known = inspect.signature(type(self).__init__).parameters
        said = []
        for name, value in self.arguments.items():
            usual = known[name].default if name in known else inspect.Parameter.empty
            is_shown = usual is not None if value is None else name not in known or known[name].kind is not _BY_NAME
            if not isinstance(value, nn.Module) and (is_shown or value != usual):
                said.append(f"{name}={value!r}")
            elif isinstance(value, nn.Module):
                said.append(f"{name}={type(value).__name__}({value.extra_repr()})")
        return ", ".join(said)


class Parts(nn.ModuleDict):
    """Modules by name; any name will do, "half", "values" and "a.b" too."""

    def __setitem__(self, name: str, part: nn.Module) -> None:
        self._modules[name] = part
