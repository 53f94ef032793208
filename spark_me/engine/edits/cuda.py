"""Edits that builds for CUDA need besides: what CUDA 12 and 13 changed since 2021, and mistakes in the GPU code."""

import re

from spark_me.engine.edits.edit import Edit
from spark_me.engine.target import Target


def cuda(target: Target) -> bool:
    """For edits of files that only a CUDA build compiles."""
    return target.cuda is not None


_THRUST_HEADERS = [
    "copy", "execution_policy", "fill", "for_each", "functional", "host_vector", "iterator/constant_iterator",
    "iterator/counting_iterator", "iterator/discard_iterator", "iterator/transform_iterator", "iterator/zip_iterator",
    "pair", "reduce", "remove", "scan", "sequence", "sort", "system_error", "transform", "tuple", "unique",
]  # fmt: skip

CUDA_EDITS: tuple[Edit, ...] = (
    Edit(
        name="thrust-headers",
        files="src/coordinate_map_functors.cuh",
        find="#include <thrust/functional.h>\n#include <thrust/host_vector.h>\n#include <thrust/pair.h>\n",
        replace="".join(f"#include <thrust/{name}.h>\n" for name in _THRUST_HEADERS),
        count=1,
        reason="The sources name algorithms of thrust whose headers used to come along with others.",
        applies=cuda,
    ),
    Edit(
        name="thrust-headers-spmm",
        files="src/spmm.cu",
        find='#include "gpu.cuh"\n',
        replace='#include "coordinate_map_functors.cuh"\n#include "gpu.cuh"\n',
        count=1,
        reason="As thrust-headers: the one user of thrust that does not include that file.",
        applies=cuda,
    ),
    Edit(
        name="tensor-header",
        files="src/spmm.cu",
        find="#include <ATen/cuda/CUDAContext.h>\n#include <ATen/cuda/CUDAUtils.h>\n",
        replace="#include <ATen/core/Tensor.h>\n#include <ATen/cuda/CUDAContext.h>\n#include <ATen/cuda/CUDAUtils.h>\n",
        count=1,
        reason="Newer torch's CUDAUtils.h looks into tensors whose declaration it leaves to others.",
        applies=cuda,
    ),
    Edit(
        name="thrust-headers-map",
        files="src/3rdparty/concurrent_unordered_map.cuh",
        find="#include <thrust/pair.h>\n#include <thrust/count.h>\n",
        replace="#include <thrust/count.h>\n#include <thrust/execution_policy.h>\n#include <thrust/pair.h>\n",
        count=1,
        reason="As thrust-headers.",
        applies=cuda,
    ),
    Edit(
        name="thrust-for-nvcc",
        files="src/utils.hpp",
        find="#ifndef CPU_ONLY\n",
        replace="#ifdef __CUDACC__\n",
        count=2,
        reason="The sources that g++ compiles have no use for thrust, and CUDA 13 put it where only nvcc looks.",
        applies=cuda,
    ),
    Edit(
        name="unary-function",
        files="src/coordinate_map_functors.cuh",
        find="struct find_coordinate\n    : public thrust::unary_function<uint32_t,\n"
        "                                    thrust::pair<uint32_t, uint32_t>> {\n",
        replace="struct find_coordinate {\n",
        count=1,
        reason="CUDA 13 removed thrust::unary_function. Nobody asks for the two types that it declares, one of which "
        "was wrong.",
        applies=cuda,
    ),
    Edit(
        name="no-profiling-ranges",
        files="src/3rdparty/concurrent_unordered_map.cuh",
        find="#include <cudf/detail/nvtx/ranges.hpp>\n",
        replace="",
        count=1,
        reason="The vendored nvtx3.hpp clashes with the one that CUDA now brings. It only names a range to profilers.",
        applies=cuda,
    ),
    Edit(
        name="no-profiling-ranges-use",
        files="src/3rdparty/concurrent_unordered_map.cuh",
        find="    CUDF_FUNC_RANGE();\n",
        replace="",
        count=1,
        reason="Follows from no-profiling-ranges.",
        applies=cuda,
    ),
    Edit(
        name="shared-map",
        files="src/3rdparty/concurrent_unordered_map.cuh",
        find="    return std::unique_ptr<Self, std::function<void(Self*)>>{\n",
        replace="    return std::shared_ptr<Self>{\n",
        count=1,
        reason="Its only user made the unique pointer shared. For that g++'s library calls a helper by a name that "
        "CUDA 13 has too: the type of the map makes the call ambiguous.",
        applies=cuda,
    ),
    Edit(
        name="no-managed-memory",
        files="src/3rdparty/concurrent_unordered_map.cuh",
        find=re.compile(r"    \{\n      cudaPointerAttributes .*?\n    \}\n\n", re.DOTALL),
        replace="",
        count=1,
        reason="CUDA 13 changed the arguments of cudaMemPrefetchAsync. No allocator of the engine hands out managed "
        "memory, the only kind that it applies to.",
        applies=cuda,
    ),
    Edit(
        name="no-managed-memory-method",
        files="src/3rdparty/concurrent_unordered_map.cuh",
        find=re.compile(r"  gdf_error prefetch\(.*?\n  \}\n\n", re.DOTALL),
        replace="",
        count=1,
        reason="As no-managed-memory; nobody calls it.",
        applies=cuda,
    ),
    Edit(
        name="spmm-buffer",
        files="src/pooling_avg_kernel.cu",
        find="  // buffer size 0 for CUSPARSE_SPMM_COO_ALG1, CUSPARSE_SPMM_COO_ALG3,\n"
        "  // CUSPARSE_SPMM_COO_ALG4, and CUSPARSE_SPMM_CSR_ALG1\n",
        replace="  char *buffer = (char *)allocator.allocate(buffer_size);\n",
        count=1,
        reason="Average pooling gave cuSPARSE the address of a host variable as its workspace, in the belief that this "
        "algorithm needs none; whether it does is for each version of the library to say.",
        applies=cuda,
    ),
    Edit(
        name="spmm-buffer-use",
        files="src/pooling_avg_kernel.cu",
        find="                              cuda_data_type, mm_alg, &buffer_size));\n",
        replace="                              cuda_data_type, mm_alg, buffer));\n"
        "  allocator.deallocate(buffer, buffer_size);\n",
        count=1,
        reason="As spmm-buffer.",
        applies=cuda,
    ),
    Edit(
        name="sparse-handle",
        files="src/gpu.cu",
        find="  cusparseHandle_t handle;\n  CUSPARSE_CHECK(cusparseCreate(&handle));\n  return handle;\n",
        replace="  thread_local std::map<int, cusparseHandle_t> handles;\n  int device;\n"
        "  CUDA_CHECK(cudaGetDevice(&device));\n  cusparseHandle_t &handle = handles[device];\n"
        "  if (handle == nullptr)\n    CUSPARSE_CHECK(cusparseCreate(&handle));\n  return handle;\n",
        count=1,
        reason="Each call made a handle that nobody destroyed: every average pooling took memory for ever.",
        applies=cuda,
    ),
    Edit(
        name="sparse-handle-header",
        files="src/gpu.cu",
        find="#include <iostream>\n",
        replace="#include <iostream>\n#include <map>\n",
        count=1,
        reason="Header of sparse-handle.",
        applies=cuda,
    ),
    Edit(
        name="kernel-region",
        files="src/coordinate_map_manager.cu",
        find="    return in_map.kernel_map(out_map, gpu_kernel, kernel_map_mode,\n"
        "                             CUDA_NUM_THREADS);\n",
        replace="    auto kernel_map = in_map.kernel_map(out_map, gpu_kernel, kernel_map_mode,\n"
        "                                        CUDA_NUM_THREADS);\n"
        "    kernel.clean();\n    return kernel_map;\n",
        count=1,
        reason="A kernel's shape was copied to the GPU and never freed: every batch took memory for ever.",
        applies=cuda,
    ),
    Edit(
        name="shared-rows",
        files="src/math_functions.cuh",
        find="           GET_BLOCKS(MAX_THREADS, length) * sizeof(unsigned int)>>>(\n",
        replace="           (GET_BLOCKS(MAX_THREADS, length) + 1) * sizeof(unsigned int)>>>(\n",
        count=2,
        reason="A block that begins in the middle of a row touches one row more than its length holds: where the block "
        "is not a multiple of the channels (192, 320, …), it wrote past the end of its shared memory.",
        applies=cuda,
    ),
    Edit(
        name="empty-strides",
        files="src/coordinate_map_gpu.cu",
        find=re.compile(r"(?<=base_type::m_byte_allocator\);\n\n)  index_storage_type \w+_tensor_stride\("),
        replace=r"  if (size() == 0) {\n    stride_map.m_size = 0;\n    return stride_map;\n  }\n\n\g<0>",
        count=2,
        reason="As empty-kernel-map: a map without sites has no hash table, and striding it copied the one at address "
        "0.",
        applies=cuda,
    ),
    Edit(
        name="empty-insertion",
        files="src/coordinate_map_manager.cu",
        find="    auto const num_blocks =\n        (mapping.size() + CUDA_NUM_THREADS - 1) / CUDA_NUM_THREADS;\n",
        replace="    auto const num_blocks = GET_BLOCKS(mapping.size(), CUDA_NUM_THREADS);\n",
        count=1,
        reason="As empty-kernel-map: a launch of no blocks is an error, which the next to ask for errors was blamed "
        "for.",
        applies=cuda,
    ),
)
