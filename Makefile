# SPDX-License-Identifier: MIT
#
# The front door. Every target does its own set-up, and only what is missing of it.

PYTHON := /usr/bin/python3
RIG := PYTHONDONTWRITEBYTECODE=1 $(PYTHON) -m tests.vm
SUDO := $(if $(filter 0,$(shell id -u)),,sudo)

# As they were typed: $$HOME in a command is for the shell of the guest, not for make.
override CMD := $(value CMD)
override K := $(value K)
export KERNEL CMD K CASE ROUNDS CONTESTANTS

.DEFAULT_GOAL := help
.PHONY: help
help: ## what can be made
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: setup kmod test test-unit test-vm demo lint
setup: ## Debian packages, virtual environments, kernels, tools
kmod: ## build mergemem.ko for every kernel, or for KERNEL=6.1
test: ## everything CI runs
test-unit: ## unit tests: newest libraries, Debian 12's, Debian 13's
test-vm: ## tests on real kernels; KERNEL=6.12 and K='pytest -k expression' limit them
demo: ## a real fleet gives its memory back, in a guest
lint: ## all linters, sparse and checkpatch among them

setup kmod test test-unit test-vm demo lint: | $(PYTHON)
	@$(RIG) $@

.PHONY: judges
judges: | $(PYTHON) ## outside programs under reckless merging: KERNEL=6.12 JUDGES='--only sqlite'
	@PYTHONDONTWRITEBYTECODE=1 $(PYTHON) -m tests.judges $(JUDGES)

.PHONY: bench bench-kmod bench-hints bench-idle debug-kernel soak planted
debug-kernel: | $(PYTHON) ## build the kernel that checks everything; KERNEL=debug runs it
	@$(RIG) debug-kernel

bench-kmod: | $(PYTHON) ## the cost of one merge against KSM, a few minutes a kernel; KERNEL=6.12
	@$(RIG) bench-kmod

bench: | $(PYTHON) ## the race against ksmd, 40 minutes a kernel; KERNEL=6.12 CASE='churn idle'
	@$(RIG) bench

bench-hints: | $(PYTHON) ## what hints cost a storm of page faults, a minute a kernel; KERNEL=6.12
	@$(RIG) bench-hints

bench-idle: | $(PYTHON) ## what the agent takes with nothing to gain, 12 minutes a kernel; KERNEL=6.12
	@$(RIG) bench-idle

soak: | $(PYTHON) ## suite and judges on the debug kernel for SOAK_MINUTES=20, then a report
	@PYTHONDONTWRITEBYTECODE=1 $(PYTHON) -m tests.soak

planted: | $(PYTHON) ## show that the debug kernel and the tests find planted bugs
	@PYTHONDONTWRITEBYTECODE=1 $(PYTHON) -m tests.soak.planted

.PHONY: vm sparse checkpatch format clean
vm: | $(PYTHON) ## a command in the guest: KERNEL=6.12 CMD='uname -a'; a shell without CMD
	@$(RIG) run

sparse checkpatch: | $(PYTHON)
	@$(RIG) lint $@

format: ## lay out the Python files
	@build/venv/bin/ruff format --quiet . && build/venv/bin/ruff check --quiet --fix .

clean: ## remove build/; the cache of kernels stays
	rm -rf build

$(PYTHON):
	$(SUDO) apt-get -q update
	$(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get -q install -y --no-install-recommends python3
