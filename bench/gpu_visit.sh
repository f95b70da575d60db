#!/bin/bash
# One visit to a machine with a GPU, CUDA and torch, and nothing else. Here:
#
#   bash bench/gpu_visit.sh fetch WHEELS        of constraints.txt what the visit imports, but for torch and CUDA
#   bash bench/gpu_visit.sh pack WHEELS OUT     OUT/000, OUT/001, ...: each fits a transfer, large wheels in pieces
#
#   HAVE            a file of package names that are there already (a `pip freeze` of that machine): not fetched
#   FOR_PYTHON      3.12: wheels for that Python instead of this one
#
# There, with the transfers as they come, and then as often as it says that time was up:
#
#   bash bench/gpu_visit.sh take OUT/000        put what came into WHEELS
#   bash bench/gpu_visit.sh run [STAGE...]      join and install wheels, then measure, test, report
#
#   REHEARSE=1      the embedded model on the processor, the same code
#   OUT             where results go (gpu-visit); a second run goes on where the first was stopped
#   WHEELS          the folder with wheels and pieces of wheels (wheels); they are installed below OUT, so that
#                   the machine's own packages stay as they are
#   BUDGET_S        seconds that this command may take (540): what does not fit is left for the next
set -u
cd "$(dirname "$0")/.." || exit 1
OUT=${OUT:-gpu-visit} WHEELS=${WHEELS:-wheels} BUDGET_S=${BUDGET_S:-540} PYTHON=${PYTHON:-python3}
export SDENGINE_CACHE=${SDENGINE_CACHE:-$OUT/cache}

# What the visit imports: ours, the export, diffusers, pytest, the engines.
IMPORTED='numpy|pillow|ftfy|wcwidth|typer|click|shellingham|rich|pygments|markdown-it-py|mdurl|annotated-doc
typing_extensions|onnx|onnx-ir|onnxscript|ml_dtypes|protobuf|safetensors|open_clip_torch|pyyaml|diffusers|transformers
accelerate|huggingface_hub|hf-xet|httpx2|httpcore2|tokenizers|regex|requests|urllib3|certifi|idna|charset-normalizer|tqdm|packaging
filelock|fsspec|truststore|flatbuffers|lazy-importer|httpx|httpcore|anyio|h11|sniffio|importlib_metadata|zipp|psutil|pytest|pluggy|iniconfig|openvino
cuda-bindings|cuda-pathfinder|tensorrt_rtx_cu13_bindings|tensorrt_rtx_cu13_libs'

wanted() { # one requirement a line; onnxruntime-gpu in the place of onnxruntime: two are one too many
  names=$(echo "$IMPORTED" | paste -sd '|')
  { grep -iE "^($names)==" constraints.txt; echo onnxruntime-gpu; } |
    while read -r line; do
      name=$(echo "${line%%=*}" | tr 'A-Z_' 'a-z-')
      tr 'A-Z_' 'a-z-' < "${HAVE:-/dev/null}" | grep -qE "^$name($|[=@ ])" || echo "$line"
    done
}

fetch() { # WHEELS
  other=()
  if [ -n "${FOR_PYTHON:-}" ]; then
    other=(--python-version "$FOR_PYTHON" --implementation cp)
    for glibc in 2_39 2_35 2_34 2_31 2_28 2_27 2_24 2_17 2_12 2_5; do
      other+=(--platform "manylinux_${glibc}_x86_64")
    done
    other+=(--platform manylinux2014_x86_64 --platform manylinux2010_x86_64 --platform manylinux1_x86_64)
  fi
  mkdir -p "$1" && wanted > "$1/wanted.txt" &&
    $PYTHON -m pip download --quiet --no-deps --only-binary=:all: "${other[@]}" --dest "$1" -r "$1/wanted.txt" &&
    # the module that imports the two wheels comes as source, 20 kB of Python
    $PYTHON -m pip wheel --quiet --no-deps --wheel-dir "$1" "$(grep -iE '^tensorrt-rtx-cu13==' constraints.txt)"
}

room() { # bytes of wheels in a transfer of at most 64 MiB, which this repository is a part of
  tree=$(git ls-files -z 2> /dev/null | xargs -0 -r stat -c %s 2> /dev/null | awk '{n += $1} END {print n + 0}')
  echo $((62 * 1024 * 1024 - tree))
}

pack() { # WHEELS OUT
  mkdir -p "$2" || exit 1
  PIECE=${PIECE:-$(room)}
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

install() { # once for each set of wheels; the machine's own packages (torch) are left alone
  [ -d "$WHEELS" ] || return 0
  join "$WHEELS"
  ls "$WHEELS"/*.whl > /dev/null 2>&1 || return 0
  (cd "$WHEELS" && ls ./*.whl) | cmp -s - "$OUT/installed" && return 0
  $PYTHON -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target "$OUT/site" "$WHEELS"/*.whl &&
    (cd "$WHEELS" && ls ./*.whl) > "$OUT/installed"
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
    export PYTHONPATH=$PWD/.types:$(realpath "$OUT")/site${PYTHONPATH:+:$PYTHONPATH}
    exec $PYTHON -m sdengine.bench.gpu_visit --out "$OUT" --budget "$BUDGET_S" \
      ${REHEARSE:+--rehearse} "$@" ;;
  *) sed -n '2,20p' "$0"; exit 2 ;;
esac
