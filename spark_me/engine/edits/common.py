"""Edits that every build needs, and those that mend what the engine computes wrongly on every device, or dies of."""

import re

from spark_me.engine.edits.edit import Edit

_HYPER_CROSS = """    dst_coordinate[0] = src_coordinate[0];
    if (m_region_type == RegionType::HYPER_CROSS) {
      for (index_type i = 1; i < m_coordinate_size; ++i)
        dst_coordinate[i] = src_coordinate[i];
      if (kernel_index == 0)
        return;
      // Which neighbour along which axis: first those ahead, from the nearest,
      // then those behind, from the farthest.
      index_type neighbour = kernel_index - 1, axis = 0;
      for (; neighbour >= m_kernel_size[axis] - 1; ++axis)
        neighbour -= m_kernel_size[axis] - 1;
      index_type const others = m_kernel_size[axis] - 1;
      index_type const ahead = m_kernel_size[axis] % 2 ? others / 2 : others;
      coordinate_type const steps =
          neighbour < ahead ? neighbour + 1 : neighbour - others;
      dst_coordinate[axis + 1] +=
          steps * coordinate_type(m_dilation[axis] * m_tensor_stride[axis]);
      return;
    }
"""

FAULT_EDITS: tuple[Edit, ...] = (
    Edit(
        name="empty-kernel-map",
        files="src/coordinate_map_manager.cpp",
        find="      return detail::empty_map_functor<coordinate_type, TemplatedAllocator,\n",
        replace="      return m_kernel_maps[kernel_map_key] =\n"
        "                 detail::empty_map_functor<coordinate_type, TemplatedAllocator,\n",
        count=1,
        reason="The kernel map of a tensor without sites was returned by reference and destroyed before anybody read "
        "it: convolution and pooling of nothing killed the process. Now the manager owns it, as it owns all others.",
    ),
    Edit(
        name="empty-stride-map",
        files="src/coordinate_map_cpu.hpp",
        find='    LOG_DEBUG("stride map out_maps.size():", out_coordinate_map.size());\n',
        replace='    LOG_DEBUG("stride map out_maps.size():", out_coordinate_map.size());\n'
        "    if (in_size == 0)\n      return std::make_pair(in_maps, out_maps);\n",
        count=1,
        reason="As empty-kernel-map: the hash table of no coordinates has no place to begin at.",
    ),
    Edit(
        name="empty-union",
        files="src/coordinate_map_cpu.hpp",
        find="      size_type const capacity = in_map.m_map.capacity();\n",
        replace="      size_type const capacity = N == 0 ? 0 : in_map.m_map.capacity();\n",
        count=1,
        reason="As empty-stride-map.",
    ),
    Edit(
        name="union-key",
        files="src/coordinate_map_manager.cpp",
        find='  coordinate_map_key_type merged_map_key(merged_map_tensor_stride, "merge");\n',
        replace='  coordinate_map_key_type merged_map_key(merged_map_tensor_stride, "merge");\n'
        "  if (exists(merged_map_key))\n"
        '    merged_map_key = get_random_string_id(merged_map_tensor_stride, "merge");\n',
        count=1,
        reason="All unions of one manager had the same key, under which nothing is inserted twice: the second was "
        "given the coordinates of the first, and rows where it lacked its own. Pruning draws a new key alike.",
    ),
    Edit(
        name="max-pool-first-value",
        files="src/pooling_max_kernel.hpp",
        find="      if (*p_curr_out < *p_curr_in) {\n",
        replace="      if (*p_curr_mask_index < 0 || *p_curr_out < *p_curr_in) {\n",
        count=1,
        reason="As the GPU's kernel does, begin with the first input, whatever its value: no input was taken where "
        "all are -inf or NaN, and what follows from that is mended by max-pool-backward.",
    ),
    Edit(
        name="max-pool-nothing",
        files="src/pooling_max_kernel.hpp",
        find="            -std::numeric_limits<Dtype>::max());\n",
        replace="            Dtype(0));\n",
        count=1,
        reason="An output without an input under its kernel, which there is where the kernel is smaller than the "
        "stride, is zero, as on GPUs and as of every other layer: it was -1.8e308.",
    ),
    Edit(
        name="max-pool-backward",
        files="src/pooling_max_kernel.hpp",
        find="      p_grad_in_feat[*p_curr_mask_index] += *p_curr_grad_out;\n",
        replace="      if (*p_curr_mask_index >= 0)\n        p_grad_in_feat[*p_curr_mask_index] += *p_curr_grad_out;\n",
        count=1,
        reason="The gradient of an output without an input was written to index -1, in front of the array: that is "
        "the heap's own bookkeeping.",
    ),
    Edit(
        name="hyper-cross",
        files="src/kernel_region.hpp",
        find="    // only for hypercube\n    dst_coordinate[0] = src_coordinate[0];\n",
        replace=_HYPER_CROSS,
        count=1,
        reason="A cross was as large as a cross and had the first offsets of a cube. Its offsets are numbered as in "
        "MinkowskiEngine after 0.5.4, so that kernels trained there keep their meaning; even kernels, which the "
        "layers refuse, begin at the site as in a cube.",
    ),
    Edit(
        name="keep-zeros",
        files="MinkowskiEngine/MinkowskiOps.py",
        find="            remove_zeros and coordinates is None\n",
        replace="            not remove_zeros or coordinates is None\n",
        count=1,
        reason="MinkowskiToSparseTensor refuses coordinates that it would not use, and refused remove_zeros=False "
        "altogether.",
    ),
)


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
