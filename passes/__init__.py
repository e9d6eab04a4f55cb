"""The graph passes, in the order they run. Each is one file; a new pass is a new file and a line in this table.

===================  ========  =====================================================================
pass                 kind      what it does
===================  ========  =====================================================================
find_blocks          analysis  block lists and chains of lists, by ``nn_module_stack``
write_apart          rewrite   arithmetic in place becomes arithmetic, where a block writes to what lies outside of it
choose_region        analysis  the blocks to cache, live-ins, live-outs and the base of each live-out
control_inputs       analysis  the inputs that enter the region past the blocks that always compute
localize_region      rewrite   distributed tensors cross the region's border as the part on this process
outline_region       rewrite   the region becomes a submodule with explicit inputs and outputs
insert_cache_branch  rewrite   the submodule becomes ``cond(pred, compute, reuse)``
specialize_branch    rewrite   the branch is folded for a decision the host has taken
split_pieces         rewrite   a specialized graph is cut at the borders of its blocks, those alike with equal keys
===================  ========  =====================================================================

All but the last two make the intermediate representation, the cond form; lowerings start from it. Passes know nothing of
the runtime: they take a graph and plain options.
"""

from __future__ import annotations

from .choose_region import LiveOut, Refusal, Region, choose_region
from .control_inputs import control_inputs
from .find_blocks import Block, BlockChains, BlockList, find_blocks
from .insert_cache_branch import BranchOptions, CacheInputs, ResidualBuffer, insert_cache_branch
from .localize_region import localize_region
from .outline_region import outline_region
from .specialize_branch import specialize_branch
from .split_pieces import Piece, Unsplit, split_pieces
from .write_apart import write_apart

PASSES = (
    find_blocks,
    write_apart,
    choose_region,
    control_inputs,
    localize_region,
    outline_region,
    insert_cache_branch,
    specialize_branch,
    split_pieces,
)

__all__ = [
    "PASSES",
    "Block",
    "BlockChains",
    "BlockList",
    "BranchOptions",
    "CacheInputs",
    "LiveOut",
    "Piece",
    "Refusal",
    "Region",
    "ResidualBuffer",
    "Unsplit",
    "choose_region",
    "control_inputs",
    "find_blocks",
    "insert_cache_branch",
    "localize_region",
    "outline_region",
    "specialize_branch",
    "split_pieces",
    "write_apart",
]
