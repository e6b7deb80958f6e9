"""Prints every public name of a TensorRT library as JSON; see test_api_lint.py.

The result maps a class to its attributes, and each attribute to the class that it is, has or returns (empty where
unknown). The module itself is the class ``trt``, its plugin module ``plugin``; a nested class has a dotted name.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
import re
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

RETURNS = re.compile(r"-> (?:typing\.)?(?:Optional\[)?([\w.]+)")


def classes(owner: Any, prefix: str = "") -> Iterator[tuple[str, type]]:
    """All classes below a module or class, with their dotted names."""
    for name, value in vars(owner).items():
        if inspect.isclass(value) and not name.startswith("_"):
            yield prefix + name, value
            if value.__module__.startswith("tensorrt") and value is not owner:
                yield from classes(value, f"{prefix}{name}.")


def class_name(value: Any, known: dict[str, type]) -> str:
    """The dotted name of what `value` is, has or returns."""
    for name, kind in known.items():
        if value is kind or type(value) is kind:
            return name
    signature = inspect.getdoc(value.fget if isinstance(value, property) else value) or ""
    for returned in RETURNS.findall(signature):
        # the longest, for ILogger.Severity rather than a class Severity
        names = [name for name in known if f".{returned}".endswith(f".{name}")]
        if names:
            return max(names, key=len)
    return ""


def names(trt: ModuleType) -> dict[str, dict[str, str]]:
    """The table of a library."""
    known = dict(classes(trt))
    owners: dict[str, Any] = {"trt": trt, **known}
    with contextlib.suppress(ImportError):  # not all versions have it
        owners["plugin"] = importlib.import_module(f"{trt.__name__}.plugin")
    return {
        path: {name: class_name(inspect.getattr_static(owner, name, None), known) for name in dir(owner)}
        for path, owner in owners.items()
    }


if __name__ == "__main__":
    library = json.load(sys.stdin)
    print(json.dumps(names(importlib.import_module(library))))
