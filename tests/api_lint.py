"""Finds the names of TensorRT that a source uses, without running it.

What is followed: variables `trt` and `trtp` (also `self._trt`), arguments and attributes that the project always
names alike (`network`, `config`, ...), and whatever comes from them by attribute, call and assignment, as far as the
library's docstrings tell the types. A name counts as guarded if the function around it asks for it with `hasattr` or
with `getattr` and a default.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

Names = Mapping[str, Mapping[str, str]]
"""Class -> attribute -> class; see trt_names.py."""

MODULES = {"trt": "trt", "trtp": "plugin"}
"""What a variable of that name always is."""

ROOTS = {
    "network": "INetworkDefinition",
    "builder": "Builder",
    "config": "IBuilderConfig",
    "profile": "IOptimizationProfile",
    "runtime": "Runtime",
    "refitter": "Refitter",
    "inspector": "EngineInspector",
}
"""What an argument `NAME: Any` or an attribute `self._NAME` is."""

ANNOTATIONS = {"Tensor": "ITensor"}
"""What an argument with such an annotation is."""

BY_STRING = {"unary": (2, "ActivationType")}
"""Methods of the project that take an enumerator's name: which argument, of which class."""


@dataclass(frozen=True)
class Use:
    """A name in a source.

    Attributes:
        line: Where it stands.
        owner: The class that must have it.
        name: The attribute.
    """

    line: int
    owner: str
    name: str

    def __str__(self) -> str:
        return f"{self.owner}.{self.name}"


def uses(source: str, names: Names) -> list[Use]:
    """Every use of a library's name that is not guarded, in the order of the source."""
    found = _Walker(names)
    found.visit(ast.parse(source))
    return sorted(set(found.uses), key=lambda use: (use.line, str(use)))


def unknown(source: str, names: Names) -> list[Use]:
    """The uses whose name the library does not have."""
    return [use for use in uses(source, names) if use.name not in names.get(use.owner, {})]


class _Walker(ast.NodeVisitor):
    def __init__(self, names: Names) -> None:
        self.uses: list[Use] = []
        self._names = names
        self._variables: dict[str, str] = {
            **MODULES,
            **{f"self._{name}": owner for name, owner in (MODULES | ROOTS).items()},
        }
        self._guarded: frozenset[str] = frozenset()

    # --- scopes

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        """Twice, so that every method knows what the others assign to `self`."""
        before = dict(self._variables)
        for _ in range(2):
            self.generic_visit(node)
        self._variables = before

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        before, guarded = dict(self._variables), self._guarded
        self._guarded |= set(_asked_for(node))
        for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs):
            self._assign(ast.Name(argument.arg), _argument_owner(argument))
        self.generic_visit(node)
        of_self = {name: owner for name, owner in self._variables.items() if name.startswith("self.")}
        self._variables, self._guarded = {**before, **of_self}, guarded

    # --- assignments

    def visit_Assign(self, node: ast.Assign) -> None:
        owner = self._owner(node.value)
        for target in node.targets:
            self._assign(target, owner)
        self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self._assign(node.target, self._owner(node.value))
        self.generic_visit(node)

    def visit_NamedExpr(self, node: ast.NamedExpr) -> None:
        self._assign(node.target, self._owner(node.value))
        self.generic_visit(node)

    def visit_With(self, node: ast.With) -> None:
        for item in node.items:
            self._assign(item.optional_vars, self._owner(item.context_expr))
        self.generic_visit(node)

    def _assign(self, target: ast.expr | None, owner: str) -> None:
        if not isinstance(target, ast.Name | ast.Attribute):
            return
        name = ast.unparse(target)
        if name not in MODULES:
            self._variables.pop(name, None)
        if owner:
            self._variables[name] = owner

    # --- names

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self._use(node, self._owner(node.value), node.attr)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        match node:
            case ast.Call(func=ast.Name("getattr"), args=[owner, ast.Constant(str(name))]):
                self._use(node, self._owner(owner), name)
            case ast.Call(func=ast.Attribute(attr=method)) if method in BY_STRING:
                index, enumeration = BY_STRING[method]
                if index < len(node.args) and isinstance(node.args[index], ast.Constant):
                    self._use(node, enumeration, node.args[index].value)
        self.generic_visit(node)

    def _use(self, node: ast.expr, owner: str, name: str) -> None:
        if owner and name not in self._guarded:
            self.uses.append(Use(node.lineno, owner, name))

    def _owner(self, node: ast.expr | None) -> str:
        """The class whose names an expression has; empty if that is unknown."""
        if node is None:
            return ""
        variable = self._variables.get(ast.unparse(node))
        if variable is not None:
            return variable
        match node:
            case ast.Attribute():
                return self._names.get(self._owner(node.value), {}).get(node.attr, "")
            case ast.Call():
                return self._owner(node.func)
            case ast.IfExp():
                return self._owner(node.body) or self._owner(node.orelse)
            case ast.NamedExpr():
                return self._owner(node.value)
        return ""


def _argument_owner(argument: ast.arg) -> str:
    annotation = ast.unparse(argument.annotation) if argument.annotation else ""
    if annotation == "Any":
        return ROOTS.get(argument.arg, "")
    return ANNOTATIONS.get(annotation, "")


def _asked_for(function: ast.FunctionDef) -> Iterator[str]:
    """Names that a function looks for before it uses them."""
    for node in ast.walk(function):
        match node:
            case ast.Call(func=ast.Name("hasattr"), args=[_, ast.Constant(str(name))]):
                yield name
            case ast.Call(func=ast.Name("getattr"), args=[_, ast.Constant(str(name)), _]):
                yield name
