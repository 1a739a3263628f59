"""The appearance of flags, and the choice of those that a help page shows.

A file of its own: the first help page needs it, and none of the fields of a recipe.
"""

from cyclopts import Group, Parameter

# A flag has no negative form, such as --no-json, unless its command names one.
PLAIN_FLAGS = Parameter(negative_bool=(), negative_iterable=())
HELP_ALL = "--help-all"
_shown = {"all": False}


def show_all(everything: bool) -> None:
    """Whether help pages show folded options too."""
    _shown["all"] = everything


class Folded(Group):
    """Options that a help page shows with --help-all alone."""

    @property
    def show(self) -> bool:
        return _shown["all"]
