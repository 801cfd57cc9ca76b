"""Find and import the app that -A names.

Forms: `proj` (its `app`, or that of proj.app or proj.__main__), `proj.mod:attr`,
`path/file.py` and `path/file.py:attr`. A file is imported under the dotted name that its
folders give it, as `canonical_module` names the agents of a file that is run.
"""

import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import NoReturn

from streamd.errors import AppError, StreamdError
from streamd.log import is_user_frame, user_traceback

_ATTRIBUTE = "app"
_MAKES_APP = re.compile(r"^(\w+)\s*(?::[^=\n]+)?=\s*((?:\w+\.)?App\([^\n]*)", re.MULTILINE)
# A folder with more files than this is no project: it is not searched for a better name.
_MAX_FILES = 500

_importing = False


def is_importing() -> bool:
    """True while `find_app` imports: `app.main()` must then do nothing."""
    return _importing


def find_app(text: str, workdir: Path) -> tuple[object, str]:
    """Import the app that `text` names.

    Puts `workdir` (for a file outside of a package: its folder) first on sys.path. Runs the
    user's module, which may do anything.

    Returns:
        The App, and where it was found: "proj:app (proj/__init__.py)".

    Raises:
        AppError: There is none. `seen` says where it was looked for or holds the traceback,
            cut to frames of the user's.
        StreamdError: What streamd raised while the module ran, with its place in `seen`.
    """
    reference, _, attribute = text.partition(":")
    if reference == "__main__":
        reference = _main_path() or reference
    if not reference:
        raise AppError(
            f"cannot import app {text!r}: it names no module",
            remedy="-A proj, -A proj.mod:attr or -A path/file.py",
        )
    with _search_path(workdir):
        if reference.endswith(".py") or os.sep in reference:
            modules = iter([_import_file(text, reference, workdir)])
        else:
            modules = _import_modules(text, reference, workdir, only=bool(attribute))
        seen: list[ModuleType] = []
        for module in modules:
            seen.append(module)
            found = _get(module, attribute or _ATTRIBUTE)
            if is_app(found):
                return (
                    found,
                    f"{module.__name__}:{attribute or _ATTRIBUTE} ({_place(module, workdir)})",
                )
    _refuse_attribute(text, attribute or _ATTRIBUTE, seen, workdir)


def is_app(value: object) -> bool:
    """True if `value` is an App; by its mark, as importing the class would be a circle."""
    return not isinstance(value, type) and getattr(value, "__streamd_app__", False) is True


def canonical_module(module: str) -> str:
    """The name of a module in agents' names: its own, except for `__main__`.

    What is run as a file gets its dotted name from its folders: `examples.word_count` for
    `python examples/word_count.py` where examples is a package, else `word_count`. What is run
    by `python -m proj` is `proj.__main__`.
    """
    if module != "__main__":
        return module
    main = sys.modules.get("__main__")
    spec = getattr(main, "__spec__", None)
    if spec is not None:
        return str(spec.name)
    path = _main_path()
    return "__main__" if path is None else _dotted(Path(path))[0]


def reference_to(app: object) -> str:
    """What -A would have to say to find `app`, which some imported module holds.

    For a module that was run, its path: "…/simple.py:app".

    Raises:
        AppError: No module holds it in a global.
    """
    main = sys.modules.get("__main__")
    others = [module for name, module in list(sys.modules.items()) if name != "__main__"]
    for module in (main, *others):
        for name, value in list(getattr(module, "__dict__", {}).items()):
            if value is app:
                return f"{_module_reference(module)}:{name}"
    raise AppError(
        "the app is in no module's global, so that the processes cannot import it",
        remedy="app = streamd.App(...) at the top of a module",
    )


def _module_reference(module: ModuleType | None) -> str:
    name = module.__name__ if module else ""
    if name != "__main__":
        return name
    if getattr(module, "__spec__", None) is not None:
        return canonical_module("__main__")
    return _main_path() or name


def _main_path() -> str | None:
    file = getattr(sys.modules.get("__main__"), "__file__", None)
    return None if file is None else str(Path(file).absolute())


