"""Program: a model function and a guide function bound to their parts.

    program = Program(model, cells, guide=guide, prior=..., encoder=..., decoder=...)
    program.model(cells), program.guide(cells)      ordinary Pyro callables
    program.replace(prior=...)                      the same story with another part
    print(program.describe())                       sites, shapes, what depends on what

A Program is a plain ``nn.Module`` that holds its parts. It registers nothing in Pyro's
parameter store, so two Programs never meet; and yet a user's own ``pyro.infer.SVI`` trains
it, because model and guide name every parameter to whoever is tracing them.
"""

from __future__ import annotations

import copy
import inspect
import math
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer.inspect import get_model_relations
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn
from torch.distributions import kl_divergence

from .agreement import check_mean_field, check_sites, drawn_backwards
from .cells import Cells
from .dispersions import NoDispersion
from .errors import ProgramError
from .guides import Completion, check_enumerated, is_computed, is_enumerated, latent_sites, law_of, plate_depth, survey
from .isolation import checked_seed, isolated
from .parts import Parts
from .priors import Prior
from .schema import Schema, did_you_mean, listed


def require_cells(cells: Any) -> None:
    """Refuse what is not Cells, an AnnData for one, with the line that makes them."""
    if not isinstance(cells, Cells):
        raise TypeError(
            f"expected Cells, not {type(cells).__name__}: make them first, "
            "cells = pyrosc.Cells.from_anndata(adata, ...)"
        )


_OFTEN = ("n_latent", "n_hidden", "n_layers", "dropout", "seed")  # what stories are asked besides parts


