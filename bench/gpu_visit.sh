#!/bin/bash
# One visit to a machine with a GPU, CUDA and torch, and nothing else. Here:
#
#   bash bench/gpu_visit.sh fetch WHEELS        the wheels of constraints.txt, but for torch and CUDA
#   bash bench/gpu_visit.sh pack WHEELS OUT     OUT/000, OUT/001, ...: at most 60 MiB each, large wheels in pieces
#
# There, with the transfers as they come, and then as often as it says that time was up:
#
#   bash bench/gpu_visit.sh take OUT/000        put what came into WHEELS
#   bash bench/gpu_visit.sh run [STAGE...]      join and install wheels, then test, measure, report
#
#   REHEARSE=1      the embedded model on the processor, the same code
#   OUT             where results go (gpu-visit); a second run goes on where the first was stopped
#   WHEELS          the folder with wheels and pieces of wheels (wheels)
#   BUDGET_S        seconds that this command may take (540): what does not fit is left for the next
set -u
cd "$(dirname "$0")/.." || exit 1
PIECE=${PIECE:-$((60 * 1024 * 1024))} # bytes: a transfer takes 64 MiB at most
OUT=${OUT:-gpu-visit} WHEELS=${WHEELS:-wheels} BUDGET_S=${BUDGET_S:-540} PYTHON=${PYTHON:-python3}
export SDENGINE_CACHE=${SDENGINE_CACHE:-$OUT/cache}

wanted() { # one requirement a line: torch and CUDA are there, and two onnxruntimes are one too many
  grep -E '^[a-zA-Z]' constraints.txt |
    grep -vE '^(torch|torchvision|nvidia-[a-z0-9-]*|cuda-toolkit|triton|onnxruntime|nncf|mypy|ruff|gradio|playwright|pandas)=='
  printf '%s\n' onnxruntime-gpu tensorrt-rtx-cu13 tensorrt-rtx-cu13-libs tensorrt-rtx-cu13-bindings
}

fetch() { # WHEELS
  mkdir -p "$1" && wanted > "$1/wanted.txt" &&
    $PYTHON -m pip download --quiet --no-deps --only-binary=:all: --dest "$1" -r "$1/wanted.txt"
}

pack() { # WHEELS OUT
  mkdir -p "$2" || exit 1
  for wheel in "$1"/*.whl; do
    name=$(basename "$wheel")
    if [ "$(stat -c %s "$wheel")" -le "$PIECE" ]; then cp "$wheel" "$2/$name"; continue; fi
    split --bytes="$PIECE" --numeric-suffixes --suffix-length=3 "$wheel" "$2/$name.part"
    (cd "$1" && sha256sum "$name") > "$2/$name.sha256"
  done
  batch=0 room=$PIECE
  for file in $(find "$2" -maxdepth 1 -type f | sort); do
    size=$(stat -c %s "$file")
    if [ "$size" -gt $room ]; then batch=$((batch + 1)) room=$PIECE; fi
    folder=$(printf '%s/%03d' "$2" $batch)
    mkdir -p "$folder" && mv "$file" "$folder/" && room=$((room - size))
  done
}

take() { mkdir -p "$WHEELS" && cp "$1"/* "$WHEELS/"; }

join() { # WHEELS: every wheel whose pieces are all here becomes whole
  for sum in "$1"/*.sha256; do
    [ -e "$sum" ] || continue
    name=$(basename "$sum" .sha256)
    [ -e "$1/$name" ] || cat "$1/$name".part* > "$1/$name"
    if ! (cd "$1" && sha256sum --check --quiet "$name.sha256"); then
      echo "error: $name is not whole: a piece is missing or damaged; bring its pieces again" >&2
      rm -f "$1/$name"; exit 1
    fi
  done
}

install() { # once; what is there already (torch) is left alone
  [ -d "$WHEELS" ] || return 0
  join "$WHEELS"
  ls "$WHEELS"/*.whl > /dev/null 2>&1 && [ ! -e "$OUT/installed" ] || return 0
  $PYTHON -m pip install --quiet --no-index --no-deps "$WHEELS"/*.whl && touch "$OUT/installed"
}

case "${1:-}" in
  wanted) wanted ;;
  fetch) fetch "$2" ;;
  pack) pack "$2" "$3" ;;
  take) take "$2" ;;
  join) join "$2" ;;
  run)
    shift; mkdir -p "$OUT" .types; [ -e .types/sdengine ] || ln -s .. .types/sdengine
    install || exit 1
    export PYTHONPATH=$PWD/.types${PYTHONPATH:+:$PYTHONPATH}
    exec $PYTHON -m sdengine.bench.gpu_visit --out "$OUT" --budget "$BUDGET_S" \
      ${REHEARSE:+--rehearse} "$@" ;;
  *) sed -n '2,16p' "$0"; exit 2 ;;
esac
