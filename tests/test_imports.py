"""The house by its imports: no circle, none upwards, and only `sparse` knows MinkowskiEngine."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import spark_me

ROOT = Path(spark_me.__file__).parent
LAYERS = """
errors
files tables devices trace masking drop_path sync_batch_norm networks initial_weights decoder dense masked_dense
sparse
engine encoder densify
machine spark weights
config
data
train
downstream bench encoders_command
cli
__main__
"""
"""Rooms from the ground up: a module imports from its own layer and those above this line."""
BELOW_SPARSE = {"errors", "devices", "trace", "sync_batch_norm"}
"""What `sparse` imports of ours: nothing that knows a task, a file or a configuration."""


@cache
def modules() -> dict[str, Path]:
    names = {}
    for path in sorted(ROOT.rglob("*.py")):
        if "resources" not in path.parts:
            parts = ["spark_me", *path.relative_to(ROOT).with_suffix("").parts]
            names[".".join(parts).removesuffix(".__init__")] = path
    return names


def imports(path: Path, everywhere: bool = False) -> Iterator[str]:
    """Modules that a file imports, when it is imported itself or everywhere in it; of ours the very file."""
    known = modules()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in known else node.module


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def test_no_circle() -> None:
    graph = {name: {each for each in imports(path) if each in modules()} for name, path in modules().items()}
    while graph:
        free = [name for name, needed in graph.items() if not needed - {name, "spark_me"} & graph.keys()]
        assert free, f"a circle among {sorted(graph)}"
        for name in free:
            del graph[name]


def test_nothing_imports_upwards() -> None:
    layer = {name: number for number, line in enumerate(LAYERS.split("\n")) for name in line.split()}
    assert {room(name) for name in modules()} - {""} == layer.keys()
    upwards = [
        f"{name} imports {each}"
        for name, path in modules().items()
        for each in imports(path)
        if room(name) and each in modules() and room(each) and layer[room(each)] > layer[room(name)]
    ]
    assert not upwards


def test_sparse_knows_little_and_minkowski_alone() -> None:
    for name, path in modules().items():
        found = set(imports(path, everywhere=True))
        if room(name) == "sparse":
            assert {room(each) for each in found if each.startswith("spark_me.")} <= {"sparse", *BELOW_SPARSE}, name
        if name != "spark_me.sparse.minkowski":
            assert not any(each.split(".")[0] == "MinkowskiEngine" for each in found), name


TASKS = {
    "train.pretrain", "downstream.finetune", "downstream.compare", "downstream.evaluate", "data.commands",
    "train.run_directory",
}  # fmt: skip
"""What runs a whole configuration, and the directory that records it. All else is given the part that it needs."""
WHOLE = {"PretrainConfig", "FinetuneConfig", "AnyConfig"}


def test_below_the_tasks_no_function_takes_a_whole_configuration() -> None:
    for name, path in modules().items():
        short = name.removeprefix("spark_me.")
        if short in TASKS or room(name) == "config":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                hints = [each.annotation for each in (*node.args.args, *node.args.kwonlyargs) if each.annotation]
                named = {each.id for hint in hints for each in ast.walk(hint) if isinstance(each, ast.Name)}
                assert not named & WHOLE, f"{short}.{node.name}"
