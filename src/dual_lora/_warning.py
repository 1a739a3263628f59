"""The one kind of all warnings of this package, which sets them apart from those of libraries."""

import warnings


class DualLoraWarning(UserWarning):
    """Whatever this package warns of.

    >>> warnings.simplefilter("error", dual_lora.DualLoraWarning)  # doctest: +SKIP
    """


def warn(message: str, stacklevel: int) -> None:
    """Warn as of the line that many calls up, as `warnings.warn` counts them."""
    warnings.warn(message, DualLoraWarning, stacklevel=stacklevel + 1)
