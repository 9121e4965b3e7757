"""Who may import whom. Read from the import lines, so a wrong arrow fails here and not in a review."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGE = REPOSITORY / "python" / "octavo"

# Folder or file of the package -> parts of the package that it may import.
LEAVES = {
    "_core", "answers", "chat", "config", "errors", "options", "outputs", "pooling", "quantizations", "sampling_params",
    "speculation", "structured_outputs",
}  # fmt: skip
ALLOWED = {
    "kernels": {"kernels"},
    # The CPU's own ops are the extension's: layers choose between them and `kernels`, which know nothing of Octavo.
    "layers": {"layers", "kernels", "model_config", "_core"},
    "models": {"models", "layers", "kernels", "model_config"},
    "weights": {"weights", "models", "layers", "model_config"} | LEAVES,
    "engine": {"engine", "models", "layers", "kernels", "weights", "model_config", "texts", "vllm_flags"} | LEAVES,
    "quantize": {"quantize", "engine", "models", "layers", "kernels", "weights", "model_config", "texts", "ending"}
    | LEAVES,
    "server": {"server", "ending"} | LEAVES,
}


def imports_of(path: Path) -> set[str]:
    """First part below `octavo` of every import in a file, those inside functions included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module] if node.module != "octavo" else [f"octavo.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("octavo.")}
    return found


@pytest.mark.parametrize("part", sorted(ALLOWED))
def test_imports_point_one_way(part: str) -> None:
    folder = REPOSITORY / "kernels" if part == "kernels" else PACKAGE / part
    files = sorted(folder.rglob("*.py"))
    assert files, f"{part} has no files"
    wrong = {}
    for path in files:
        found = imports_of(path)
        if part == "server":  # the one door through which the server reaches the engine
            found -= {"engine"} if "octavo.engine.async_engine" in path.read_text() else set()
        if found - ALLOWED[part]:
            wrong[str(path.relative_to(REPOSITORY))] = sorted(found - ALLOWED[part])
    assert not wrong


def test_no_circle_of_imports() -> None:
    """Imports inside functions count: they put off the circle and do not dissolve it."""
    files = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
    imported = {name: modules_in(path, files) - {name} for name, path in files.items()}
    while leaves := [name for name, found in imported.items() if not found]:
        for name in leaves:
            del imported[name]
        for found in imported.values():
            found.difference_update(leaves)
    assert not imported, "each of these lies on a circle or imports one that does"


def modules_in(path: Path, files: dict[str, Path]) -> set[str]:
    """The package's files that a file imports, but for the package itself, which is always there first."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
        elif isinstance(node, ast.Import):
            names = {alias.name for alias in node.names}
        else:
            continue
        found |= {name.removeprefix("octavo.") for name in names if name.startswith("octavo.")}
    return found & set(files)


def test_server_and_leaves_do_not_import_torch() -> None:
    files = [*(PACKAGE / "server").rglob("*.py"), *(PACKAGE / f"{name}.py" for name in LEAVES - {"_core"})]
    offenders = [
        str(path) for path in files if re.search(r"^\s*(import|from) (torch|triton)\b", path.read_text(), re.M)
    ]
    assert not offenders


def test_twins_run_without_triton() -> None:
    """CPUs run them: neither they, nor the door to the ops, nor what these import may import
    Triton.
    """
    kernels = REPOSITORY / "kernels"
    waiting, seen = [kernels / "ops.py", *(kernels / "reference").rglob("*.py")], set()
    while waiting:
        path = waiting.pop()
        seen.add(path)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                continue
            assert not any(name.split(".")[0] == "triton" for name in names), path
            ours = (kernels.joinpath(*name.split(".")[2:]) for name in names if name.startswith("octavo.kernels."))
            found = {file for stem in ours for file in (stem.with_suffix(".py"), stem / "__init__.py") if file.exists()}
            waiting += found - seen
    assert kernels / "step" / "plan_format.py" in seen


def test_only_the_binding_names_pyo3() -> None:
    files = [
        path for path in (REPOSITORY / "rust").rglob("*.rs") if "py" not in path.relative_to(REPOSITORY / "rust").parts
    ]
    offenders = [str(path) for path in files if re.search(r"\b(pyo3|numpy)::", path.read_text())]
    assert not offenders


def test_only_a_familys_file_names_the_family() -> None:
    """A new family of models is a new file in `models/` and a line in its registry."""
    family = re.compile("gemma|qwen|mistral|LlamaFor", re.IGNORECASE)
    folders = ("layers", "weights", "engine")
    offenders = {}
    for path in [PACKAGE / "model_config.py", *(path for name in folders for path in (PACKAGE / name).rglob("*.py"))]:
        tree = ast.parse(path.read_text())
        texts = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}  # docstrings
        words = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in texts]
        if found := [word for word in words if isinstance(word, str) and family.search(word)]:
            offenders[str(path.relative_to(PACKAGE))] = found
    assert not offenders


def test_nothing_unsafe_is_deserialised() -> None:
    pattern = re.compile(r"\bimport pickle\b|\btorch\.load\(|\beval\(|\btorch\.compile\(|trust_remote_code=True")
    offenders = [
        str(path)
        for folder in (REPOSITORY / "python", REPOSITORY / "kernels")
        for path in folder.rglob("*.py")
        if pattern.search(re.sub(r"\.eval\(\)", "", path.read_text()))
    ]
    assert not offenders
