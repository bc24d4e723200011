"""Operators over data beside products by hand, curvlinops and BackPACK, and what was asked of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap
from torch.nn import functional as F

import hesse
from benchmarks.cases import (
    RESIDUAL_CNNS,
    TRANSFORMER_2,
    Case,
    Classifier,
    deep_mlp,
    elementary_attention,
    mlp,
    transformer_of,
)
from benchmarks.measure import (
    Extrapolated,
    deviation,
    in_fresh_process,
    measure,
    record_of,
    show,
    timed,
)
from benchmarks.peers import backpack_diagonal, batched_entries, sampled_coordinates
from hesse import demo

Batches = list[tuple[Tensor, Tensor]]
Callables = dict[str, Callable[[], Any]]

MEDIAN_ASKED = 1.3
"""Of the time of curvlinops divided by that of hesse, in the median over the rows."""
_WRONG = 1e-3  # a deviation that float32 does not explain
_COLUMNS, _TAKEN = 32, 4
_BUDGET = 200 * 2**20
_CHUNK = 32  # products in a batch, of one per coordinate
_BY_HAND, _BATCHED = "by hand", "by hand, batched"
_LOOP, _AGAIN = "by hand, 32 times", "hesse, 32 times A @ v"
_CURVLINOPS, _IN_EIGHTS = "curvlinops", "curvlinops, 8 columns at a time"
_BACKPACK, _CONVERTED = "BackPACK DiagGGNExact", "BackPACK DiagGGNExact, model converted"
_PER_COORDINATE = "by hand, one product per coordinate, batched"
_CURVLINOPS_PER_COORDINATE = "curvlinops, one product per coordinate, batched"
_JACOBIANS = "torch.func, the Jacobian of every sample"
_SINGLE = "single batches, each with its plan, unchecked"


@dataclass(frozen=True)
class Asked:
    """That what others take, divided by what hesse takes, is at least so much.

    Attributes:
        over: those others, of whom the least counts; or a number of bytes.
        under: hesse.
        least: what was asked.
        key: of the records, what is divided.
    """

    over: tuple[str, ...] | int
    under: str
    least: float
    key: str = "seconds"

    def found(self, records: dict[str, dict[str, Any]]) -> float | None:
        """What is reached; None where nobody answered."""
        if isinstance(self.over, int):
            most: float | None = self.over
        else:
            most = min(
                (records[who][self.key] for who in self.over if self.key in records[who]), default=None
            )
        own = records[self.under].get(self.key)
        return most / own if most is not None and own else None


@dataclass(frozen=True)
class Row:
    """One question, and who answers it.

    Attributes:
        name: what `--case` takes.
        description: what the page says of it.
        make: the contestants, the first of them hesse.
        asked: of what they take.
        reference: what answers are compared with; None to leave that out.
        peaks: whose peak memory is measured, in processes of their own.
        repeats: how often each is timed, unless told otherwise.
    """

    name: str
    description: str
    make: Callable[[], Callables]
    asked: tuple[Asked, ...]
    reference: Callable[[], Any] | None = None
    peaks: tuple[str, ...] = ()
    repeats: int = 5


@dataclass(frozen=True)
class Data:
    """A model, and data in batches."""

    name: str
    description: str
    build: Callable[[], Classifier]
    batch: int
    context: Callable[[], Any] = field(default=nullcontext)

    def classifier(self) -> Classifier:
        """The model and its data, the same at every call."""
        torch.manual_seed(0)
        return self.build()

    def batches(self, classifier: Classifier) -> Batches:
        """The data in a list, so that nobody's time is that of loading them."""
        pairs = zip(classifier.inputs.split(self.batch), classifier.targets.split(self.batch), strict=True)
        return list(pairs)


def small_cnn(samples: int) -> Classifier:
    layers = [nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * 3 * 3, 10))
    return Classifier(model, torch.randn(samples, 1, 14, 14), torch.randint(10, (samples,)))


_MLP = "tanh MLP 64-256-256-10, {} samples in batches of {}"
_CNN = "two convolutions, ReLU, max pooling, {} images of 14x14 in batches of {}"
_TRANSFORMER = "two TransformerEncoderLayers of width 32, gelu, {} sequences of 16 tokens in batches of {}"


def _mlp(samples: int, batch: int, name: str = "mlp") -> Data:
    return Data(name, _MLP.format(samples, batch), partial(mlp, 64, 256, 256, 10, samples=samples), batch)


def _cnn(samples: int, batch: int) -> Data:
    return Data("cnn", _CNN.format(samples, batch), partial(small_cnn, samples), batch)


