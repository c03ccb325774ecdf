"""Many fits of one experiment: a plan, claims, workers, launchers, one table.

    OUT/cohort.json           the configuration that all fits share
    OUT/configs/              copies of the YAML files: editing an experiment changes no fit that is under way
    OUT/fits/<name>/          one fit: job.json, claims/, log.txt, state.json and the run folder that `medinr fit` makes
    OUT/batches/<name>/       fits that share a process: job.json names them; each has its own folder nevertheless
    OUT/cohort.csv            one row a fit; summary.csv and cohort.md: what they have in common

What is done is read from these files alone, so that any number of schedulers may be killed and called again. Modules
that a worker imports do without PyTorch: a worker waits beside each fit, and should cost nothing.
"""