class Program(nn.Module):
    """A generative story and its guide, bound to their parts.

    Parameters
    ----------
    model : function ``model(cells, *, part, ...)``
        Draws every quantity in the order nature would, inside ``cells.plate()``.
    cells : Cells
        Only their schema is read, to size the parts.
    guide : function ``guide(cells, *, part, ...)``
        Draws the model's latent sites given the counts. Those it leaves out, or all of them for
        None, are completed: see `pyrosc.guides`.
    seed : int
        For the starting weights.
    **parts : modules, by the names that model and guide ask for
        Copied; the ones given are left as they are. A part "encoder" also serves completed sites of cells.

    Raises
    ------
    ProgramError
        If parts are missing, unknown to model and guide, or do not fit together; or a site that
        the guide leaves out cannot be completed.
    """

    def __init__(
        self,
        model: Callable[..., None],
        cells: Cells,
        guide: Callable[..., None] | None = None,
        *,
        seed: int = 0,
        **parts: nn.Module | None,
    ) -> None:
        super().__init__()
        require_cells(cells)
        self.schema: Schema = cells.schema
        self.seed = checked_seed(seed)
        self._story, self._guide = model, guide
        self._wanted = {f: _wanted_parts(f) for f in (model, guide) if f is not None}
        given = _without_none(parts)
        self._check_names(given)
        self.parts = Parts()
        self.completion = Completion()
        self._quiet = False
        self.corrections: Any = None  # of single cells, where a fit was refined
        self.entries: dict[str, Tensor] = {}  # of parameters, by name: the only ones that are trained, where not all
        self._sizes: dict[str, int] = {}
        self.enumerated: list[str] = []  # discrete sites that the story sums out
        self.guided_sums: list[str] = []  # discrete sites that the guide draws, and objectives sum over
        self.has_factors = False  # whether the guide adds to the objective by pyro.factor
        self._state = "z"
        self.computed: set[str] = set()  # sites that the story computes from others
        self.noisy: set[str] = set()  # sites whose prior depends on what the guide draws after them
        self.n_combinations = 1  # of the values of sites that are summed out
        self.has_globals = False  # whether a latent site is one for all cells
        self.n_plates = 1  # nested plates, that of cells included
        self._assemble(given)
        self.eval()

    def _check_names(self, parts: Mapping[str, nn.Module]) -> None:
        wanted = {"encoder": False} | {name: needed for f in self._wanted.values() for name, needed in f.items()}
        for name, part in parts.items():
            if name not in wanted:
                raise ProgramError(
                    f'no part "{name}" in {self.story}. Its parts: {listed(wanted, 20)}.'
                    + did_you_mean(name, [*wanted, *_OFTEN])
                )
            if isinstance(part, nn.Module) and "_parameters" not in vars(part):
                raise ProgramError(
                    f'part "{name}" ({type(part).__name__}) does not call super().__init__() when it is made'
                )
            if not isinstance(part, nn.Module):
                remedy = (
                    f"call it: {name}={part.__name__}()"
                    if isinstance(part, type)
                    else "a prior, for example, is made by pyrosc.Prior(dist.Normal, 0.0, 1.0)"
                )
                raise ProgramError(
                    f'part "{name}" must be an nn.Module, not {type(part).__name__} ({part!r}); {remedy}'
                )
        absent = [name for name, needed in wanted.items() if needed and name not in parts]
        if absent:
            raise ProgramError(
                f"{self.story} asks for {listed(absent)}, not given. Given: {listed(parts) or 'nothing'}."
            )

    def _assemble(self, parts: Mapping[str, nn.Module]) -> None:
        """Take copies of parts, settle the sizes they share, and build those that were not built for these cells."""
        device, dtype = self.device, self.dtype
        for name, part in parts.items():
            self.parts[name] = copy.deepcopy(part)
        sizes: dict[str, int] = {"n_genes": self.schema.n_genes}
        said: dict[str, str] = {}
        for name, part in self.parts.items():
            for size, value in getattr(part, "sizes", {}).items():
                if sizes.setdefault(size, value) != value:
                    raise ProgramError(f'{size} is {sizes[size]} in part "{said[size]}" and {value} in part "{name}"')
                said[size] = name
        for name, part in self.parts.items():
            for size in getattr(part, "uses", ()) if name not in parts else ():
                if self._sizes.get(size) != sizes.get(size):
                    raise ProgramError(
                        f'part "{name}" was built for {size}={self._sizes.get(size)}, which is now {sizes.get(size)}: '
                        f"replace it as well, replace({name}={type(part).__name__}(...), ...)"
                    )
        self._sizes = sizes
        built_for = f"{zlib.crc32(repr((self.schema, sorted(sizes.items()))).encode()):08x}"
        with isolated(self.seed):
            # Priors may read other parts, so they are built last.
            for name in sorted(parts, key=lambda name: (hasattr(parts[name], "link"), name)):
                part = self.parts[name]
                build = getattr(part, "build", None)
                # A trained part of another Program over the same genes and columns keeps its weights.
                if build is not None and getattr(part, "built_for", None) != built_for:
                    build(self.schema, sizes, dict(self.parts.items()))
                    part.built_for, part.started = built_for, False  # type: ignore[assignment]
                part.to(device, dtype)
            for part in self.parts.values():
                link = getattr(part, "link", None)
                if link is not None:
                    link(dict(self.parts.items()))
        self._check_prior()
        self._complete()

    def _check_prior(self) -> None:
        """Whether the prior of a state draws as many numbers as the networks take."""
        prior = self.parts["prior"] if "prior" in self.parts else None
        if prior is None or "n_latent" not in self._sizes:
            return
        try:
            with isolated(self.seed), torch.no_grad():
                event = tuple(prior().event_shape)
        except TypeError:  # one that wants cells
            return
        if event != (self._sizes["n_latent"],):
            raise ProgramError(
                f'part "prior" draws a state of shape {event}, '
                f"the networks take n_latent={self._sizes['n_latent']} numbers"
            )

    def _complete(self) -> None:
        """Find out what the model draws and the guide function does not, and make guides for it."""
        blank = self.blank(3)
        with self.driven(self.seed), torch.no_grad():
            names: set[str] = set()
            traces = []
            if self._guide is not None:
                traces.append(self._run(blank, lambda: poutine.trace(self._by_hand).get_trace(blank)))
                names = set(traces[0].nodes)
            traces.append(self._run(blank, lambda: poutine.trace(self.model).get_trace(blank)))
            drawn = latent_sites(traces[-1])
            if "x" in drawn:
                raise ProgramError(
                    'the model draws "x" although there are counts: observe it, pyro.sample("x", ..., obs=cells.x)'
                )
            self.n_plates = plate_depth(*traces)
            self._state = "u" if "u" in drawn and "z" not in drawn else "z"
            nodes: dict[str, Any] = traces[-1].nodes
            self.computed = {name for name, site in nodes.items() if site["type"] == "sample" and is_computed(site)}
            self.has_globals = any(all(f.name != "cells" for f in s["cond_indep_stack"]) for s in drawn.values())
            self._settle_sums(traces)
            self.enumerated = [n for n, site in drawn.items() if n not in names and is_enumerated(site)]
            if self.enumerated and self.guided_sums:
                raise ProgramError(
                    f"{self.story} sums out {listed(self.enumerated)} in the model and {listed(self.guided_sums)} in "
                    "the guide: leave all to the model, or draw all in the guide"
                )
            for name in self.enumerated:
                check_enumerated(name, drawn[name])
            if self.enumerated:
                self._check_enumerating(blank)
            sizes = [drawn[name]["fn"].enumerate_support(expand=False).shape[0] for name in self.enumerated]
            self.n_combinations = math.prod(sizes)
            missing = [name for name in drawn if name not in names and name not in self.enumerated]
            sites = survey(lambda: poutine.trace(self.model).get_trace(blank), missing) if missing else []
            self._check_plates(traces[-1])
            wanted = {name for f in self._wanted.values() for name in f}
            self.completion.settle(sites, self.schema, dict(self.parts.items()), blank, "encoder" in wanted)
        self.completion.to(self.device, self.dtype)
        if "encoder" in self.parts and "encoder" not in wanted and not any(site.in_cells for site in sites):
            raise ProgramError(f'no part "encoder" is used by {self.story}: leave it out')

    def _settle_sums(self, traces: list[poutine.Trace]) -> None:
        """Discrete sites that the guide function draws, marked to be summed over; and what their order asks for."""
        guide: dict[str, Any] = traces[0].nodes if len(traces) > 1 else {}
        self.guided_sums = [n for n, s in guide.items() if s["type"] == "sample" and is_enumerated(s)]
        self.has_factors = any(
            s["type"] == "sample" and s["is_observed"] and not is_computed(s) and not site_is_subsample(s)
            for s in guide.values()
        )
        for name in self.guided_sums:
            check_enumerated(name, guide[name])
        self.noisy = set()
        if self.guided_sums:
            blank = self.blank(3)
            made = get_model_relations(self._by_hand, (blank,)), get_model_relations(self.model, (blank,))
            self.noisy = drawn_backwards(*made)

    def _check_enumerating(self, blank: Cells) -> None:
        run = poutine.enum(self.model, first_available_dim=-1 - self.n_plates)
        try:
            poutine.trace(run).get_trace(blank).compute_log_prob()
        except (RuntimeError, ValueError, IndexError) as error:
            raise ProgramError(
                f"{self.story} cannot take all values of {listed(self.enumerated)} at once: {error}. "
                "An enumerated site comes with a dimension in front, (values, 1) instead of (n,): index a table with "
                "it, table[site], or use torch.where; no assignment in place"
            ) from error

    def _check_plates(self, trace: poutine.Trace) -> None:
        """What is told of the plate of cells from one run on three made-up cells."""
        nodes: dict[str, Any] = trace.nodes
        sites = {n: s for n, s in nodes.items() if s["type"] == "sample" and not site_is_subsample(s)}
        if not any(f.name == "cells" for site in sites.values() for f in site["cond_indep_stack"]):
            raise ProgramError(
                f"{self.story} draws nothing in the plate of cells, so that mini-batches would count for less than the "
                "whole: open it, `with cells.plate():`"
            )
        for name, site in sites.items():
            inside = any(f.name == "cells" for f in site["cond_indep_stack"])
            value, event_dim = site["value"], site["fn"].event_dim
            # Pyro takes all dimensions of a computed value for its event unless told otherwise, the cells' too.
            if inside and is_computed(site) and event_dim == value.dim() > 0 and len(value) == 3:
                raise ProgramError(
                    f'site "{name}" is computed for each cell: say how many dimensions one cell has, '
                    f'pyro.deterministic("{name}", value, event_dim={event_dim - 1})'
                )

    def blank(self, n_cells: int) -> Cells:
        """Made-up cells without a single count, on the Program's device."""
        blank = Cells.blank(self.schema, n_cells)
        return blank.with_counts(torch.zeros(n_cells, self.schema.n_genes)).to(self.device, self.dtype)

    def _run(self, cells: Cells, call: Callable[[], poutine.Trace], seen: str = "") -> poutine.Trace:
        """A run of model or guide; what goes wrong in it is said with the parts at hand."""
        try:
            return call()
        except ProgramError:
            raise
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
            raise ProgramError(
                f"{self.story} could not be run on {cells!r}: {error}{self._hint(str(error))}\n"
                f"Parts: {self._parts_line()}{seen}"
            ) from error

    def _hint(self, error: str) -> str:
        """What is likely wrong, where it is a common slip."""
        if "Shape mismatch inside plate" in error:
            return ". The numbers of one cell are one event: distribution.to_event(1)"
        parts = dict(self.parts.items())
        if isinstance(parts.get("library"), Prior) and "unsupported operand" in error:
            return '. A part "library" makes the site itself: for a prior on it, library=LatentLibrary(7.0, 1.0)'
        if isinstance(parts.get("dispersion"), Prior) and "'at'" in error:
            return ". For a prior on the dispersion, dispersion=GeneDispersion(prior=Prior(...))"
        prior = parts.get("prior")
        if "positional argument" in error and prior is not None and not inspect.signature(prior.forward).parameters:
            return '. The prior of a cell\'s state is called prior(cells): write "def forward(self, cells=None)"'
        return ""

    @property
    def story(self) -> str:
        """Name of the model: of its function, or of its file where that is just "model"."""
        name = getattr(self._story, "__name__", type(self._story).__name__)
        file = self._story.__module__.rsplit(".", 1)[-1]
        return file if name == "model" and not file.startswith("__") else name

    @property
    def functions(self) -> tuple[Callable[..., None], Callable[..., None] | None]:
        """The model and the guide as they were written; None for no guide."""
        return self._story, self._guide

    # ---- the two callables ------------------------------------------------------------------

    def model(self, cells: Cells) -> None:
        """The story of these cells, as a Pyro model."""
        self._announce()
        self._story(cells.running(), **self._handed(self._story))

    def guide(self, cells: Cells) -> None:
        """Its guide: completed globals, the guide function, completed sites of cells."""
        self._announce()
        cells = cells.running()
        with nullcontext() if self.corrections is None or self.training else self.corrections.of(cells):
            self.completion.draw_globals(cells)
            self._by_hand(cells)
            self.completion.draw_locals(cells, self.parts["encoder"] if "encoder" in self.parts else None)

    def _by_hand(self, cells: Cells) -> None:
        if self._guide is not None:
            self._guide(cells if cells.is_running else cells.running(), **self._handed(self._guide))

    def forward(self, cells: Cells) -> None:
        """The story; so that a Program can stand where a callable is asked for."""
        self.model(cells)

    def _handed(self, function: Callable[..., None]) -> dict[str, nn.Module]:
        return {name: self.parts[name] for name in self._wanted[function] if name in self.parts}

    def _announce(self) -> None:
        """Name every parameter to the handlers around, so that pyro.infer.SVI finds them.

        Not for our own loop, which has them at hand (they cost up to a millisecond a step).
        """
        if self._quiet or not poutine.runtime.am_i_wrapped():
            return
        parameter: Any
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                parameter.unconstrained = lambda p=parameter: p
                say = poutine.runtime.effectful(type="param")(lambda p=parameter, **_: p)
                say(name=f"program{id(self):x}.{name}", constraint=constraints.real)

    @contextmanager
    def driven(self, seed: int, *, train: bool = False, validate: bool = False) -> Iterator[None]:
        """While one of our own calls drives the Program: its seed, its mode, one thread, no side effects."""
        modes = {module: module.training for module in self.modules()}
        quiet = self._quiet
        with isolated(seed, self.device, validate):
            self._quiet = True
            self.train(False)
            if train:
                self.set_training()
            try:
                yield
            finally:
                self._quiet = quiet
                for module, mode in modes.items():
                    module.training = mode

    def set_training(self) -> None:
        """Train mode, but for what is frozen: dropout and running statistics there would not be as they were kept."""
        self.train(True)
        for module in self.modules():
            own = list(module.parameters())
            if own and not any(p.requires_grad for p in own):
                module.eval()

    @property
    def state_site(self) -> str:
        """The site that is a cell's state to the guide: "z", or "u" where the story computes z from it."""
        return self._state

    # ---- other programs from this one -------------------------------------------------------

    def replace(self, **parts: nn.Module | None) -> Program:
        """The same story with some parts replaced; the others keep their weights.

        ``dispersion=None`` stands for `NoDispersion`.

        Raises
        ------
        ProgramError
            If there is no part of that name, or it does not fit the others.
        """
        kept, given = dict(self.parts.items()), _without_none(parts)
        self._check_names(kept | given)
        new = self.copy()
        new.corrections = None  # they were of the guide as it was
        new._assemble(given)
        return new.eval()

    def copy(self) -> Program:
        """An independent Program with the same parts and weights."""
        new = copy.copy(self)
        new.__dict__ = dict(self.__dict__)
        new._modules = dict(self._modules)
        new._buffers = {name: None if buffer is None else buffer.clone() for name, buffer in self._buffers.items()}
        seen: dict[int, Any] = {}  # one memory, so that parts that refer to others refer to the new ones
        new.parts = Parts()
        for name, part in self.parts.items():
            new.parts[name] = copy.deepcopy(part, seen)
        new.completion = copy.deepcopy(self.completion, seen)
        new.corrections = copy.deepcopy(self.corrections)
        new._quiet = False
        return new

    @property
    def device(self) -> torch.device:
        return next((p.device for p in self.parameters()), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        """Floating type of the weights."""
        return next((p.dtype for p in self.parameters()), torch.get_default_dtype())

    def start(self, cells: Cells) -> None:
        """Set values that new parts take from data (``part.start``); once for each part."""
        new: list[Any] = [part for _, part in sorted(self.parts.items()) if not getattr(part, "started", False)]
        for part in new:
            frozen = [not p.requires_grad for p in part.parameters()]
            if hasattr(part, "start") and not (frozen and all(frozen)):
                with torch.no_grad():
                    part.start(cells)
        self.completion.start(cells)
        self.set_started()

    def set_started(self) -> None:
        """Take every part's values as they are: they are not to be set from data again."""
        for part in (*self.parts.values(), *self.completion.guides):
            part.started = True

    # ---- looking at it ----------------------------------------------------------------------

    def generate(
        self, cells: Cells | int, *, fixed: Mapping[str, Tensor] | None = None, seed: int = 0
    ) -> dict[str, Tensor]:
        """Draw from the story itself, from the prior to the counts.

        Parameters
        ----------
        cells : Cells, or a number of cells to make up from the schema
            Their covariates and library are used; their counts are not.
        fixed : values to pin, by site

        Returns
        -------
        dict
            Every site's value, (n, event) inside the plate, on the CPU. Random.
        """
        if isinstance(cells, Cells):
            blank = cells.without_counts()
        elif isinstance(cells, bool) or not hasattr(cells, "__index__") or cells < 1:
            raise ValueError(f"generate takes Cells, or a number of cells of at least 1, not {cells!r}")
        else:
            blank = Cells.blank(self.schema, int(cells), seed=seed)
        blank = blank.to(self.device, self.dtype)
        values = {name: torch.as_tensor(v).to(self.device) for name, v in dict(fixed or {}).items()}
        values = {name: v.to(self.dtype) if v.is_floating_point() else v for name, v in values.items()}
        with self.driven(seed), torch.no_grad():
            if values:
                self._check_fixed(values, poutine.trace(self.model).get_trace(blank))
            trace = poutine.trace(poutine.condition(self.model, data=values)).get_trace(blank)
        nodes: dict[str, Any] = trace.nodes
        return {
            name: site["value"].cpu()
            for name, site in nodes.items()
            if site["type"] == "sample" and not site_is_subsample(site)
        }

    @property
    def has_own_bound(self) -> bool:
        """Whether training takes a bound that ``TraceMeanField_ELBO`` does not know."""
        return bool(self.enumerated or self.guided_sums or self.has_factors)

    def _check_fixed(self, values: Mapping[str, Tensor], trace: poutine.Trace) -> None:
        nodes: dict[str, Any] = trace.nodes
        sites = [n for n, s in nodes.items() if s["type"] == "sample" and not site_is_subsample(s)]
        for name, value in values.items():
            if name not in sites:
                raise ValueError(
                    f'fixed= names "{name}", not a site of {self.story}: {listed(sites, 20)}.'
                    + did_you_mean(name, sites)
                )
            shape = tuple(nodes[name]["value"].shape)
            if tuple(value.shape) != shape:
                raise ValueError(f'fixed["{name}"] has shape {tuple(value.shape)}, the site {shape}')

    def traces(self, cells: Cells) -> tuple[poutine.Trace, poutine.Trace]:
        """One run of the guide and of the model along it: (guide trace, model trace)."""
        guide = poutine.trace(self.guide).get_trace(cells)
        model = poutine.trace(poutine.replay(self.model, trace=guide)).get_trace(cells)
        return guide, model

    def check(self, cells: Cells) -> None:
        """Whether model and guide agree, on these cells: sites, supports, shapes, and the mean-field condition.

        Raises
        ------
        ProgramError
            Naming the site, with a table of shapes.
        """
        with self.driven(self.seed, validate=True), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            guide = self._run(cells, lambda: poutine.trace(self.guide).get_trace(cells))
            follow = poutine.replay(self.model, trace=guide)
            drawn = f"\nDrawn by the guide:\n{guide.format_shapes()}"
            model = self._run(cells, lambda: poutine.trace(follow).get_trace(cells), drawn)
            check_sites(guide, model, cells, self.enumerated, self.guided_sums)
            try:
                guide.compute_log_prob()
                model.compute_log_prob()
            except (RuntimeError, ValueError) as error:
                raise ProgramError(f"{error}\nShapes (batch | event):\n{model.format_shapes()}") from error
            self._check_reading(model, cells)
            relations = get_model_relations(self.guide, (cells,)), get_model_relations(self.model, (cells,))
            check_mean_field(*relations, self.noisy)

    def _check_reading(self, model: poutine.Trace, cells: Cells) -> None:
        """The story may observe the counts, and not read them otherwise: they would be used twice."""
        x: Any = cells.x
        others = cells.with_counts((x.roll(1, 0) + 1).clamp(max=2.0**20).cpu())
        again = poutine.trace(poutine.replay(self.model, trace=model)).get_trace(others)
        nodes: dict[str, Any] = model.nodes
        for name, site in nodes.items():
            if site["type"] != "sample" or site_is_subsample(site) or name not in again.nodes:
                continue
            other: Any = again.nodes[name]
            if is_computed(site):
                same = torch.equal(site["value"], other["value"])
            else:
                laws = site["fn"], other["fn"]
                one, two = (law.log_prob(site["value"]) for law in laws)
                same = torch.allclose(one, two, rtol=1e-4, atol=1e-3, equal_nan=True)
            if not same:
                raise ProgramError(
                    f'the model reads cells.x to make "{name}", besides observing it, so that counts are used twice. '
                    "For the observed total use cells.library"
                )

    @property
    def has_monte_carlo(self) -> bool:
        """Whether the KL term of a site of each cell has no closed form."""
        blank = self.blank(3)
        with self.driven(self.seed), torch.no_grad():
            guide, model = self.traces(blank)
        drawn: dict[str, Any] = guide.nodes
        return any(
            name in drawn
            and any(f.name == "cells" for f in site["cond_indep_stack"])
            and (name in self.noisy or analytic_kl(drawn[name]["fn"], site["fn"]) is None)
            for name, site in latent_sites(model).items()
        )

    def _parts_line(self) -> str:
        return ", ".join(f"{name}={type(part).__name__}" for name, part in self.parts.items())

    def describe(self) -> str:
        """The story as a table: every site with its shapes, law, guide and KL term; then what depends on what.

        ``n`` stands for the cells at hand. KL terms are "analytic", or "Monte Carlo" where no
        closed form is known. Made from one run on three made-up cells.
        """
        blank = self.blank(3)
        with self.driven(self.seed), torch.no_grad():
            guide, model = self.traces(blank)
            relations = get_model_relations(self.model, (blank,))
        nodes: dict[str, Any] = model.nodes
        rows = [("site", "plate", "batch | event", "law", "guide", "KL")]
        for name, site in nodes.items():
            if site["type"] != "sample" or site_is_subsample(site):
                continue
            in_plate = any(f.name == "cells" for f in site["cond_indep_stack"])
            batch = ["n" if in_plate and i == len(site["fn"].batch_shape) - 1 else str(size)
                     for i, size in enumerate(site["fn"].batch_shape)]  # fmt: skip
            shape = f"{' '.join(batch):>5} | {' '.join(map(str, site['fn'].event_shape))}"
            law, by, kl = law_of(site["fn"]), "", ""
            if is_computed(site):
                law = "computed"
            elif site["is_observed"]:
                by = "observed"
            elif name in guide.nodes:
                by = law_of(guide.nodes[name]["fn"]) + (" (completed)" if name in self.completion.names else "")
                closed = name not in self.noisy and analytic_kl(guide.nodes[name]["fn"], site["fn"]) is not None
                kl = "analytic" if closed else "Monte Carlo"
                by += " (summed out)" if name in self.guided_sums else ""
            elif name in self.enumerated:
                by = "summed out"
            rows.append((name, "cells" if in_plate else "", shape, law, by, kl))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        table = "\n".join("  ".join(v.ljust(w) for v, w in zip(row, widths)).rstrip() for row in rows)
        depends = [
            f"{child} <- {', '.join(p for p in parents if p != child)}"
            for child, parents in relations["sample_sample"].items()
            if child != "cells" and any(p != child for p in parents)
        ]
        n_parameters = sum(p.numel() for p in self.parameters())
        parts = "\n".join(f"  {name}: {_one_line(part)}" for name, part in self.parts.items())
        columns = [f"{f.column} ({len(f)})" for f in self.schema.factors.values()]
        columns += [c.column for c in self.schema.continuous]
        return (
            f"{self.story}: {self.schema.n_genes:,} genes, {n_parameters:,} weights"
            + (f", columns {', '.join(columns)}" if columns else "")
            + f"\n{table}\ndepends: {'; '.join(depends)}\nparts:\n{parts}"
        )


def _one_line(part: nn.Module) -> str:
    text = getattr(part, "extra_repr", str)()
    return f"{type(part).__name__}({text})"


def _without_none(parts: Mapping[str, nn.Module | None]) -> dict[str, Any]:
    """Parts with "no dispersion" as a part."""
    return {k: NoDispersion() if k == "dispersion" and part is None else part for k, part in parts.items()}


def _wanted_parts(function: Callable[..., None]) -> dict[str, bool]:
    """Keyword-only arguments by name: True if they have no default."""
    parameters = list(inspect.signature(function).parameters.values())
    if not parameters or parameters[0].kind not in (
        inspect.Parameter.POSITIONAL_ONLY,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
    ):
        raise ProgramError(
            f"{function.__name__} must take the cells first: def {function.__name__}(cells, *, prior, ...)"
        )
    kinds = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return {p.name: p.default is inspect.Parameter.empty for p in parameters[1:] if p.kind in kinds}


def analytic_kl(guide: Any, model: Any) -> Tensor | None:
    """KL(guide, model) of the batch shape where a closed form is known, else None."""
    try:
        return kl_divergence(guide, model)
    except NotImplementedError:
        return None
