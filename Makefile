# RUN= uses the environment that is already active.
RUN ?= uv run

.PHONY: check test

check: ## style, types and the direction of imports
	$(RUN) ruff check
	$(RUN) ruff format --check
	$(RUN) mypy
	$(RUN) lint-imports

test:
	$(RUN) pytest
