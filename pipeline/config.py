"""A YAML file and `--set` overrides in, one validated experiment configuration out.

All faults of a file are reported together, each with its dotted path. Keys are strict: what the
schema does not know is an error, not a comment.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from data_prep.errors import UserError

ConfigT = TypeVar("ConfigT", bound=BaseModel)


class Strict(BaseModel):
    """Base of every configuration section: immutable, and no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class _StrictLoader(yaml.SafeLoader):
    """Refuses a key given twice, which plain YAML silently resolves to the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Return the mapping in a YAML file.

    Raises:
        UserError: the file is missing, is not YAML, repeats a key, or holds no mapping.
    """
    path = Path(path)
    try:
        content = yaml.load(path.read_text(), Loader=_StrictLoader)  # a SafeLoader
    except OSError as error:
        raise UserError(
            f"cannot read the configuration: {error.strerror}",
            where=str(path),
            todo="check the path; shipped configurations are in configs/",
        ) from error
    except UnicodeDecodeError as error:
        raise UserError("not a text file", where=str(path), todo="give a YAML file") from error
    except yaml.YAMLError as error:
        raise UserError(f"not valid YAML: {error}", where=str(path)) from error
    if not isinstance(content, dict):
        raise UserError("the top level must be a mapping of keys to values", where=str(path))
    return content


def apply_overrides(content: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Return a copy of `content` with `a.b=value` overrides applied; values are read as YAML.

    Raises:
        UserError: an override has no `=`, is not valid YAML, or descends into a plain value.
    """
    result = dict(content)
    for override in overrides:
        path, equals, text = override.partition("=")
        if not equals or not path.strip():
            raise UserError(
                f"--set {override!r} is not of the form a.b=value",
                todo="e.g. --set train.steps=100",
            )
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UserError(f"--set {path}: the value is not valid YAML: {error}") from error
        _set_path(result, path.strip().split("."), value, override)
    return result


def _set_path(tree: dict[str, Any], keys: Sequence[str], value: Any, override: str) -> None:
    """Assign in place, copying each mapping on the way: the caller's tree stays as it was."""
    for key in keys[:-1]:
        child = tree.get(key)
        if child is not None and not isinstance(child, dict):
            raise UserError(f"--set {override}: {key!r} holds a value, not a section")
        tree[key] = dict(child or {})
        tree = tree[key]
    tree[keys[-1]] = value


def validate(
    schema: type[ConfigT], content: Mapping[str, Any], where: str, tags: Sequence[str] = ()
) -> ConfigT:
    """Return `content` as an instance of `schema`.

    Args:
        schema: The root of the configuration.
        content: What the YAML file holds.
        where: The file, for messages.
        tags: Discriminators of unions, which pydantic puts into paths and users never wrote.

    Raises:
        UserError: with every fault of the content, one per line.
    """
    try:
        return schema.model_validate(content)
    except ValidationError as error:
        lines = list(dict.fromkeys(_describe(fault, schema, tags) for fault in _roots(error)))
        count = "one fault" if len(lines) == 1 else f"{len(lines)} faults"
        raise UserError(
            f"{count} in the configuration\n" + "\n".join(f"    {line}" for line in lines),
            where=where,
            todo="mend the keys above; nothing was run",
        ) from None


def _roots(error: ValidationError) -> list[Any]:
    """Leave out the echoes of a fault in `train` in the arms that inherit that section."""
    faults = error.errors()
    shared = {fault["loc"][1:] for fault in faults if fault["loc"][:1] == ("train",)}
    return [
        fault
        for fault in faults
        if fault["loc"][:1] != ("arms",)
        or "train" not in fault["loc"]
        or fault["loc"][fault["loc"].index("train") + 1 :] not in shared
    ]


def _describe(fault: Any, schema: type[BaseModel], tags: Sequence[str]) -> str:
    path = ".".join(str(part) for part in fault["loc"] if part not in tags) or "(top level)"
    if fault["type"] == "extra_forbidden":
        message = "unknown key"
        near = difflib.get_close_matches(str(fault["loc"][-1]), _known_keys(schema), n=1)
        if near:
            message += f"; did you mean {near[0]!r}?"
        return f"{path}: {message}"
    message = fault["msg"].removeprefix("Value error, ")
    given = fault.get("input")
    if isinstance(given, (str, int, float, bool)) or given is None:
        return f"{path}: {message} (given: {given!r})"
    return f"{path}: {message}"


def _known_keys(schema: type[BaseModel]) -> list[str]:
    """Return the keys of every section of a schema: a near miss is usually in another section."""
    keys: set[str] = set()
    todo: list[Any] = [schema]
    seen: set[Any] = set()
    while todo:
        item = todo.pop()
        if item in seen:
            continue
        seen.add(item)
        if isinstance(item, type) and issubclass(item, BaseModel):
            keys.update(item.model_fields)
            todo.extend(field.annotation for field in item.model_fields.values())
        else:
            todo.extend(getattr(item, "__args__", ()))
    return sorted(keys)