def _dotted(path: Path) -> tuple[str, Path]:
    """The dotted name of a file, and the folder that is above its packages."""
    parts = [] if path.stem == "__init__" else [path.stem]
    folder = path.absolute().parent
    while (folder / "__init__.py").exists() and folder.parent != folder:
        parts.insert(0, folder.name)
        folder = folder.parent
    return ".".join(parts), folder


@contextmanager
def _search_path(workdir: Path) -> Iterator[None]:
    global _importing
    _put_first(workdir)
    importlib.invalidate_caches()
    _importing = True
    try:
        yield
    finally:
        _importing = False


def _put_first(folder: Path) -> None:
    path = str(folder.absolute())
    if path not in sys.path:
        sys.path.insert(0, path)


def _import_file(text: str, reference: str, workdir: Path) -> ModuleType:
    path = (workdir / reference).absolute()
    if path.is_dir():
        path /= "__init__.py"
    if not path.is_file():
        raise _nothing_there(
            text, f"there is no file {_shown(path, workdir)}", [], workdir, Path(reference).stem
        )
    if path.suffix != ".py":
        raise AppError(
            f"cannot import app {text!r}: {_shown(path, workdir)} is no Python file",
            remedy="-A path/file.py, or -A with a module",
        )
    name, root = _dotted(path)
    _put_first(root)
    there = sys.modules.get(name)
    if there is not None and _is_at(there, path):
        return there
    if "." in name or path.name == "__init__.py":
        module = _import(text, name, workdir)
        if module is not None and _is_at(module, path):
            return module
    elif there is None:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        made = importlib.util.module_from_spec(spec)
        sys.modules[name] = made
        try:
            spec.loader.exec_module(made)
        except (Exception, SystemExit) as error:
            del sys.modules[name]
            _refuse_exception(text, error, workdir)
        return made
    other = getattr(sys.modules.get(name), "__file__", None) or "a built-in module"
    raise AppError(
        f"cannot import app {text!r}: the name {name!r} is taken by another module",
        seen=[f"it is {other}"],
        remedy=f"rename {_shown(path, workdir)}",
    )


def _is_at(module: ModuleType, path: Path) -> bool:
    file = getattr(module, "__file__", None)
    return file is not None and Path(file).resolve() == path.resolve()


def _import_modules(
    text: str, reference: str, workdir: Path, *, only: bool
) -> Iterator[ModuleType]:
    """The module itself, then those where a package's app is usual; imported as asked for."""
    # A name that begins with a dot is relative, and there is nothing here that it could be to.
    first = None if reference.startswith(".") else _import(text, reference, workdir)
    if first is None:
        raise _nothing_there(
            text,
            f"no module named {reference!r}",
            [f"looked in {workdir.absolute()} and {len(sys.path) - 1} folders of sys.path"],
            workdir,
            reference,
        )
    yield first
    if only or not hasattr(first, "__path__"):
        return
    for name in (f"{reference}.app", f"{reference}.__main__"):
        if importlib.util.find_spec(name) is not None:
            module = _import(text, name, workdir)
            if module is not None:
                yield module


def _import(text: str, name: str, workdir: Path) -> ModuleType | None:
    """Import a module; None if there is no such module."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if (name == missing or name.startswith(f"{missing}.")) and not _user_place(
            error, workdir
        ):
            return None
        _refuse_exception(text, error, workdir)
    except (Exception, SystemExit) as error:
        _refuse_exception(text, error, workdir)


def _refuse_exception(text: str, error: BaseException, workdir: Path) -> NoReturn:
    place = _user_place(error, workdir)
    if isinstance(error, StreamdError):
        if place:
            error.seen.append(f"at {place}")
        raise error
    if isinstance(error, SystemExit):
        raise AppError(
            f"cannot import app {text!r}: it ended the process by sys.exit({error.code!r})",
            seen=user_traceback(error).splitlines(),
            remedy='put what runs the app under `if __name__ == "__main__":`',
        ) from error
    what = f"{type(error).__name__}: {error}".partition("\n")[0]
    raise AppError(
        f"cannot import app {text!r}: {what}{f' ({place})' if place else ''}",
        seen=user_traceback(error).splitlines(),
    ) from error


def _user_place(error: BaseException, workdir: Path) -> str | None:
    """File and line of the innermost frame of the user's, if possible of one in `workdir`."""
    place = near = None
    at = error.__traceback__
    while at is not None:
        file = at.tb_frame.f_code.co_filename
        if is_user_frame(file):
            place = f"{_shown(Path(file), workdir)}:{at.tb_lineno}"
            near = near if _shown(Path(file), workdir) == file else place
        at = at.tb_next
    return near or place


