"""Files: a Fit as one safetensors file, which holds tensors and one JSON text and can run nothing.

The text (header entry "pyrosc") has the format number, versions, the story's name, every part
as it now is by a name from the table below with its arguments, the schema, settings and
history. A story or part of the user's own is handed back at load time by name; nothing is
ever imported by a name found in a file.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import os
import secrets
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from pyro import poutine
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from .cells import Cells
from .corrections import Corrections
from .dispersions import (
    BatchDispersion,
    CellDispersion,
    GeneDispersion,
    InverseSqrtPrior,
    LabelDispersion,
    NoDispersion,
    TrendPrior,
)
from .encoders import FlowEncoder, FullRankEncoder
from .errors import PyroscWarning
from .labels import Classifier, LabelPrior, TypeNormal
from .libraries import GivenLibrary, LatentLibrary, ObservedLibrary
from .likelihoods import BernoulliLikelihood, NBLikelihood, PoissonLikelihood, ZINBLikelihood
from .loadings import HorseshoeLoadings, NonNegativeLoadings, NormalLoadings
from .models import linear_scvi, mrvi, poissonvi, scanvi, scvi, shifted_samples
from .networks import Decoder, Encoder, LinearDecoder, LoadingsDecoder
from .overlap import Landmarks
from .parts import Part
from .posterior import Fit
from .priors import DISTRIBUTIONS, FlowPrior, MixturePrior, Prior, VampPrior
from .program import Program
from .regions import RegionDecoder
from .samples import Archetypes, Directions, SampleEffects, SampleEncoder, SampleNormal
from .schema import Schema, listed

_MEMBER = "members."  # before the names of an ensemble's tensors
_MARKS = {"landmarks": "landmarks.", "examples": "examples."}  # and of states of cells
FORMAT = 1
_ENTRY = "pyrosc"

STORIES: dict[str, tuple[Callable[..., None], Callable[..., None] | None]] = {
    "scvi": (scvi.model, scvi.guide),
    "scanvi": (scanvi.model, scanvi.guide),
    "mrvi": (mrvi.model, mrvi.guide),
    "shifted_samples": (shifted_samples.model, shifted_samples.guide),
    "linear_scvi": (linear_scvi.model, linear_scvi.guide),
    "poissonvi": (poissonvi.model, poissonvi.guide),
}

PARTS: dict[str, type[Part]] = {
    part.__name__: part
    for part in (
        Prior, MixturePrior, VampPrior, FlowPrior, ObservedLibrary, GivenLibrary, LatentLibrary,
        GeneDispersion, BatchDispersion, LabelDispersion, CellDispersion, NoDispersion, InverseSqrtPrior, TrendPrior,
        NBLikelihood, ZINBLikelihood, PoissonLikelihood, Encoder, Decoder, LinearDecoder,
        LabelPrior, Classifier, TypeNormal, SampleEffects, Directions, Archetypes, SampleEncoder, SampleNormal,
        NormalLoadings, HorseshoeLoadings, NonNegativeLoadings, LoadingsDecoder,
        BernoulliLikelihood, RegionDecoder, FullRankEncoder, FlowEncoder,
    )
}  # fmt: skip


def save(fit: Fit, path: Any, *, overwrite: bool = False) -> None:
    """Write ``fit`` to ``path``: beside it first, then renamed, so that a crash leaves the old file whole.

    Raises
    ------
    FileExistsError
        If ``path`` is there and ``overwrite`` is not set.
    FileNotFoundError
        If its folder is not there.
    """
    path = Path(path).absolute()
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} is there already: pass overwrite=True, or another path")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent}")
    programs = {"": fit.program} | {f"{_MEMBER}{i}.": member for i, member in enumerate(fit.members)}
    tensors = {
        prefix + name: value.detach().cpu().contiguous().clone()
        for prefix, program in programs.items()
        for name, value in program.state_dict().items()
    }
    for name, start in _MARKS.items():
        marks = getattr(fit, name)
        if marks is not None:
            tensors[f"{start}loc"] = marks.loc.cpu().contiguous().clone()
            tensors[f"{start}log_total"] = marks.log_total.clone()
            tensors |= {f"{start}columns.{column}": value.clone() for column, value in marks.columns.items()}
    text = json.dumps(_described(fit) | {"checksum": _checksum(tensors)}, allow_nan=False)
    _replace(path, to_bytes(tensors, metadata={_ENTRY: text}))


def _replace(path: Path, content: bytes) -> None:
    """Put a file in place whole or not at all."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, f"could not write {len(content):,} bytes to {path}: {error.strerror}") from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _described(fit: Fit) -> dict[str, Any]:
    program = fit.program
    model, guide = program.functions
    return {
        "format": FORMAT,
        "versions": fit.settings["versions"],
        "story": next((name for name, pair in STORIES.items() if pair == (model, guide)), None),
        "model": _function(model),
        "guide": _function(guide),
        "sites": _sites(program),
        "seed": program.seed,
        "members": len(fit.members),
        "corrections": None
        if program.corrections is None
        else {
            "sizes": program.corrections.sizes,
            "family": program.corrections.family,
        },
        "parts": {name: _part(part) for name, part in program.parts.items()},
        "schema": program.schema.to_json(),
        "settings": _finite(fit.settings),
        "frozen": [name for name, p in program.named_parameters() if not p.requires_grad],
        "history": {column: _finite(fit.history[column].tolist()) for column in fit.history},
    }


