# The only commands anyone types. `make serve` and `make test` install what they need first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed

.DEFAULT_GOAL := help
.PHONY: help install serve test check test-fast test-engine test-ray test-system test-drill bench-gateway bench-grpc bench-streams bench-fairness drill-gateway drill-cluster bench-planner bench-cluster format proto docs accuracy calibrate lock test-multihost

help:  ## what can be typed here
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

install: $(INSTALLED)  ## .venv with everything in it

# Made anew when a lock file or the project's metadata changes; otherwise nothing is reinstalled.
$(INSTALLED): requirements/cpu.txt requirements/dev.txt pyproject.toml requirements/install.sh
	PYTHON="$(PYTHON)" VENV="$(VENV)" sh requirements/install.sh
	touch $@

serve: install  ## Ray, engines and gateway on this machine, until Ctrl-C
	$(BIN)/bora up

check: install  ## format, lint, types, imports, generated files: no test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: check test-fast test-engine test-ray test-system test-drill  ## everything that CI runs

test-fast: install  ## seconds: no engine, no Ray
	$(BIN)/python -m pytest

test-engine: install  ## minutes: real vLLM processes
	$(BIN)/python -m pytest -m engine

test-ray: install  ## minutes: Ray with simulated engines
	$(BIN)/python -m pytest -m ray

test-drill: install  ## a minute: engines that fail under streams, which no client may notice
	$(BIN)/python -m loadtests.drill_gateway --quick

test-system: install  ## minutes: all of bora, as a user starts it
	$(BIN)/python -m pytest -m system

test-multihost: install  ## minutes: ray up on hosts with networks of their own (root; installs sshd, rsync, redis)
	$(BIN)/python -m pytest -m multihost

format: install  ## write the code the way `check` wants it
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

proto: install  ## gateway/proto/*_pb2*.py from the .proto files
	$(BIN)/python -m grpc_tools.protoc -I . --python_out=. --grpc_python_out=. --pyi_out=. gateway/proto/*.proto

docs: install  ## configs/README.md from the descriptions in the code
	$(BIN)/python -c "from cluster.reference import reference; print(reference(), end='')" > configs/README.md

accuracy: install  ## predicted against measured memory and speed, beside other estimators
	$(BIN)/python -m tests.accuracy

calibrate: install  ## placement/fitted.py from measured latency, by least squares
	$(BIN)/python -m tests.accuracy.calibrate

bench-gateway: install  ## CPU per request and per streamed chunk, beside other gateways
	$(BIN)/python -m loadtests.bench_gateway

bench-planner: install  ## the planner: time, gap and memory over size; cost beside plans made by hand
	$(BIN)/python -m loadtests.bench_planner
	$(BIN)/python -m loadtests.bench_placement
	$(BIN)/python -m loadtests.bench_helix

bench-grpc: install  ## CPU per gRPC request and message, beside a bare pass-through
	$(BIN)/python -m loadtests.bench_grpc

bench-cluster: install  ## 50, 100, 200 replicas on 12 hosts: deploy, scale, host loss, loop times, memory (root)
	$(BIN)/python -m tests.multihost.bench

bench-streams: install  ## 10,000 streams through one gateway worker, 24,000 clients that come and go
	$(BIN)/python -m loadtests.bench_streams

bench-fairness: install  ## one tenant at 50 times the load: what another one waits
	$(BIN)/python -m loadtests.bench_fairness

drill-gateway: install  ## engines die, freeze and talk nonsense under streams: does a client notice?
	$(BIN)/python -m loadtests.drill_gateway

drill-cluster: install  ## engines, gateway, controller, head, hosts and cables die: what it costs (all rows: root)
	$(BIN)/python -m tests.multihost.drill

lock: install  ## requirements/*.txt from pyproject.toml
	BIN="$(BIN)" sh requirements/lock.sh
