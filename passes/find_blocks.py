"""find_blocks: which modules of the model are its repeated blocks, and in which order they run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import fx

from .graph_values import name_of
from .module_paths import block_path, is_compute, memberships, module_calls, module_entries

MIN_BLOCK_NODES = 3
MIN_BLOCKS = 2
# Attributes that end in a number are blocks (block0, block1, block2) or parts of one (norm1, attn1, norm2): blocks are
# more than two, multiply by weights, and are most of what runs from the first to the last of them.
MIN_NAMED_BLOCKS = 3
MULTIPLIES = frozenset({"linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "conv1d", "conv2d", "conv3d"})
# Lists of one chain may have some glue between them (a concat, a reshape), not another part of the model.
MAX_GLUE_NODES = 12
MAX_GLUE_BLOCKS = 1.5


@dataclass(frozen=True, slots=True)
class Block:
    """One repeated block: its module path, its class and the interval of graph positions it occupies, both inclusive."""

    path: str
    class_name: str
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class BlockList:
    """A container whose children run in order. Lists that interleave count as one; the first one names the blocks."""

    path: str
    blocks: tuple[Block, ...]
    first: int
    last: int
    nodes: int


@dataclass(frozen=True, slots=True)
class BlockChains:
    """What was found: every list in execution order, and the chains to try, the most promising first."""

    lists: tuple[BlockList, ...]
    chains: tuple[tuple[BlockList, ...], ...]


class _Candidate:
    """Nodes by block index of one container, while the lists are being sorted out."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.members: dict[int, list[int]] = {}
        self.classes: dict[int, str] = {}
        # where the blocks' own names say no number
        self.names: dict[int, str] = {}

    @property
    def size(self) -> int:
        return sum(map(len, self.members.values()))

    @property
    def first(self) -> int:
        return min(positions[0] for positions in self.members.values())

    @property
    def last(self) -> int:
        return max(positions[-1] for positions in self.members.values())

    def ordered(self) -> list[tuple[int, list[int]]]:
        return sorted(self.members.items(), key=lambda item: item[1][0])


def find_blocks(gm: fx.GraphModule) -> BlockChains:
    """Find the block lists of a traced model and the chains they form.

    *Detects* containers with two or more numbered children that did work, by ``nn_module_stack``; where there are none,
    three or more modules of one class beside each other, whatever their names; else three or more calls of one module.
    Lists in sequence, each fed by the one before it, make a chain (Flux: double blocks, then single blocks); lists that
    interleave (spatial, temporal, spatial, …) count as one list of composite blocks.

    *Rewrites* nothing: this is an analysis.

    *Refuses when* nothing is repeated: both fields are then empty.
    """
    nodes = list(gm.graph.nodes)
    candidates = _containers(nodes) or _siblings(nodes) or _repeated_calls(nodes)
    merged = _merge_interleaved(_without_nested(candidates))
    lists = sorted(merged, key=lambda block_list: block_list.first)
    return BlockChains(tuple(lists), tuple(_chains(nodes, lists)))


def _containers(nodes: Sequence[fx.Node]) -> dict[str, _Candidate]:
    found: dict[str, _Candidate] = {}
    for position, node in enumerate(nodes):
        if not is_compute(node):
            continue
        for container, index, class_name in memberships(node):
            candidate = found.setdefault(container, _Candidate(container))
            candidate.members.setdefault(index, []).append(position)
            if class_name:
                candidate.classes.setdefault(index, class_name)
    return {path: c for path, c in found.items() if _is_repeated(c, nodes)}


def _siblings(nodes: Sequence[fx.Node]) -> dict[str, _Candidate]:
    """Modules of one class with one parent, in the order in which they first run."""
    found: dict[tuple[str, str], _Candidate] = {}
    numbers: dict[str, int] = {}
    for position, node in enumerate(nodes):
        if not is_compute(node):
            continue
        for path, class_name in dict.fromkeys(module_entries(node)):
            parent = path.rpartition(".")[0]
            candidate = found.setdefault((parent, class_name), _Candidate(f"{parent}.*" if parent else "*"))
            number = numbers.setdefault(path, len(candidate.members))
            candidate.members.setdefault(number, []).append(position)
            candidate.names[number], candidate.classes[number] = path, class_name
    repeated = [candidate for candidate in found.values() if _is_repeated(candidate, nodes)]
    largest: dict[str, _Candidate] = {}
    for candidate in sorted(repeated, key=lambda each: each.size):
        largest[candidate.path] = candidate
    return largest


def _repeated_calls(nodes: Sequence[fx.Node]) -> dict[str, _Candidate]:
    """Modules that run several times: one block that the model goes through again and again."""
    found: dict[str, _Candidate] = {}
    for position, node in enumerate(nodes):
        if not is_compute(node):
            continue
        for path, class_name, number in module_calls(node):
            # the mark of candidates whose members have no numbers of their own
            candidate = found.setdefault(path, _Candidate(f"{path}@*"))
            candidate.members.setdefault(number, []).append(position)
            candidate.names[number], candidate.classes[number] = f"{path}@{number}" if number else path, class_name
    work = sum(map(is_compute, nodes))
    # what runs several times may also be an embedder: a block is most of the model
    return {each.path: each for each in found.values() if _is_repeated(each, nodes) and 2 * each.size > work}


