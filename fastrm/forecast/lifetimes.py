"""The lifetimes of storages in a pass, also for a network with more layers than have run.

A `Meter` notes the storages that operations make while a pass runs. Layers of one kind do the same, so that a few
of them are enough: `repeated` copies what a layer's storages did to all layers that stand between the same neighbours.
"""

import functools
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Layers on each side that decide what a layer makes and lets go, with its own kind.
_NEIGHBOURS = 2


class Moment(NamedTuple):
    """A place in a pass.

    Attributes:
        backward: in the backward pass.
        layer: that has begun last; None before the first.
        event: number of what has happened since.
    """

    backward: bool
    layer: int | None
    event: int


@dataclass
class Life:
    """The life of one storage.

    Attributes:
        part: of the network whose weights were read last when it was made.
        is_copy: of a weight, in another dtype.
        died: None if it outlives the pass.
        taken: when it became the gradient of a weight, or was added to it; None: it did not.
    """

    num_bytes: int
    part: str
    is_copy: bool
    born: Moment
    died: Moment | None = None
    taken: Moment | None = None


class Meter(TorchDispatchMode):
    """A mode that notes the lives of all storages that are made while it is entered.

    Args:
        parts: storages that are there before, such as weights, are not counted; the part that each belongs to.
        bodies: operators that are opaque, and functions that return for their inputs what computes the same by
            operations that can be seen. What these functions themselves make is not counted.
    """

    def __init__(self, parts: Mapping[torch.Tensor, str], bodies: Mapping[object, Callable]):
        super().__init__()
        self._parts = {storage_of(tensor): part for tensor, part in parts.items()}
        self._bodies = bodies
        self._part = ""
        self._backward, self._layer, self._event = False, None, 0
        self._alive: dict[int, tuple[weakref.ref, int]] = {}
        self._lives: list[Life] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in self._bodies:
            body = self._bodies[func](*args, **kwargs)
            with self:
                return body()
        reads_weight = False
        for argument in args:
            if isinstance(argument, torch.Tensor) and (part := self._parts.get(storage_of(argument))):
                self._part, reads_weight = part, True
        output = func(*args, **kwargs)
        is_copy = reads_weight and func is torch.ops.aten._to_copy.default
        for made in (output,) if isinstance(output, torch.Tensor) else tree_leaves(output):
            if isinstance(made, torch.Tensor):
                self.count(made, is_copy)
        return output

    def count(self, tensor: torch.Tensor, is_copy: bool = False) -> None:
        """Begin a life for the storage of a tensor, unless it is known."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._parts or key in self._alive:
            return
        self._lives.append(Life(storage.nbytes(), self._part, is_copy, self._now()))
        self._alive[key] = weakref.ref(storage, functools.partial(self._end, key)), len(self._lives) - 1

    def _end(self, key: int, _) -> None:
        _, number = self._alive.pop(key)
        self._lives[number].died = self._now()

    def begin(self, layer: int | None, backward: bool) -> None:
        """Note that the pass has come to a layer."""
        self._backward, self._layer, self._event = backward, layer, 0

    def take(self, parameter: torch.Tensor) -> None:
        """Note that the gradient of a parameter has been added to `.grad`."""
        if (found := self._alive.get(storage_of(parameter.grad))) is not None:
            _, number = found
            self._lives[number].taken = self._now()

    def lives(self) -> list[Life]:
        """Return the noted lives, and stop noting."""
        self._alive.clear()
        return self._lives

    def _now(self) -> Moment:
        self._event += 1
        return Moment(self._backward, self._layer, self._event)


def storage_of(tensor: torch.Tensor) -> int:
    """Return a number that no other living storage has."""
    return tensor.untyped_storage()._cdata


@dataclass(frozen=True)
class Fullest:
    """The storages that are alive when a pass holds the most, in bytes.

    Attributes:
        when: the direction, and the part of the network whose weights were read last.
        activations: kept for the backward pass.
        working: made and let go by the layer that runs.
        copies: of weights in the dtype of the products.
        gradients: of weights.
    """

    when: str
    activations: int
    working: int
    copies: int
    gradients: int

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return self.activations + self.working + self.copies + self.gradients


def fullest(lives: Sequence[Life], num_layers: int, gradients_stay: bool) -> Fullest:
    """Find the moment at which a pass holds the most.

    Args:
        lives: of all layers.
        gradients_stay: each gradient of a weight lives on as `.grad`; else it is added to one that is not counted, and
            let go.
    """
    turn = num_layers + 1, 0  # where the backward pass begins

    def place(moment: Moment | None) -> tuple[int, int]:
        """Return the place of a moment: forward from the first layer to the last, then backward."""
        if moment is None:
            return 2 * num_layers + 2, 0
        if not moment.backward:
            return 0 if moment.layer is None else 1 + moment.layer, moment.event
        return turn[0] + (0 if moment.layer is None else num_layers - moment.layer), moment.event

    spans = [
        (place(life.born), place(life.died if gradients_stay or life.taken is None else life.taken), life)
        for life in lives
    ]
    changes = [(born, life.num_bytes, life.part) for born, _, life in spans]
    changes += [(died, -life.num_bytes, life.part) for _, died, life in spans]
    live = most = 0
    at, part = (0, 0), ""
    for moment, change, of_part in sorted(changes, key=lambda change: change[0]):
        live += change
        if live > most:
            most, at, part = live, moment, of_part
    sums: Counter[str] = Counter()
    for born, died, life in spans:
        if not born <= at < died:
            continue
        is_gradient = gradients_stay and life.taken is not None and place(life.taken) <= at
        is_kept = born < turn <= died
        kind = "copies" if life.is_copy else "gradients" if is_gradient else "activations" if is_kept else "working"
        sums[kind] += life.num_bytes
    when = ", ".join(filter(None, ("backward" if at >= turn else "forward", part)))
    return Fullest(when, sums["activations"], sums["working"], sums["copies"], sums["gradients"])


def enough(kinds: Sequence) -> list[int]:
    """Choose layers that are enough to know all: one for each kind among neighbours of the same kinds.

    Args:
        kinds: of all layers, in the order of the forward pass.

    Returns:
        Their numbers, in order. They stand next to one another as in the whole network.
    """
    kept, wanted = list(range(len(kinds))), set(_surroundings(kinds))
    for size in reversed(range(1, len(kinds))):
        for start in reversed(range(len(kept) - size + 1)):
            rest = kept[:start] + kept[start + size :]
            if wanted == set(_surroundings([kinds[number] for number in rest])):
                kept = rest
    return kept


def repeated(lives: Sequence[Life], kinds: Sequence, kept: Sequence[int]) -> list[Life]:
    """Return the lives of a pass through all layers, from those of a pass through the layers that are kept.

    Args:
        kinds: of all layers.
        kept: numbers of layers that have run, as `enough` chooses them.
    """
    places = {number: place for place, number in enumerate(kept)}
    arounds = _surroundings([kinds[number] for number in kept])
    layers_of: dict[tuple, list[int]] = {}
    for number, around in enumerate(_surroundings(kinds)):
        layers_of.setdefault(around, []).append(number)

    def moved(moment: Moment | None, origin: int | None, number: int | None) -> Moment | None:
        """Return a moment in the life of a storage of layer `number`, from that of one made in place `origin`."""
        if moment is None or moment.layer is None:
            return moment
        place = places[moment.layer]
        if origin is not None and abs(place - origin) < _NEIGHBOURS:
            return moment._replace(layer=number + place - origin)
        # Far away, it is the last of all such layers that lets go.
        last = min if moment.backward else max
        return moment._replace(layer=last(layers_of[arounds[place]]))

    found = []
    for life in lives:
        origin = places.get(life.born.layer)
        if origin is not None and arounds.index(arounds[origin]) != origin:
            continue  # another one stands for the same layers
        for number in [None] if origin is None else layers_of[arounds[origin]]:
            born, died, taken = (moved(moment, origin, number) for moment in (life.born, life.died, life.taken))
            found.append(replace(life, born=born, died=died, taken=taken))
    return found


def _surroundings(kinds: Sequence) -> list[tuple]:
    """Return the kinds of each layer and of those around it; None where there is no layer."""
    padded = [*[None] * _NEIGHBOURS, *kinds, *[None] * _NEIGHBOURS]
    return [tuple(padded[first : first + 2 * _NEIGHBOURS + 1]) for first in range(len(kinds))]
