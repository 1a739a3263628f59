"""Limits of the numbers in a method's configuration, checked before anything is built of it.

A configuration may come with somebody else's adapter. Of its numbers some are sizes of tensors, some say how often a
loop runs, and some (seeds, steps, α) cost nothing however large they are. Every number has one of three bounds: that of
its name in LIMITS, none if its name is in FREE, and else that of a size.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

MOST_SIZE = 4096  # that is taken without a question, whatever the model's dimensions
MOST_LAYERS = 1000  # the deepest published model has some 130
MOST_NUMBERS = 10**8  # of one tensor that a model of any size may get

# Loops, and shares that are at most the whole. PEFT's defaults are one to ten; papers go to a few dozens.
LIMITS: dict[str, float] = {
    **dict.fromkeys(("depth", "xlora_depth", "encoder_num_layers"), 64),
    **dict.fromkeys(("num_layers", "adapter_layers", "shadow_num_hidden_layers", "layers_to_transform"), MOST_LAYERS),
    **dict.fromkeys(("num_cayley_neumann_terms", "psoft_svd_lowrank_niter", "loftq_iter", "niter"), 100),
    **dict.fromkeys(("boft_n_butterfly_factor", "num_transformer_submodules"), 64),
    **dict.fromkeys(("sparse_rate", "sparsity"), 1),
    **dict.fromkeys(("theta_d_length", "n_frequency", "num_vectors", "asa_target_subspaces"), MOST_NUMBERS),
    # The length of a range of layers, see `_layers`.
    "layer_replication": float("inf"),
}
# Seeds, steps of a training, factors of a sum, ids of tokens and bits.
FREE = re.compile(
    r"seed|prng_key|alpha|lambda|scaling|step|warmup|^tinit$|^tfinal$|^deltaT$|interval|token_id|token_ind|"
    r"invocation_tokens|^cpt_|bits"
)
_NO_KINDS = {"Optional", "Union", "None", "NoneType", "class", "typing"}  # words of an annotation
# Fields whose product is the size of a tensor, or of one for each layer.
PRODUCTS = (
    ("num_vectors", "vector_length"),
    ("num_ranks", "num_tasks", "token_dim"),
    ("num_tasks", "num_virtual_tokens", "num_ranks"),
    ("num_virtual_tokens", "num_transformer_submodules", "num_layers", "token_dim"),
    ("num_frozen_tokens", "num_layers", "token_dim"),
    ("encoder_hidden_size", "encoder_hidden_size", "encoder_num_layers"),
    ("encoder_hidden_size", "num_layers", "token_dim"),
    ("n_tasks", "n_skills", "n_splits", "r"),
    ("xlora_size", "xlora_size", "xlora_depth"),
    ("shadow_hidden_size", "shadow_intermediate_size", "shadow_num_hidden_layers"),
    ("shadow_hidden_size", "shadow_hidden_size", "shadow_num_hidden_layers"),
    ("num_subspaces", "subspace_rank", "subspace_rank"),
    ("adapter_len", "adapter_layers"),
    ("u", "r", "r"),
    ("num_B", "r"),
)  # fmt: skip


def check_bounds(config: Any, model: Any) -> None:
    """Raise ValueError, in one sentence, for a number that would build, draw or repeat without an end.

    config: of any method of PEFT. model: what it is to adapt; its weights are not looked at.
    """
    values = config.to_dict()
    shapes = [tuple(parameter.shape) for parameter in model.parameters()]
    largest = max(MOST_SIZE, *(max(shape, default=0) for shape in shapes))
    of_model = max(MOST_NUMBERS, sum(map(prod, shapes)))
    for field, name, number in _numbers(values, _fractions(config)):
        most = LIMITS.get(name, LIMITS.get(field, largest))
        if not number <= most:
            what = f"{field} holds" if name == field else f"{field} holds {name}:"
            why = "no weight of this model has a dimension above" if most == largest else "expected at most"
            raise ValueError(f"{what} {_written(number)}, and {why} {_written(most)}.")
    _check_start(values)
    _check_layers(values)
    _check_tokens(values, largest)
    for fields in PRODUCTS:
        sizes = [value for name in fields if _is_number(value := values.get(name)) and value > 0]
        if len(sizes) > 1 and prod(sizes) > of_model:
            names = " × ".join(dict.fromkeys(name for name in fields if values.get(name)))
            raise ValueError(f"{names} is {_written(prod(sizes))} numbers, expected at most {of_model:,}.")


def check_kinds(config: Any) -> None:
    """Raise ValueError, in one sentence, for a value of another kind than its field's that PEFT takes all the same.

    The text "false" is true for it, a scale of NaN or infinity makes every output NaN, and true is the number 1.
    """
    values = config.to_dict()
    fields = dataclasses.fields(config) if dataclasses.is_dataclass(config) else ()
    for field in fields:
        value, kinds = values.get(field.name), set(re.findall(r"\w+", str(field.type))) - _NO_KINDS
        if kinds == {"bool"} and not isinstance(value, bool | None):
            raise ValueError(f"{field.name} is {value!r:.100}, expected true or false.")
        plain = kinds and kinds <= {"int", "float"}
        if plain or field.name.endswith("_pattern"):
            for each in value.values() if isinstance(value, dict) else [value]:
                if isinstance(each, bool) or (plain and isinstance(each, str)):
                    raise ValueError(f"{field.name} holds {each!r:.100}, expected a number.")
    for name, value in values.items():
        for _, number in _numbers_inside(value, name, False):
            if not -math.inf < number < math.inf:
                raise ValueError(f"{name} holds {number}, expected a finite number.")


def _fractions(config: Any) -> set[str]:
    """Fields that are no whole numbers by their annotation: rates, weights and tolerances."""
    fields = dataclasses.fields(config) if dataclasses.is_dataclass(config) else ()
    return {
        field.name
        for field in fields
        if re.fullmatch(r".*\bfloat\b.*", str(field.type)) and "int" not in str(field.type)
    }


def _numbers(values: Mapping[str, Any], fractions: set[str]) -> Iterator[tuple[str, str, float]]:
    """(field, the name inside it, number) of all that is bounded."""
    for field, value in values.items():
        if field in LIMITS or not (field in fractions or FREE.search(field)):
            named = not field.endswith("_pattern")  # there a name is a pattern of the stranger's
            yield from ((field, name, number) for name, number in _numbers_inside(value, field, named))


def _numbers_inside(value: Any, name: str, named: bool) -> Iterator[tuple[str, float]]:
    """named: whether the names in it are those of settings, which have bounds of their own."""
    if isinstance(value, Mapping):
        for key, each in value.items():
            if not (named and FREE.search(str(key))):
                yield from _numbers_inside(each, key if named and key in LIMITS else name, named)
    elif isinstance(value, list | tuple | set):
        for each in value:
            yield from _numbers_inside(each, name, named)
    elif _is_number(value):
        yield name, value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_start(values: Mapping[str, Any]) -> None:
    """PiSSA's start has its number of iterations in its name."""
    for field, value in values.items():
        found = re.search(r"_niter_(\d+)", value) if isinstance(value, str) and len(value) < 1000 else None
        if found and (len(found[1]) > 9 or int(found[1]) > LIMITS["niter"]):
            raise ValueError(f"{field} is {value[:100]!r}, expected at most {LIMITS['niter']} iterations.")


def _check_layers(values: Mapping[str, Any]) -> None:
    wanted = values.get("layers_to_transform")
    if isinstance(wanted, list | tuple | set) and len(wanted) > MOST_LAYERS:
        raise ValueError(f"layers_to_transform names {len(wanted):,} layers, expected at most {MOST_LAYERS:,}.")
    ranges = values.get("layer_replication") or []
    try:
        count = sum(max(0, int(end) - int(start)) for start, end in ranges)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"layer_replication is {str(ranges)[:200]}, expected pairs [start, end].") from None
    if count > MOST_LAYERS or len(ranges) > MOST_LAYERS:
        raise ValueError(f"layer_replication makes a model of {count:,} layers, at most {MOST_LAYERS:,} are built.")


def _check_tokens(values: Mapping[str, Any], largest: int) -> None:
    """Each token that trains has a row of weights of its own, one that stands twice as well."""
    for field in ("trainable_token_indices", "token_indices"):
        count = sum(1 for _ in _numbers_inside(values.get(field), field, False))
        if count > largest:
            raise ValueError(f"{field} names {count:,} tokens, expected at most {largest:,}.")


def _written(number: float) -> str:
    return f"{number:,}" if abs(number) < 10**18 else "more than 10¹⁸"
