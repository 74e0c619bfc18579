"""Plain data as YAML 1.2's core schema: 1e-3 is a number, no is a word, and nothing in a file is run."""

from __future__ import annotations

import math
import re
from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """YAML 1.2's core schema of plain data: no anchors, no tags of Python, no key twice."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise yaml.MarkedYAMLError(problem="anchors and aliases are not read", problem_mark=event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag != "tag:yaml.org,2002:str":
                found = getattr(key, "value", "a list or mapping")
                problem = f"a key must be text, got {found} (a number or null needs quotes)"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"key {key.value} is there twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Writes what `_Loader` reads; texts that either version of YAML could take for something else get quotes."""

    yaml_implicit_resolvers = {key: list(value) for key, value in yaml.SafeDumper.yaml_implicit_resolvers.items()}

    def ignore_aliases(self, data: Any) -> bool:
        return True


_SCHEMA = {
    "null": (r"~|null|Null|NULL|", "~nN\0"),
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?[0-9]+", "-+0123456789"),
    "float": (
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
}
for _tag, (_pattern, _first) in _SCHEMA.items():
    for _class in (_Loader, _Dumper):
        first = ["" if char == "\0" else char for char in _first]
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})\\Z"), first)


def _decimal(loader: Any, node: Any) -> int:
    return int(loader.construct_scalar(node))


def _text(dumper: Any, text: str) -> Any:
    plain = text.isprintable() and text.isascii()
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if plain else '"')


_Loader.add_constructor("tag:yaml.org,2002:int", _decimal)
_Dumper.add_representer(str, _text)


def read_yaml(text: str, where: str) -> Any:
    """Return the data in a text.

    Args:
        where: what to call the text in an error.

    Raises:
        ValueError: in one line, if it is not YAML, has a key twice or one that is no text, an anchor or an alias.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506, a subclass of SafeLoader
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f", line {error.problem_mark.line + 1}"
        raise ValueError(f"{where}{line}: not readable as YAML: {error.problem or error.context}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not readable as YAML: {' '.join(str(error).split())}") from error


def one_line(value: object) -> str:
    """Return plain data as YAML on one line, which `read_yaml` gives back.

    Raises:
        yaml.YAMLError: if it is no plain data.
    """
    wrapped = [_listed(value)]  # a bare scalar would be followed by an end-of-document mark
    text = yaml.dump(
        wrapped, Dumper=_Dumper, default_flow_style=True, width=math.inf, allow_unicode=True, sort_keys=False
    )
    return text.strip()[1:-1]


def _listed(value: object) -> object:
    if isinstance(value, list | tuple):
        return [_listed(item) for item in value]
    return {key: _listed(item) for key, item in value.items()} if isinstance(value, dict) else value
