"""The tapes of a network's parts: what each keeps and makes, in bytes, for the rows of one pack.

They follow fastrm.model.layers operation by operation. Three data types appear: the residual stream and
the norms are float32; matrix products and attention are in the dtype of autocast; norms in the vision
tower read a residual stream in that dtype too, because pixels become one through a matrix product.
"""

from dataclasses import dataclass

from fastrm.forecast.tape import Operation, Tape

FLOAT = 4


@dataclass(frozen=True)
class Rows:
    """How many rows of each kind one pack has.

    Attributes:
        tokens: T.
        keys: rows of keys that attention reads if every run of queries has its own (a prefix once for each
            response that is no first child).
        anchors, anchor_keys: R, and the same of a layer with queries at the anchors.
        patches: of all images, before merging.
    """

    tokens: int
    keys: int
    anchors: int
    anchor_keys: int
    patches: int


@dataclass(frozen=True)
class Computation:
    """How layers compute, as far as memory depends on it.

    Attributes:
        bf16: matrix products in bfloat16 (autocast), else in float32.
        bf16_weights: matrices are stored in bfloat16, so that autocast copies none.
        fp8: large matrices of decoder layers are cast to FP8 anew at each product, and not copied.
        attention: varlen copies shared keys and values; eager and triton read them in place.
        liger: RMSNorm and SwiGLU of Liger, which keep their inputs alone.
        fused: q, k, v come from one product, and gate, up.
        accumulated: gradients of weights exist already, and new ones are added to them.
    """

    bf16: bool = False
    bf16_weights: bool = False
    fp8: bool = False
    attention: str = "eager"
    liger: bool = False
    fused: bool = False
    accumulated: bool = True

    @property
    def product(self) -> int:
        """Bytes of an element of a matrix product."""
        return 2 if self.bf16 else FLOAT


@dataclass(frozen=True)
class LayerSizes:
    """Widths of a decoder layer or vision block.

    Attributes:
        hidden, query, key: D; all query heads; all key heads.
        intermediate: of the MLP.
        heads: query heads.
        gated: the MLP has a gate.
        layer_norm: norms are nn.LayerNorm, which keeps its input alone.
    """

    hidden: int
    query: int
    key: int
    intermediate: int
    heads: int
    gated: bool = True
    layer_norm: bool = False


