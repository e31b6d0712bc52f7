from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FORBIDDEN = {"segvit": {"pipeline", "flows", "ray", "mlflow"}, "pipeline": {"flows"}, "flows": set()}


def imported_packages(file: Path) -> set[str]:
    """Top-level packages a file imports anywhere, in functions too."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("package", FORBIDDEN)
def test_imports__go_one_way(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    for file in files:
        assert not imported_packages(file) & FORBIDDEN[package], file


def imported_parts(file: Path) -> set[str]:
    """The packages and top-level modules of pipeline/ that a file imports anywhere."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}".split(".")[1] for alias in node.names if node.module == "pipeline"}
            found |= {node.module.split(".")[1]} if node.module.startswith("pipeline.") else set()
    return found


def test_parts_of_pipeline__import_each_other_in_no_circle() -> None:
    graph: dict[str, set[str]] = {}
    for file in (ROOT / "pipeline").rglob("*.py"):
        part = file.relative_to(ROOT / "pipeline").parts[0].removesuffix(".py")
        graph[part] = graph.get(part, set()) | imported_parts(file) - {part}
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError, which names them
    assert {"shards", "workflow", "training", "storage", "steps"} <= set(order)
    assert order.index("steps") > order.index("training") > order.index("shards") > order.index("storage")


def imported_files(file: Path) -> set[str]:
    """The modules of this project that a file imports anywhere, in functions and for types too."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in FORBIDDEN:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if is_module(inner) else node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] in FORBIDDEN}
    return found


def is_module(name: str) -> bool:
    path = ROOT / name.replace(".", "/")
    return path.is_dir() or path.with_suffix(".py").is_file()


def test_files__import_each_other_in_no_circle() -> None:
    graph = {}
    for package in FORBIDDEN:
        for file in (ROOT / package).rglob("*.py"):
            name = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            graph[name] = imported_files(file) - {name}
    assert len(graph) > 150
    TopologicalSorter(graph).prepare()  # raises CycleError, which names them


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("segvit", ["ray", "mlflow", "pipeline"]),
        ("flows.cli", ["ray", "mlflow", "torch"]),
        ("flows.recipes.segmentation", ["ray", "mlflow", "torch"]),
        # Cached flows answer with these; PyTorch would double their time.
        ("flows.present.runs", ["ray", "mlflow", "torch"]),
        ("flows.present.models", ["ray", "mlflow", "torch"]),
        ("flows.present.search", ["ray", "mlflow", "torch"]),
        # In the processes that only lead a training, which start anew for each.
        ("pipeline.training.train", ["timm", "torchvision", "mlflow"]),
    ],
)
def test_import__loads_nothing_heavy(module: str, absent: list[str]) -> None:
    code = f"import sys, {module}; print([name for name in {absent!r} if name in sys.modules])"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "[]"
