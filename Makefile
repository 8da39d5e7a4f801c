# make demo    train a small RetNet on this Python's own source, export it, load it elsewhere
# make test    lint, then every test that runs without a GPU (FAST=1 leaves the slow ones out)
# make check   lint and formatting alone
# make bench   operators, then whole models, on one core, beside what others run there
# make aot     every kernel compiled for four GPUs, without one, and checked; in part in make test
# make compat  every model's export on the oldest and the newest libraries that pyproject.toml
#              allows, in environments of their own (.venv/compat, made once; gigabytes).
#              COMPAT="--upgrade" looks for newer ones; python tests/hub/compat.py --help
# make gpu     the tests that need a GPU and benchmarks, with PYTHON as it is: installs nothing;
#              in parts, what is unknown first, 10 minutes at most; again goes on where that ended
#              GPU="--limit 280" and other options: python kernels/bench/gpu/parts.py --help
# make clean   remove what was built; runs/, exported/ and .venv/ stay
#
# demo, test, check, bench, aot and compat create .venv and install into it by themselves, once.

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
# Threads for the demo on a CPU. It is too small for more than four, and a container may own fewer
# cores than it sees, where OpenMP spins instead of working.
THREADS ?= $(shell n=$$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN); echo $$((n < 4 ? n : 4)))
# One thread per test process: two processes with two threads each are slower on two cores. Tests
# differ so much in length that a process which is done takes over what the other has not begun.
PYTEST := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest \
	-n 2 --dist worksteal -q

# A .venv that came along with a copied or moved folder still runs the code of the old place.
ifneq ($(shell cat $(STAMP) 2>/dev/null),$(CURDIR))
$(STAMP): reinstall
endif

.PHONY: demo test check bench aot compat gpu clean reinstall

demo: $(STAMP)
	@OMP_NUM_THREADS=$(THREADS) $(BIN)/accelerate launch \
		--num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
		recipes/pretrain.py recipes/configs/retnet_demo.toml --overwrite
	@$(BIN)/zoo export runs/retnet_demo exported/retnet_demo --overwrite
	@$(BIN)/python recipes/try_export.py exported/retnet_demo

test: check
	@$(PYTEST) -m "not gpu$(if $(FAST), and not slow)"

check: $(STAMP)
	@$(BIN)/python -m ruff check --quiet --output-format concise .
	@$(BIN)/python -m ruff format --check --quiet --output-format concise .

bench: $(STAMP)
	@OMP_NUM_THREADS=1 $(BIN)/python kernels/bench/cpu.py
	@OMP_NUM_THREADS=1 $(BIN)/python kernels/bench/models.py

aot: $(STAMP)
	@OMP_NUM_THREADS=1 $(BIN)/python kernels/bench/resources.py

compat: $(STAMP)
	@OMP_NUM_THREADS=1 $(BIN)/python tests/hub/compat.py $(COMPAT)

gpu:
	@$(PYTHON) -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' || { \
		echo "make gpu: the torch of $(PYTHON) sees no GPU" >&2; exit 1; }
	@PYTHONPATH=.$${PYTHONPATH:+:$$PYTHONPATH} $(PYTHON) kernels/bench/gpu/parts.py $(GPU)

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache
	find . -name .venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
		echo "longzoo needs Python 3.10 or newer, $(PYTHON) is not: make PYTHON=python3.11" >&2; exit 1; }
	@if [ -f $(STAMP) ] && [ "$$(cat $(STAMP))" != "$(CURDIR)" ]; then rm -rf .venv; fi
	@echo "Installing into .venv (once; a few minutes)"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt setuptools
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt \
		--no-build-isolation -e '.[train,test]'
# Apart, each for a few tests: where they are installed, whoever imports transformers imports them.
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt \
		--no-deps --target .venv/torchao torchao
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt \
		--no-deps --target .venv/deepspeed deepspeed einops hjson msgpack ninja py-cpuinfo
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt \
		--no-deps --target .venv/trl trl
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt \
		--no-deps --target .venv/quanto optimum-quanto ninja
	@echo "$(CURDIR)" > $(STAMP)
