"""The category of all warnings of this package, by which users tell them from those of libraries."""

import warnings


class DualLoraWarning(UserWarning):
    """The category of every warning of this package.

    >>> warnings.simplefilter("error", dual_lora.DualLoraWarning)  # doctest: +SKIP
    """


def warn(message: str, stacklevel: int) -> None:
    """Warn with the position `stacklevel` calls up, as `warnings.warn` counts them."""
    warnings.warn(message, DualLoraWarning, stacklevel=stacklevel + 1)
