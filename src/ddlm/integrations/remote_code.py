"""Code that travels with an exported model: cut out of the package's own sources, never written a second time.

`transformers` runs a model it does not know from Python files inside the model's folder
(``trust_remote_code=True``). Those files are made here from the real sources: start at the file that defines the
`transformers` classes, follow its imports of ``ddlm`` modules, keep the top-level statements that are reached and
turn ``from ddlm.network.layers import Rotary`` into ``from .ddlm_layers import Rotary``. Everything kept is verbatim.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ddlm import __version__

ENTRY = "ddlm.integrations.transformers"
ENTRY_FILE = "modeling_ddlm.py"
_LINE = 100


def remote_code() -> dict[str, str]:
    """Files that let an exported folder load without ddlm: file name -> source text.

    Raises:
        ValueError: when a source holds a statement the cut cannot handle (a developer's mistake, caught by the tests).
    """
    modules = {ENTRY: _Module.read(ENTRY)}
    modules[ENTRY].need_all()
    changed = True
    while changed:  # names needed of one module can reach further names of another
        changed = False
        for module in list(modules.values()):
            for name, wanted in module.requests():
                if name not in modules:
                    modules[name] = _Module.read(name)
                changed |= modules[name].need(wanted)
    files = {_file_name(name): module.render() for name, module in modules.items()}
    files[ENTRY_FILE] += _further_imports(modules)
    if len(files) != len(modules):
        raise ValueError(f"two modules want one file name: {', '.join(modules)}")
    return files


def _further_imports(modules: dict[str, _Module]) -> str:
    """Imports of the files that the entry reaches through others: transformers 4 copies only what it names itself."""
    named = {name for name, _ in modules[ENTRY].requests()}
    lines = []
    for name, module in modules.items():
        if name != ENTRY and name not in named:
            source = _file_name(name).removesuffix(".py")
            lines.append(f"from .{source} import {module.first_defined()}  # noqa: F401\n")
    return "\n\n# so that every version of transformers copies these files, too\n" + "".join(lines)


def _file_name(module: str) -> str:
    return ENTRY_FILE if module == ENTRY else f"ddlm_{module.rsplit('.', 1)[-1]}.py"


@dataclass
class _Statement:
    """A top-level statement, its text with the comments above it, what it binds and what it refers to."""

    node: ast.stmt
    text: str
    binds: set[str]
    refers: set[str]


@dataclass
class _Module:
    name: str
    statements: list[_Statement]
    needed: set[str] = field(default_factory=set)

    @classmethod
    def read(cls, name: str) -> _Module:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise ValueError(f"no source of {name} to export")
        return cls.parse(name, Path(spec.origin).read_text(encoding="utf-8"))

    @classmethod
    def parse(cls, name: str, source: str) -> _Module:
        lines = source.splitlines(keepends=True)
        statements = []
        start = 0
        for node in ast.parse(source).body:
            end = node.end_lineno or node.lineno
            text = "".join(lines[start:end])
            start = end
            if not _is_docstring(node) and not _is_type_checking(node):
                statements.append(
                    _Statement(node, text, set(_bound(name, node)), set(_names(node)))
                )
        return cls(name, statements)

    def need_all(self) -> None:
        """Keep everything that is not an import; imports are kept where something refers to them."""
        for s in self.statements:
            if not isinstance(s.node, ast.Import | ast.ImportFrom):
                self.need(s.binds)

    def need(self, names: set[str]) -> bool:
        """Keep ``names`` and all they refer to in this module; True when that is more than before."""
        before = len(self.needed)
        defined = {b for s in self.statements for b in s.binds}
        if missing := names - defined:
            raise ValueError(f"{self.name} does not define {', '.join(sorted(missing))}")
        open_names = names - self.needed
        while open_names:
            self.needed |= open_names
            reached = {r for s in self.statements if s.binds & open_names for r in s.refers}
            open_names = (reached & defined) - self.needed
        return len(self.needed) > before

    def requests(self) -> Iterator[tuple[str, set[str]]]:
        """Other modules of the package and the names needed of them."""
        for s in self.statements:
            if isinstance(s.node, ast.ImportFrom) and _is_ours(s.node.module):
                wanted = {a.name for a in s.node.names if (a.asname or a.name) in self.needed}
                if wanted:
                    assert s.node.module is not None
                    yield s.node.module, wanted

    def first_defined(self) -> str:
        """Name of the first kept statement that is no import."""
        return next(
            name
            for s in self.statements
            if not isinstance(s.node, ast.Import | ast.ImportFrom)
            for name in sorted(s.binds & self.needed)
        )

    def render(self) -> str:
        """Source text of the kept statements."""
        parts = [
            f"# Cut out of {self.name} of ddlm {__version__} (Apache-2.0) when this model was exported.\n"
            "# Change the package, not this file.\n",
            "from __future__ import annotations\n\n",
        ]
        for s in self.statements:
            if isinstance(s.node, ast.Import | ast.ImportFrom):
                parts.append(self._render_import(s.node))
            elif s.binds & self.needed:
                if _imports_ours(s.node):
                    where = f"{self.name}:{s.node.lineno}"
                    raise ValueError(
                        f"{where}: an import of ddlm inside a function cannot be exported"
                    )
                parts.append(s.text if s.text.startswith("\n") else "\n" + s.text)
        return "".join(parts)

    def _render_import(self, node: ast.Import | ast.ImportFrom) -> str:
        kept = [a for a in node.names if (a.asname or a.name.split(".")[0]) in self.needed]
        if not kept:
            return ""
        names = [a.name + (f" as {a.asname}" if a.asname else "") for a in kept]
        if isinstance(node, ast.Import):
            return "".join(f"import {name}\n" for name in names)
        assert node.module is not None
        if _is_ours(node.module):
            source = "." + _file_name(node.module).removesuffix(".py")
        else:
            source = node.module
        line = f"from {source} import {', '.join(names)}\n"
        if len(line) <= _LINE:
            return line
        return f"from {source} import (\n" + "".join(f"    {n},\n" for n in names) + ")\n"


def _bound(module: str, node: ast.stmt) -> Iterator[str]:
    """Names a top-level statement binds."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield node.name
    elif isinstance(node, ast.Assign):
        yield from (
            n.id for target in node.targets for n in ast.walk(target) if isinstance(n, ast.Name)
        )
    elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        yield node.target.id
    elif isinstance(node, ast.Import):
        if any(_is_ours(a.name) for a in node.names):
            raise ValueError(
                f"{module}:{node.lineno}: write 'from ddlm... import name' to be exportable"
            )
        yield from (a.asname or a.name.split(".")[0] for a in node.names)
    elif isinstance(node, ast.ImportFrom):
        if node.level:
            raise ValueError(f"{module}:{node.lineno}: relative imports cannot be exported")
        if node.module != "__future__":
            yield from (a.asname or a.name for a in node.names)
    elif not (_is_docstring(node) or _is_type_checking(node)):
        raise ValueError(
            f"{module}:{node.lineno}: a top-level {type(node).__name__} cannot be exported"
        )


def _names(node: ast.stmt) -> Iterator[str]:
    yield from (n.id for n in ast.walk(node) if isinstance(n, ast.Name))


def _is_ours(module: str | None) -> bool:
    return module is not None and (module == "ddlm" or module.startswith("ddlm."))


def _is_docstring(node: ast.stmt) -> bool:
    """A bare string: the module's docstring, or the help text under a constant."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _is_type_checking(node: ast.stmt) -> bool:
    return (
        isinstance(node, ast.If)
        and isinstance(node.test, ast.Name)
        and node.test.id == "TYPE_CHECKING"
    )


def _imports_ours(node: ast.stmt) -> bool:
    """Whether a function of this statement imports from ddlm when it runs; such an import cannot be followed."""
    inner = [n for n in ast.walk(node) if n is not node]
    return any(
        (isinstance(n, ast.ImportFrom) and _is_ours(n.module))
        or (isinstance(n, ast.Import) and any(_is_ours(a.name) for a in n.names))
        for n in inner
    )
