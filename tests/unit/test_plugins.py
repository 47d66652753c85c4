"""`plugins`: the folder is the registry; options are strict."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Literal

import pytest

from palimpsest import plugins, sourcehash
from palimpsest.errors import UsageError


@plugins.options
class Example:
    """An options class."""

    beta: float = 0.1
    """Strength."""
    steps: int = 3
    names: tuple[str, ...] = ()
    kind: Literal["a", "b"] = "a"


def test_listing_imports_nothing():
    code_before = set(sys.modules)
    infos = plugins.list_plugins("datasets")
    assert "advbench" in [info.name for info in infos]
    assert all(info.summary and not info.name.startswith("_") for info in infos)
    assert not {m for m in set(sys.modules) - code_before if m.startswith("palimpsest.datasets.")}


def test_every_kind_can_be_listed():
    for kind in plugins.KINDS:
        for info in plugins.list_plugins(kind):
            assert info.summary, f"{info.path} has no docstring"
    with pytest.raises(UsageError, match="did you mean 'datasets'"):
        plugins.list_plugins("dataset")


def test_an_unknown_plugin_is_named_with_its_neighbour():
    with pytest.raises(UsageError, match="did you mean 'advbench'"):
        plugins.plugin_class("datasets", "advbnch")


def test_options_keep_field_docstrings_and_defaults():
    fields = plugins.option_fields(Example)
    assert fields["beta"].description == "Strength."
    assert plugins.option_values(Example(beta=2)) == {
        "beta": 2.0,
        "steps": 3,
        "names": [],
        "kind": "a",
    }


@pytest.mark.parametrize(
    "values", [{"beta": True}, {"beta": "1"}, {"steps": 1.5}, {"kind": "c"}, {"names": (1,)}]
)
def test_wrong_types_raise(values: dict[str, Any]):
    with pytest.raises(ValueError, match=next(iter(values))):
        Example(**values)


def test_build_plugin_explains_wrong_options():
    with pytest.raises(UsageError, match=r"\[here\] has no option 'prt'; did you mean 'part'"):
        plugins.build_plugin("datasets", "xstest", {"prt": "safe"}, where="here")
    with pytest.raises(UsageError, match=r"\[datasets.xstest\] part"):
        plugins.build_plugin("datasets", "xstest", {"part": "both"})
    with pytest.raises(UsageError, match=r"\[datasets.table\] path"):
        plugins.build_plugin("datasets", "table", {})
    built = plugins.build_plugin("datasets", "mmlu", {"subjects": ["anatomy"]})
    assert built.subjects == ("anatomy",)


def test_foreign_code_needs_permission(tmp_path: Path):
    mine = tmp_path / "mine.py"
    mine.write_text(
        '"""Mine."""\n'
        "from __future__ import annotations\n"
        "from palimpsest.plugins import options\n"
        "@options\nclass Mine:\n"
        '    """Mine."""\n'
        "    size: int = 1\n"
        "    def load(self, source):\n        return []\n",
        encoding="utf-8",
    )
    with pytest.raises(UsageError, match="--allow-code"):
        plugins.plugin_class("datasets", str(mine))
    built = plugins.build_plugin("datasets", str(mine), {"size": 2}, allow_code=True)
    assert built.size == 2
    assert len(sourcehash.plugin_sha256(built)) == 64
    mine.write_text('"""Two."""\nx = 1\n', encoding="utf-8")
    with pytest.raises(UsageError, match="0 public classes with `load`"):
        plugins.plugin_class("datasets", str(mine), allow_code=True)
    with pytest.raises(UsageError, match="does not exist"):
        plugins.plugin_class("datasets", str(tmp_path / "none.py"), allow_code=True)
    with pytest.raises(UsageError, match="cannot be imported"):
        plugins.plugin_class("datasets", "no_such_package.module", allow_code=True)