def _transformer(samples: int, batch: int) -> Data:
    build = partial(transformer_of, width=32, heads=4, hidden=64, tokens=16, samples=samples)
    return Data("transformer", _TRANSFORMER.format(samples, batch), build, batch, elementary_attention)


_WIDE = _mlp(1024, 256, "mlp, larger batches")
DATA = (_mlp(1024, 64), _WIDE, _cnn(256, 64), _transformer(256, 64))
_SMALL = (_mlp(64, 32), _cnn(64, 32), _transformer(64, 32))  # memory does not grow with their number


def _vectors(model: nn.Module, count: int) -> Tensor:
    """Columns [P, count]."""
    size = sum(parameter.numel() for parameter in model.parameters())
    return torch.randn(size, count, generator=torch.Generator().manual_seed(1))


# By hand ----------------------------------------------------------------------------------------------


def products_by_hand(
    curvature: str, model: nn.Module, batches: Batches, columns: Tensor, batched: bool = False
) -> Tensor:
    """Products with columns [P, k]: of every batch one graph, over which each column goes backward.

    Of the Gauss-Newton matrix by the derivative of $J^T u$ along a column, the loss's Hessian by the output,
    and $J^T$ again.
    """
    parameters = list(model.parameters())
    samples = sum(len(x) for x, _ in batches)
    sizes, shapes = [p.numel() for p in parameters], [p.shape for p in parameters]
    count = columns.shape[1]
    rows = [part.reshape(count, *s) for part, s in zip(columns.T.split(sizes, 1), shapes, strict=True)]
    total = torch.zeros(count, len(columns), dtype=columns.dtype)
    for x, y in batches:
        z = model(x)
        keep = {"retain_graph": True, "is_grads_batched": batched}
        product = (_hessian if curvature == "Hessian" else _gauss_newton)(z, y, parameters, keep)
        given = [rows] if batched else [[part[i] for part in rows] for i in range(count)]
        for i, vectors in enumerate(given):
            found = [part.flatten(int(batched)) for part in product(vectors)]
            total[slice(None) if batched else i].add_(torch.cat(found, -1), alpha=len(x) / samples)
    return total.T


def _hessian(z: Tensor, y: Tensor, parameters: list[nn.Parameter], keep: dict[str, bool]) -> Any:
    gradient = torch.autograd.grad(F.cross_entropy(z, y), parameters, create_graph=True)
    return lambda vectors: torch.autograd.grad(gradient, parameters, vectors, **keep)


def _gauss_newton(z: Tensor, y: Tensor, parameters: list[nn.Parameter], keep: dict[str, bool]) -> Any:
    (slope,) = torch.autograd.grad(F.cross_entropy(z, y), z, create_graph=True)
    u = torch.zeros_like(z, requires_grad=True)
    pulled = torch.autograd.grad(z, parameters, u, create_graph=True)

    def product(vectors: list[Tensor]) -> Any:
        (pushed,) = torch.autograd.grad(pulled, u, vectors, **keep)
        (bent,) = torch.autograd.grad(slope, z, pushed, **keep)
        return torch.autograd.grad(z, parameters, bent, **keep)

    return product


# Products beside curvlinops ---------------------------------------------------------------------------


def products(data: Data, curvature: str, count: int | None) -> Callables:
    classifier = data.classifier()
    model, batches = classifier.model, data.batches(classifier)
    operators = {"Hessian": hesse.HessianOperator, "Gauss-Newton": hesse.GaussNewtonOperator}
    A = operators[curvature](hesse.Loss(model, F.cross_entropy, batches))
    V = _vectors(model, count or 1)
    v = V[:, 0].contiguous()
    single = partial(products_by_hand, curvature, model, batches, V[:, :1])

    @cache
    def theirs() -> Any:
        import curvlinops

        names = {"Hessian": "HessianLinearOperator", "Gauss-Newton": "GGNLinearOperator"}
        operator = getattr(curvlinops, names[curvature])
        parameters = list(model.parameters())
        return operator(model, nn.CrossEntropyLoss(), parameters, batches, check_deterministic=False)

    def helped(call: Callable[[], Any]) -> Callable[[], Any]:
        def called() -> Any:
            with data.context():
                return call()

        return called

    if count is None:
        return {
            "hesse": lambda: A @ v,
            _CURVLINOPS: helped(lambda: theirs() @ v),
            _BY_HAND: helped(lambda: single()[:, 0]),
        }
    some = V[:, :_TAKEN].T.contiguous()
    return {
        "hesse": lambda: A @ V,
        _CURVLINOPS: helped(lambda: theirs() @ V),
        _IN_EIGHTS: helped(lambda: torch.cat([theirs() @ part for part in V.split(8, 1)], 1)),
        _AGAIN: partial(_one_by_one, some, count, lambda column: A @ column),
        _LOOP: helped(
            partial(
                _one_by_one,
                some,
                count,
                lambda column: products_by_hand(curvature, model, batches, column[:, None]),
            )
        ),
        _BATCHED: helped(lambda: products_by_hand(curvature, model, batches, V, batched=True)),
    }


