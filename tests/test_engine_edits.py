"""Our edits of MinkowskiEngine: applied exactly as declared, or the build stops."""

import ast
import re
import shutil

import pytest

from spark_me.engine import source
from spark_me.engine.edits import EDITS, Edit, apply_edits, digest, edits_for
from spark_me.engine.edits.cuda import CUDA_EDITS
from spark_me.engine.source import cache_dir
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
    assert [e.name for e in edits_for(target(), [for_cuda, old_python, edit()])] == ["swap"]
    on_gpu = target(cuda=toolkit((13, 0)))
    assert [e.name for e in edits_for(on_gpu, [for_cuda, old_python, edit()])] == ["cuda", "swap"]
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


TOOLKITS = [None, (12, 1), (12, 9), (13, 0), (13, 1)]


def toolkit(version):
    return version and Cuda(home=source.Path("/usr/local/cuda"), version=version, archs="9.0")


@pytest.fixture(scope="module")
def upstream(tmp_path_factory):
    """The real source, unedited; not to be written to."""
    archive = cache_dir() / "source" / source.ARCHIVE_NAME
    if not archive.is_file():
        pytest.skip("MinkowskiEngine's source is not in the cache: `spark-me engine install --rebuild` fetches it")
    return source.unpack(source.get_archive(archive), tmp_path_factory.mktemp("upstream"))


@pytest.fixture
def real_tree(upstream, tmp_path):
    return shutil.copytree(upstream, tmp_path / "tree")


@pytest.mark.parametrize("python", [(3, 10), (3, 13)])
@pytest.mark.parametrize("version", TOOLKITS)
def test_edits_fit_the_real_source(real_tree, python, version):
    apply_edits(real_tree, edits_for(target(python, toolkit(version))))
    package = real_tree / "MinkowskiEngine"
    bare_names = {path.stem for path in package.iterdir()} - {"__init__"}
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert not bare_names & {str(name).split(".")[0] for name in names}, path.name
            if isinstance(node, ast.ImportFrom) and node.module == "collections":
                assert "Sequence" not in {alias.name for alias in node.names}, path.name
            assert not (isinstance(node, ast.Attribute) and ast.unparse(node) == "sys.path"), path.name
    division = (real_tree / "src" / "math_functions_cpu.cpp").read_text().split("void cpu_div<double>")[1]
    assert division.split("}")[0].count("vdDiv(n, a, b, y);") == 1


@pytest.mark.parametrize("declared", CUDA_EDITS, ids=lambda declared: declared.name)
def test_a_changed_source_stops_a_cuda_build(real_tree, declared):
    """Each edit for CUDA looks for text that is there, and misses it when it is not."""
    path = next(path for path in sorted(real_tree.glob(declared.files)) if occurrences(declared, path.read_text()))
    text = path.read_text()
    start, end = occurrences(declared, text)[0]
    path.write_text(text[:start] + text[end:])
    with pytest.raises(EngineError, match=re.escape(repr(declared.name))):
        apply_edits(real_tree, edits_for(target(cuda=toolkit((13, 0)))))


def occurrences(declared, text):
    pattern = declared.find if isinstance(declared.find, re.Pattern) else re.compile(re.escape(declared.find))
    return [match.span() for match in pattern.finditer(text)]


def test_a_cpu_build_leaves_gpu_code_alone(real_tree, upstream):
    apply_edits(real_tree, edits_for(target()))
    for path in (real_tree / "src").rglob("*.cu*"):
        assert path.read_text() == (upstream / path.relative_to(real_tree)).read_text(), path.name


# Which header of thrust declares what the sources name, by thrust's documentation.
THRUST = {
    "copy": "copy", "device": "execution_policy", "fill": "fill", "for_each": "for_each", "equal_to": "functional",
    "minimum": "functional", "unary_function": "REMOVED", "host_vector": "host_vector", "make_pair": "pair",
    "pair": "pair", "reduce_by_key": "reduce", "remove_if": "remove", "inclusive_scan": "scan", "sequence": "sequence",
    "sort": "sort", "sort_by_key": "sort", "system_error": "system_error", "transform": "transform",
    "make_tuple": "tuple", "tuple": "tuple", "get": "tuple", "unique": "unique", "count_if": "count",
    "constant_iterator": "iterator/constant_iterator", "counting_iterator": "iterator/counting_iterator",
    "make_zip_iterator": "iterator/zip_iterator",
}  # fmt: skip


def test_gpu_sources_include_what_they_name_of_thrust(real_tree):
    apply_edits(real_tree, edits_for(target(cuda=toolkit((13, 0)))))
    sources = sorted((real_tree / "src").glob("*.cu"))
    assert sources
    for path in sources:
        code = without_comments(included_text(path, real_tree / "src"))
        headers = set(re.findall(r"#include <thrust/([\w/]+)\.h>", code))
        needed = {THRUST[name] for name in re.findall(r"\bthrust::(\w+)", code)}
        assert needed <= headers, f"{path.name}: {sorted(needed - headers)}"
        for gone in ("nvtx", "CUDF_FUNC_RANGE", "cudaMemPrefetchAsync"):
            assert gone not in code, path.name


def without_comments(text):
    """Nor macros: what they name counts where they are used."""
    text = re.sub(r"//[^\n]*", "", re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL))
    return re.sub(r"#define (?:.*\\\n)*.*", "", text)


def included_text(path, root, seen=None):
    """A source with all of the tree's own headers that it includes, once each."""
    seen = set() if seen is None else seen
    seen.add(path)
    text = path.read_text()
    for name in re.findall(r'^#include ["<]([^">]+)[">]', text, flags=re.MULTILINE):
        for candidate in (path.parent / name, root / name, root / "3rdparty" / name):
            if candidate.is_file() and candidate not in seen:
                text += included_text(candidate, root, seen)
    return text
