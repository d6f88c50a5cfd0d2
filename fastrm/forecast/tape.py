"""When memory is live while autograd runs a function, from a list of the function's operations.

A `Tape` says of each operation what it makes, and what its backward pass reads. From that follows, as
autograd works: a value lives until nothing reads it any more; what a backward pass reads lives until that
has run; the backward pass goes through the operations in reverse, where a gradient lives from the first
operation that adds to it until the one that made its value has taken it.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Operation:
    """One operation: `inputs` -> `output`.

    Attributes:
        keeps: values that its backward pass reads.
        is_product: a matrix product or attention, whose result selective checkpointing keeps.
        passes: inputs whose gradient is the gradient of the output itself, in the same memory.
        copy: bytes of a weight in the dtype of the product, read by the backward pass.
        forward_scratch, backward_scratch: bytes that live only while it runs.
    """

    output: str
    inputs: tuple[str, ...]
    keeps: tuple[str, ...] = ()
    is_product: bool = False
    passes: tuple[str, ...] = ()
    copy: int = 0
    forward_scratch: int = 0
    backward_scratch: int = 0


class Tape:
    """The operations of one layer, in order, and the sizes of their values in bytes.

    Attributes:
        input: name of the value that comes from the layer before.
    """

    def __init__(self, input: str, num_bytes: int):
        self.input = input
        self.operations: list[Operation] = []
        self._bytes = {input: num_bytes}
        self._gradient_bytes = {input: num_bytes}

    def add(self, operation: Operation, num_bytes: int, gradient_bytes: int | None = None) -> str:
        """Append an operation; returns the name of its output.

        Args:
            num_bytes: of the output; 0 for a view.
            gradient_bytes: of its gradient, if that is not as large.
        """
        name = operation.output
        if name in self._bytes:
            raise ValueError(f"tape: {name} is made twice")
        self.operations.append(operation)
        self._bytes[name] = num_bytes
        self._gradient_bytes[name] = num_bytes if gradient_bytes is None else gradient_bytes
        return name

    @property
    def output(self) -> str:
        return self.operations[-1].output

    @property
    def copies(self) -> int:
        """Bytes of all copies of weights."""
        return sum(operation.copy for operation in self.operations)

    def kept(self, mode: str) -> int:
        """Bytes of activations that live from the forward to the backward pass. Copies of weights are not counted.

        Args:
            mode: none, selective or full activation checkpointing.
        """
        return self._sum(self._kept_names(mode))

    def forward_peak(self, differentiable: bool) -> int:
        """Bytes live at most in the forward pass, the input included. Copies of weights are not counted.

        Args:
            differentiable: what the backward pass reads is kept; else nothing is.
        """
        readers = Counter(name for operation in self.operations for name in set(operation.inputs))
        kept = self._kept_names("none") if differentiable else set()
        live, peak = {self.input}, self._bytes[self.input]
        for operation in self.operations:
            live.add(operation.output)
            peak = max(peak, self._sum(live | kept & self._made_until(operation)) + operation.forward_scratch)
            for name in set(operation.inputs):
                readers[name] -= 1
                if not readers[name]:
                    live.discard(name)
        return peak

    def backward_peak(self, mode: str) -> int:
        """Bytes live at most in the backward pass: what is kept, copies of weights, gradients of values, scratch.

        The gradient of the output is there at the start. With checkpointing the layer is run again first;
        then everything that none keeps is there.
        """
        kept = Counter(name for operation in self.operations for name in set(operation.keeps))
        live, copies = self._sum(kept), self.copies
        gradients = {self.output: self._gradient_bytes[self.output]}
        peak = max(live + copies, self.kept(mode)) + sum(gradients.values())
        for operation in reversed(self.operations):
            new, added = self._input_gradients(operation, gradients)
            now = live + copies + sum(gradients.values())
            peak = max(peak, now + sum(new.values()) + added + operation.backward_scratch)
            taken = gradients.pop(operation.output)
            gradients |= new
            gradients |= dict.fromkeys(operation.passes, 0)
            if operation.passes:
                gradients[operation.passes[0]] = taken
            copies -= operation.copy
            for name in set(operation.keeps):
                kept[name] -= 1
                if not kept[name]:
                    live -= self._bytes[name]
        return peak

    def _input_gradients(self, operation: Operation, gradients: dict[str, int]) -> tuple[dict[str, int], int]:
        """Gradients that the backward pass of an operation makes first, and bytes of those it adds to others."""
        names = [name for name in dict.fromkeys(operation.inputs) if name not in operation.passes]
        new = {name: self._gradient_bytes[name] for name in names if name not in gradients}
        return new, sum(self._gradient_bytes[name] for name in names if name in gradients)

    def _kept_names(self, mode: str) -> set[str]:
        if mode == "full":
            return {self.input}
        if mode == "selective":
            return {self.input} | {operation.output for operation in self.operations if operation.is_product}
        return {name for operation in self.operations for name in operation.keeps}

    def _made_until(self, last: Operation) -> set[str]:
        stop = self.operations.index(last) + 1
        return {self.input} | {operation.output for operation in self.operations[:stop]}

    def _sum(self, names) -> int:
        return sum(self._bytes[name] for name in names)


@dataclass(frozen=True)
class Part:
    """One part of a model, in the order of the forward pass.

    Attributes:
        tape: of the part's operations.
        trained: it, or anything before it, is trained: a backward pass runs through it.
        gradient_bytes: of its own weights.
        mode: activation checkpointing of this part.
        count: equal parts in a row.
        held: bytes that live through the forward pass of this part for other reasons, such as pixels.
    """

    name: str
    tape: Tape
    trained: bool
    gradient_bytes: int
    mode: str
    count: int = 1
    held: int = 0


@dataclass(frozen=True)
class Moment:
    """What is live at one moment of a pass over a pack, in bytes.

    Attributes:
        name: when.
        activations: kept by parts for their backward passes.
        working: values, gradients of values and scratch of the part that runs.
        copies: of weights in the dtype of the products.
        gradients: of weights.
    """

    name: str
    activations: int
    working: int
    copies: int
    gradients: int

    @property
    def total(self) -> int:
        return self.activations + self.working + self.copies + self.gradients


def moments(parts: Sequence[Part], gradients: str) -> list[Moment]:
    """The moments of a pack's forward and backward pass at which memory can be at its largest.

    Copies of weights live until the forward pass ends, as autocast's cache holds them; and in a part
    without checkpointing until its backward pass.

    Args:
        gradients: of weights. growing: each part's are there from its backward pass on. kept: those of
            earlier packs are there from the start. divided: none is kept here.
    """
    steps = [part for part in parts for _ in range(part.count)]
    there = sum(part.gradient_bytes for part in steps) if gradients == "kept" else 0
    kept = copies = 0
    found = []
    for part in steps:
        copies += part.tape.copies
        working = part.tape.forward_peak(part.trained and part.mode == "none")
        found.append(Moment(f"forward, {part.name}", kept, working + part.held, copies, there))
        kept += part.tape.kept(part.mode) * part.trained
    copies = sum(part.tape.copies for part in steps if part.trained and part.mode == "none")
    for part in reversed(steps):
        if not part.trained:
            break
        kept -= part.tape.kept(part.mode)
        copies -= part.tape.copies * (part.mode == "none")
        there += part.gradient_bytes * (gradients == "growing")
        found.append(Moment(f"backward, {part.name}", kept, part.tape.backward_peak(part.mode), copies, there))
    return found
