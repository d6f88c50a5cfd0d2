"""The prefix tree of token sequences: every shared run of tokens once.

Trees are found from the tokens, not from the text: each response's conversation is tokenised whole,
so sharing can never change a token at the border of prompt and response.
"""

from dataclasses import dataclass, field

import numpy as np

# A cut costs a query run and a second copy of the path's keys; a shorter shared run is cheaper whole.
MIN_SHARED_TOKENS = 16


@dataclass
class Tree:
    """Segments in row order (depth first), each a run of tokens of one of the sequences.

    Attributes:
        parents: of each segment, or -1.
        spans: of each segment: (sequence, start, stop), the tokens that it holds.
        ends: of each sequence: (segment, offset in the segment) of its last token.
    """

    parents: list[int] = field(default_factory=list)
    spans: list[tuple[int, int, int]] = field(default_factory=list)
    ends: list[tuple[int, int] | None] = field(default_factory=list)

    @property
    def lengths(self) -> list[int]:
        return [stop - start for _, start, stop in self.spans]

    @property
    def num_attention_pairs(self) -> int:
        """The number of query-key pairs of one causal layer: each token sees its path up to itself."""
        # Before a segment's first token, its path is as long as the sequence that the segment was cut from.
        return sum(causal_pairs(stop) - causal_pairs(start) for _, start, stop in self.spans)


def causal_pairs(num_tokens: int) -> int:
    """Return the number of query-key pairs of causal attention over a sequence."""
    return num_tokens * (num_tokens + 1) // 2


def build_tree(sequences: list[np.ndarray], share: bool = True, min_shared: int = MIN_SHARED_TOKENS) -> Tree:
    """Build the tree that shares the common prefixes of non-empty sequences (any integer dtype).

    Equal elements are taken to be the same content; callers give every image its own numbers.
    A prefix is shared when it is at least `min_shared` long. A sequence that is a prefix of another
    ends inside the other's path and needs no segment of its own.
    """
    tree = Tree(ends=[None] * len(sequences))
    if share:
        _grow(tree, sequences, list(range(len(sequences))), 0, -1, min_shared)
    else:
        for number, sequence in enumerate(sequences):
            _add(tree, number, 0, len(sequence), -1)
            tree.ends[number] = (number, len(sequence) - 1)
    return tree


def _grow(tree, sequences, members, start, parent, min_shared) -> None:
    """Add the segments of `members`, which agree on everything before `start`."""
    pending = _split(tree, sequences, members, start, parent)
    while pending:
        group, agreed = pending.pop(0)
        stop = len(sequences[group[0]]) if len(group) == 1 else _common_stop(sequences, group, agreed)
        if len(group) > 1 and stop - start < min_shared:
            # Too short to pay for all of them, but some may agree further than that.
            short = [m for m in group if len(sequences[m]) == stop]
            longer = _by_token(sequences, [m for m in group if len(sequences[m]) > stop], stop)
            pending[:0] = [([m], stop) for m in short] + [(subset, stop) for subset in longer]
            continue
        segment = _add(tree, group[0], start, stop, parent)
        if len(group) == 1:
            tree.ends[group[0]] = (segment, stop - start - 1)
        else:
            _grow(tree, sequences, group, stop, segment, min_shared)


def _split(tree, sequences, members, start, parent):
    """Return the members that go on after `start`, grouped by their next token; the others end at `parent`."""
    for member in members:
        if len(sequences[member]) == start:
            _, first, stop = tree.spans[parent]
            tree.ends[member] = (parent, stop - first - 1)
    return [(g, start) for g in _by_token(sequences, [m for m in members if len(sequences[m]) > start], start)]


def _by_token(sequences, members, at):
    groups: dict[int, list[int]] = {}
    for member in members:
        groups.setdefault(int(sequences[member][at]), []).append(member)
    return list(groups.values())


def _common_stop(sequences, members, start) -> int:
    first = sequences[members[0]]
    stop = len(first)
    for member in members[1:]:
        other = sequences[member]
        stop = min(stop, len(other))
        differ = np.flatnonzero(first[start:stop] != other[start:stop])
        if len(differ):
            stop = start + int(differ[0])
    return stop


def _add(tree, sequence, start, stop, parent) -> int:
    tree.parents.append(parent)
    tree.spans.append((sequence, start, stop))
    return len(tree.spans) - 1
