"""What a user's function uses: tables it names and writes, agents it sends to, globals.

Worked out from the function's code, globals and closure, and those of the app's own functions
and classes that it calls. Nothing is run. A table that is reached another way (through a dict,
or an attribute of an object) is not seen; `group=` says what cannot be seen.
"""

import ast
import dis
import inspect
import sys
import textwrap
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from streamd.agents import Agent
from streamd.tables import Table
from streamd.topics import Topic

MUTABLE = (list, dict, set, bytearray)
WRITING_METHODS = {
    "update", "pop", "popitem", "setdefault", "clear",
    "__setitem__", "__delitem__", "__ior__",
}  # fmt: skip


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
        for name, value, module in _named(fun):
            if isinstance(value, Table):
                uses.tables[value.name] = value
                if name in written:
                    uses.written.add(value.name)
            elif isinstance(value, Agent):
                uses.agents[value.name] = value
            elif isinstance(value, Topic):
                uses.topics[value.name] = value
            elif isinstance(value, MUTABLE):
                if module.partition(".")[0] == package:
                    uses.shared[id(value)] = f"{module}.{name}"
            elif _is_of(value, package):
                stack.extend(_functions(value))
    return uses


def _functions(target: Any) -> Iterator[types.FunctionType]:
    if isinstance(target, type):
        # Those of a base of another package name nothing of the app's.
        for kind in target.__mro__:
            for member in vars(kind).values():
                for name in ("__func__", "fget", "fset", "fdel", "func"):
                    yield from _wrapped(getattr(member, name, None))
                yield from _wrapped(member)
    else:
        yield from _wrapped(getattr(target, "__func__", target))


def _wrapped(target: Any) -> Iterator[types.FunctionType]:
    """A function, and those that it wraps."""
    while isinstance(target, types.FunctionType):
        yield target
        target = getattr(target, "__wrapped__", None)


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


def _named(fun: types.FunctionType) -> Iterator[tuple[str, Any, str]]:
    """(name, value, module) of each global, closure variable, attribute of a module or class,
    import and default that is named."""
    here = fun.__module__
    yield from ((name, value, here) for name, value in _defaults(fun))
    enclosed = dict(_closure(fun))
    for code in _codes(fun.__code__):
        owner: Any = None  # what was loaded last: the next attribute is of it
        for step in dis.get_instructions(code):
            name, module = step.argval, here
            if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
                owner = fun.__globals__.get(name)
            elif "DEREF" in step.opname and step.opname.startswith("LOAD"):
                owner = enclosed.get(name)
            elif step.opname in ("LOAD_ATTR", "LOAD_METHOD"):
                module = getattr(owner, "__name__", "")
                owner = _attribute(owner, name)
            elif step.opname == "IMPORT_NAME":
                owner = sys.modules.get(name)
                continue
            elif step.opname == "IMPORT_FROM":
                module = getattr(owner, "__name__", "")
                yield name, _attribute(owner, name), module
                continue
            else:
                owner = None
            if owner is not None:
                yield name, owner, module


def _attribute(owner: Any, name: str) -> Any:
    # Of what else has attributes, reading one may run code.
    return vars(owner).get(name) if isinstance(owner, types.ModuleType | type) else None


def _closure(fun: types.FunctionType) -> Iterator[tuple[str, Any]]:
    for name, cell in zip(fun.__code__.co_freevars, fun.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:  # a variable that is not set yet
            continue


def _defaults(fun: types.FunctionType) -> Iterator[tuple[str, Any]]:
    code, defaults = fun.__code__, fun.__defaults__ or ()
    yield from zip(code.co_varnames[code.co_argcount - len(defaults) :], defaults, strict=False)
    yield from (fun.__kwdefaults__ or {}).items()


def _written_names(fun: types.FunctionType) -> set[str]:
    """Names `t` for which the source has `t[...] = `, `del t[...]`, `t.update(...)`, `t |= `,
    or one of these for what was assigned from `t`."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(fun.__code__)))
    except (OSError, TypeError, SyntaxError, IndentationError):
        return set()  # no source to read: a write is found when it happens
    written: set[str] = set()
    aliases: list[tuple[str, str]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            aliases += [(_last_name(to), _last_name(node.value)) for to in node.targets]
        if isinstance(node, ast.AugAssign) and isinstance(node.op, ast.BitOr):
            written.add(_last_name(node.target))
        elif isinstance(node, ast.Subscript) and isinstance(node.ctx, (ast.Store, ast.Del)):
            written.add(_last_name(node.value))
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr in WRITING_METHODS
        ):
            written.add(_last_name(node.func.value))
    written |= {origin for alias, origin in aliases if alias in written}
    return written - {""}


def _last_name(node: ast.expr) -> str:
    if isinstance(node, ast.Name):
        return node.id
    return node.attr if isinstance(node, ast.Attribute) else ""
