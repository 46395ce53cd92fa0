# make demo: the whole chain on the embedded model.   make test: lint, types and every test.   Both set up .venv first.
.PHONY: demo test setup lint format clean

setup:
	@requirements/install.sh

demo: setup
	@.venv/bin/pareto demo --out demo-out

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

# Two processes: vLLM looks into every imported module when an engine starts in one, and Flask's, which Locust brings,
# do not stand it.
test: lint
	.venv/bin/python -m pytest tests/loadtest
	.venv/bin/python -m pytest --ignore=tests/loadtest

format: setup
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

clean:
	rm -rf .venv build demo-out *.egg-info kv_cache/*.so
