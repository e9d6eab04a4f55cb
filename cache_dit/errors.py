"""The errors of this package; wrong arguments are plain `ValueError` and `TypeError`."""


class CacheDitError(RuntimeError):
    """Base class of the errors that are ours and not the caller's arguments' fault."""


class NoBlocksError(CacheDitError):
    """The model holds no chain of transformer blocks that could be cached."""
