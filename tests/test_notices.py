"""`warn_once`: one category, once a model, by name, at the caller's line."""

import ast
import warnings
from pathlib import Path

import pytest
from torch import nn

import tokenprune
from tokenprune.errors import TokenPruneWarning
from tokenprune.notices import warn_once


def test_once_a_model_by_name() -> None:
    one, other = nn.Linear(1, 1), nn.Linear(1, 1)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for model, name in [(one, "a"), (one, "a"), (one, "b"), (other, "a"), (other, "a")]:
            warn_once(model, name, "what to do")
    assert [str(w.message) for w in seen] == ["a: what to do", "b: what to do", "a: what to do"]
    assert {w.category for w in seen} == {TokenPruneWarning}
    assert {w.filename for w in seen} == {__file__}


def test_it_can_be_made_an_error() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", TokenPruneWarning)
        with pytest.raises(UserWarning, match="a: what to do"):
            warn_once(nn.Linear(1, 1), "a", "what to do")


def test_the_product_warns_in_no_other_way() -> None:
    root = Path(tokenprune.__file__).parent
    found = [
        path.name
        for path in root.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "warnings.warn"
    ]
    assert found == ["notices.py"]
