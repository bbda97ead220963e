# The commands for people. The work is done by cargo and by the scripts in dev/.
export CARGO_TARGET_DIR ?= $(CURDIR)/target

.DEFAULT_GOAL := help
.PHONY: bench bench-verdict help cluster cluster-down demo demo-stop soak test

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

cluster: ## makes or starts the demo's cluster: a real Kubernetes in one container
	@dev/cluster up landfall-demo

cluster-down: ## ends the demo; removes the clusters and the images that were made for them
	@dev/demo stop 2> /dev/null
	@dev/cluster down landfall-demo landfall-test
	@dev/setup clean

demo: ## says what it will do, sets up what is missing, pushes a commit and takes it live (YES=1 does not ask)
	@dev/demo

demo-stop: ## ends the demo's agent and git server; its state and its cluster stay
	@dev/demo stop

test: ## sets up what is missing and runs every test
	@dev/test

bench: ## measures a release build against a shell script and fixed goals; not while tests run
	@dev/bench

bench-verdict: ## measures how soon a broken rollout is told, beside kubectl; not while tests run
	@dev/bench-verdict

soak: ## 300 verdicts, 100 releases under load, thousands of kills: long, figures in dev/soak.json; SECONDS=600: kills alone
	@dev/soak $(if $(SECONDS),--seconds $(SECONDS))
