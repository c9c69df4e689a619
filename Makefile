# Every target makes .venv first where it is missing. PYTHON names the interpreter it is made from.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: demo test lint

demo: $(INSTALLED)
	$(BIN)/dpofast demo --overwrite

test: $(INSTALLED)
	$(BIN)/python -m pytest --durations=10

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/mypy dpofast
	$(BIN)/clang-format --dry-run -Werror csrc/*.hpp csrc/*.cpp

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

$(INSTALLED): setup.py pyproject.toml constraints.txt $(wildcard csrc/*.?pp)
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) was not found. Name another: make PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -c "$$CHECK"
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(BIN)/pip install -c constraints.txt -e ".[test]"
	@touch $@
