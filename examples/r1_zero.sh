#!/usr/bin/env bash
# R1-Zero at toy scale: reinforcement learning straight from a base model that has seen the reasoning format only rarely.
# Minutes on a CPU, nothing downloaded. What to expect stands behind each step, and in docs/r1.md.
#
#   examples/r1_zero.sh [FOLDER]        default runs/r1-zero; SCALE=20 divides the work by 20 (a smoke test)
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
out=${1:-runs/r1-zero} scale=${SCALE:-1}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # on a model this small a second thread waits more than it computes
[ ! -e "$out" ] || { echo "$out is there already: pass another folder" >&2; exit 2; }
chain=generated:chain,steps=4,modulus=10
common=(--max-tokens 128 --dtype fp32 --activation-checkpointing off)

solve() { # solved rate of a model on 300 problems that cannot have been in training
  longtrace evaluate --model "$out/$1" --data "$chain,split=test" --limit $((300 / scale)) --max-new-tokens 80 \
    --temperature 1 --batch-size 300 --out "$out/$1.json"
}

# The base: 0.4M weights that learn from problems with bare answers, from facts, and from few worked traces of a careless
# teacher (one row in ten; every seventh step is wrong). It answers at once, and guesses: a tenth is luck.
longtrace demo --base-only --out "$out/demo"
longtrace sft --model "$out/demo/base" --out "$out/base" "${common[@]}" --tokens-per-row 704 --steps $((1600 / scale)) \
  --lr 3e-3 --warmup 0.05 \
  --data "$chain,style=answer,rows=24000" "$chain,errors=0.15,rows=4000,seed=1" "$here/facts.jsonl"
solve base

# Reinforcement learning, nothing else: R1-Zero's two rewards, accuracy and format. Watch accuracy, format and tokens climb.
longtrace grpo --model "$out/base" --out "$out/zero" "${common[@]}" --tokens-per-row 2048 --max-new-tokens 80 \
  --data "$chain,rows=2000,seed=2" --reward accuracy format --steps $((100 / scale)) --lr 3e-4 --warmup 0
solve zero
echo "accuracy and length against steps: $out/zero/report.html"
