# Two commands do everything, set-up included: `make report` and `make test`.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
export TF_CPP_MIN_LOG_LEVEL ?= 2

.PHONY: install report test bench lab lock export clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml requirements.lock
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint requirements.lock --editable '.[dev]'
	touch $@

report: install  ## run the demo suite and print the path of its report
	$(BIN)/dermnb run nbs/suites/demo.yaml --workers 2

test: install  ## notebooks clean, export in step, every notebook and test passes
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python tests/in_step.py
	$(BIN)/nbdev_test --n_workers 2 --do_print --timing
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder --durations 15

bench: install  ## what answers, the audit, runs, their input and training steps cost on this machine (the recipe: where DERMNB_DATA_DIR has HAM10000): reports/benchmarks
	mkdir -p reports/benchmarks
	set -e; for n in serving audit batches input choice coverage $${DERMNB_DATA_DIR:+recipe}; do \
	  $(BIN)/papermill --no-progress-bar nbs/benchmarks/$$n.ipynb reports/benchmarks/$$n.ipynb; \
	  $(BIN)/python -c "import sys; from dermnb.report import pages; \
	    from dermnb.runs import kernels; n = sys.argv[1]; \
	    kernels.make_publishable(n, True); print(pages.build_notebook_page(n))" \
	    reports/benchmarks/$$n.ipynb; \
	done

lab: install  ## open the notebooks
	$(BIN)/jupyter lab nbs

export: install  ## write dermnb/ from the notebooks and clean them
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean

lock: install  ## resolve all versions anew
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --all-extras \
	  --no-emit-index-url --no-header pyproject.toml --output-file requirements.lock

clean:  ## remove what the two commands made, but no results
	rm -rf $(VENV) data/cache
