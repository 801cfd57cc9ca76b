"""What a user's function uses: tables it names and writes, agents it sends to, globals.

Worked out from the function's code, globals and closure, and those of the app's own functions
and classes that it calls. Nothing is run. A table that is reached another way (through a dict,
or an attribute of an object) is not seen; `group=` says what cannot be seen.
"""

import ast
import inspect
import textwrap
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from streamd.agents import Agent
from streamd.tables import Table
from streamd.topics import Topic

MUTABLE = (list, dict, set, bytearray)
WRITING_METHODS = {"update", "pop", "popitem", "setdefault", "clear"}


@dataclass
class Uses:
    """What one function uses, directly or through functions of the app."""

    tables: dict[str, Table] = field(default_factory=dict)  # by table name, as met
    written: set[str] = field(default_factory=set)  # tables it assigns to
    agents: dict[str, Agent] = field(default_factory=dict)  # agents it names
    topics: dict[str, Topic] = field(default_factory=dict)
    shared: dict[int, str] = field(default_factory=dict)  # id of a mutable global -> its name


def uses_of(target: Any, package: str) -> Uses:
    """What a function, or every method of a class, uses.

    Args:
        package: The first part of the app's module name; other code is not followed.
    """
    uses = Uses()
    seen: set[int] = set()
    stack = list(_functions(target))
    while stack:
        fun = stack.pop()
        if id(fun) in seen:
            continue
        seen.add(id(fun))
        written = _written_names(fun)
        for name, value in _named(fun):
            if isinstance(value, Table):
                uses.tables[value.name] = value
                if name in written:
                    uses.written.add(value.name)
            elif isinstance(value, Agent):
                uses.agents[value.name] = value
            elif isinstance(value, Topic):
                uses.topics[value.name] = value
            elif isinstance(value, MUTABLE):
                uses.shared[id(value)] = f"{fun.__module__}.{name}"
            elif _is_of(value, package):
                stack.extend(_functions(value))
    return uses


def _functions(target: Any) -> Iterator[types.FunctionType]:
    target = inspect.unwrap(target) if callable(target) else target
    if isinstance(target, types.MethodType):
        target = target.__func__
    if isinstance(target, types.FunctionType):
        yield target
    elif isinstance(target, type):
        for member in vars(target).values():
            member = getattr(member, "__func__", member)
            if isinstance(member, types.FunctionType):
                yield member


def _is_of(value: Any, package: str) -> bool:
    if not isinstance(value, (types.FunctionType, types.MethodType, type)):
        return False
    module = getattr(value, "__module__", None) or ""
    return module.partition(".")[0] == package


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _named(fun: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """(name, value) of each global, closure variable and module attribute that is named."""
    names = {name for code in _codes(fun.__code__) for name in code.co_names}
    for name in sorted(names):
        value = fun.__globals__.get(name)
        if isinstance(value, types.ModuleType):
            for attribute in sorted(names & set(vars(value))):
                yield attribute, vars(value)[attribute]
        elif value is not None:
            yield name, value
    for name, cell in zip(fun.__code__.co_freevars, fun.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:  # a variable that is not set yet
            continue
    for default in fun.__defaults__ or ():
        yield "", default


def _written_names(fun: Callable[..., Any]) -> set[str]:
    """Names `t` for which the source has `t[...] = `, `del t[...]` or `t.update(...)`."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(fun)))
    except (OSError, TypeError, SyntaxError, IndentationError):
        return set()  # no source to read: a write is found when it happens
    written: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, (ast.Store, ast.Del)):
            written.add(_last_name(node.value))
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr in WRITING_METHODS
        ):
            written.add(_last_name(node.func.value))
    return written


def _last_name(node: ast.expr) -> str:
    if isinstance(node, ast.Name):
        return node.id
    return node.attr if isinstance(node, ast.Attribute) else ""
