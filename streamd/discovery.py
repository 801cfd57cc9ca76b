"""`autodiscover`: importing the modules in which an app's agents, pages and commands stand.

Modules are imported in the order of their names, once each; `__main__` and tests are left out.
"""

import importlib
import pkgutil
from collections.abc import Iterable
from typing import Any

from streamd.errors import AppError


def discover(wanted: Any, origin: str) -> None:
    """Import what the setting `autodiscover` says.

    Args:
        wanted: False; True: the package `origin` with all below it; or names of modules and
            packages; or a function that returns either.

    Raises:
        AppError: It is none of these, or a module does not exist. What a module raises while
            it is imported passes through.
    """
    if callable(wanted):
        wanted = wanted()
    if wanted is True:
        wanted = [origin]
    elif isinstance(wanted, str):
        wanted = [wanted]
    elif not wanted:
        return
    if not isinstance(wanted, Iterable) or not all(isinstance(name, str) for name in wanted):
        raise AppError(
            f"autodiscover is {wanted!r}: expected true, or a list of modules and packages",
            remedy='App(autodiscover=["proj.users", "proj.orders"])',
        )
    for name in wanted:
        _import_all(name)


def _import_all(name: str) -> None:
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # it is there, and what it imports is not
        raise AppError(
            f"autodiscover names {name!r}, and there is no module {error.name!r}",
            remedy="correct autodiscover or app_origin in App(...)",
        ) from error
    for info in pkgutil.iter_modules(getattr(module, "__path__", ())):
        if info.name != "__main__" and not info.name.startswith("test"):
            _import_all(f"{name}.{info.name}")
