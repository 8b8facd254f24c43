"""The stories, one file each (``pyrosc.models.scvi`` is the file, ``pyrosc.scvi`` builds the Program), and their parts.

Stories
-------
scvi    each cell has a low-dimensional state, decoded to shares of genes; counts scatter around share times total.
        For most count data with batches. Parts: prior, library, dispersion, decoder, likelihood, encoder.
scanvi  the state comes from the cell's type, known for some cells, and from how it varies within the type.
        To name cells by a few labels, and new cells by a reference (``fit.map``). Parts: those of scvi (the prior is
        that of the variation within types), labels, classifier, state, within. It told simulated types better than a
        mixture over labels as the prior of scvi with the same classifier term (benchmarks/README.md).
mrvi    samples (donors) move the expression of a cell, some kinds of cells more than others; the state is free of them.
        To ask which samples differ, in which cells, by what. Parts: those of scvi (the prior is that of u), effects,
        directions, archetypes, posterior.
shifted_samples  every cell of a sample is moved alike: the plain hierarchy of states. Its effects hold composition as
        much as state. Parts: those of scvi, effects, posterior.
linear_scvi  log shares are linear in the state, so that each factor is a list of genes with intervals (`Fit.loadings`).
        To read programmes, at a small loss of held-out likelihood. Parts: those of scvi, and loadings.
poissonvi  fragments of open chromatin in regions, Poisson about the cell's total times shares; each region has a
        factor of its own. For scATAC, up to hundreds of thousands of regions. Parts: those of scvi.

A story of your own is a function, ``Program(model, cells, ...)``; every part below fits it
(tutorials/03_write_a_story.py):

- What is one for all cells is drawn before the plate, what each cell has inside ``with cells.plate():``, the
  numbers of one cell as one event (``.to_event(1)``). A global drawn inside the plate is silently one for each cell.
- Effects of a column are indexed, ``effect[cells.batch]``, ``effect[cells.sample]``. A new sample has no effect to
  index: verbs then say so.
- What is computed gets a name by ``pyro.deterministic("rho", rho, event_dim=1)``; `expression` reads the site rho.
- Counts are observed, ``obs=cells.x``, and not read otherwise; the observed total is ``cells.library``.
- A discrete site of each cell with few values is summed out exactly: ``infer={"enumerate": "parallel"}``. It comes
  with a dimension in front, so index tables with it, ``profile[kind]``. Start such tables apart from each other, or
  all values may end as one. The mark stands in the model, and the guide leaves the site out; or it stands in the guide,
  which then says how probable each value is, and may draw other sites given it (``models/scanvi.py``).
- A term that training adds to the ELBO and the ELBO does not have is a factor in the guide, less than nothing there:
  ``pyro.factor("known", -term, has_rsample=False)``.
- Sites that the guide leaves out are guided by the Program; `describe` shows how, `draws` asks any of them.
- A likelihood of your own is a part that answers a distribution with ``event_dim`` 1. For `check.compare` across
  likelihoods its base distribution needs ``rest_given(kept, fraction)``, as those in ``pyrosc.distributions`` have.

Parts
-----
Each is handed over by name, ``scvi(cells, prior=MixturePrior(20))``, or later, ``program.replace(prior=...)``.

prior, of a cell's state, ``prior(cells)``
    Prior(dist.Normal, 0.0, 1.0)  one round cloud (default; its KL is analytic). Any Pyro distribution:
                                  dist.Laplace for few large coordinates, dist.StudentT for outlying cells
    MixturePrior(k)               groups of cells; labels=True for one component a label. Cells made up from it
                                  look more like real ones
    VampPrior(k)                  the guide's posteriors at k learned pseudo-cells: groups of any shape, at the
                                  price of k more cells a step
    FlowPrior()                   any smooth shape; can be fitted after the rest

library, expected total counts, ``library(cells)``
    ObservedLibrary()             the observed total, taken as known (default)
    LatentLibrary()               unknown, LogNormal by batch; for uncertainty about depth
    GivenLibrary()                size factors of yours; rho is then a rate (default with size_factor=)

dispersion, scatter beyond Poisson, ``dispersion()`` and ``dispersion.at(value, cells, hidden)``
    GeneDispersion()              one number a gene (default)
    BatchDispersion()             one a gene and batch, where protocols differ in noise
    LabelDispersion()             one a gene and label
    CellDispersion()              one a gene and cell, from the decoder's hidden layer; many weights
    NoDispersion()                for Poisson counts
    The first three take ``prior=``, and are then the site "dispersion" with a posterior:
    Prior(dist.LogNormal, 1.0, 1.0); InverseSqrtPrior(rate), little scatter unless the counts say so;
    TrendPrior(), genes of like expression scatter alike

likelihood, ``likelihood(mean, dispersion, hidden)``
    NBLikelihood()                UMI counts (default)
    ZINBLikelihood()              with extra zeros: read counts, or to check that there are none
    PoissonLikelihood()           no scatter beyond sampling: fragments of ATAC, or a null to compare with
    BernoulliLikelihood()         for counts that were cut to 0 and 1: P(1) = 1 - exp(-mean)

labels, what is known of a cell's type, ``labels(cells)`` and ``labels.evidence(cells)``
    LabelPrior()                  types as common as each other, labels taken for certain (default)
    LabelPrior(weights=, learned=True, errors=0.1, groups={"T": ["CD4 T", "CD8 T"]}): how common types are, or learned
    from the cells; a share of wrong labels; labels that stand for several types

classifier, ``classifier(z)``; state and within, ``state(u, y)`` and ``within(z, y)``
    Classifier(weight=20)         log odds of types from the state; how much known labels count in training
    TypeNormal()                  a normal by type, from a small network

effects, how far a sample moves the archetypes, ``effects()`` and ``effects.at(effect, shares, cells)``; directions,
what that does to genes; archetypes, a cell's shares of them; posterior, the guide of all
    SampleEffects(6, 20)          six archetypes, twenty directions; n_archetypes=1 moves all cells of a sample alike
    Directions(sd)                Archetypes()      SampleNormal()

loadings, what each factor of a linear decoder does to each gene, ``loadings()``
    HorseshoeLoadings(n)          few genes move with a factor, about n of them (default: 5 %); unused factors end at 0
    NormalLoadings(sd)            all move a little; every rotation of the factors is then as good
    NonNegativeLoadings(median)   a factor raises genes and lowers none

decoder, ``decoder(z, cells)``, and encoder, ``encoder(cells)`` and ``encoder.law(cells)`` where it knows better
    Decoder(), Encoder()          hidden layers; n_hidden, n_layers, dropout, norm="layer" or "batch"
    LinearDecoder()               log shares linear in z: loadings can be read, as estimates
    LoadingsDecoder()             the same with loadings of the story's own, decoder(z, cells, loadings)
    RegionDecoder()               shares of very many regions, one dense block of a mini-batch at a time
    FullRankEncoder()             latents that depend on each other given the counts; an analytic KL from normals
    FlowEncoder()                 skewed posteriors too; KL by Monte Carlo
    covariates="first", "deep", "norm" or False: batch and other columns joined to the first layer, to every
    layer, as shift and scale of the norm, or not seen. embedding=e for columns of many levels

The first architecture of deep count models, with dispersion and zero inflation from the decoder and an encoder
that sees the batch, is

    scvi(cells, encoder=Encoder(covariates="first"), dispersion=CellDispersion(), likelihood=ZINBLikelihood())
"""
