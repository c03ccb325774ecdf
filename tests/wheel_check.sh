#!/bin/sh
# Tries medinr as somebody has it who installed the wheel: outside of the repository, in an environment of its own.
#   sh tests/wheel_check.sh VENV FOLDER
set -eu
venv=$(cd "$1" && pwd)
experiments=$(cd "$(dirname "$0")/../experiments" && pwd)
mkdir -p "$2"
cd "$2"
unset PYTHONPATH # the repository is not to be found by chance
export WANDB_MODE=offline

"$venv/bin/medinr" --help
where=$("$venv/bin/python" -c 'import data_modules, medinr; print(medinr.__file__, data_modules.__file__)')
case $where in
"$venv"/*" $venv"/*) ;;
*) echo "wheel_check: expected the packages from $venv, found $where" >&2 && exit 1 ;;
esac

"$venv/bin/medinr" phantom tube --out tube --size 32
"$venv/bin/medinr" register tube/breathing/fixed.nii.gz tube/breathing/moving.nii.gz --out result --preset fast --report
for file in warped.nii.gz displacement.nii.gz metrics.json transform.ckpt report.html figures/registration.png; do
    test -s "result/$file" || { echo "wheel_check: result/$file: missing" >&2 && exit 1; }
done
"$venv/bin/medinr" apply result/transform.ckpt --image tube/breathing/moving.nii.gz --out carried

"$venv/bin/medinr" phantom dirlab --out data --cases 1 --size 32 --phases extremes
"$venv/bin/medinr" check data
experiment="--config $experiments/idir_dirlab.yaml --data.root data --data.steps_per_epoch 2"
for command in fit test; do
    # shellcheck disable=SC2086 # several words are meant
    "$venv/bin/medinr" $command $experiment --trainer.max_steps 4 --model.points 64 --model.field.hidden '[16, 16]'
done
"$venv/bin/medinr" dashboard idir_dirlab --out dashboard
test -s dashboard/dashboard.html
echo "wheel_check: the wheel works in $venv"