def _one_by_one(some: Tensor, count: int, product: Callable[[Tensor], Tensor]) -> Extrapolated:
    """The time of `count` products, one after the other, by that of some."""
    seconds, found = timed(lambda: [product(column).flatten() for column in some])
    return Extrapolated(seconds * count / len(some), len(some), found)


def exact_products(data: Data, curvature: str, count: int | None) -> Tensor:
    """The same by hand in float64."""
    classifier = data.classifier()
    V = _vectors(classifier.model, count or 1).double()
    double = classifier.double()
    with data.context():
        found = products_by_hand(curvature, double.model, data.batches(double), V)
    return found if count else found[:, 0]


def _product_row(data: Data, curvature: str, count: int | None) -> Row:
    peers: tuple[str, ...] = (_CURVLINOPS,) if count is None else (_CURVLINOPS, _IN_EIGHTS)
    asked = [Asked(peers, "hesse", 1.0), Asked((_CURVLINOPS,), "hesse", 1.0, "peak_bytes")]
    if count is None and curvature == "Hessian":
        asked.append(Asked((_BY_HAND,), "hesse", 1 / 1.05))
    if count is not None:
        asked += [Asked((_AGAIN,), "hesse", 3.0), Asked((_LOOP,), "hesse", 3.0)]
    short = "A @ v" if count is None else "A @ V"
    what = "a vector" if count is None else f"{count} columns"
    arguments = (data, curvature, count)
    return Row(
        f"{data.name}, {curvature}, {short}",
        f"the {curvature} times {what}; {data.description}",
        partial(products, *arguments),
        tuple(asked),
        partial(exact_products, *arguments),
        ("hesse", _CURVLINOPS),
        repeats=15 if count is None else 3,
    )


# Gauss-Newton diagonals -------------------------------------------------------------------------------


def gauss_newton_diagonals(case: Case) -> Callables:
    classifier = case.classifier("cpu")
    assert classifier
    model, batches = classifier.model, [(classifier.inputs, classifier.targets)]

    def operator() -> hesse.GaussNewtonOperator:
        return hesse.GaussNewtonOperator(hesse.Loss(model, F.cross_entropy, batches))

    kept = operator()
    of_backpack = "DiagGGNExact", "diag_ggn_exact"
    as_it_is, converted = deepcopy(classifier), deepcopy(classifier)
    contestants: Callables = {
        "hesse": lambda: list(operator().diagonal().values()),
        "hesse, the operator kept": lambda: list(kept.diagonal().values()),
        _BACKPACK: backpack_diagonal(as_it_is, *of_backpack),
        _CONVERTED: backpack_diagonal(converted, *of_backpack, converted=True),
        _JACOBIANS: case.for_peers(partial(diagonal_of_jacobians, classifier)),
    }
    if case in _REFUSED:
        contestants |= {
            _PER_COORDINATE: case.for_peers(partial(some_entries, classifier)),
            _CURVLINOPS_PER_COORDINATE: case.for_peers(partial(some_columns, classifier)),
        }
    return contestants


