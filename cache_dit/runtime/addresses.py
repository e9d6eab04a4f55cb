"""Where objects lie, for a few hundred at once: by that it is known at every call that a model's weights are those of the last.

`list(map(id, objects))` makes an object for each. In CPython a tuple holds the addresses one after the other, so that its
memory is the answer: 0.4 µs instead of 6 for 234 weights.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence

_HEADER, _ADDRESS = tuple.__basicsize__, tuple.__itemsize__


def _one_by_one(objects: Sequence[object]) -> bytes:
    return struct.pack(f"{len(objects)}P", *map(id, objects))


def _at_once(objects: Sequence[object]) -> bytes:
    held = tuple(objects)
    return ctypes.string_at(id(held) + _HEADER, len(held) * _ADDRESS)


def _lies_as_expected() -> bool:
    """Whether this interpreter's tuples are laid out so; their sizes tell it without looking at memory first."""
    if struct.calcsize("P") != _ADDRESS or (1, 2).__sizeof__() != _HEADER + 2 * _ADDRESS:
        return False
    sample = (None, twice := object(), "", twice)
    return _at_once(sample) == _one_by_one(sample)


addresses = _at_once if _lies_as_expected() else _one_by_one
