"""YAML with the numbers of version 1.2, read and written. PyYAML has those of 1.1.

There 010 is eight, 1:30 is ninety, in a time that grows with the square of the length, and 1e-4 is a text. Whatever
either version takes for a number is quoted where it is a text, so that it comes back as one.
"""

import re
from collections import Counter
from typing import Any

import yaml

MOST_MERGED = 100_000  # values that `<<` brings, in all mappings together
LONGEST = 1000  # digits of a whole number
_INT, _FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"
_NUMBERS = {
    _INT: (re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+"), "-+0123456789"),
    _FLOAT: (
        re.compile(
            r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
        ),
        "-+.0123456789",
    ),
}


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, without names that stand twice; what `<<` merges is bounded while it is merged."""

    def __init__(self, stream: Any):
        super().__init__(stream)
        self._seen: set[int] = set()  # mappings; what another one merges comes again, with what it merged itself
        self._merged = 0

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        if id(node) not in self._seen:
            self._seen.add(id(node))
            names = Counter(
                key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"
            )
            if twice := [name for name, count in names.items() if count > 1]:
                self._refuse(f"it has the name {twice[0]!r:.100} twice", node)
        before = len(node.value)
        super().flatten_mapping(node)
        self._merged += max(0, len(node.value) - before)
        if self._merged > MOST_MERGED:
            self._refuse("it merges too many values", node)

    def _refuse(self, why: str, node: yaml.Node) -> None:
        raise yaml.constructor.ConstructorError(None, None, why, node.start_mark)

    def _int(self, node: yaml.ScalarNode) -> int:
        text = self.construct_scalar(node)
        if len(text) > LONGEST:
            self._refuse(f"a number has {len(text):,} digits", node)
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))

    def _float(self, node: yaml.ScalarNode) -> float:
        text = self.construct_scalar(node)
        return float(text.replace(".", "", 1) if text[-1] in "fFnN" else text)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in known if tag not in _NUMBERS]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


class _Dumper(yaml.SafeDumper):
    """YAML's safe dumper, which quotes what looks like a number of either version."""


def _text(dumper: _Dumper, value: str) -> yaml.ScalarNode:
    """Unicode's own line ends are escaped, which only double quotes can: they would be read as spaces."""
    style = '"' if any(end in value for end in "\x85\u2028\u2029") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(str, _text)

for _tag, (_pattern, _first) in _NUMBERS.items():
    _whole = re.compile(rf"(?:{_pattern.pattern})$")  # PyYAML asks for a match at the beginning
    _Loader.add_implicit_resolver(_tag, _whole, list(_first))
    _Dumper.add_implicit_resolver(_tag, _whole, list(_first))
_Loader.add_constructor(_INT, _Loader._int)
_Loader.add_constructor(_FLOAT, _Loader._float)


def load(text: str) -> Any:
    """Return the value of a YAML text. Raises yaml.YAMLError, RecursionError, or ValueError for a date that is none."""
    return yaml.load(text, _Loader)  # noqa: S506 (a SafeLoader)


def dump(value: Any, **options: Any) -> str:
    """A value as YAML. options: as PyYAML has them."""
    return str(yaml.dump(value, Dumper=_Dumper, **options))
