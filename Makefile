# Every target sets up .venv first, once; later runs reuse it.
# TORCH=2.11.0 picks another torch, PYTHON=python3.12 another interpreter, VENV=dir another place.

export TORCH PYTHON VENV JOBS

.PHONY: setup demo lint types test test-gpu models examples bench check

setup demo lint types test test-gpu models examples bench check:
	@bash .ci/task $@
