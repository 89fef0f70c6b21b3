# On a fresh machine with Python 3.11 or later: `make demo` runs the main job, `make test` passes the tests. Both set up what
# they need: uv in a private folder when it is absent, then the locked environment in .venv with the interpreter that is there.
PYTHON ?= python3
UV := $(shell command -v uv 2>/dev/null || echo .uv/bin/uv)
export UV_PYTHON_DOWNLOADS := never

.PHONY: demo test check bench
demo: .venv/.synced
	.venv/bin/nightlabel demo

test: .venv/.synced check
	.venv/bin/python -m pytest

check: .venv/.synced
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy

# Ours, its peers and plain processes on the same photographs: 25 minutes, or 5 with `make bench BENCH=--quick`.
bench: .venv-bench/.synced
	.venv-bench/bin/python tests/benchmarks/peers.py $(BENCH)

.venv-bench/.synced: uv.lock pyproject.toml | $(UV)
	UV_PROJECT_ENVIRONMENT=.venv-bench $(UV) sync --frozen --no-default-groups --group bench \
		--python "$$($(PYTHON) -c 'import sys; print(sys.executable)')"
	@touch $@

.venv/.synced: uv.lock pyproject.toml | $(UV)
	$(UV) sync --frozen --python "$$($(PYTHON) -c 'import sys; print(sys.executable)')"
	@touch $@

.uv/bin/uv:
	$(PYTHON) -m venv .uv
	.uv/bin/python -m pip install --quiet 'uv>=0.8'
