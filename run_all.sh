#!/usr/bin/env bash
# The whole experiment: three pretrainings, seven rows, two tasks, label fractions, linear probes, tables and figure.
#
#   bash run_all.sh                                 simulated data, every stage small: some 10 minutes on 2 cores
#   bash run_all.sh --sen12ms DIR --dfc2020 DIR     the published sizes and five seeds, a job per GPU at a time
#
# DIR is a folder of GeoTIFFs or a store of data.py pack. --out DIR is where everything goes (default: simulated/,
# or experiment/ for real data). Started again after a break, it does only what is missing.
set -euo pipefail

sen12ms="" dfc2020="" out=""
while [ $# -gt 0 ]; do
  case "$1" in
    --sen12ms | --dfc2020 | --out)
      [ -n "${2:-}" ] || { echo "run_all.sh: $1 needs a folder" >&2; exit 2; }
      printf -v "${1#--}" %s "$(realpath -m "$2")"; shift 2 ;;
    *) echo "run_all.sh: unknown option $1; see the top of the file" >&2; exit 2 ;;
  esac
done
if [ "${sen12ms:+given}" != "${dfc2020:+given}" ]; then
  echo "run_all.sh: give both --sen12ms and --dfc2020, or neither for simulated data" >&2; exit 2
fi
cd "$(dirname "$(realpath "$0")")"

gpus=$(python -c "import torch; print(torch.cuda.is_available() * torch.cuda.device_count())")
cores=$(python -c "import os; print(len(os.sched_getaffinity(0)))")
IFS=, read -ra visible <<< "${CUDA_VISIBLE_DEVICES:-$(seq -s, 0 $((gpus > 0 ? gpus - 1 : 0)))}"
# Jobs that do not depend on each other: one per GPU at a time, on a CPU two at a time with half the cores each.
slots=$((gpus > 0 ? gpus : cores > 1 ? 2 : 1))
[ "$gpus" -gt 0 ] || export OMP_NUM_THREADS=$(((cores + slots - 1) / slots))
if [ -n "$sen12ms" ]; then
  out=${out:-experiment} seeds=5 fractions="0.01 0.1 0.5"
  d_simclr=() mma=() simclr_rgb=() scale=()
  finetune=(--threads $((cores / slots < 8 ? (cores + slots - 1) / slots : 8))) probe=("${finetune[@]}")
else
  out=${out:-simulated} seeds=1 fractions="0.1"
  # Small crops, and higher learning rates than published, so that some hundred steps are enough.
  scale=(--scale standard)
  common=(--batch-size 64 --holdout 0.2 --eval-every 5 --threads 1)
  d_simclr=("${common[@]}" --crop 32 --lr 1e-3 --epochs 10 --constant-epochs 5)
  mma=("${common[@]}" --crop 16 --lr 3e-4 --epochs 8 --constant-epochs 4)
  simclr_rgb=("${common[@]}" --crop 32 --lr 1e-3 --epochs 6 --constant-epochs 3)
  probe=(--crop 32 --threads 1)
  finetune=("${probe[@]}" --epochs 4 --drop-epoch 3 --batch-size 32 --lr 1e-3 --classifier-lr 1e-2)
fi
mkdir -p "$out"

jobs=()
queue() { jobs+=("$(printf '%q ' "$@")"); }
run_slot() {  # takes jobs until none is left
  local i status log
  trap 'exit 143' TERM  # once the job in hand has ended: a pretraining saves first
  for ((i = 0; i < ${#jobs[@]}; i++)); do
    mkdir "$claims/$i" 2> /dev/null || { [ -d "$claims/$i" ] && continue; } || {
      echo "run_all.sh: $claims/$i cannot be made: free space, start again" >&2; exit 2; }
    echo "+ ${jobs[i]}"
    if [ "$slots" -eq 1 ]; then eval "${jobs[i]}"; continue; fi
    log=$out/job-$i.log status=0  # the progress bars of several at a time go to files
    eval "${jobs[i]}" 2> "$log" || status=$?
    [ "$status" -eq 0 ] || { tr '\r' '\n' < "$log" | tail -n 3 >&2; exit "$status"; }
  done
}
end() {  # all that was started; a job in hand saves first
  local pid
  for pid in "${pids[@]}"; do kill -TERM -- -"$pid" 2> /dev/null || true; done
  wait
  rm -rf "$claims"
}
alone() {  # one command, which ends with this script, too
  pids=() claims=""
  trap end EXIT
  set -m
  "$@" &
  set +m
  pids=($!)
  wait "${pids[0]}"
  trap - EXIT
}
run_jobs() {
  local slot
  pids=() claims=$(mktemp -d "$out/.claims.XXXXXX")  # a folder for each job that a slot has taken
  trap end EXIT
  set -m  # each slot is a process group, so that a failure or Ctrl-C can end it whole
  for ((slot = 0; slot < slots; slot++)); do
    ( set +m
      [ "$gpus" -eq 0 ] || export CUDA_VISIBLE_DEVICES=${visible[slot]}
      run_slot ) &
    pids+=($!)
  done
  set +m
  for pid in "${pids[@]}"; do wait -n; done  # the first failure ends all
  trap - EXIT
  rm -rf "$claims"
  jobs=()
}

if [ -z "$sen12ms" ]; then
  [ -e "$out/dfc2020/index.json" ] || alone python tests/simulate.py "$out/trees" --size 48 --scenes 16 --patches 40 \
    --dfc-train 64 --dfc-test 48
  sen12ms=$out/trees/sen12ms dfc2020=$out/trees/dfc2020
fi
for name in sen12ms dfc2020; do  # a tree is packed once (another one is refused); a store is taken as it is
  if [ ! -e "${!name}/index.json" ]; then
    alone python data.py pack "${!name}" "$out/$name"
    printf -v "$name" %s "$out/$name"
  fi
done

for method in d-simclr mma simclr-rgb; do
  declare -n settings=${method//-/_}
  queue python pretrain.py --method "$method" --data "$sen12ms" --out "$out/runs/$method" "${settings[@]}" "${scale[@]}"
done
run_jobs

evaluate=(--data "$dfc2020" --results "$out/results" --seeds "$seeds")
for method in d-simclr mma simclr-rgb; do
  probed=(python linear_eval.py "${evaluate[@]}" "${probe[@]}" --task single multi)
  queue "${probed[@]}" --checkpoint "$out/runs/$method/last.pt"
  queue "${probed[@]}" --baseline random --method "$method" "${scale[@]}"
  [ -e "$out/runs/$method.png" ] || queue python tests/show.py "$out/runs/$method" "$out/runs/$method.png"
done
queue "${probed[@]}" --baseline bands "${scale[@]}"
for method in d-simclr mma; do
  for sensor in s1 s2; do queue "${probed[@]}" --checkpoint "$out/runs/$method/last.pt" --sensors "$sensor"; done
done
for method in mma d-simclr late-fusion early-fusion simclr-rgb only-s2 only-s1; do
  tuned=(python finetune.py "${evaluate[@]}" --method "$method" "${finetune[@]}")
  case $method in
    simclr-rgb | d-simclr | mma) tuned+=(--checkpoint "$out/runs/$method/last.pt") ;;
    *) tuned+=("${scale[@]}") ;;
  esac
  queue "${tuned[@]}" --task single multi
  case $method in early-fusion | late-fusion | d-simclr | mma)  # the lines of the figure
    read -ra shares <<< "$fractions"
    queue "${tuned[@]}" --label-fraction "${shares[@]}" ;;
  esac
done
run_jobs
alone python finetune.py --report "$out/results"
