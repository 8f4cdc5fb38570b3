#!/usr/bin/env bash
# Fresh machine: sets everything up, then runs the main job on a small budget: record robot video, train a world model on
# it, rank policies by imagined rollouts, and hold the ranking against the simulator.
#   ./scripts/quickstart.sh                      about 21 minutes on 2 cores after installation
#   ./scripts/quickstart.sh --budget smallest    under 15 minutes: everything runs, nothing is good
#   ./scripts/quickstart.sh --budget hours       the same, trained longer
#   --task TASK (drawer-open-v3)   --out DIR (quickstart-TASK)   --seed N
# Interrupted? Run the same command again: it goes on.
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
budget=default task=drawer-open-v3 out="" seed=0
while [ $# -gt 0 ]; do
  case "$1" in
    --budget) budget=$2; shift 2 ;;
    --task) task=$2; shift 2 ;;
    --out) out=$2; shift 2 ;;
    --seed) seed=$2; shift 2 ;;
    -h|--help) sed -n '2,9s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) echo "quickstart: unknown option $1 (see --help)" >&2; exit 2 ;;
  esac
done
case "$budget" in
  smallest) episodes=24 demos=5  few=3  tok=40  wm=60   free=0   scorer=40  probe=40  policy=40  weak=20  true=6  imagined=12 ;;
  default)  episodes=120 demos=28 few=6 tok=250 wm=400  free=0   scorer=120 probe=80  policy=300 weak=60  true=12 imagined=24 ;;
  hours)    episodes=240 demos=50 few=10 tok=1500 wm=6000 free=6000 scorer=800 probe=800 policy=1500 weak=150 true=50 imagined=100 ;;
  *) echo "quickstart: --budget smallest, default or hours required, got $budget" >&2; exit 2 ;;
esac
out=${out:-quickstart-$task}

bash "$here/scripts/setup.sh"
export PATH="$here/.venv/bin:$PATH"
data=$out/data runs=$out/runs
step() { echo; echo "== $* =="; }
train() { # train FOLDER STAGE ARGS...: run a stage once; an interrupted stage is gone on with
  local folder=$1; shift
  [ -f "$folder.done" ] && return 0
  worldline train "$@" --data "$data" --out "$folder" --loop.seed "$seed"
  touch "$folder.done"
}

mkdir -p "$runs"
shipped=$here/checkpoints/$task steps=7
[ -d "$shipped" ] && steps=8
step "1/$steps record $episodes episodes of metaworld/$task"
# other starts than those the shipped world model was trained on (recorded with seeds below 100)
[ -f "$data/meta/info.json" ] || worldline record "metaworld/$task" --episodes "$episodes" --policy mixed --seed $((seed + 100)) --out "$data"
worldline inspect "$data" --out "$out/inspect"
step "2/$steps train the tokenizer"
train "$runs/tok" tokenizer --preset tiny --max-steps "$tok"
step "3/$steps train the world model"
train "$runs/wm" world-model --tokenizer "$runs/tok" --preset tiny --max-steps "$wm"
free_flag=()
if [ "$free" -gt 0 ]; then
  train "$runs/wm-action-free" world-model --tokenizer "$runs/tok" --preset tiny --max-steps "$free" --model.network.actions False
  free_flag=(--action-free "$runs/wm-action-free")
fi
step "4/$steps train the success scorer and two probes"
train "$runs/success" scorer --tokenizer "$runs/tok" --max-steps "$scorer"
train "$runs/probe" probe --target object --tokenizer "$runs/tok" --max-steps "$probe"
train "$runs/inverse" probe --target action --tokenizer "$runs/tok" --max-steps "$probe"
step "5/$steps train policies from poor to good"
train "$runs/bc" policy --kind bc --episodes "$demos" --max-steps "$policy"
train "$runs/diffusion" policy --kind diffusion --episodes "$demos" --max-steps "$policy"
train "$runs/bc-few-demos" policy --kind bc --episodes "$few" --max-steps "$policy"
train "$runs/bc-hardly-trained" policy --kind bc --episodes "$few" --max-steps "$weak"
step "6/$steps watch and measure the world model on held-out episodes"
worldline imagine --world-model "$runs/wm" --data "$data" --episode 3 --out "$out/imagined.mp4"
worldline eval --world-model "$runs/wm" --data "$data" --split held-out --probe "$runs/probe" --inverse-model "$runs/inverse" \
  --scorer "$runs/success" "${free_flag[@]}" --out "$out/world-model"
step "7/$steps rank the policies in imagination, and in the simulator"
rank() { # rank WORLD-MODEL SCORER OUT
  worldline rank --world-model "$1" --scorer "$2" --data "$data" --truth "metaworld/$task" \
    --policies "$runs/bc" "$runs/diffusion" "$runs/bc-few-demos" "$runs/bc-hardly-trained" "$runs/bc@noise=1.5,lag=8" \
    --episodes "$true" --imagined-episodes "$imagined" --correct-with $((true / 2)) --out "$3"
}
rank "$runs/wm" "$runs/success" "$out/ranking"
if [ -d "$shipped" ]; then
  step "8/$steps rank them with the shipped world model, which was trained longer"
  mkdir -p "$out/ranking-shipped" && cp -R "$out/ranking/rollouts" "$out/ranking-shipped/"  # the truth is the same
  rank "$shipped/world-model" "$shipped/scorer" "$out/ranking-shipped"
fi

echo
echo "Look at:"
echo "  $out/world-model/report.html   real beside imagined, and what the world model gets wrong"
echo "  $out/ranking/report.html       the ranking beside the truth, with its intervals ($true true and $imagined imagined episodes a policy: wide)"
[ ! -d "$shipped" ] || echo "  $out/ranking-shipped/report.html  the same policies, ranked by the shipped world model"
echo "  $out/inspect/report.html       the recorded data"
