# Every target that needs the environment sets it up first; what is in place is left alone.
PYTHON ?= python3
ENGINE ?=
# For the demo, for example ARGS="train.epochs=1".
ARGS ?=
BENCH_OUT ?= runs/bench_cuda
VENV ?= .venv
DEBIAN_ROOT ?= /var/tmp/spark_me-debian
BIN := $(VENV)/bin

# Set in containers as a rule, this makes each of the many processes that tests start compile all that it imports: seconds.
test test-numerics test-cuda: export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-finetune test test-numerics test-cuda bench-cuda check-cuda
.PHONY: lint encoders format doctor docker-check clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' Makefile

setup: ## make .venv with torch, the engine and this package
	@PYTHON="$(PYTHON)" ENGINE="$(ENGINE)" docker/install.sh "$(VENV)"

demo: setup ## pretrain a small SparK on real photos; pictures in runs/demo
	@$(BIN)/spark-me pretrain configs/demo/pretrain.yaml $(ARGS)

demo-finetune: setup ## pretrain on digits, fine-tune on few labels, compare with scratch; runs/demo_finetune
	@$(BIN)/spark-me data digits runs/demo_finetune/digits
	@$(BIN)/spark-me pretrain configs/demo/digits_pretrain.yaml
	@$(BIN)/spark-me compare configs/demo/digits_finetune.yaml

test: setup ## run the tests
	@# A file a process, in the order of tests/conftest.py; one thread each, as those of several processes wait for each other.
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# Tests that compare float32 results of different computations: processors round differently, a tolerance may fit one.
# The simplest instructions of torch, oneDNN and MKL stand for another processor: none of today takes them by itself.
OTHER_CPU := ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_CBWR=COMPATIBLE
NUMERICS := $(addprefix tests/test_,decoder.py spark.py::test_loss_float32 \
  sparse_kernels_autotune.py sparse_depthwise.py sparse_layers.py sparse_norms.py weights_kernels.py \
  downstream_export.py downstream_features.py downstream_predict.py \
  train_optim.py train_reconstruct.py downstream_soft_targets.py)

test-numerics: setup ## run the tests that compare float32 results as on another processor
	@$(OTHER_CPU) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile $(NUMERICS)

test-cuda: setup ## run the tests that need a GPU, and those whose kernels are interpreted without one
	@$(BIN)/python -m pytest -q -m "gpu or any_device"

check-cuda: setup ## compile and link the engine for GPUs; needs nvcc but no GPU
	@# The key of the cache holds all that decides a build: what was built before is not compiled again.
	@TORCH_CUDA_ARCH_LIST="$${TORCH_CUDA_ARCH_LIST:-9.0}" $(BIN)/spark-me engine install --cuda --build-only

bench-cuda: setup ## measure all backends on a GPU into BENCH_OUT; goes on where it was interrupted
	@bench/cuda.sh "$(BIN)/spark-me" "$(BENCH_OUT)"

encoders: setup ## try every network of torchvision and timm (an hour); writes docs/encoders.md
	@$(BIN)/python tests/sweep_encoders.py

lint: setup ## check style, types and Dockerfiles
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy spark_me
	$(BIN)/hadolint docker/Dockerfile docker/Dockerfile.cpu

format: setup ## bring the code into the project's style
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

doctor: setup ## prove the engine against dense torch
	@$(BIN)/spark-me doctor

docker-check: ## as root: install and run in an empty Debian 12, as docker/Dockerfile.cpu does
	docker/test_in_debian.sh "$(DEBIAN_ROOT)"

clean: ## remove what builds and checks leave behind; keeps .venv and runs
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find spark_me tests -name __pycache__ -type d -exec rm -rf {} +