def _get(module: ModuleType, attribute: str) -> object:
    value: object = module
    for part in attribute.split("."):
        value = getattr(value, part, None)
    return value


def _refuse_attribute(
    text: str, attribute: str, modules: list[ModuleType], workdir: Path
) -> NoReturn:
    module = modules[0]
    value = _get(module, attribute)
    if value is None or isinstance(value, ModuleType):
        message = f"cannot import app {text!r}: {module.__name__} has no {attribute!r}"
    else:
        message = (
            f"cannot import app {text!r}: {attribute!r} of {module.__name__} is "
            f"{_article(type(value).__name__)}, not an App"
        )
    found = [
        f"{holder.__name__}:{name}"
        for holder in modules
        for name, other in vars(holder).items()
        if is_app(other)
    ]
    names = ", ".join(_place(holder, workdir) for holder in modules)
    seen = [f"looked in {names}"]
    if found:
        raise AppError(
            message, seen=[*seen, f"there are: {', '.join(found)}"], remedy=f"-A {found[0]}"
        )
    others = _candidates(workdir)
    seen += [f"{name} ({where})" for name, where in others.items()][:5]
    package = module.__name__.partition(".")[0]
    near = [name for name in others if re.split(r"[.:]", name)[0] == package] or list(others)
    remedy = 'app = streamd.App("name") in a module'
    if near:
        remedy = f"-A {near[0]}" if len(near) == 1 else "-A with one of these"
    raise AppError(message, seen=seen, remedy=remedy)


def _article(word: str) -> str:
    return f"{'an' if word[0].lower() in 'aeiou' else 'a'} {word}"


def _nothing_there(text: str, what: str, seen: list[str], workdir: Path, name: str) -> AppError:
    others = _candidates(workdir)
    modules = {other.partition(":")[0]: other for other in others}
    package, _, last = name.rpartition(".")
    close = get_close_matches(name, modules, 1) or get_close_matches(last, modules, 1)
    if package in modules and not close:
        close = [package]
    best = modules[close[0]] if close else next(iter(others)) if len(others) == 1 else None
    if best is None:
        return AppError(f"cannot import app {text!r}: {what}", seen=seen)
    return AppError(
        f"cannot import app {text!r}: {what}",
        seen=[*seen, f"did you mean {best!r}? ({others[best]})"],
        remedy=f"-A {best}",
    )


def _candidates(workdir: Path) -> dict[str, str]:
    """What -A could say for files near `workdir` that make an App, and where they do."""
    found: dict[str, str] = {}
    patterns = ("*.py", "*/__init__.py", "*/app.py", "*/__main__.py", "*/*.py")
    files: Iterable[Path] = dict.fromkeys(
        path for pattern in patterns for path in sorted(workdir.glob(pattern))
    )
    for path in list(files)[:_MAX_FILES]:
        try:
            made = _MAKES_APP.search(path.read_text(errors="replace"))
        except OSError:
            continue
        if made is None:
            continue
        name = _dotted(path)[0]
        if path.parent != workdir and not (path.parent / "__init__.py").exists():
            name = str(path.relative_to(workdir))
        # What a package's own name finds needs no more than that.
        short = re.sub(r"\.(app|__main__)$", "", name)
        said = short if made[1] == _ATTRIBUTE else f"{name}:{made[1]}"
        found.setdefault(said, f"{_shown(path, workdir)} has {made[1]} = {made[2].strip()}")
    return found


def _place(module: ModuleType, workdir: Path) -> str:
    file = getattr(module, "__file__", None)
    return module.__name__ if file is None else _shown(Path(file), workdir)


def _shown(path: Path, workdir: Path) -> str:
    try:
        return str(path.relative_to(workdir.absolute()))
    except ValueError:
        return str(path)
