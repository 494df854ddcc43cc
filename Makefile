# Every target begins with what it needs: on a bare Debian or Ubuntu machine `make test` is enough.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SUDO := $(shell [ "$$(id -u)" = 0 ] || echo sudo)
PACKAGES := python3-venv fuse3 attr acl gcc libc6-dev e2fsprogs git make procps psmisc sqlite3 strace util-linux
PYTEST := $(BIN)/pytest
# Tests wait more than they compute. A file's tests stay together: they share its mounts. The long ones come first
# (tests/conftest.py), so that no worker ends with one of them alone. A machine on which much fails (a full disk, no
# FUSE) is told so after a while, not after each of thousands of tests has waited for its mount.
PYTEST_ARGS ?= -n 3 --dist loadfile --no-loadscope-reorder --maxfail 30

.PHONY: setup demo test soak sanitize conformance lint bench clean

setup: $(VENV)/.installed

# Only what is missing is installed, so that a machine without the right to do so can still be set up by hand.
# The server's compiled part is optional, and built anew when what it has to agree with has changed. So is libfuse 2,
# which Debian has no more after its 13: only --binding fusepy needs it.
COMPILED := $(addprefix tierfs/,$(shell grep -o '"[a-z_/]*\.[chp]y*"' tierfs/fuse/compiled.py | tr -d '"'))

$(VENV)/.installed: setup.cfg setup.py pyproject.toml Makefile $(COMPILED)
	@missing=""; for package in $(PACKAGES); do \
		dpkg-query -W -f='$${Status}' $$package 2>/dev/null | grep -q 'ok installed' || \
		dpkg-query -W -f='$${Status}' $${package}t64 2>/dev/null | grep -q 'ok installed' || \
		missing="$$missing $$package"; \
	done; \
	if [ -n "$$missing" ]; then \
		echo "installing$$missing"; \
		$(SUDO) apt-get update -qq && \
		for package in $$missing; do \
			DEBIAN_FRONTEND=noninteractive $(SUDO) apt-get install -y -qq --no-install-recommends $$package >/dev/null || \
			DEBIAN_FRONTEND=noninteractive $(SUDO) apt-get install -y -qq --no-install-recommends $${package}t64 >/dev/null || \
			{ echo "make setup: $$package cannot be installed: install it by hand" >&2; exit 1; }; \
		done; \
	fi
	@[ -e /dev/fuse ] || $(SUDO) modprobe fuse || echo "make setup: there is no /dev/fuse: mounting will fail" >&2
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "make setup: $(PYTHON) is too old: give Python 3.11 or later as PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import ctypes.util, sys; sys.exit(not ctypes.util.find_library("fuse"))' || \
		{ known() { apt-cache show libfuse2 libfuse2t64 2>/dev/null | sed -n 's/^Package: //p' | head -n 1; }; \
		package=$$(known); \
		[ -n "$$package" ] || ls /var/lib/apt/lists/*_Packages* >/dev/null 2>&1 || \
		{ $(SUDO) apt-get update -qq && package=$$(known); }; \
		[ -n "$$package" ] && \
		DEBIAN_FRONTEND=noninteractive $(SUDO) apt-get install -y -qq --no-install-recommends $$package >/dev/null; } || \
		echo "make setup: there is no libfuse 2 to be had: --binding fusepy cannot be used" >&2
	[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -c 'import os, sys, sysconfig; \
		sys.exit(not os.path.exists(sysconfig.get_paths()["include"] + "/Python.h"))' || \
		DEBIAN_FRONTEND=noninteractive $(SUDO) apt-get install -y -qq --no-install-recommends python3-dev >/dev/null || \
		echo "make setup: python3-dev cannot be installed: the mount is served by pure Python, more slowly" >&2
	@echo 'installing what setup.cfg lists (minutes, the first time)'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	@# Who may not write here, or is told not to, would compile all of it whenever a process of TierFS begins.
	$(BIN)/python -m compileall -q tierfs daemon
	@touch $@

demo: setup
	@bash tests/demo.sh

test: setup
	$(PYTEST) -m 'not soak' $(PYTEST_ARGS)

soak: setup
	$(PYTEST) -m soak --timeout 7200

sanitize: setup
	@bash tests/sanitize.sh $(SANITIZE_ARGS)

# The public POSIX suites on both bindings, beside the filesystem beneath; they come from cargo where it is.
conformance: setup
	@$(BIN)/python tests/conformance/run.py $(CONFORMANCE_ARGS)

lint: setup
	$(BIN)/ruff check tierfs daemon tests benchmarks
	$(BIN)/mypy

# Peers are measured where they can be had; the tables name those that are missing.
bench: setup
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[bench]' || true
	@for package in bindfs mergerfs redis-server rsync s3fs; do \
		dpkg-query -W -f='$${Status}' $$package 2>/dev/null | grep -q 'ok installed' || \
		DEBIAN_FRONTEND=noninteractive $(SUDO) apt-get install -y -qq --no-install-recommends $$package >/dev/null || \
		echo "make bench: $$package cannot be installed: its rows will be missing"; \
	done
	@for benchmark in benchmarks/bench_*.py; do echo "== $$benchmark"; $(BIN)/python $$benchmark $(BENCH_ARGS) || exit 1; done

clean:
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
