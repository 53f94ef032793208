"""Our edits of MinkowskiEngine: applied exactly as declared, or the build stops."""

import ast
import re
import sys

import pytest

from spark_me.engine import source
from spark_me.engine.cache import cache_dir
from spark_me.engine.edits import EDITS, Edit, apply_edits, digest, edits_for
from spark_me.engine.target import Cuda, Target
from spark_me.errors import EngineError


def target(python=(3, 11), cuda=None):
    return Target(python=python, abi="cpython", platform="linux-x86_64", torch="2.11.0", cuda=cuda)


def edit(**changes):
    declared = {"name": "swap", "files": "*.txt", "find": "old", "replace": "new", "count": 3, "reason": "a test"}
    return Edit(**(declared | changes))


@pytest.fixture
def tree(tmp_path):
    (tmp_path / "a.txt").write_text("old and old\n")
    (tmp_path / "b.txt").write_text("one old thing\n")
    (tmp_path / "c.py").write_text("old\n")
    return tmp_path


def test_replaces_every_occurrence_in_the_files_named(tree):
    apply_edits(tree, [edit()])
    assert (tree / "a.txt").read_text() == "new and new\n"
    assert (tree / "b.txt").read_text() == "one new thing\n"
    assert (tree / "c.py").read_text() == "old\n"


def test_a_pattern_may_use_its_groups(tree):
    apply_edits(tree, [edit(find=re.compile(r"^one (\w+)", re.MULTILINE), replace=r"\1 two", count=1)])
    assert (tree / "b.txt").read_text() == "old two thing\n"


@pytest.mark.parametrize("count", [2, 4])
def test_another_count_names_the_edit_and_changes_nothing(tree, count):
    with pytest.raises(EngineError, match=rf"'swap'.*expects {count}.*finds 3"):
        apply_edits(tree, [edit(count=count)])
    assert (tree / "a.txt").read_text() == "old and old\n"


def test_an_edit_already_applied_is_an_error(tree):
    apply_edits(tree, [edit()])
    with pytest.raises(EngineError, match="'swap'"):
        apply_edits(tree, [edit()])


def test_edits_are_chosen_by_target():
    for_cuda = edit(name="cuda", applies=lambda target: target.cuda is not None)
    old_python = edit(name="3.9", applies=lambda target: target.python < (3, 10))
    toolkit = Cuda(home=source.Path("/usr/local/cuda"), version=(13, 0), archs="9.0")
    assert [e.name for e in edits_for(target(), [for_cuda, old_python, edit()])] == ["swap"]
    assert [e.name for e in edits_for(target(cuda=toolkit), [for_cuda, old_python, edit()])] == ["cuda", "swap"]
    assert [e.name for e in edits_for(target(python=(3, 9)), [for_cuda, old_python, edit()])] == ["3.9", "swap"]


def test_digest_follows_what_changes_the_build_and_nothing_else():
    base = digest([edit()], b"script")
    assert digest([edit(reason="said better")], b"script") == base
    others = [
        digest([edit(find="older")], b"script"),
        digest([edit(find=re.compile("old"))], b"script"),
        digest([edit(replace="newer")], b"script"),
        digest([edit(files="*.py")], b"script"),
        digest([edit(), edit()], b"script"),
        digest([edit()], b"another script"),
    ]
    assert len({base, *others}) == 1 + len(others)


def test_every_edit_says_why_and_has_its_own_name():
    assert len({e.name for e in EDITS}) == len(EDITS)
    assert all(len(e.reason) > 10 for e in EDITS)


def test_edits_fit_the_real_source(tmp_path):
    archive = cache_dir() / "source" / source.ARCHIVE_NAME
    if not archive.is_file():
        pytest.skip("MinkowskiEngine's source is not in the cache: `spark-me engine install --rebuild` fetches it")
    tree = source.unpack(source.get_archive(archive), tmp_path)
    apply_edits(tree, edits_for(target(python=sys.version_info[:2])))
    package = tree / "MinkowskiEngine"
    bare_names = {path.stem for path in package.iterdir()} - {"__init__"}
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert not bare_names & {str(name).split(".")[0] for name in names}, path.name
            if isinstance(node, ast.ImportFrom) and node.module == "collections":
                assert "Sequence" not in {alias.name for alias in node.names}, path.name
            assert not (isinstance(node, ast.Attribute) and ast.unparse(node) == "sys.path"), path.name
    division = (tree / "src" / "math_functions_cpu.cpp").read_text().split("void cpu_div<double>")[1]
    assert division.split("}")[0].count("vdDiv(n, a, b, y);") == 1
