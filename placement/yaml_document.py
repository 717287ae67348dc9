"""YAML text as nodes that know their lines, and as plain values; odd YAML is refused here.

What a file of ours never needs is an error instead of a surprise: tags, documents nested or
expanded beyond measure, aliases that contain themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import yaml
from yaml.constructor import SafeConstructor

from placement.errors import ConfigError

Loc = tuple[str | int, ...]

MAX_DEPTH = 100
MAX_NODES = 1_000_000  # aliases counted as often as they are used

# The C parser where PyYAML has it: eight times faster, and the catalogue is read at each start.
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_C_DEPTH = 2000  # the C parser recurses on the C stack: a tenfold of this ends the process

_TAG = "tag:yaml.org,2002:"
_SCALARS: Mapping[str, Callable[[SafeConstructor, yaml.ScalarNode], Any]] = {
    f"{_TAG}null": SafeConstructor.construct_yaml_null,
    f"{_TAG}bool": SafeConstructor.construct_yaml_bool,
    f"{_TAG}int": SafeConstructor.construct_yaml_int,
    f"{_TAG}float": SafeConstructor.construct_yaml_float,
    f"{_TAG}str": SafeConstructor.construct_yaml_str,
    # Dates stay text: whoever wants one reads it as ISO 8601.
    f"{_TAG}timestamp": lambda own, node: str(SafeConstructor.construct_yaml_timestamp(own, node)),
}
_MERGE = f"{_TAG}merge"


def compose(text: str, source: str) -> yaml.Node:
    """The root node of a text of one document; `source` names it in errors.

    Raises:
        ConfigError: no YAML, empty, or nested too deeply.
    """
    if _LOADER is yaml.SafeLoader or _may_be_deep(text):
        _refuse_depth(text, source)
    try:
        root = yaml.compose(text, Loader=_LOADER)
    except (yaml.YAMLError, UnicodeEncodeError) as error:
        root = _compose_slowly(text, source, error)
    if root is None:
        raise ConfigError(f"{source}: the file is empty")
    return root


def plain_value(root: yaml.Node, source: str) -> Any:
    """What `root` says, as JSON has it: dicts with text as keys, lists, text, numbers, None.

    Numbers may be infinite or not a number: a `Spec` refuses those, with all its other mistakes.

    Raises:
        ConfigError: something that JSON cannot say, or a key that stands twice.
    """
    return _Construction(source).value(root, (), ())


def own_path(root: yaml.Node, loc: Loc) -> Loc:
    """`loc` without the union tags that pydantic puts into it: keys and indices of the document.

    A last key that is missing stays.
    """
    node: yaml.Node | None = root
    path: list[str | int] = []
    for depth, part in enumerate(loc):
        below = _below(node, part)
        if below is not None:
            node = below[1]
        elif not isinstance(node, yaml.MappingNode) or depth < len(loc) - 1:
            continue
        path.append(part)
    return tuple(path)


def node_at(root: yaml.Node, loc: Loc) -> yaml.Node:
    """The deepest node on the way to `loc`."""
    node = root
    for part in loc:
        below = _below(node, part)
        node = node if below is None else below[1]
    return node


def line_of(root: yaml.Node, loc: Loc, *, of_key: bool = False) -> int:
    """Line of the deepest node on the way to `loc` (of its key, if that is what is wrong)."""
    node = root
    for depth, part in enumerate(loc):
        below = _below(node, part)
        if below is not None:
            node = below[0] if of_key and depth == len(loc) - 1 else below[1]
    return int(node.start_mark.line) + 1


def dotted(loc: Loc) -> str:
    """`models[0].name`."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc)
    return text.removeprefix(".")


def _below(node: yaml.Node | None, part: str | int) -> tuple[yaml.Node, yaml.Node] | None:
    """Key and value at `part`; an item of a list is its own key."""
    if isinstance(node, yaml.SequenceNode):
        known = isinstance(part, int) and 0 <= part < len(node.value)
        return (node.value[part], node.value[part]) if known else None
    if not isinstance(node, yaml.MappingNode):
        return None
    for key, value in node.value:
        if key.value == str(part) and key.tag != _MERGE:
            return key, value
    for key, value in node.value:
        merged = value.value if isinstance(value, yaml.SequenceNode) else [value]
        found = (_below(each, part) for each in merged if key.tag == _MERGE)
        if first := next((pair for pair in found if pair is not None), None):
            return first
    return None


def _may_be_deep(text: str) -> bool:
    """Whether nesting may exceed `_C_DEPTH`: a level takes a bracket or a column of its own.

    (Two levels a column, since a list may stand in the column of the key that it belongs to.)
    """
    longest = max((len(line) for line in text.splitlines()), default=0)
    return text.count("[") + text.count("{") + 2 * longest > _C_DEPTH