def _checksum(tensors: dict[str, Tensor]) -> str:
    crc = 0
    for name in sorted(tensors):
        crc = zlib.crc32(tensors[name].numpy().tobytes(), zlib.crc32(name.encode(), crc))
    return f"{crc:08x}"


def _function(function: Callable[..., None] | None) -> dict[str, Any] | None:
    return None if function is None else {"name": function.__name__, "source": _hash(function)}


def _hash(thing: Any) -> str | None:
    """Of its source text, where Python can give it."""
    try:
        return hashlib.sha256(inspect.getsource(thing).encode()).hexdigest()
    except (OSError, TypeError):
        return None


def _part(part: nn.Module) -> dict[str, Any]:
    name = type(part).__name__
    if PARTS.get(name) is not type(part) or not isinstance(part, Part):
        given = getattr(part, "arguments", {})
        return {
            "own": f"{name}(...)",
            "source": _source(part),
            "arguments": {k: v for k, v in given.items() if _is_json(v)},
        }
    if isinstance(part, Prior) and DISTRIBUTIONS.get(part.arguments["distribution"]) is not part.distribution:
        return {"own": f"Prior({part.arguments['distribution']}, ...)", "source": _source(part)}
    arguments = {k: _part(v) if isinstance(v, nn.Module) else v for k, v in part.arguments.items()}
    within = [v["own"] for v in arguments.values() if isinstance(v, dict) and "own" in v]
    if within:  # a part of the user's own inside one of ours: the whole is handed back
        return {"own": f"{name}({', '.join(within)})", "source": _source(part)}
    return {"part": name, "arguments": arguments}


def _source(part: nn.Module) -> str | None:
    """Hash of the source of a part: of its class, of a prior's distribution, and of the parts inside it."""
    thing = part.distribution if isinstance(part, Prior) else type(part)
    inner = [_source(v) for v in getattr(part, "arguments", {}).values() if isinstance(v, nn.Module)]
    found = [h for h in (_hash(thing), *inner) if h is not None]
    return hashlib.sha256("".join(found).encode()).hexdigest() if found else None


def _is_json(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str))


def _sites(program: Program) -> dict[str, list[int]]:
    """Event shape of every site drawn by the story."""
    blank = program.blank(2)
    with program.driven(0), torch.no_grad():
        trace = poutine.trace(program.model).get_trace(blank)
    nodes: dict[str, Any] = trace.nodes
    return {
        name: list(site["fn"].event_shape)
        for name, site in nodes.items()
        if site["type"] == "sample" and not poutine.util.site_is_subsample(site)
    }


