#!/usr/bin/env bash
# Measure on a GPU, most wanted first: one JSON file a measurement. What is there already is left alone, so an
# interrupted run is started again. A measurement that fails says why and leaves no file; the others go on.
#
#   bench/cuda.sh SPARK_ME FOLDER
#
# SPARK_ME is the command, FOLDER takes the files. At the end their tables are printed as Markdown.
set -euo pipefail
spark_me=$1 folder=$2
mkdir -p "$folder"
# Backends of different sizes take turns: memory of one must serve the others.
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}

measure() { # NAME ARGUMENTS...
    local file=$folder/$1.json
    shift
    [ -e "$file" ] && return
    echo "$(date +%T) $file"
    timeout --kill-after 10 470 "$spark_me" bench --device cuda --json "$file" "$@" || echo "failed ($?): $file" >&2
}

encoder=(--scope encoder --batch 256 --runs 7)
step=(--scope step --batch 256 --runs 7 --backends native minkowski masked_dense)
largest=(--largest-batch --batch 64 --dtype bfloat16 --backends native minkowski masked_dense)

measure 01-resnet50-encoder-bf16 --encoder resnet50 "${encoder[@]}" --dtype bfloat16
measure 02-convnextv2_tiny-encoder-bf16 --encoder convnextv2_tiny "${encoder[@]}" --dtype bfloat16
measure 03-resnet50-step-bf16 --encoder resnet50 "${step[@]}" --dtype bfloat16
measure 04-convnextv2_tiny-step-bf16 --encoder convnextv2_tiny "${step[@]}" --dtype bfloat16
measure 05-resnet50-encoder-tf32 --encoder resnet50 "${encoder[@]}" --dtype tf32
measure 06-convnextv2_tiny-encoder-tf32 --encoder convnextv2_tiny "${encoder[@]}" --dtype tf32
measure 07-resnet50-largest --encoder resnet50 "${largest[@]}"
measure 08-convnextv2_tiny-largest --encoder convnextv2_tiny "${largest[@]}"
measure 09-resnet50-step-tf32 --encoder resnet50 "${step[@]}" --dtype tf32
measure 10-convnextv2_tiny-step-tf32 --encoder convnextv2_tiny "${step[@]}" --dtype tf32
measure 11-resnet101-encoder-bf16 --encoder resnet101 "${encoder[@]}" --batch 128 --dtype bfloat16
measure 12-convnext_base-encoder-bf16 --encoder convnext_base "${encoder[@]}" --batch 128 --dtype bfloat16
measure 13-resnet101-step-bf16 --encoder resnet101 "${step[@]}" --batch 128 --dtype bfloat16
measure 14-convnext_base-step-bf16 --encoder convnext_base "${step[@]}" --batch 128 --dtype bfloat16
measure 15-resnet101-encoder-tf32 --encoder resnet101 "${encoder[@]}" --batch 128 --dtype tf32
measure 16-convnext_base-encoder-tf32 --encoder convnext_base "${encoder[@]}" --batch 128 --dtype tf32
measure 17-resnet101-step-tf32 --encoder resnet101 "${step[@]}" --batch 128 --dtype tf32
measure 18-convnext_base-step-tf32 --encoder convnext_base "${step[@]}" --batch 128 --dtype tf32

"$spark_me" bench --table "$folder"/*.json
