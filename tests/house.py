"""The house in figures: sizes, density, levels, arrows. tests/test_design.py holds them below their ceilings.

    python tests/house.py        one table a file, one line for the whole

A code token is a name, an operator, a number or a string, as Python's tokenizer has them. Tokens a line are counted
over the lines that are neither empty nor a comment.
"""
import ast
import functools
import io
import tokenize
from pathlib import Path

ROOT = Path(__file__).parent.parent
ROOMS = ("physics", "official", "vlm", "benchmarks", "common")
METHOD = ("align", "experts", "model", "diffusion", "train", "state", "data", "sample", "config")  # in reading order
LEVELS = (  # lowest first; a file imports from lower levels, or from its own but never in a circle
    ("config", "rules"), ("align", "experts", "model", "diffusion", "physics", "common"), ("world",), ("data",),
    ("official", "vlm", "benchmarks"), ("sample", "state"), ("train", "evaluate", "encode", "teacher", "report"), ("bench", "ablate"))
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
KINDS = (tokenize.NAME, tokenize.OP, tokenize.NUMBER, tokenize.STRING)
FSTRING = tuple(getattr(tokenize, name) for name in ("FSTRING_START",) if hasattr(tokenize, name))  # Python 3.12 on


def sources() -> list[Path]:
    """Every file of the project, tests aside."""
    return sorted([*ROOT.glob("*.py"), *(path for room in ROOMS for path in (ROOT / room).glob("*.py"))])


def name_of(path: Path) -> str:
    """train.py -> train, common/store.py -> common.store, common/__init__.py -> common."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def tokens(text: str) -> list[tokenize.TokenInfo]:
    """The code tokens of a source text."""
    return [token for token in tokenize.generate_tokens(io.StringIO(text).readline) if token.type in KINDS + FSTRING]


def docstring_lines(tree: ast.Module) -> set[int]:
    """Numbers of the lines that docstrings take."""
    found = set()
    for node in ast.walk(tree):
        holds_one = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        if holds_one and ast.get_docstring(node) is not None:
            found |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return found


def functions(tree: ast.Module) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


def length(function: ast.FunctionDef) -> int:
    return function.end_lineno - function.lineno + 1


def is_packed(node: ast.AST) -> bool:
    """`a, b = x, y`: several values in one statement."""
    return isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple) and isinstance(node.value, ast.Tuple)


@functools.cache
def measure(path: Path) -> dict[str, int]:
    """Counts of one file."""
    text = path.read_text(encoding="utf-8")
    tree, lines, found = ast.parse(text), text.splitlines(), tokens(text)
    docs = docstring_lines(tree)
    alone = [line.strip() for line in lines]
    nodes = list(ast.walk(tree))
    return {
        "lines": len(lines),
        "tokens": len(found),
        "written lines": sum(bool(line) and not line.startswith("#") for line in alone),  # docstrings among them
        "comments": sum("#" in line and number not in docs and is_comment(line)
                        for number, line in enumerate(lines, start=1)),
        "docstrings": len(docs),
        "assignments": sum(isinstance(node, ast.Assign) for node in nodes),
        "packed": sum(is_packed(node) for node in nodes),
        "wide": sum(len(line) > 100 for line in lines),
        "too wide": sum(len(line) > 110 for line in lines),
    }


def is_comment(line: str) -> bool:
    """A line that holds a comment, alone or behind code; a line of dashes is none."""
    alone = line.strip().startswith("#")
    return (alone and not line.strip("# -\n") == "") or (not alone and "  # " in line)


@functools.cache
def imported(path: Path) -> frozenset[str]:
    """Dotted names of all that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(names)


@functools.cache
def arrows() -> dict[str, set[str]]:
    """{file: the project's own files that it imports}."""
    own = {name_of(path) for path in sources()}
    return {name_of(path): (imported(path) & own) - {name_of(path)} for path in sources()}


def main() -> None:
    rows = {name_of(path): measure(path) for path in sources()}
    rows["in all"] = {key: sum(row[key] for row in rows.values()) for key in next(iter(rows.values()))}
    print("| file | lines | code tokens | tokens a line | comment lines, % | docstring lines, % | packed, % | "
          "over 100 columns |")
    print("|---|---|---|---|---|---|---|---|")
    for name, row in rows.items():
        share = lambda part, whole: f"{100 * row[part] / max(row[whole], 1):.0f}"
        print(f"| {name} | {row['lines']} | {row['tokens']} | {row['tokens'] / max(row['written lines'], 1):.1f} | "
              f"{share('comments', 'lines')} | {share('docstrings', 'lines')} | {share('packed', 'assignments')} | "
              f"{row['wide']} |")
    print(f"\n{sum(len(to) for to in arrows().values())} arrows between {len(arrows())} files; the method's eight "
          f"files have {sum(rows[name]['lines'] for name in METHOD)} lines.")


if __name__ == "__main__":
    main()
