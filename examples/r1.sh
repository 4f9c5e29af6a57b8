#!/usr/bin/env bash
# DeepSeek-R1's pipeline at toy scale: cold start -> RL -> rejection sampling -> SFT with other data mixed in -> RL.
# Minutes on a CPU, nothing downloaded. What to expect stands behind each step, and in docs/r1.md.
#
#   examples/r1.sh [FOLDER]             default runs/r1; SCALE=20 divides the work by 20 (a smoke test)
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
out=${1:-runs/r1} scale=${SCALE:-1}
export PATH=$PATH:$(dirname "${BASH_SOURCE[0]}")/../.venv/bin # where `make setup` leaves the command
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # on a model this small a second thread waits more than it computes
[ ! -e "$out" ] || { echo "$out is there already: pass another folder" >&2; exit 2; }
chain=generated:chain,steps=4,modulus=10 facts=$here/facts.jsonl
common=(--max-tokens 128 --dtype fp32 --activation-checkpointing off)

train() { # NAME MODEL STEPS LR SOURCE...
  longtrace sft --model "$out/$2" --out "$out/$1" "${common[@]}" --tokens-per-row 704 --steps $(((${3} + scale - 1) / scale)) --lr "$4" \
    --warmup 0.05 --data "${@:5}"
}
reinforce() { # NAME MODEL STEPS SOURCE...
  longtrace grpo --model "$out/$2" --out "$out/$1" "${common[@]}" --tokens-per-row 2048 --max-new-tokens 80 \
    --reward accuracy format=0.1 --steps $(((${3} + scale - 1) / scale)) --lr 3e-4 --warmup 0 --data "${@:4}"
}
solve() { # reasoning on problems that cannot have been in training, and what else the model knew
  echo "$1, reasoning and facts:"
  longtrace evaluate --model "$out/$1" --data "$chain,split=test" --limit $(((300 + scale - 1) / scale)) --max-new-tokens 80 \
    --temperature 1 --batch-size 300 --out "$out/$1-reasoning.json"
  longtrace evaluate --model "$out/$1" --data "$facts" --max-new-tokens 80 --out "$out/$1-facts.json"
}

# The base (R1: V3-Base) has read worked examples (a careless teacher's, every seventh step wrong), knows facts, and answers
# problems at once, with a guess: worked examples are one in twenty of what it read last.
longtrace demo --base-only --out "$out/demo"
mix=("$facts" "$facts" "$facts" "$facts" "$facts" "$facts" "$facts" "$facts") # eight times over, or they would be too few
train worked demo/base 800 3e-3 "$chain,errors=0.15,rows=4000" "${mix[@]}"
train base worked 500 2e-3 "$chain,style=answer,rows=1000,seed=1" "$chain,errors=0.15,rows=50,seed=1" "${mix[@]}"
solve base # expect 11 % reasoning (a tenth is luck), all of 64 facts

# 1. Cold start (R1: thousands of long traces): the careless teacher's again.
train cold base 200 1e-3 "$chain,errors=0.15,rows=3000,seed=1"
solve cold # 52 % (0.85^4 of the teacher's examples end right); 22 % of the facts: the rest is forgotten

# 2. Reinforcement learning on reasoning.
reinforce rl cold 40 "$chain,rows=2000,seed=2"
solve rl # 95 %, 20 %

# 3. Rejection sampling from it: four tries at each problem, right ones in the right format, two of them at most.
longtrace sample --model "$out/rl" --out "$out/sampled" --data "$chain,rows=$(((1000 + scale - 1) / scale)),seed=3" --samples 4 \
  --max-new-tokens 80 --require accuracy format --per-problem 2 # expect 3,804 right of 4,000, 1,004 kept

# 4. Fine-tuning, from the base again, on what was kept and on other data (R1: 600k and 200k).
train sft base 400 2e-3 "$out/sampled/kept.jsonl" "${mix[@]}"
solve sft # 99 %, all of the facts

# 5. Reinforcement learning on everything.
reinforce r1 sft 20 "$chain,rows=2000,seed=4" "$facts"
solve r1 # 99 %, all of the facts: one group in sixteen still has something to teach
