# Every target sets up what it needs, into .venv (and the engines, for test-engines, into .venv-engines); nothing
# else is touched. PYTHON is any Python >= 3.11.
PYTHON ?= python3.11
VENV := .venv
ENGINES := .venv-engines
BIN := $(VENV)/bin
SHELL := /bin/bash

# What of the tests reads, writes or frees blocks.
MEMORY_TESTS := $(patsubst %,tests/test_%.py,clear client dram drain faults fuzz holds listing lmcache lmcache_remote \
	movement nvme_node quotas redis_node room states takeover)
# Take all cores there are, or time what happens. The others mostly wait, so three files of them run at a time.
ALONE := $(patsubst %,tests/test_%.py,index_faults lmcache_faults reserving stress tcp)
SIDE_BY_SIDE := --numprocesses 3 --dist loadfile $(addprefix --ignore ,$(ALONE))

.PHONY: run test test-engines test-debug demo bench lint clean

run: $(VENV)/.daemon
	@echo "Try it from another terminal:"
	@echo "  echo hello | $(BIN)/kvstore put greeting - --model demo"
	@echo "  $(BIN)/kvstore get greeting --model demo"
	@echo "  $(BIN)/kvstore stats; curl http://127.0.0.1:7400/metrics"
	@echo "Ctrl-C stops it."
	$(BIN)/kvstore serve --dram 1GiB

test: $(VENV)/.test $(VENV)/tools
	$(BIN)/python -m pytest $(SIDE_BY_SIDE)
	$(BIN)/python -m pytest $(ALONE)
	$(MAKE) test-engines

test-engines: $(VENV)/.test $(ENGINES)/.engines
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile tests/engines

test-debug: $(VENV)/.test
	KVSTORE_DEBUG=1 $(BIN)/python -m pytest $(SIDE_BY_SIDE) $(MEMORY_TESTS)
	KVSTORE_DEBUG=1 $(BIN)/python -m pytest $(filter-out %/test_index_faults.py %/test_reserving.py,$(ALONE))

demo: $(VENV)/.demo
	$(BIN)/python -m benchmarks.demo

bench: $(VENV)/.bench
	$(BIN)/python -m benchmarks

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) $(ENGINES) $(ENGINES).lock

# One stamp for each extra that is installed; `test` holds all others.
$(VENV)/.%: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || python3 -m venv $(VENV)
	$(BIN)/python -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or later is needed"'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$*]'
	touch $@

# What tests of deploy/ run and this machine has not, from Debian's packages, which are unpacked here and not installed.
# Without Debian those tests say what to install.
$(VENV)/tools: | $(VENV)/.test
	mkdir -p $@.new
	cd $@.new && for tool in promtool:prometheus kubectl:kubernetes-client; do \
		command -v $${tool%:*} >/dev/null && continue; \
		apt-get download $${tool#*:} || { apt-get update && apt-get download $${tool#*:}; } || continue; \
		dpkg -x $${tool#*:}_*.deb .; \
	done
	mv $@.new $@

# vLLM, SGLang's publisher and LMCache's connector, without the daemon: an engine's environment as in production.
$(ENGINES)/.engines: pyproject.toml tests/engines/install $(wildcard tests/engines/requirements*.txt)
	tests/engines/install $(ENGINES) $(PYTHON)
