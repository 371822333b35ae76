"""The house's own rules:
imports point one way, functions are short, the README's map of equations names what exists."""
import ast
import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.quick
ROOT = Path(__file__).parent.parent
MAY_IMPORT = {  # an arrow never points up
    "config": "", "world": "", "data": "config world", "encode": "config data", "diffusion": "",
    "model": "config", "experts": "", "align": "",
    "teacher": "config world data encode align",
    "train": "config world data encode diffusion model experts align sample evaluate",
    "sample": "config world data encode diffusion model experts",
    "evaluate": "config world data encode diffusion model experts align train sample",
    "bench": "config data diffusion model experts train",
}
FILES = sorted(p for p in ROOT.glob("*.py"))
STORIES = {"main", "train"}  # told from top to bottom, so they may be long


def imports(path: Path) -> set[str]:
    """Dotted names of all that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def rooms_imported(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(path)} & set(MAY_IMPORT)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_every_file_has_its_place_and_imports_point_one_way(path):
    assert path.stem in MAY_IMPORT, f"{path.name} is not in the floor plan"
    assert rooms_imported(path) <= set(MAY_IMPORT[path.stem].split())


def test_there_is_no_circle():
    arrows = {p.stem: rooms_imported(p) for p in FILES}
    while leaves := [room for room, to in arrows.items() if not to & set(arrows)]:
        for room in leaves:
            del arrows[room]
    assert not arrows, f"these import each other: {sorted(arrows)}"


@pytest.mark.parametrize("name", ["model.py", "experts.py", "diffusion.py", "align.py"])
def test_the_method_is_free_of_everything_around_it(name):
    found = imports(ROOT / name)
    assert not {n
                for n in found
                if re.match(r"(argparse|logging|tqdm|torch\.optim|torch\.distributed|torch\.utils)\b", n)}
    assert not re.search(r"torch\.(optim|distributed)", (ROOT / name).read_text())


@pytest.mark.parametrize("name", ["config.py", "world.py"])
def test_rooms_without_torch(name):
    assert not {n for n in imports(ROOT / name) if n.split(".")[0] == "torch"}


def test_a_students_run_does_not_load_what_official_models_need():
    """train.py imports official/ and vlm/ inside the functions that need them."""
    found = {alias.name if isinstance(node, ast.Import) else node.module
             for node in ast.parse((ROOT / "train.py").read_text()).body
             if isinstance(node, ast.Import | ast.ImportFrom) for alias in node.names}
    assert not {name for name in found if name.split(".")[0] in ("official", "vlm")}


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_files_are_readable(path):
    text = path.read_text()
    tree = ast.parse(text)
    assert ast.get_docstring(tree), "a file opens with what it is"
    assert not re.search(r"TODO|FIXME|XXX", text)
    functions = [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
    assert {f.name: f.end_lineno - f.lineno + 1 for f in functions if f.end_lineno - f.lineno + 1 > 60
            and f.name not in STORIES} == {}


def exists(file: str, dotted: str) -> bool:
    """Is there a function, method or class of this name in the file?"""
    scope = ast.parse((ROOT / file).read_text()).body
    for part in dotted.split("."):
        found = [n for n in scope if isinstance(n, (ast.ClassDef, ast.FunctionDef)) and n.name == part]
        if not found:
            return False
        scope = found[0].body
    return True


def test_exists_can_tell():
    assert exists("experts.py", "ProPhy.forward") and exists("align.py", "coarse_loss")
    assert exists("experts.py", "Routing")
    assert not exists("experts.py", "ProPhy.backward") and not exists("align.py", "forward")


def test_readme_maps_every_equation_to_a_function_that_exists():
    """Rows such as `| Eq. 1 | experts.py:SemanticExpertBlock.forward |`."""
    rows = [line for line in (ROOT / "README.md").read_text().splitlines() if re.match(r"\|\s*Eq\.", line)]
    named = [place for row in rows for place in re.findall(r"(\w+\.py):([\w.]*\w)", row)]
    assert {int(n) for row in rows for low, high in re.findall(r"Eq\. (\d)(?:\s*[-–]\s*(\d))?", row)
            for n in range(int(low), int(high or low) + 1)} >= set(range(1, 7))
    assert len(named) >= len(rows)
    assert [f"{file}:{name}"
            for file, name in named if not ((ROOT / file).exists() and exists(file, name))] == []
