"""Parameters that several commands have, each with one help text."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from dual_lora.lab.recipe.schema import Precision

# A flag has no negative form, such as --no-json, unless its command names one.
PLAIN_FLAGS = Parameter(negative_bool=(), negative_iterable=())

Json = Annotated[bool, Parameter(help="End with one line of JSON on standard output.")]
Base = Annotated[str | None, Parameter(help="Base model of an adapter, if it has moved.")]
Dtype = Annotated[Precision | None, Parameter(help="Precision of the base weights. [default: the run's, else float32]")]
