"""Words: docstrings begin with a verb or name the thing; documentation and messages use plain words and the field's terms."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("runtime", "export", "calibration", "benchmarks")

# Words that melrt does not use, and what it says instead.
REPLACED = {
    r"speak|speaks|spoken|speaking": "synthesize",
    r"hear|hears|heard|hearing": "evaluate, measure",
    r"judge|judges|judged|judging": "evaluate",
    r"learnt": "learned, requantized",
    r"anew": "again, rebuild",
    r"listener|listeners": "client, playback",
    r"whoever|whomever": "a caller that",
    r"mend|mends|mended|mending": "fix",
    r"lies between|lie between": "must be between",
    r"is no (?:file|mel|bundle|number|folder|list|numpy|record|generator)": "is not a",
    r"in vain|for ever|turn and turn about|to be had|ever so": "plain words",
    r"fault of melrt's own|of our own|by us": "internal error, melrt's",
    r"who asks|who is let in|lets in|is let in|let in": "admitted",
    r"[a-z]*(?:normalis|quantis|equalis|synthesis(?=e|ing)|recognis|optimis|serialis|initialis)[a-z]*": "US spelling",
    r"colour[a-z]*|flavour[a-z]*|behaviour[a-z]*|neighbour[a-z]*|artefact[a-z]*|centre[a-z]*": "US spelling",
}
# First words that make a docstring a fragment. A docstring begins with a verb ("Return the ...") or names the thing.
FRAGMENTS = {
    "As", "Of", "By", "What", "Where", "Whether", "Who", "Whose", "How", "Those", "These", "That", "So", "For", "From", "To", "Under",
    "Between", "With", "Within", "Which", "When", "If",
}  # fmt: skip


def sources() -> list[Path]:
    return [path for folder in PACKAGES for path in sorted((ROOT / folder).rglob("*.py"))]


def pages() -> list[Path]:
    tests = sorted((ROOT / "tests").rglob("*.py"))
    docs = sorted((ROOT / "docs").rglob("*"))
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "Makefile", ROOT / "pyproject.toml",
            *tests, *[page for page in docs if page.suffix in (".md", ".py", ".sh", ".toml")]]  # fmt: skip


@pytest.mark.parametrize("path", [*sources(), *pages()], ids=lambda path: str(path.relative_to(ROOT)))
def test_words_that_are_not_used(path: Path) -> None:
    if path == Path(__file__):
        pytest.skip("this file lists the words")
    text = re.sub(r"RENAMED = \{.*?\n\}", "", path.read_text(), flags=re.DOTALL)  # the table of old words
    found = [
        f"line {text.count(chr(10), 0, match.start()) + 1}: {match[0]!r}; say: {instead}"
        for pattern, instead in REPLACED.items()
        for match in re.finditer(rf"(?<![\w-])(?:{pattern})(?![\w-])", text, re.IGNORECASE)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings_are_no_fragments(path: Path) -> None:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        texts = []
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            texts.append((node, ast.get_docstring(node)))
            if isinstance(node, ast.ClassDef | ast.Module):  # the texts under fields
                values = [item.value for item in node.body if isinstance(item, ast.Expr) and isinstance(item.value, ast.Constant)]
                texts += [(value, value.value) for value in values if isinstance(value.value, str)]
        for where, text in texts:
            words = re.findall(r"[A-Za-z]+", text or "")
            if words and words[0] in FRAGMENTS:
                found.append(f"line {getattr(where, 'lineno', 1)}: {text.splitlines()[0]}")
    assert not found, "\n".join(found)