def _is_repeated(candidate: _Candidate, nodes: Sequence[fx.Node]) -> bool:
    _keep_one_run_per_block(candidate)
    blocks = [positions for positions in candidate.members.values() if len(positions) >= MIN_BLOCK_NODES]
    if not candidate.path.endswith("*"):
        return len(blocks) >= MIN_BLOCKS
    working = [block for block in blocks if any(name_of(nodes[position]) in MULTIPLIES for position in block)]
    return len(working) >= MIN_NAMED_BLOCKS and 2 * candidate.size > candidate.last - candidate.first


def _without_nested(found: dict[str, _Candidate]) -> list[_Candidate]:
    """Drop lists inside the blocks of another list.

    A short outer list (stages of a U-Net) gives way to a longer inner one that does most of its block's work.
    """
    dropped: set[str] = set()
    for outer in found:
        inner = [path for path in found if path != outer and _is_inside(path, outer)]
        if not inner:
            continue
        longest = max((len(found[path].members) for path in inner if _fills_block(found[path], found[outer])), default=0)
        if len(found[outer].members) < 3 and longest > len(found[outer].members):
            dropped.add(outer)
        else:
            dropped.update(inner)
    return [candidate for path, candidate in found.items() if path not in dropped]


def _fills_block(inner: _Candidate, outer: _Candidate) -> bool:
    first = inner.first
    block = next(positions for positions in outer.members.values() if first in positions)
    return 2 * inner.size > len(block)


def _is_inside(path: str, outer: str) -> bool:
    if outer.endswith("@*"):
        return path.startswith(outer[:-2] + ".")
    stem = outer[:-1] if outer.endswith("*") else (outer + "." if outer else "")
    return path.startswith(stem) and path != outer and (not outer.endswith("*") or "." in path[len(stem) :])


def _keep_one_run_per_block(candidate: _Candidate) -> None:
    """Keep, for each block, its first run of at least half the length of its longest.

    A block's nodes may come in several runs: a submodule of block 0 called again behind the chain, or the whole list
    called a second time.
    """
    owner = sorted((position, index) for index, positions in candidate.members.items() for position in positions)
    runs: list[tuple[int, list[int]]] = []
    for position, index in owner:
        if runs and runs[-1][0] == index:
            runs[-1][1].append(position)
        else:
            runs.append((index, [position]))
    for index in candidate.members:
        own = [positions for owner_index, positions in runs if owner_index == index]
        longest = max(map(len, own))
        candidate.members[index] = next(positions for positions in own if 2 * len(positions) >= longest)


def _merge_interleaved(candidates: Iterable[_Candidate]) -> list[BlockList]:
    groups: list[list[_Candidate]] = []
    for candidate in sorted(candidates, key=lambda c: c.first):
        if groups and candidate.first < max(c.last for c in groups[-1]):
            groups[-1].append(candidate)
        else:
            groups.append([candidate])
    return [_block_list(group) for group in groups]


def _block_list(group: list[_Candidate]) -> BlockList:
    """Blocks of the group's first list; where several lists interleave a block lasts until the next one begins."""
    head = group[0]
    end = max(candidate.last for candidate in group)
    ordered = head.ordered()
    starts = [positions[0] for _, positions in ordered]
    blocks = []
    for place, (index, positions) in enumerate(ordered):
        following = starts[place + 1] - 1 if place + 1 < len(starts) else end
        last = positions[-1] if len(group) == 1 else following
        path = head.names.get(index) or block_path(head.path, index)
        blocks.append(Block(path, head.classes.get(index, ""), positions[0], last))
    path = " + ".join("*" if each.path == "*" else each.path.rstrip("*").rstrip(".@") for each in group)
    return BlockList(path, tuple(blocks), head.first, end, sum(candidate.size for candidate in group))


def _chains(nodes: Sequence[fx.Node], lists: Sequence[BlockList]) -> list[tuple[BlockList, ...]]:
    """Every run of neighbouring lists that holds the largest one, longest first."""
    if not lists:
        return []
    main = max(range(len(lists)), key=lambda i: lists[i].nodes)
    low = high = main
    while low > 0 and _continues(nodes, lists[low - 1], lists[low], lists[main]):
        low -= 1
    while high + 1 < len(lists) and _continues(nodes, lists[high], lists[high + 1], lists[main]):
        high += 1
    spans = [(i, j) for i in range(low, main + 1) for j in range(main, high + 1)]
    spans.sort(key=lambda span: -sum(part.nodes for part in lists[span[0] : span[1] + 1]))
    return [tuple(lists[i : j + 1]) for i, j in spans]


def _continues(nodes: Sequence[fx.Node], earlier: BlockList, later: BlockList, main: BlockList) -> bool:
    """Whether ``later`` follows closely and takes what the last block of ``earlier`` made."""
    glue = sum(is_compute(node) for node in nodes[earlier.last + 1 : later.first])
    if glue > max(MAX_GLUE_NODES, MAX_GLUE_BLOCKS * main.nodes / len(main.blocks)):
        return False
    source = earlier.blocks[-1]
    reached = {node for node in nodes[source.first : source.last + 1] if is_compute(node)}
    for node in nodes[source.first : later.last + 1]:
        if node not in reached and any(argument in reached for argument in node.all_input_nodes):
            reached.add(node)
    return any(node in reached for node in nodes[later.first : later.last + 1] if is_compute(node))
