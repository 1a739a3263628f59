"""What flags look like. A file of its own: the first help page needs it, and none of the fields of a recipe."""

from cyclopts import Parameter

# A flag has no negative form, such as --no-json, unless its command names one.
PLAIN_FLAGS = Parameter(negative_bool=(), negative_iterable=())
