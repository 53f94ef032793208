"""Our edits of MinkowskiEngine: applied exactly as declared, or the build stops."""

import ast
import re
import shutil
from itertools import groupby

import pytest

from spark_me.engine import source
from spark_me.engine.edits import EDITS, apply_edits, digest, edits_for, read_edits
from spark_me.engine.source import cache_dir
from spark_me.errors import EngineError


def edit(files="*.txt", options="3 times, inline", change="-old\n+new", title="swap", reason="a test"):
    return next(read_edits(f"=== {title}\n{reason}\n--- {files} ({options})\n{change}\n"))


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
    apply_edits(tree, [edit(options="regex MULTILINE", change=r"-^one (\w+)" + "\n" + r"+\1 two")])
    assert (tree / "b.txt").read_text() == "old two thing\n"


def test_lines_are_kept_taken_and_added_as_in_a_patch(tree):
    (tree / "a.txt").write_text("first\n\n-old\n last\nfirst\n")
    text = "Words before.\n\n=== one\nwhy\n--- a.txt\n first\n\n--old\n++new\n+\n  last\n\n=== two\nno\n--- b.txt\n-x\n"
    one, two = read_edits(text)
    assert (one.name, one.reason, one.count, two.name, two.replace) == ("one", "why", 1, "two", "")
    apply_edits(tree, [one])
    assert (tree / "a.txt").read_text() == "first\n\n+new\n\n last\nfirst\n"
    with pytest.raises(KeyError):
        edit(change="-old\nnew")


@pytest.mark.parametrize("count", [2, 4])
def test_another_count_names_the_edit_and_changes_nothing(tree, count):
    with pytest.raises(EngineError, match=rf"'swap'.*expects {count}.*finds 3"):
        apply_edits(tree, [edit(options=f"{count} times, inline")])
    assert (tree / "a.txt").read_text() == "old and old\n"


def test_an_edit_already_applied_is_an_error(tree):
    apply_edits(tree, [edit()])
    with pytest.raises(EngineError, match="'swap'"):
        apply_edits(tree, [edit()])


def test_edits_are_chosen_by_device():
    declared = [edit(title="gpu for cuda"), edit(title="host for cpu"), edit()]
    assert [e.name for e in edits_for("cpu", declared)] == ["host", "swap"]
    assert [e.name for e in edits_for("cuda", declared)] == ["gpu", "swap"]


def test_digest_follows_what_changes_the_build_and_nothing_else():
    base = digest([edit()], b"script")
    assert digest([edit(reason="said better")], b"script") == base
    others = [
        digest([edit(change="-older\n+new")], b"script"),
        digest([edit(options="3 times, regex")], b"script"),
        digest([edit(options="3 times, regex DOTALL")], b"script"),
        digest([edit(change="-old\n+newer")], b"script"),
        digest([edit(files="*.py")], b"script"),
        digest([edit(), edit()], b"script"),
        digest([edit()], b"another script"),
    ]
    assert len({base, *others}) == 1 + len(others)


def test_every_edit_says_why_and_has_its_own_name():
    names = [name for name, _ in groupby(EDITS, key=lambda edit: edit.name)]
    assert len(set(names)) == len(names) > 30
    assert all(len(e.reason) > 10 and e.device in ("", "cpu", "cuda") for e in EDITS)


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


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_edits_fit_the_real_source(real_tree, device):
    apply_edits(real_tree, edits_for(device))
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


@pytest.mark.parametrize("declared", EDITS, ids=lambda declared: declared.name)
def test_a_changed_source_stops_a_build(real_tree, declared):
    """Each edit looks for text that is there, and misses it when it is not."""
    pattern = declared.find if isinstance(declared.find, re.Pattern) else re.compile(re.escape(declared.find))
    path = next(path for path in sorted(real_tree.glob(declared.files)) if pattern.search(path.read_text()))
    path.write_text(pattern.sub("", path.read_text(), count=1))
    with pytest.raises(EngineError, match=re.escape(repr(declared.name))):
        apply_edits(real_tree, edits_for(declared.device or "cpu"))


def test_a_cpu_build_leaves_gpu_code_alone(real_tree, upstream):
    apply_edits(real_tree, edits_for("cpu"))
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
    apply_edits(real_tree, edits_for("cuda"))
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
