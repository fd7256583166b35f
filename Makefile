# make demo    a peer, a real model, a generated text, and everything stopped again
# make run     the same peer in the foreground at http://127.0.0.1:8000
# make cluster three peers with Serf and etcd on 127.0.0.1 to 127.0.0.3, until Ctrl-C
# make test    all that the tests need, then style, types, imports, tests and failure simulations
# make simulate        the simulations alone: 300 bad days of whole clusters, 500 of their decisions alone
# make simulate-night  twenty times as many, and how many seeds each known bug takes to be found
# make chaos   200 faults on a real cluster, drawn by a seed, and a table of them; needs root (ARGS='--faults 50 --seed 7')
# make lint    style, types and imports only
# make bench   measurements beside other programs, in environments of their own (ARGS=--quick: a short round)
# make bench-engine    the engine beside llama.cpp and tinygrad's own server; builds the first of them once (ARGS as above)
# make bench-cluster   three hosts on this machine: failover, lost workers, rates, a soak; needs root (ARGS as above)
# make clean   remove caches, build outputs and the demo's data
#
# PYTHON=/path/to/python3.12 chooses the interpreter that .venv is made with.

ifdef PYTHON
export PYTHON
endif
BIN := .venv/bin
# The tests that cover every branch of peer/state and peer/decide, which is asserted.
PURE := tests/state tests/decide tests/leader tests/executor/test_judgements.py
# Those that mostly wait for whole peers to be killed and to come back: the others run beside them, and give way.
WAITING := tests/process tests/systemd
.PHONY: demo run cluster test simulate simulate-night chaos lint bench bench-engine bench-cluster clean
.DEFAULT_GOAL := demo

demo:
	@.ci/setup demo
	@$(BIN)/bitinglip demo

run:
	@.ci/setup demo
	@$(BIN)/bitinglip up --data-dir .data/demo --api 127.0.0.1:8000 --device CPU --model smollm2-135m

cluster:
	@.ci/setup cluster
	@$(BIN)/bitinglip cluster

test:
	@.ci/setup test
	@$(MAKE) --no-print-directory lint-ready
	$(BIN)/coverage run -m pytest $(PURE)
	$(BIN)/coverage report
	@$(MAKE) --no-print-directory --jobs=2 --keep-going --output-sync=line test-waiting test-working
	@$(MAKE) --no-print-directory simulate-ready

.PHONY: test-waiting test-working
test-waiting:
	$(BIN)/python -m pytest $(WAITING)

test-working:
	nice -n 5 $(BIN)/python -m pytest $(foreach path,$(PURE) $(WAITING),--ignore=$(path))

simulate:
	@.ci/setup test
	@$(MAKE) --no-print-directory simulate-ready

.PHONY: simulate-ready
simulate-ready:
	$(BIN)/bitinglip simulate --level policy --seeds 500
	$(BIN)/bitinglip simulate --level world --seeds 300

simulate-night:
	@.ci/setup test
	$(BIN)/bitinglip simulate --level policy --seeds 10000 --first 1000
	$(BIN)/bitinglip simulate --level world --seeds 6000 --first 1000
	$(BIN)/bitinglip simulate --level policy --bugs
	$(BIN)/bitinglip simulate --level world --bugs

chaos:
	@.ci/setup test
	$(BIN)/python -m tests.process.cluster.chaos $(ARGS)

lint:
	@.ci/setup test
	@$(MAKE) --no-print-directory lint-ready

.PHONY: lint-ready
lint-ready:
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench:
	@.ci/setup test
	$(BIN)/python -m tests.bench $(ARGS)

bench-engine:
	@.ci/setup test
	$(BIN)/python -m tests.bench.engine $(ARGS)

bench-cluster:
	@.ci/setup test
	$(BIN)/python -m tests.bench.cluster $(ARGS)

clean:
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis .data/demo .data/demo.log
	find . -path ./.venv -prune -o -path ./.bench -prune -o -name __pycache__ -type d -exec rm -rf {} +