class _Writer:
    """Adds the operations that layers are made of to a tape.

    Args:
        stream: bytes of an element of the residual stream.
        trained: the weights have gradients.
    """

    def __init__(self, tape: Tape, how: Computation, stream: int, trained: bool, fp8: bool = False):
        self.tape, self.how, self.stream, self.trained, self.fp8 = tape, how, stream, trained, fp8
        self.one_kernel_norm = how.liger
        self._number = 0

    def add(self, kind: str, num_bytes: int, *inputs: str, gradient_bytes: int | None = None, keeps=(), **options):
        """`keeps` may name the output as "output"."""
        self._number += 1
        name = f"{kind} {self._number}"
        keeps = tuple(name if kept == "output" else kept for kept in keeps)
        return self.tape.add(Operation(name, inputs, keeps, **options), num_bytes, gradient_bytes)

    def norm(self, states: str, size: int) -> str:
        """RMSNorm of `size` elements; the result is float32."""
        stream = self.stream
        if self.one_kernel_norm:
            return self.add("norm", FLOAT * size, states, keeps=(states,), backward_scratch=FLOAT * size)
        if stream != FLOAT:
            states = self.add("float", FLOAT * size, states)
        # x / rms(x): the gradient has two terms, through x and through its square.
        scaled = self.add("rms", FLOAT * size, states, keeps=(states,), backward_scratch=2 * FLOAT * size)
        if stream != FLOAT:
            scaled = self.add("round", stream * size, scaled)
        # times the weight, whose gradient is a sum over the elementwise product.
        return self.add("norm", FLOAT * size, scaled, keeps=(scaled,), backward_scratch=FLOAT * size)

    def rounded(self, states: str, size: int, stream: int = FLOAT) -> str:
        """Autocast's cast of the input of one product."""
        return self.add("cast", self.how.product * size, states) if self.how.product != stream else states

    def linear(self, states: str, rows: int, inputs: int, outputs: int, stream: int = FLOAT) -> str:
        """A matrix product with a cast of its input."""
        states = self.rounded(states, rows * inputs, stream)
        weight, size = inputs * outputs, self.how.product
        cast = self.how.bf16 and not self.how.bf16_weights
        # Autocast's cache holds copies of trained weights only. FP8 holds W and its transpose for a moment.
        copied = 0 if self.fp8 else 2 * weight * cast
        scratch = 2 * weight if self.fp8 else 0
        # The product's own gradient of the weight, its float32 form, and the sum with what is there.
        gradient = (size * weight * self.how.bf16 + FLOAT * weight * self.how.accumulated) * self.trained
        return self.add(
            "product", size * rows * outputs, states, keeps=(states,) if self.trained else (), is_product=True,
            copy=copied if self.trained else 0,
            forward_scratch=scratch + (0 if self.trained else copied),
            backward_scratch=scratch + gradient + (0 if self.trained else copied),
        )  # fmt: skip

    def rotated(self, heads: str, size: int) -> str:
        """Rotary embedding in float32, and the cast back: x cos + (x turned by a half) sin."""
        scratch = 3 * FLOAT * size
        turned = self.add("rotate", FLOAT * size, heads, forward_scratch=scratch, backward_scratch=scratch)
        return self.rounded(turned, size)

    def attention(self, query: str, key: str, value: str, rows: tuple[int, int, int], sizes: LayerSizes) -> str:
        """Of `rows` = (queries, keys there are, keys that are read). The result is in the dtype of products."""
        queries, present, read = rows
        size, how = self.how.product, self.how.attention
        out = size * queries * sizes.query
        if how == "varlen" and read != present:
            source, gathered = size * present * sizes.key, size * read * sizes.key
            key, value = (self.add("gather", gathered, name, backward_scratch=source) for name in (key, value))
        statistics = FLOAT * queries * sizes.heads
        # Eager attention holds a batch of blocks at a time, at most all rows: its output, and its gradients.
        in_parts, gradients = how == "eager", out + 2 * size * present * sizes.key
        return self.add(
            "attention", out + statistics, query, key, value, keeps=(query, key, value, "output"), is_product=True,
            gradient_bytes=out, forward_scratch=out * in_parts, backward_scratch=gradients * in_parts,
        )  # fmt: skip

    def plus(self, stream: str, addition: str, size: int) -> str:
        """The residual stream and an addition to it, whose gradients are one in memory if their dtypes are."""
        passes = (stream, addition) if self.how.product == self.stream else (stream,)
        return self.add("sum", self.stream * size, stream, addition, passes=passes)

    def mlp(self, states: str, rows: int, sizes: LayerSizes, stream: int = FLOAT) -> str:
        size = self.how.product * rows * sizes.intermediate
        if not sizes.gated:
            wide = self.linear(states, rows, sizes.hidden, sizes.intermediate, stream)
            active = self.add("activation", size, wide, keeps=(wide,), backward_scratch=2 * size)
            return self.linear(active, rows, sizes.intermediate, sizes.hidden, self.how.product)
        if self.how.fused:
            both = self.linear(states, rows, sizes.hidden, 2 * sizes.intermediate, stream)
            kept = (both,)
            gate, up = (self.add(part, 0, both, gradient_bytes=size) for part in ("gate", "up"))
        else:
            gate, up = (self.linear(states, rows, sizes.hidden, sizes.intermediate, stream) for _ in range(2))
            kept = (gate, up)
        if self.how.liger and not self.how.fused:
            product = self.add("gated", size, gate, up, keeps=kept)
        else:
            active = self.add("silu", size, gate, keeps=kept[:1])
            product = self.add("gated", size, active, up, keeps=(active, kept[-1]))
        return self.linear(product, rows, sizes.intermediate, sizes.hidden, self.how.product)


def decoder_tape(sizes: LayerSizes, rows: Rows, how: Computation, trained: bool) -> Tape:
    """A decoder layer on all tokens."""
    num, hidden = rows.tokens, rows.tokens * sizes.hidden
    tape = Tape("stream", FLOAT * hidden)
    write = _Writer(tape, how, FLOAT, trained, how.fp8)
    states = write.norm("stream", hidden)
    query, key, value = _projections(write, states, num, sizes)
    query, key = write.rotated(query, num * sizes.query), write.rotated(key, num * sizes.key)
    mixed = write.attention(query, key, value, (num, num, rows.keys), sizes)
    added = write.linear(mixed, num, sizes.query, sizes.hidden, how.product)
    stream = write.plus("stream", added, hidden)
    added = write.mlp(write.norm(stream, hidden), num, sizes)
    write.plus(stream, added, hidden)
    return tape


