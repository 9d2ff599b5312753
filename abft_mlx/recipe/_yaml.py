"""Reading YAML without its surprises: ``no`` stays a word, ``1e-5`` is a number, keys are unique.

PyYAML follows YAML 1.1, where an unquoted ``no`` is false, ``1:30`` is 90 and ``1e-5`` is a
string. Class names and learning rates are what recipes hold, so this loader follows YAML 1.2.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

LONGEST_TEXT = 1_000_000
MOST_VALUES = 100_000


class _Loader(yaml.SafeLoader):
    """A safe loader with YAML 1.2 scalars that refuses duplicate keys, and aliases that explode."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._sizes: dict[int, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Compose a node, counting the values that it holds, each alias as what it stands for."""
        event = self.peek_event()
        node = super().compose_node(parent, index)
        if node is None:
            return None
        if isinstance(event, yaml.AliasEvent):
            if id(node) not in self._sizes:
                raise yaml.composer.ComposerError(
                    None, None, f"*{event.anchor} stands inside itself", node.start_mark
                )
            return node
        size = 1
        if isinstance(node, yaml.SequenceNode):
            size += sum(self._sizes[id(one)] for one in node.value)
        elif isinstance(node, yaml.MappingNode):
            size += sum(self._sizes[id(one)] for pair in node.value for one in pair)
        if size > MOST_VALUES:
            raise yaml.composer.ComposerError(
                None, None, f"more than {MOST_VALUES:,} values, aliases included", node.start_mark
            )
        self._sizes[id(node)] = size
        return node

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        """Construct a scalar's text, if it can be written again."""
        text = super().construct_scalar(node)
        try:
            str(text).encode()
        except UnicodeEncodeError:
            raise yaml.constructor.ConstructorError(
                None, None, "half of a surrogate pair", node.start_mark
            ) from None
        return text

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, (dict, list)):
                continue
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} occurs twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """A safe dumper that quotes every text which YAML 1.1 or the loader above reads otherwise."""


# Unlike YAML 1.2, a number with a leading zero stays a word: it is a class name, not a quantity.
for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(0|[1-9][0-9]*)", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*|(?=[eE])))([eE][-+]?[0-9]+)?"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("merge", r"<<", "<"),
):
    for _kind in (_Loader, _Dumper):
        _kind.add_implicit_resolver(
            f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), list(_first)
        )


def _decimal(loader: _Loader, node: yaml.ScalarNode) -> int:
    return int(loader.construct_scalar(node))


_Loader.add_constructor("tag:yaml.org,2002:int", _decimal)


def parse(text: str) -> Any:
    """The value of one YAML document.

    Raises:
        yaml.YAMLError: not YAML, a tag that names code, a key that occurs twice, or too long, too
            deep or too many values.
    """
    if len(text) > LONGEST_TEXT:
        raise yaml.YAMLError(f"longer than {LONGEST_TEXT:,} characters")
    try:
        return yaml.load(text, Loader=_Loader)
    except RecursionError:
        raise yaml.YAMLError("nested too deeply") from None


def write(values: dict[str, Any]) -> str:
    """A map as one YAML document, in its own order, that `parse` and YAML 1.1 read alike."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