def diagonal_of_jacobians(classifier: Classifier) -> list[Tensor]:
    """By the Jacobian of every sample's logits, all at once, and the softmax's Hessian."""
    named = {name: parameter.detach() for name, parameter in classifier.model.named_parameters()}

    def logits(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        return functional_call(classifier.model, parameters, (sample[None],))[0]

    jacobians = vmap(jacrev(logits), in_dims=(None, 0))(named, classifier.inputs)
    with torch.no_grad():
        p = classifier.model(classifier.inputs).softmax(1)
    found = []
    for name in named:
        J = jacobians[name].flatten(2)
        mean = torch.einsum("nc,ncp->np", p, J)
        found.append((torch.einsum("nc,ncp->p", p, J.square()) - mean.square().sum(0)) / len(p))
    return [part.view_as(like) for part, like in zip(found, named.values(), strict=True)]


def some_entries(classifier: Classifier) -> Extrapolated:
    """By products with the tensors' own blocks, 32 coordinates of each taken and scaled to all."""
    model, leaves = classifier.model, list(classifier.model.parameters())
    began, z = timed(lambda: model(classifier.inputs))
    sample, entries, seconds = sampled_coordinates(leaves, _CHUNK), [], began
    keep = {"retain_graph": True}
    for leaf, rows in zip(leaves, sample, strict=True):
        graph, product = timed(partial(_gauss_newton, z, classifier.targets, [leaf], keep))
        own = partial(_of_own_block, product)
        taken, found = timed(partial(batched_entries, own, leaf, rows, _CHUNK))
        seconds += graph + taken * leaf.numel() / len(rows)
        entries.append(found)
    return Extrapolated(seconds, sum(map(len, sample)), entries)


def _of_own_block(product: Callable[[list[Tensor]], Sequence[Tensor]], entry: Tensor) -> Tensor:
    return product([entry])[0]


def some_columns(classifier: Classifier) -> Extrapolated:
    """By columns of the operator of curvlinops, 32 of them taken and scaled to all."""
    from curvlinops import GGNLinearOperator

    leaves, batches = list(classifier.model.parameters()), [(classifier.inputs, classifier.targets)]
    A = GGNLinearOperator(classifier.model, nn.CrossEntropyLoss(), leaves, batches, check_deterministic=False)
    whole = torch.empty(A.shape[0])
    (rows,) = sampled_coordinates([whole], _CHUNK)
    one_hot = torch.zeros(len(whole), len(rows)).scatter_(0, rows[None], 1.0)
    taken, found = timed(lambda: A @ one_hot)
    return Extrapolated(taken * len(whole) / len(rows), len(rows), [found.gather(0, rows[None])[0]])


def exact_diagonal(case: Case) -> list[Tensor]:
    """The same in float64, by the Jacobian of every sample."""
    classifier = case.classifier("cpu")
    assert classifier
    return case.for_peers(diagonal_of_jacobians)(classifier.double())


_LAYER_NORM_MLP = Case(
    "gelu-layernorm-skips",
    "GELU MLP with layer norms and skips, 4 hidden layers of width 128, 32 samples",
    partial(deep_mlp, 4, activation=nn.GELU, normed=True, skips=True),
)


_REFUSED = (_LAYER_NORM_MLP, TRANSFORMER_2)  # by BackPACK
_DIAGONALS = (*(case for case in RESIDUAL_CNNS if "relu" in case.name), *_REFUSED)


def _diagonal_row(case: Case) -> Row:
    refused = case in _REFUSED
    asked = (
        Asked((_PER_COORDINATE, _CURVLINOPS_PER_COORDINATE), "hesse", 20.0)
        if refused
        else Asked((_BACKPACK, _CONVERTED), "hesse", 1.5)
    )
    return Row(
        f"{case.name}, Gauss-Newton diagonal",
        f"{case.description}; curvlinops has no exact diagonal but by products",
        partial(gauss_newton_diagonals, case),
        (asked,),
        partial(exact_diagonal, case),
        ("hesse", _CONVERTED, _JACOBIANS),
        repeats=3,
    )


# The Hessian's diagonal over a data set ---------------------------------------------------------------


def digits() -> Callables:
    """The network of the demonstration, trained, over all the digits in batches of 64."""
    with demo._reproducible():
        images, labels = demo._digits()
        network = demo._trained(demo._residual(), images, labels, epochs=8).float()
    batches = list(zip(images.split(64), labels.split(64), strict=True))
    parameters = list(network.parameters())

    def of_batch(x: Tensor, y: Tensor, **options: Any) -> Any:
        return hesse.hessian_diagonal(lambda: F.cross_entropy(network(x), y), parameters, **options)

    @cache
    def plans() -> dict[int, hesse.Plan]:
        shapes = {len(x): (x, y) for x, y in batches}
        return {size: of_batch(*pair, check=False, full_output=True).plan for size, pair in shapes.items()}

    def single() -> list[Tensor]:
        total = [torch.zeros_like(parameter) for parameter in parameters]
        for x, y in batches:
            for one, part in zip(total, of_batch(x, y, method=plans()[len(x)], check=False), strict=True):
                one.add_(part.detach(), alpha=len(x) / len(images))
        return total

    def whole(check: bool) -> list[Tensor]:
        loss = hesse.Loss(network, F.cross_entropy, batches)
        return list(hesse.hessian_diagonal(loss, check=check).values())

    return {
        "hesse.Loss, check=False": partial(whole, False),
        "hesse.Loss": partial(whole, True),
        _SINGLE: single,
    }


# Memory -----------------------------------------------------------------------------------------------


_MANY = (8, 64, 256)


def budgeted(data: Data) -> Callables:
    """Products with more and more columns within one budget."""
    classifier = data.classifier()
    model = classifier.model
    loss = hesse.Loss(model, F.cross_entropy, data.batches(classifier))
    A = hesse.HessianOperator(loss, memory=_BUDGET)
    return {_columns(count): partial(A.__matmul__, _vectors(model, count)) for count in _MANY}


def _columns(count: int) -> str:
    return f"hesse, {count} columns"


def _budget_row(data: Data) -> Row:
    description = f"the Hessian times columns within a budget of 200 MiB; {data.description}"
    return Row(
        f"{data.name}, A @ V within a budget",
        description,
        partial(budgeted, data),
        tuple(Asked(_BUDGET, _columns(count), 1.0, "peak_bytes") for count in _MANY),
        peaks=tuple(map(_columns, _MANY)),
        repeats=1,
    )


ROWS = (
    *(
        _product_row(data, curvature, count)
        for data in DATA
        for curvature in ("Hessian", "Gauss-Newton")
        for count in (None, _COLUMNS)
        if data is not _WIDE or (curvature == "Hessian" and count is None)
    ),
    *(_diagonal_row(case) for case in _DIAGONALS),
    Row(
        "digits, Hessian diagonal",
        "the residual network of `hesse demo`, 1,797 images in batches of 64",
        digits,
        (Asked((_SINGLE,), "hesse.Loss, check=False", 1 / 1.1), Asked((_SINGLE,), "hesse.Loss", 1 / 1.1)),
        repeats=3,
    ),
    *map(_budget_row, _SMALL),
)


def contestant(row: str, who: str) -> Callable[[], Any]:
    """One contestant by name: unlike its callable, this can be sent to another process."""
    (found,) = (known for known in ROWS if known.name == row)
    return found.make()[who]


@cache
def _torch_loaded() -> None:
    """Let torch and peers load what they load late, which takes seconds and would be the first one's time."""
    small = Data("", "", partial(mlp, 4, 4, 2, samples=8), 4)
    for curvature in ("Hessian", "Gauss-Newton"):
        for call in products(small, curvature, None).values():
            with suppress(ImportError):
                call()
    diagonal_of_jacobians(small.classifier())


def answer_row(row: Row, repeats: int | None) -> dict[str, Any]:
    """Everything about one row."""
    _torch_loaded()
    callables = row.make()
    measured = measure(callables, repeats or row.repeats)
    reference = row.reference() if row.reference else None
    records: dict[str, dict[str, Any]] = {}
    for who, found in measured.items():
        record = records[who] = record_of(found)
        if reference is not None and not found.error:
            off = _deviation(found.result, reference)
            record |= {"deviation": off, "right": off < _WRONG}
        if who in row.peaks and not found.error:
            record |= in_fresh_process(partial(contestant, row.name, who))
        print(f"{'operators':9} {row.name:36} {who:48} {show(record)}", flush=True)
    asked = []
    for wish in row.asked:
        value = wish.found(records)
        asked.append(
            {
                "key": wish.key,
                "over": "the budget" if isinstance(wish.over, int) else " or ".join(wish.over),
                "under": wish.under,
                "least": wish.least,
                "found": value,
                "reached": None if value is None else value >= wish.least,
            }
        )
        print(f"{'':9} {asked[-1]}", flush=True)
    # Whose result is wrong counts here: it is as fast as it is.
    beside = next((one["found"] for one in asked if _CURVLINOPS in one["over"].split(" or ")), None)
    derived = {} if beside is None or row.repeats == 1 else {"ratio_to_curvlinops": beside}
    return {"description": row.description, "contestants": records, "asked": asked, **derived}


def _deviation(result: Any, reference: Any) -> float:
    """How far an answer is from the reference, in what of it was taken."""
    if not isinstance(result, Extrapolated):
        return deviation(result, reference)
    if isinstance(reference, Tensor):  # of products, the first
        return deviation(result.entries, list(reference[:, : result.products].T))
    if len(result.entries) == 1:  # of all coordinates in a row
        reference = [torch.cat([part.flatten() for part in reference])]
    rows = sampled_coordinates(reference, _CHUNK)
    return deviation(result.entries, [p.flatten()[r] for p, r in zip(reference, rows, strict=True)])