def _projections(write: _Writer, states: str, rows: int, sizes: LayerSizes) -> tuple[str, str, str]:
    if not write.how.fused:
        widths = (sizes.query, sizes.key, sizes.key)
        query, key, value = (write.linear(states, rows, sizes.hidden, width) for width in widths)
        return query, key, value
    size = write.how.product * rows
    joined = write.linear(states, rows, sizes.hidden, sizes.query + 2 * sizes.key)
    query, key = (write.add("part", 0, joined, gradient_bytes=size * w) for w in (sizes.query, sizes.key))
    # Attention that reads values in place keeps all of the product that they are a part of.
    return query, key, joined if write.how.attention != "varlen" else write.add("part", size * sizes.key, joined)


def last_decoder_tape(sizes: LayerSizes, rows: Rows, how: Computation, trained: bool) -> Tape:
    """The last layer: keys and values of all tokens, everything else at the anchors alone."""
    num, at, hidden = rows.tokens, rows.anchors, rows.tokens * sizes.hidden
    tape = Tape("stream", FLOAT * hidden)
    write = _Writer(tape, how, FLOAT, trained)
    states = write.norm("stream", hidden)
    chosen = write.add("anchors", FLOAT * at * sizes.hidden, states, backward_scratch=FLOAT * hidden)
    query = write.linear(chosen, at, sizes.hidden, sizes.query)
    key = write.rotated(write.linear(states, num, sizes.hidden, sizes.key), num * sizes.key)
    value = write.linear(states, num, sizes.hidden, sizes.key)
    query = write.rotated(query, at * sizes.query)
    mixed = write.attention(query, key, value, (at, num, rows.anchor_keys), sizes)
    added = write.linear(mixed, at, sizes.query, sizes.hidden, how.product)
    stream = write.add("anchors", FLOAT * at * sizes.hidden, "stream", backward_scratch=FLOAT * hidden)
    stream = write.plus(stream, added, at * sizes.hidden)
    added = write.mlp(write.norm(stream, at * sizes.hidden), at, sizes)
    write.plus(stream, added, at * sizes.hidden)
    return tape


def vision_tape(sizes: LayerSizes, rows: Rows, how: Computation, trained: bool) -> Tape:
    """A block of the vision tower on all patches."""
    num, hidden = rows.patches, rows.patches * sizes.hidden
    tape = Tape("stream", how.product * hidden)
    write = _Writer(tape, how, how.product, trained)
    write.one_kernel_norm |= sizes.layer_norm
    states = write.norm("stream", hidden)
    joined = write.linear(states, num, sizes.hidden, 3 * sizes.hidden)
    part = {"gradient_bytes": how.product * hidden}
    query, key = (write.rotated(write.add("part", 0, joined, **part), hidden) for _ in range(2))
    mixed = write.attention(query, key, joined, (num, num, num), sizes)
    stream = write.plus("stream", write.linear(mixed, num, sizes.hidden, sizes.hidden, how.product), hidden)
    write.plus(stream, write.mlp(write.norm(stream, hidden), num, sizes), hidden)
    return tape


def pixel_tape(rows: Rows, values: int, width: int, how: Computation, trained: bool) -> Tape:
    """Pixels of all patches, `values` each, put into the order of the windows and multiplied."""
    size = rows.patches * values
    tape = Tape("pixels", FLOAT * size)
    write = _Writer(tape, how, how.product, trained)
    write.linear(write.add("order", FLOAT * size, "pixels"), rows.patches, values, width)
    return tape


def merger_tape(rows: Rows, merge: int, width: int, hidden: int, how: Computation, trained: bool) -> Tape:
    """The projector: norm, two matrices with a GELU between, and the order of the images again."""
    patches, tokens, wide = rows.patches * width, rows.patches // merge**2, merge**2 * width
    tape = Tape("stream", how.product * patches)
    write = _Writer(tape, how, how.product, trained)
    states = write.linear(write.norm("stream", patches), tokens, wide, wide)
    active = write.add("gelu", how.product * tokens * wide, states, keeps=(states,))
    features = write.linear(active, tokens, wide, hidden, how.product)
    write.add("order", how.product * tokens * hidden, features)
    return tape


