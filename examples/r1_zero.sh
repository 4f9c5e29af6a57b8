#!/usr/bin/env bash
# R1-Zero at toy scale: reinforcement learning straight from a base model that hardly ever uses the reasoning format.
# Minutes on a CPU, nothing downloaded. What to expect stands behind each step, and in docs/r1.md.
#
#   examples/r1_zero.sh [FOLDER]        default runs/r1-zero; SCALE=20 divides the work by 20 (a smoke test)
set -euo pipefail
out=${1:-runs/r1-zero} scale=${SCALE:-1}
export PATH=$PATH:$(dirname "${BASH_SOURCE[0]}")/../.venv/bin # where `make setup` leaves the command
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # on a model this small a second thread waits more than it computes
[ ! -e "$out" ] || { echo "$out is there already: pass another folder" >&2; exit 2; }
chain=generated:chain,steps=4,modulus=10
common=(--max-tokens 128 --dtype fp32 --activation-checkpointing off)

solve() { # solved rate of a model on 300 problems that cannot have been in training
  longtrace evaluate --model "$out/$1" --data "$chain,split=test" --limit $(((300 + scale - 1) / scale)) --max-new-tokens 80 \
    --temperature 1 --batch-size 300 --out "$out/$1.json"
}

train() { # NAME MODEL STEPS LR SOURCE...
  longtrace sft --model "$out/$2" --out "$out/$1" "${common[@]}" --tokens-per-row 704 --steps $(((${3} + scale - 1) / scale)) --lr "$4" \
    --warmup 0.05 --data "${@:5}"
}

# The base: 0.4M weights that read the worked examples of a careless teacher first (every seventh step is wrong), and then
# bare answers with one worked example in twenty. It answers at once, and guesses: expect 11 % (a tenth is luck), 4 tokens.
longtrace demo --base-only --out "$out/demo"
train worked demo/base 700 3e-3 "$chain,errors=0.15,rows=9000"
train base worked 300 1e-3 "$chain,style=answer,rows=7000,seed=1" "$chain,errors=0.15,rows=350,seed=1"
solve base

# Reinforcement learning, nothing else: R1-Zero's two rewards. Expect format from 0.02 to 0.5 in 10 steps and 0.96 in 20,
# tokens from 5 to 31 with it, accuracy from 0.12 to 0.4 in 40 steps and 0.6 in 80; then 64 % of the held-out problems.
longtrace grpo --model "$out/base" --out "$out/zero" "${common[@]}" --tokens-per-row 2048 --max-new-tokens 80 \
  --data "$chain,rows=2000,seed=2" --reward accuracy format --steps $(((80 + scale - 1) / scale)) --lr 3e-4 --warmup 0
solve zero
echo "accuracy and length against steps: $out/zero/report.html"