def _finite(value: Any) -> Any:
    """JSON has no NaN: None stands for it."""
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def load(
    path: Any,
    *,
    model: Callable[..., None] | None = None,
    guide: Callable[..., None] | None = None,
    device: str | torch.device = "cpu",
    **own_parts: nn.Module,
) -> Fit:
    """Read a Fit that ``Fit.save`` wrote.

    Parameters
    ----------
    model, guide : functions of a story of your own, which a file cannot hold
    device : where to put it; it is read on the CPU first
    **own_parts : parts of your own, by name, made as they were for the fit; their weights come from the file

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the file is incomplete, was not written by pyrosc or by a newer one, a story or part of your
        own was not handed in, or what was handed in has other sites or shapes than when it was saved.

    Warns
    -----
    PyroscWarning
        If the source of a function or part handed in has changed since.
    """
    path = Path(path).absolute()
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    held, tensors = _read(path)
    notes: list[str] = []
    functions = _functions(held, model, guide, path, notes)
    schema = Schema.from_json(held["schema"])
    parts = {name: _made(name, part, tensors, own_parts, path, notes) for name, part in held["parts"].items()}
    strange = set(own_parts) - set(parts)
    if strange:
        raise ValueError(f"{path.name} has no part {listed(sorted(strange))}; its parts: {listed(parts, 20)}")
    program = Program(functions[0], Cells.empty(schema), functions[1], seed=held["seed"], **parts)
    own = {k: v for k, v in tensors.items() if not k.startswith((_MEMBER, *_MARKS.values()))}
    _with_corrections(program, held, own)
    _fill(program, own, held["frozen"], path)
    sites = _sites(program)
    if sites != held["sites"]:
        raise ValueError(f"the story's sites are {sites}, but {path.name} was saved with {held['sites']}")
    if notes:
        warnings.warn("; ".join(notes), PyroscWarning, stacklevel=2)
    history = pd.DataFrame({k: [math.nan if v is None else v for v in column] for k, column in held["history"].items()})
    members = []
    for i in range(held.get("members", 0)):
        prefix = f"{_MEMBER}{i}."
        member, own = program.copy(), {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        _with_corrections(member, held, own)
        _fill(member, own, [], path)
        members.append(member.to(device))
    marks = {name: _marks(tensors, start) for name, start in _MARKS.items()}
    return Fit(program.to(device), history, held["settings"], members, **marks)


def _marks(tensors: dict[str, Tensor], start: str) -> Landmarks | None:
    if f"{start}loc" not in tensors:
        return None
    front = f"{start}columns."
    columns = {name.removeprefix(front): value for name, value in tensors.items() if name.startswith(front)}
    return Landmarks(tensors[f"{start}loc"], tensors[f"{start}log_total"], columns)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            if _ENTRY not in header:
                raise ValueError(f"{path} is a safetensors file, but not one that pyrosc wrote")
            held = json.loads(header[_ENTRY])
            if held["format"] > FORMAT:
                from . import __version__

                raise ValueError(
                    f"{path.name} was written by pyrosc {held['versions']['pyrosc']} (format {held['format']}); "
                    f"this is {__version__}, which reads up to format {FORMAT}. Install the newer one."
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            if _checksum(tensors) != held["checksum"]:
                raise ValueError(f"{path} is damaged: its numbers are not those that were saved; copy it again")
            return held, tensors
    except SafetensorError as error:
        size, whole = path.stat().st_size, _promised(path)
        if whole is not None and size < whole:
            raise ValueError(
                f"{path} is incomplete ({size / 1e6:.2f} of {whole / 1e6:.2f} MB); copy it again, or fit again"
            ) from error
        raise ValueError(f"{path} is not a file that pyrosc wrote, or it is damaged: {error}") from error


def _promised(path: Path) -> int | None:
    """Bytes that a safetensors header says its file has; None if the header itself is cut off or strange."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    if len(content) < 8 or length > 1e9:
        return None
    try:
        header = json.loads(content[8 : 8 + length])
        return 8 + length + max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
    except (ValueError, KeyError, TypeError):
        return 8 + length if len(content) < 8 + length else None


def _functions(
    held: dict[str, Any], model: Any, guide: Any, path: Path, notes: list[str]
) -> tuple[Callable[..., None], Callable[..., None] | None]:
    if held["story"] in STORIES and model is None and guide is None:
        return STORIES[held["story"]]
    known = STORIES.get(held["story"], (None, None))
    found: list[Any] = []
    for what, given, stock in (("model", model, known[0]), ("guide", guide, known[1])):
        function = given if given is not None else stock
        if held[what] is None:
            if given is not None:
                raise ValueError(
                    f"{path.name} was saved without a {what} function (it was completed): leave {what}= out"
                )
            found.append(None)
            continue
        name = held[what]["name"]
        if function is None:
            both = [f"{w}={held[w]['name']}" for w in ("model", "guide") if held[w] is not None]
            raise ValueError(
                f'{path.name} holds a story of your own, "{held["model"]["name"]}": '
                f"pass the functions it was made with, load(path, {', '.join(both)})"
            )
        if held[what]["source"] and _hash(function) and _hash(function) != held[what]["source"]:
            notes.append(f'the source of {what} "{name}" has changed since {path.name} was saved')
        found.append(function)
    return found[0], found[1]


def _made(
    name: str, held: dict[str, Any], tensors: dict[str, Tensor], own: dict[str, nn.Module], path: Path, notes: list[str]
) -> nn.Module:
    if name in own:
        if not isinstance(own[name], nn.Module):
            raise ValueError(f'part "{name}" must be made, {name}={held.get("own", "...")}, not {own[name]!r}')
        was, now = held.get("arguments", {}), getattr(own[name], "arguments", {})
        other = [k for k, v in was.items() if _is_json(v) and k in now and now[k] != v] if "own" in held else []
        if other:
            k = other[0]
            raise ValueError(
                f'part "{name}": {k} is {now[k]!r} as handed in, and was {was[k]!r} for {path.name}. '
                "Make it as it was for the fit."
            )
        if held.get("source") and _source(own[name]) not in (None, held["source"]):
            notes.append(f'the source of part "{name}" has changed since {path.name} was saved')
        for key, value in own[name].state_dict().items():
            _compare(f"parts.{name}.{key}", value, tensors.get(f"parts.{name}.{key}"), path)
        return own[name]
    if "own" in held:
        raise ValueError(
            f'part "{name}" is of a class of your own, {held["own"]}: pass one made as it was for the fit, '
            f"load(path, {name}={held['own']})"
        )
    return _from_table(held, tensors, f"parts.{name}.", path)


def _from_table(held: dict[str, Any], tensors: dict[str, Tensor], prefix: str, path: Path) -> nn.Module:
    """A part of the package as the file describes it, with the parts inside it."""
    if held["part"] not in PARTS:
        raise ValueError(f'{path.name} has a part "{held["part"]}" that this pyrosc does not know')
    own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    arguments = {
        k: _from_table(v, tensors, f"{prefix}{k}.", path) if isinstance(v, dict) and "part" in v else v
        for k, v in held["arguments"].items()
    }
    return PARTS[held["part"]].from_arguments(arguments, own)


def _compare(name: str, own: Tensor | None, held: Tensor | None, path: Path) -> None:
    """Refuse a tensor that has another shape than in the file."""
    here, there = (None if t is None else tuple(t.shape) for t in (own, held))
    if here != there:
        raise ValueError(
            f"{name.removeprefix('parts.')}: the part as handed in has shape {here}, {path.name} holds {there}. "
            "Make it as it was for the fit."
        )


def _with_corrections(program: Program, held: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Room for the corrections of refined cells, as many as the file has."""
    said = held.get("corrections")
    if said is not None and "corrections.keys" in tensors:
        program.corrections = Corrections(said["sizes"], said["family"], len(tensors["corrections.keys"]))


def _fill(program: Program, tensors: dict[str, Tensor], frozen: list[str], path: Path) -> None:
    own = program.state_dict()
    for name in sorted(own.keys() | tensors.keys()):
        _compare(name, own.get(name), tensors.get(name), path)
    weights = [name for name, _ in program.named_parameters()]
    program.to(tensors[weights[0]].dtype if weights else torch.get_default_dtype())
    program.load_state_dict(tensors)
    program.set_started()
    for name, parameter in program.named_parameters():
        parameter.requires_grad_(name not in frozen)
