"""YAML that others may have written: plain values alone, and bounded in size, depth and what its aliases make of it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

#: Bytes of a file, levels that lists and mappings lie in each other, and values once every alias stands for what it names.
MOST_BYTES, DEEPEST, MOST_VALUES = 64 * 1024, 20, 10_000
_MERGE = "tag:yaml.org,2002:merge"


class YamlError(ValueError):
    """The text is not YAML, or more than a recipe needs. The message is one line, without the file."""


class PlainLoader(yaml.SafeLoader):
    """Makes no objects of Python's, and says where a value is that its tag does not fit."""

    def construct_object(self, node, deep=False):
        try:
            return super().construct_object(node, deep)
        except yaml.YAMLError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
            kind = node.tag.rpartition(":")[2]
            what = f"{_short(node.value)} is no {kind}" if isinstance(node, yaml.ScalarNode) else f"no {kind}: {error}"
            raise yaml.constructor.ConstructorError(None, None, what, node.start_mark) from error


def read_yaml(file: Path) -> Any:
    """The plain value in a file. Merge keys (`<<: *name`) work; a key that is given twice is refused.

    Raises:
        YamlError: it is not YAML, or too large, too deep, or refers to itself.
        OSError: it cannot be read.
    """
    with file.open("rb") as stream:
        content = stream.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise YamlError(f"has more than {MOST_BYTES:,} bytes; a recipe is some lines of 'option: value'")
    try:
        return _value(content.decode("utf-8"))
    except yaml.MarkedYAMLError as error:
        where = "" if error.problem_mark is None else f" (line {error.problem_mark.line + 1})"
        raise YamlError(f"is not YAML: {error.problem or error.context}{where}") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise YamlError(f"is not YAML: {' '.join(str(error).split())}") from error


def _value(text: str) -> Any:
    depth = 0
    # Token by token, before anything that calls itself for every level.
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise YamlError(f"nests lists or mappings more than {DEEPEST} deep (line {event.start_mark.line + 1})")
    loader = PlainLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if _values_of(node, {}) > MOST_VALUES:
            raise YamlError(f"holds more than {MOST_VALUES:,} values, with each alias (*name) written out")
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _values_of(node: yaml.Node, known: dict[int, int | None]) -> int:
    """How many values `node` holds, with aliases written out; refuses keys that are given twice on the way."""
    if id(node) in known:
        count = known[id(node)]
        if count is None:
            raise YamlError(f"holds an alias of what it stands in (line {node.start_mark.line + 1})")
        return count
    known[id(node)] = None
    if isinstance(node, yaml.MappingNode):
        _refuse_twins(node)
    # Each is counted once, however often it is named, so that this takes no longer than the text is long.
    count = 1 + sum(_values_of(inner, known) for inner in _inner(node))
    known[id(node)] = count
    return count


def _inner(node: yaml.Node) -> Iterator[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        for pair in node.value:
            yield from pair
    elif isinstance(node, yaml.SequenceNode):
        yield from node.value


def _refuse_twins(node: yaml.MappingNode) -> None:
    seen = set()
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode) or key.tag == _MERGE:
            continue
        # Plain YAML would silently take the last.
        if (key.tag, key.value) in seen:
            raise YamlError(f"is not YAML: the key {_short(key.value)} is given twice (line {key.start_mark.line + 1})")
        seen.add((key.tag, key.value))


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:30]}…")
