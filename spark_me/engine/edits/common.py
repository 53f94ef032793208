"""Edits that every build needs, whatever it computes on."""

import re

from spark_me.engine.edits.edit import Edit

_SORT_BY_OUTPUT_ROW = """
inline void sort_by_output_row(cpu_in_map &in_map, cpu_out_map &out_map) {
  std::vector<std::pair<default_types::index_type, default_types::index_type>>
      pairs(in_map.size());
  for (size_t i = 0; i < pairs.size(); ++i)
    pairs[i] = {out_map[i], in_map[i]};
  std::sort(pairs.begin(), pairs.end());
  for (size_t i = 0; i < pairs.size(); ++i) {
    out_map[i] = pairs[i].first;
    in_map[i] = pairs[i].second;
  }
}
"""

COMMON_EDITS: tuple[Edit, ...] = (
    Edit(
        name="sequence-abc",
        files="MinkowskiEngine/**/*.py",
        find=re.compile(r"^from collections import Sequence$", re.MULTILINE),
        replace="from collections.abc import Sequence",
        count=4,
        reason="Python 3.10 removed the abstract classes from `collections`.",
        applies=lambda target: target.python >= (3, 10),
    ),
    Edit(
        name="sequence-abc-namedtuple",
        files="MinkowskiEngine/MinkowskiKernelGenerator.py",
        find="from collections import Sequence, namedtuple",
        replace="from collections import namedtuple\nfrom collections.abc import Sequence",
        count=1,
        reason="Python 3.10 removed the abstract classes from `collections`.",
        applies=lambda target: target.python >= (3, 10),
    ),
    Edit(
        name="no-sys-path",
        files="MinkowskiEngine/__init__.py",
        find="file_dir = os.path.dirname(__file__)\nsys.path.append(file_dir)\n",
        replace="",
        count=1,
        reason="Importing the engine put its own folder on sys.path, so that its modules and a `utils` and a "
        "`diagnostics` could be imported by those bare names from anywhere.",
    ),
    Edit(
        name="package-imports-from",
        files="MinkowskiEngine/**/*.py",
        find=re.compile(
            r"^( *)from (Minkowski(?!Engine)\w+|diagnostics|sparse_matrix_functions) import\b", re.MULTILINE
        ),
        replace=r"\1from MinkowskiEngine.\2 import",
        count=78,
        reason="Follows from no-sys-path. It also leaves one class SparseTensor instead of two, "
        "`MinkowskiSparseTensor.SparseTensor` and `MinkowskiEngine.MinkowskiSparseTensor.SparseTensor`.",
    ),
    Edit(
        name="package-imports",
        files="MinkowskiEngine/__init__.py",
        find=re.compile(r"^import (MinkowskiOps|MinkowskiFunctional)$", re.MULTILINE),
        replace=r"import MinkowskiEngine.\1 as \1",
        count=2,
        reason="Follows from no-sys-path.",
    ),
    Edit(
        name="no-cpu-warning",
        files="MinkowskiEngine/__init__.py",
        find=re.compile(r"^if not is_cuda_available\(\):\n    warnings\.warn\(\n(?: {8}.*\n)*    \)\n", re.MULTILINE),
        replace="",
        count=1,
        reason="A CPU build is chosen and announced when it is installed; every import warned about it again.",
        applies=lambda target: target.cuda is None,
    ),
    Edit(
        name="double-division",
        files="src/math_functions_cpu.cpp",
        find=re.compile(r"(void cpu_div<double>\([^)]*\) \{\n  )vdMul\("),
        replace=r"\1vdDiv(",
        count=1,
        reason="The division of doubles multiplied: broadcasting a division was wrong in float64.",
    ),
    Edit(
        name="autograd-classes",
        files="MinkowskiEngine/**/*.py",
        find=re.compile(r"\b(Minkowski\w*Function)\(\)"),
        replace=r"\1",
        count=18,
        reason="torch deprecates instances of autograd functions: `apply` belongs to the class.",
    ),
    Edit(
        name="ordered-kernel-maps-sort",
        files="src/kernel_map.hpp",
        find="#include <ostream>\n#include <tuple>",
        replace="#include <algorithm>\n#include <ostream>\n#include <tuple>\n#include <utility>",
        count=1,
        reason="Headers of ordered-kernel-maps.",
    ),
    Edit(
        name="ordered-kernel-maps",
        files="src/kernel_map.hpp",
        find="using cpu_out_maps = std::vector<cpu_out_map>;\n",
        replace="using cpu_out_maps = std::vector<cpu_out_map>;\n" + _SORT_BY_OUTPUT_ROW,
        count=1,
        reason="Threads append the pairs of a CPU kernel map as they find them, so that the rounding of weight "
        "gradients differed from run to run. A fixed order makes runs bitwise equal and walks memory forward.",
    ),
    Edit(
        name="ordered-kernel-maps-use",
        files="src/coordinate_map_cpu.hpp",
        find="      out_maps[i].resize(max_num);\n    }\n\n    return std::make_pair(in_maps, out_maps);",
        replace="      out_maps[i].resize(max_num);\n      sort_by_output_row(in_maps[i], out_maps[i]);\n    }\n\n"
        "    return std::make_pair(in_maps, out_maps);",
        count=1,
        reason="As ordered-kernel-maps.",
    ),
    Edit(
        name="ordered-stride-maps",
        files="src/coordinate_map_cpu.hpp",
        find="    return std::make_pair(move(in_maps), move(out_maps));",
        replace="    sort_by_output_row(in_maps[0], out_maps[0]);\n"
        "    return std::make_pair(move(in_maps), move(out_maps));",
        count=1,
        reason="As ordered-kernel-maps, for pooling whose kernel equals its stride.",
    ),
)
