# Every target sets up what it needs: .venv when it is missing, and the extras it uses, once (stamp files in .venv).
# A machine needs Python >= 3.11 with venv, and make.

PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
JOBS   ?= 2
ARGS   ?=

# Tests run in $(JOBS) processes of one thread each; files stay whole, so that a file's fixtures are made once.
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help demo test test-all lint typed mypy bench tables docs figures golden clean distclean
.SECONDARY:
.NOTPARALLEL:

help: ## list these targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sort | awk -F ':.*## ' '{printf "make %-10s %s\n", $$1, $$2}'

demo: $(VENV)/.with-examples ## train LeNet-5 on real digits, compress it by a policy, show before and after
	@$(PY) examples/lenet_mnist/demo.py $(ARGS)

test: $(VENV)/.with-test ## run the tests (at most 15 minutes on 2 cores)
	$(PYTEST) -m "not slow" $(ARGS)

test-all: $(VENV)/.with-test ## run the tests, the slow ones too
	$(PYTEST) $(ARGS)

lint: $(VENV)/.with-lint $(VENV)/.with-test mypy ## ruff, mypy (strict) and the direction of imports
	$(PY) -m ruff check .
	$(PY) -m pytest -q tests/test_imports.py

# fxcompress/, passes/ and grammar/ are one package once installed; for mypy, links lay them out that way.
typed:
	@mkdir -p build/typed/fxcompress && cd build/typed/fxcompress && find . -maxdepth 1 -type l -delete && \
	  ln -sf ../../../fxcompress/* . && ln -sfn ../../../passes passes && ln -sfn ../../../grammar grammar

mypy: $(VENV)/.with-lint typed ## mypy alone
	@cd build && MYPYPATH=typed ../$(PY) -m mypy --config-file ../pyproject.toml -p fxcompress

bench: $(VENV)/.with-bench ## measure check, plan, compile and removal times
	@$(PY) benchmarks/compile_time.py --peer $(ARGS)
	@$(PY) benchmarks/remove_scaling.py

tables: $(VENV)/.with-examples $(VENV)/.with-bench ## run what README.md says of removal, and put it there (an hour or two)
	@$(PY) benchmarks/remove_zoo.py --peer $(ARGS)
	@$(PY) benchmarks/remove_speed.py
	@$(PY) benchmarks/remove_latency.py
	@$(PY) benchmarks/remove_accuracy.py
	@$(PY) benchmarks/compensate.py
	@$(PY) benchmarks/readme.py

docs: $(VENV)/.with-examples ## write the language reference and the index of diagnostics anew
	$(PY) -m fxcompress.docs

figures: $(VENV)/.with-examples $(VENV)/.with-bench ## run the demo and put its figures and picture into README.md
	@$(PY) examples/lenet_mnist/demo.py
	@$(PY) benchmarks/readme.py out/lenet_mnist.json

golden: $(VENV)/.with-test ## write the golden texts anew; read the diff before you commit it
	$(PYTEST) --update-golden -m "not slow" $(ARGS)

clean: ## remove what was built, but not .venv
	rm -rf build dist out *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean ## remove .venv too
	rm -rf $(VENV)

# The stamps. torch comes first, by name: then pip's own settings decide which build of it is taken.
$(VENV)/.base: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "fxcompress needs Python 3.11 or later; say make PYTHON=... to name one" >&2; exit 1; }
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet -c constraints.txt torch torchvision
	@touch $@

$(VENV)/.with-%: pyproject.toml $(VENV)/.base
	$(PY) -m pip install --quiet -c constraints.txt -e ".[$*]"
	@touch $@
