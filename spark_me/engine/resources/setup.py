"""Takes the place of MinkowskiEngine's own setup.py, which needs numpy.distutils and uninstalls what is there.

Everything that depends on the machine is in `build_options.json` beside this file, written by spark_me/engine/build.py;
what is always so is here.
"""

import json
from pathlib import Path

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

# Upstream's own lists. A .cu and a .cpp file of one name must not both be compiled.
CPU_SOURCES = [
    "src/math_functions_cpu.cpp",
    "src/coordinate_map_manager.cpp",
    "src/convolution_cpu.cpp",
    "src/convolution_transpose_cpu.cpp",
    "src/local_pooling_cpu.cpp",
    "src/local_pooling_transpose_cpu.cpp",
    "src/global_pooling_cpu.cpp",
    "src/broadcast_cpu.cpp",
    "src/pruning_cpu.cpp",
    "src/interpolation_cpu.cpp",
    "src/quantization.cpp",
    "src/direct_max_pool.cpp",
    "pybind/minkowski.cpp",
]
CUDA_SOURCES = [
    "src/math_functions_cpu.cpp",
    "src/math_functions_gpu.cu",
    "src/coordinate_map_manager.cu",
    "src/coordinate_map_gpu.cu",
    "src/convolution_kernel.cu",
    "src/convolution_gpu.cu",
    "src/convolution_transpose_gpu.cu",
    "src/pooling_avg_kernel.cu",
    "src/pooling_max_kernel.cu",
    "src/local_pooling_gpu.cu",
    "src/local_pooling_transpose_gpu.cu",
    "src/global_pooling_gpu.cu",
    "src/broadcast_kernel.cu",
    "src/broadcast_gpu.cu",
    "src/pruning_gpu.cu",
    "src/interpolation_gpu.cu",
    "src/spmm.cu",
    "src/gpu.cu",
    "src/quantization.cpp",
    "src/direct_max_pool.cpp",
    "pybind/minkowski.cu",
]

# Upstream's modules can be imported without their package: importing the engine puts its folder on sys.path. Ours does
# not; but published code says `from MinkowskiOps import to_sparse` (ConvNeXt V2 and what was made of it) and
# `import MinkowskiFunctional` (lartpc_mlreco3d), and now and then the other two. So modules of these names, alone, hand
# out what the package's have: no class exists twice.
BARE_NAMES = ["MinkowskiOps", "MinkowskiFunctional", "MinkowskiNonlinearity", "MinkowskiSparseTensor"]

options = json.loads(Path("build_options.json").read_text())
cuda = options["device"] == "cuda"
# -g0: the flags that Python was built with ask for debug symbols, which double the build's time and size.
# -w: upstream's warnings are not ours to mend.
cxx_flags = ["-O3", "-g0", "-w", "-fopenmp", *options["compile_flags"]]
nvcc_flags = ["-O3", "-w", "--expt-relaxed-constexpr", "--expt-extended-lambda", *options["compile_flags"]]
if not cuda:
    cxx_flags.append("-DCPU_ONLY")

extension = (CUDAExtension if cuda else CppExtension)(
    name="MinkowskiEngineBackend._C",
    sources=CUDA_SOURCES if cuda else CPU_SOURCES,
    include_dirs=[str(Path(name).absolute()) for name in ("src", "src/3rdparty")] + options["include_dirs"],
    extra_compile_args={"cxx": cxx_flags, "nvcc": nvcc_flags} if cuda else {"cxx": cxx_flags},
    extra_link_args=["-fopenmp", *options["link_flags"]],
)

for name in BARE_NAMES:
    Path(f"{name}.py").write_text(f"from MinkowskiEngine.{name} import *\n")

setup(
    name="MinkowskiEngine",
    version=options["version"],
    description="A convolutional neural network library for sparse tensors, built by spark_me",
    license="MIT",
    packages=["MinkowskiEngine", "MinkowskiEngine.utils", "MinkowskiEngine.modules"],
    py_modules=BARE_NAMES,
    package_data={"MinkowskiEngine": [options["record"]]},
    install_requires=["torch", "numpy", *options["requires"]],
    ext_modules=[extension],
    cmdclass={"build_ext": BuildExtension.with_options(use_ninja=True)},
    zip_safe=False,
)
