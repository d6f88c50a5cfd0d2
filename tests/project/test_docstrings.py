"""The form of docstrings: each begins with a sentence that can be read without the name."""

import ast
from itertools import pairwise

import pytest

from tests.helpers.project import PROJECT

FILES = sorted(file for folder in ("fastrm", "kernels", "bench") for file in (PROJECT / folder).rglob("*.py"))
FILES = [file for file in FILES if not file.is_relative_to(PROJECT / "kernels" / "tests")]


def words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# First words of the rest of a sentence that the name would have to begin.
FRAGMENTS = words("""
    After As At Because Before Between By Does For From Has How If In Into Is Of On Over That Through To Under Until
    What When Where Whether Which While Who Whose Why With Without
""")
# Imperatives that functions begin with. A new one is added here; a noun, as in "Rewards of a pack", is not.
VERBS = words("""
    Accept Add Advance Allow Announce Answer Append Apply Ask Assert Attach Attend Begin Block Build Call Capture
    Carry Cast Change Check Choose Clear Clone Close Collect Combine Compare Compile Complete Compute Concatenate
    Configure Convert Copy Count Create Cut Decode Delete Derive Describe Detect Discard Divide Download Draw Drop
    Emit Encode End Escape Estimate Evaluate Exchange Expand Explain Export Extract Fill Find Flush Forget Format Free
    Fuse Gate Gather Generate Give Group Guard Guess Handle Hash Hold Improve Initialise Insert Integrate Invert Join
    Keep Kill Launch Lay Leave Let Limit List Load Locate Make Mark Measure Merge Move Multiply Name Normalise Note
    Notify Open Pack Pad Parse Pass Permute Pick Plan Predict Prepare Print Profile Propose Protect Prune Push Put
    Quote Raise Read Record Recover Reduce Refuse Register Reject Remember Remove Rename Render Reorder Repeat Replace
    Report Require Reset Resize Resolve Restore Resume Retry Return Round Run Save Say Scale Scan Score Search
    Select Send Serve Set Shorten Show Sort Split Start Stop Store Strip Subtract Sum Swap Switch Take Tell Test
    Time Tokenise Trace Train Translate Trim Turn Undo Unpack Update Use Validate Verify Wait Walk Warn Watch Widen
    Write Yield
""")


def faults(kind: str, text: str) -> list[str]:
    """Return what is wrong with the docstring of a module, class, property, field or function."""
    line, word = text.split("\n")[0], text.split()[0].rstrip(",:;.")
    found = ["its first line is no complete sentence"] if not (text if kind == "field" else line).endswith(".") else []
    found += ["it begins like the rest of a sentence"] if word in FRAGMENTS else []
    found += ["it does not begin with an imperative"] if kind == "function" and word not in VERBS else []
    found += ["it begins like a function"] if kind in ("class", "property") and word in VERBS else []
    return found


def docstrings(tree: ast.Module):
    """Yield (line, kind, docstring) of everything in a file that has one."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and (text := ast.get_docstring(node)):
            is_property = any("property" in ast.unparse(one) for one in getattr(node, "decorator_list", ()))
            kinds = {ast.Module: "module", ast.ClassDef: "class"}
            yield getattr(node, "lineno", 1), kinds.get(type(node), "property" if is_property else "function"), text
        statements = getattr(node, "body", [])
        for field, text in pairwise(statements) if isinstance(statements, list) else ():
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                yield field.lineno, "field", text.value.value


def test_every_docstring_can_be_read_alone():
    found = [
        f"{file.relative_to(PROJECT)}:{line}: {', and '.join(wrong)}: {text.splitlines()[0]}"
        for file in FILES
        for line, kind, text in docstrings(ast.parse(file.read_text()))
        if (wrong := faults(kind, text))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "kind, text",
    [
        ("class", "Of one cell."), ("class", "Write one checkpoint."), ("property", "Return the sum."),
        ("module", "What a cell costs"), ("field", "Which value is bold."), ("function", "Rewards (R,) of a pack."),
        ("function", "Return a sum\nof two lines."),
    ],
)  # fmt: skip
def test_fragments_are_found(kind, text):
    assert faults(kind, text)
