"""A YAML file of flags. A bare file name is looked up in the working folder, then among the shipped configs."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from jaxserve.core.errors import ConfigError
from jaxserve.flags.build import default
from jaxserve.flags.names import find

# Beside the package in a checkout, inside it in a wheel.
SHIPPED = (Path(__file__).parents[1] / "configs", Path(__file__).parents[2] / "configs")


def read_config(name: str) -> dict[str, Any]:
    """Raw values by flag name. Keys are long flag names, dashes or underscores. Raises ConfigError."""
    import yaml  # here: --help and flag errors need none of it

    path = locate(name)
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), strict_loader())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"config {name!r} cannot be read as YAML: {error}") from error
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise ConfigError(f"config {name!r} must be a table of flags, like 'port: 8000'")
    values: dict[str, Any] = {}
    for key, value in content.items():
        flag, is_off = find(str(key), where="key")
        if flag.name in values:
            raise ConfigError(f"config {name!r} has {flag.name!r} twice")
        if is_off:
            if not isinstance(value, bool):
                raise ConfigError(f"{key} must be true or false, got {value!r}")
            value = not value
        if value is None and default(flag.name) is not None:
            raise ConfigError(f"{key} has no value in config {name!r}; leave the line away for the default")
        if value is not None:
            values[flag.name] = value
    return values


def strict_loader() -> type:
    """YAML's safe loader, except that a key given twice is an error instead of its last value."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            twice = next((key for i, key in enumerate(keys) if key in keys[:i]), None)
            if twice is not None:
                problem = f"the key {twice!r} is given twice"
                raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
            return super().construct_mapping(node, deep)

    return Loader


def locate(name: str) -> Path:
    """The file that `name` means. Raises ConfigError with where it was looked for."""
    path = Path(name).expanduser()
    if path.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"config {name!r} must be a .yaml file")
    places = [path] if path.name != name else [path, *(folder / name for folder in SHIPPED)]
    for place in places:
        if place.is_file():
            return place
    shipped = sorted({entry.name for folder in SHIPPED for entry in folder.glob("*.yaml")})
    near = difflib.get_close_matches(name, shipped, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ConfigError(
        f"there is no config {name!r}, neither here nor among the shipped ones ({', '.join(shipped)}){hint}"
    )
