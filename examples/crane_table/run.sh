#!/usr/bin/env bash
# From a corpus to CRANE's table for a base model and its chat version. One GPU that holds the model; see README.md.
#
#   BASE, CHAT     checkpoint directories or hub ids
#   CORPUS, SPLIT  texts to measure relevance on: a directory, or hf:NAME with its split; default: the packaged corpus
#   LAPE           LAPE's published neuron file, if you have it
#   OUT, PORT      directory for everything that is written; port of the server
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
BASE=${BASE:-meta-llama/Llama-2-7b-hf}
CHAT=${CHAT:-meta-llama/Llama-2-7b-chat-hf}
OUT=${OUT:-results/crane_table}
PORT=${PORT:-8000}
server=

stop() {
    if [ -n "$server" ]; then
        kill -TERM "$server" 2>/dev/null || true
        wait "$server"
        server=
    fi
}
trap stop EXIT

evaluate() {  # MODEL MASKS RESULTS
    crane serve "$1" --masks "$2" --port "$PORT" --max-model-len 4096 >"$3.log" 2>&1 &
    server=$!
    crane eval "$here/plan.yaml" --out "$3" --server "http://127.0.0.1:$PORT" --wait 1800
    stop
}

mkdir -p "$OUT"

# Relevance, on texts of the three languages. CRANE also scores the MLPs' output dimensions.
crane relevance "$BASE" ${CORPUS:+--corpus "$CORPUS"} ${SPLIT:+--split "$SPLIT"} --languages en,zh,vi --limit 1000 \
    --methods crane,lape,random --output-dimensions --dtype bfloat16 --checkpointing --out "$OUT/scores.safetensors"

# Masks: CRANE's own rule (z > 1), and as many random units of the same layers.
crane select "$OUT/scores.safetensors" --method crane --rule published --output-dimensions --out "$OUT/masks"
crane select "$OUT/scores.safetensors" --method random --rule published --quotas like:crane --output-dimensions \
    --out "$OUT/masks"
# LAPE: the published neurons if they are given, else its rule on our texts.
if [ -n "${LAPE:-}" ]; then
    crane masks import-lape "$LAPE" --languages en,zh,fr,es,vi,id,ja --model "$BASE" --out "$OUT/lape"
    cp "$OUT"/lape/lape-{en,zh,vi}.safetensors "$OUT/masks/"
else
    crane select "$OUT/scores.safetensors" --method lape --rule published --out "$OUT/masks"
fi
crane masks list "$OUT/masks"

# The base model; then its masks on the chat version.
evaluate "$BASE" "$OUT/masks" "$OUT/base"
crane masks transfer "$OUT/masks" --to "$CHAT" --out "$OUT/masks-chat"
evaluate "$CHAT" "$OUT/masks-chat" "$OUT/chat"
crane compare "$OUT/base" "$OUT/chat" --out "$OUT/compared"

for version in base chat; do
    python "$here/table.py" "$OUT/$version"
done
