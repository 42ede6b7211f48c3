"""The list of techniques: its page is what the registry says, and every test it names exists."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from lath.formats.registry import SYSTEMS, systems_table
from lath.formats.system import System

TESTS = Path(__file__).parent


def test_the_page_is_the_registry() -> None:
    page = (TESTS.parent / "docs" / "systems.md").read_text()
    assert systems_table() in page, "docs/systems.md is out of date: paste `lath systems`"


def test_names_are_unique() -> None:
    names = [system.name for system in SYSTEMS]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: system.name)
def test_its_tests_exist(system: System) -> None:
    assert system.tests
    for test in system.tests:
        file, _, name = test.partition("::")
        tree = ast.parse((TESTS / file).read_text())
        functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        assert name in functions, f"{system.name} names {test}, which does not exist"
