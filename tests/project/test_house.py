"""The sizes that the code keeps, so that a reader can hold a function's call and a module in mind."""

import ast
from collections.abc import Iterator

import pytest

from tests.helpers.project import PROJECT

MOST_PARAMETERS, MOST_LINES, MOST_LINES_OF_A_FUNCTION = 8, 400, 50
# Public functions that may have more parameters, and why.
EXCEPTIONS = {
    "fastrm/evaluate/reward_model.py: RewardModel.from_pretrained": "users call it with keywords, each of which stands "
    "alone: an object for some of them would be one more thing to import for one model",
}


def public_functions(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Yield (name, number of parameters but self and cls) of public functions and methods."""
    for node in tree.body:
        inner = node.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_") else [node]
        for function in inner:
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef) and _is_public(function.name):
                found = function.args
                names = [one.arg for one in (*found.posonlyargs, *found.args, *found.kwonlyargs)]
                name = function.name if function is node else f"{node.name}.{function.name}"
                yield name, len([name for name in names if name not in ("self", "cls")])


def _is_public(name: str) -> bool:
    return name == "__init__" or not name.startswith("_")


def num_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """The lines of a function, its docstring left out."""
    first, count = function.body[0], function.end_lineno - function.lineno + 1
    is_docstring = ast.get_docstring(function, clean=False) is not None
    return count - (first.end_lineno - first.lineno + 1) * is_docstring


def modules() -> list[str]:
    return sorted(str(file.relative_to(PROJECT)) for file in (PROJECT / "fastrm").rglob("*.py"))


def test_public_functions_have_few_parameters():
    long = {
        f"{module}: {name}"
        for module in modules()
        for name, count in public_functions(ast.parse((PROJECT / module).read_text()))
        if count > MOST_PARAMETERS
    }
    assert long == set(EXCEPTIONS)


@pytest.mark.parametrize(
    "text, found",
    [
        ("def f(a, b, /, c, *d, e, **g): pass", [("f", 4)]),
        ("class A:\n    def __init__(self, a): pass\n    def _b(self, a): pass", [("A.__init__", 1)]),
        ("class _A:\n    def f(self, a): pass\nasync def g(a): pass\ndef _h(a): pass", [("g", 1)]),
    ],
)
def test_parameters_are_counted(text, found):
    assert list(public_functions(ast.parse(text))) == found


def test_lines_are_counted():
    (function,) = ast.parse('def f(a):\n    """One.\n\n    Two.\n    """\n    return a\n').body
    assert num_lines(function) == 2


def test_no_function_is_long():
    long = {
        f"{module}: {node.name}"
        for module in modules()
        for node in ast.walk(ast.parse((PROJECT / module).read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and num_lines(node) > MOST_LINES_OF_A_FUNCTION
    }
    assert not long


def test_no_module_is_long():
    long = {module for module in modules() if (PROJECT / module).read_text().count("\n") > MOST_LINES}
    assert not long