def _refuse_depth(text: str, source: str) -> None:
    """Count levels without recursion. A syntax error is left to the parser that comes after."""
    depth = 0
    try:
        for event in yaml.parse(text, Loader=_LOADER):
            if isinstance(event, yaml.CollectionStartEvent):
                depth += 1
            elif isinstance(event, yaml.CollectionEndEvent):
                depth -= 1
            if depth > MAX_DEPTH and event.start_mark:
                line = event.start_mark.line + 1
                raise ConfigError(f"{source}:{line}: nested more than {MAX_DEPTH} levels deep")
    except (yaml.YAMLError, ValueError):
        return


def _compose_slowly(text: str, source: str, refusal: Exception) -> yaml.Node | None:
    """What the C parser refuses again in Python, whose errors say more and where."""
    _refuse_depth(text, source)
    try:
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise ConfigError(_syntax_error(error, text, source)) from None
    except (ValueError, OverflowError):  # of chr(): "\UFFFFFFFF"
        raise ConfigError(_syntax_error(refusal, text, source)) from None


def _syntax_error(error: Exception, text: str, source: str) -> str:
    mark = getattr(error, "problem_mark", None)
    where, problem = source, getattr(error, "problem", None) or str(error)
    if isinstance(error, yaml.reader.ReaderError):
        where = f"{source}:{text.count(chr(10), 0, error.position) + 1}"
        problem = f"a character that YAML does not allow ({error.character!r}): {error.reason}"
    elif mark:
        where = f"{source}:{mark.line + 1}"
        if "\\t" in problem:
            problem += "; indent with spaces, YAML takes no tabs"
    return f"{where}: not valid YAML: {problem}"


class _Construction:
    """From nodes to values; counts the nodes."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._scalars = SafeConstructor()
        self._num_nodes = 0

    def value(self, node: yaml.Node, loc: Loc, parents: tuple[yaml.Node, ...]) -> Any:
        self._num_nodes += 1
        if self._num_nodes > MAX_NODES:
            self._refuse(node, loc, f"the document has more than {MAX_NODES:,} entries")
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, loc)
        if any(node is parent for parent in parents):
            self._refuse(node, loc, "an alias that contains itself")
        if len(parents) >= MAX_DEPTH:
            self._refuse(node, loc, f"nested more than {MAX_DEPTH} levels deep")
        if node.tag == f"{_TAG}seq":
            items = enumerate(node.value)
            return [self.value(item, (*loc, index), (*parents, node)) for index, item in items]
        if isinstance(node, yaml.MappingNode) and node.tag == f"{_TAG}map":
            return self._mapping(node, loc, (*parents, node))
        return self._refuse(node, loc, f"the tag {node.tag!r} is not understood")

    def _mapping(
        self, node: yaml.MappingNode, loc: Loc, parents: tuple[yaml.Node, ...]
    ) -> dict[str, Any]:
        own: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            key = self._key(key_node, loc)
            line = key_node.start_mark.line + 1
            if key in lines:
                why = f"the key stands twice (first on line {lines[key]})"
                self._refuse(key_node, (*loc, key), why)
            lines[key] = line
            value = self.value(value_node, (*loc, key), parents)
            if key_node.tag != _MERGE:
                own[key] = value
                continue
            for part in reversed(value if isinstance(value, list) else [value]):
                if not isinstance(part, dict):
                    self._refuse(value_node, (*loc, key), "expects a mapping, or a list of them")
                merged |= part
        return merged | own

    def _key(self, node: yaml.Node, loc: Loc) -> str:
        """As it is written: the key `on` is not the value true."""
        if not isinstance(node, yaml.ScalarNode):
            self._refuse(node, loc, "a key must be a single word")
        self._text(node, loc)
        return str(node.value)

    def _scalar(self, node: yaml.ScalarNode, loc: Loc) -> Any:
        self._text(node, loc)
        construct = _SCALARS.get(node.tag)
        if construct is None:
            self._refuse(node, loc, f"the tag {node.tag!r} is not understood")
        try:
            value = construct(self._scalars, node)
        # SafeConstructor's own checks do not cover explicit tags (`!!bool x` is a KeyError).
        except (ValueError, LookupError, AttributeError, OverflowError):
            kind = node.tag.removeprefix(_TAG)
            shown = node.value if len(node.value) <= 40 else f"{node.value[:40]}..."
            self._refuse(node, loc, f"{shown!r} is not a valid {kind}; in quotes it is text")
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            self._refuse(node, loc, "a number of more than 64 bits")
        return value

    def _text(self, node: yaml.ScalarNode, loc: Loc) -> None:
        try:
            node.value.encode()
        except UnicodeEncodeError:
            self._refuse(node, loc, "half of a surrogate pair is not text")

    def _refuse(self, node: yaml.Node, loc: Loc, why: str) -> NoReturn:
        where = f"{self._source}:{node.start_mark.line + 1}"
        raise ConfigError(f"{where}: {dotted(loc) or 'document'}: {why}")