def tile_tape(sizes: LayerSizes, rows: Rows, how: Computation, trained: bool) -> Tape:
    """A layer of InternVL's tower on all patches and class tokens; float32 scales make a float32 stream."""
    num, hidden = rows.patches, rows.patches * sizes.hidden
    tape = Tape("stream", FLOAT * hidden)
    write = _Writer(tape, how, FLOAT, trained)
    write.one_kernel_norm |= sizes.layer_norm
    states = write.norm("stream", hidden)
    query, key, value = (write.linear(states, num, sizes.hidden, sizes.hidden) for _ in range(3))
    mixed = write.attention(query, key, value, (num, num, num), sizes)
    added = write.linear(mixed, num, sizes.hidden, sizes.hidden, how.product)
    stream = write.plus("stream", _scaled(write, added, hidden, trained), hidden)
    added = write.mlp(write.norm(stream, hidden), num, sizes)
    write.plus(stream, _scaled(write, added, hidden, trained), hidden)
    return tape


def _scaled(write: _Writer, states: str, size: int, trained: bool) -> str:
    """Times a learned vector, whose gradient is a sum over the elementwise product."""
    return write.add(
        "scale", FLOAT * size, states, keeps=(states,) if trained else (), backward_scratch=FLOAT * size * trained
    )


def tile_pixel_tape(rows: Rows, patches: int, values: int, width: int, how: Computation, trained: bool) -> Tape:
    """Pixels of all patches multiplied, with class tokens between them and positions added: `rows.patches` rows."""
    tape = Tape("pixels", FLOAT * patches * values)
    write = _Writer(tape, how, FLOAT, trained)
    size = FLOAT * rows.patches * width
    states = write.add("class tokens", size, write.linear("pixels", patches, values, width))
    write.add("copy", size, write.add("positions", size, states))
    return tape


def tile_projector_tape(
    rows: Rows, patches: int, merge: int, width: int, hidden: int, how: Computation, trained: bool
) -> Tape:
    """InternVL's projector: patches without class tokens, norm, two matrices with a GELU between."""
    tokens, wide = patches // merge**2, merge**2 * width
    tape = Tape("stream", FLOAT * rows.patches * width)
    write = _Writer(tape, how, FLOAT, trained)
    write.one_kernel_norm = True  # nn.LayerNorm
    states = write.norm(write.add("patches", FLOAT * patches * width, "stream"), patches * width)
    states = write.linear(states, tokens, wide, hidden)
    active = write.add("gelu", how.product * tokens * hidden, states, keeps=(states,))
    write.linear(active, tokens, hidden, hidden, how.product)
    return tape


def mean_tape(rows: Rows, hidden: int, how: Computation, trained: bool) -> Tape:
    """The final norm of all tokens and the means of their pieces, in float32."""
    size = rows.tokens * hidden
    tape = Tape("stream", FLOAT * size)
    write = _Writer(tape, Computation(accumulated=how.accumulated), FLOAT, trained)
    states = write.norm("stream", size)
    write.add("means", FLOAT * rows.anchors * hidden, states, backward_scratch=FLOAT * size)
    return tape


def embedding_tape(
    rows: Rows, vocabulary: int, hidden: int, with_images: bool, how: Computation, trained: bool
) -> Tape:
    """The look-up, and the features of images put into its result. Its gradient is a whole matrix."""
    size = FLOAT * rows.tokens * hidden
    tape = Tape("features", 0)
    write = _Writer(tape, how, FLOAT, trained)
    gradient = FLOAT * vocabulary * hidden * trained * how.accumulated
    states = write.add("embeddings", size, "features", backward_scratch=gradient)
    if with_images:
        write.add("images", size, states)
    return tape


def head_tape(rows: Rows, hidden: int, num_layers: int, how: Computation, normed: bool = False) -> Tape:
    """Final norm, where the states are not normed yet, and head of each response, in float32."""
    size = FLOAT * rows.anchors * hidden
    tape = Tape("states", size)
    write = _Writer(tape, Computation(accumulated=how.accumulated), FLOAT, True)
    states = "states" if normed else write.norm("states", rows.anchors * hidden)
    for _ in range(num_layers - 1):
        wide = write.linear(states, rows.anchors, hidden, hidden)
        states = write.add("activation", size, wide, keeps=(wide,))
    write.linear(states, rows.anchors, hidden, 1)
    return tape
