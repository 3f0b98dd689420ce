# Sourced by the other scripts: keeps .venv in the repository's root as pyproject.toml and requirements.txt want it.
#
#   kimi_vl_environment run|dev               sets KIMI_VL_PYTHON; silent unless something has to be installed
#   kimi_vl_transformers oldest|newest        after `dev`: prints the Python of an environment over .venv, with the
#                                             oldest or newest transformers that pyproject.toml allows
#   kimi_vl_clients                           the same with clients of OpenAI's API
#   kimi_vl_lmms_eval                         the same with lmms-eval
#   kimi_vl_mindspore                         the same with what pyproject.toml names under mindspore
#   kimi_vl_router                            the same with vllm-router
#   kimi_vl_cluster                           the same with Ray Serve, as pyproject.toml wants it
#
# What was installed is remembered as the text of these two, in .venv itself. A mark stands there while it is
# being made; where it is found later, that installation was cut off, and the environment is made from nothing.

kimi_vl_root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
kimi_vl_venv="$kimi_vl_root/.venv"
KIMI_VL_PYTHON="$kimi_vl_venv/bin/python"

kimi_vl_environment() {
  local wanted
  wanted="$(_kimi_vl_wanted "$1")" || return 1
  _kimi_vl_ready "$1" "$wanted" && return 0
  # One installation at a time. The lock is on the folder, taken by Python because not every system has flock(1);
  # it belongs to the open file, so it stays with this shell and ends with it.
  exec 9< "$kimi_vl_root/scripts" || return 1
  local status=0
  _kimi_vl_python -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX)' || status=1
  if [ "$status" = 0 ] && ! _kimi_vl_ready "$1" "$wanted"; then
    _kimi_vl_install "$1" "$wanted" || status=1
  fi
  exec 9<&-
  [ "$status" = 0 ] || echo "error: the Python environment could not be made; run the command again to continue" >&2
  return "$status"
}

# The Python that makes the environment.
_kimi_vl_python() {
  command python3 "$@"
}

# The text that has to have been installed for the set $1.
_kimi_vl_wanted() {
  case "$1" in
    run | dev) cat "$kimi_vl_root/pyproject.toml" "$kimi_vl_root/requirements.txt" ;;
    *) echo "error: unknown environment $1" >&2; return 1 ;;
  esac
}

_kimi_vl_ready() {
  local record="$kimi_vl_venv/.installed-$1"
  [ -x "$KIMI_VL_PYTHON" ] && [ ! -e "$kimi_vl_venv/.installing" ] && [ -f "$record" ] &&
    [ "$(cat "$record")" = "$2" ]
}

_kimi_vl_install() {
  local extra=checkout existed=1 interrupted=""
  [ "$1" = dev ] && extra=dev
  if ! _kimi_vl_python -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "error: Python 3.11 or newer is needed as python3" >&2
    return 1
  fi
  if [ -e "$kimi_vl_venv/.installing" ] || ! "$KIMI_VL_PYTHON" -c 'import pip' > /dev/null 2>&1; then
    echo "set-up: making the Python environment in .venv" >&2
    existed=""
    mkdir -p "$kimi_vl_venv" && touch "$kimi_vl_venv/.installing" || return 1
    # Not `venv --clear`: the mark has to stay.
    find "$kimi_vl_venv" -mindepth 1 -maxdepth 1 ! -name .installing -exec rm -rf {} + || return 1
    _kimi_vl_python -m venv "$kimi_vl_venv" >&2 || return 1
  fi
  echo "set-up: installing what pyproject.toml names under $extra (once; this can take some minutes)" >&2
  touch "$kimi_vl_venv/.installing" || return 1
  rm -f "$kimi_vl_venv"/.installed-*
  trap 'interrupted=1' INT TERM
  # The versions of the image, but for torch.
  grep -v '^torch==' "$kimi_vl_root/requirements.txt" > "$kimi_vl_venv/constraints.txt" || return 1
  if ! "$KIMI_VL_PYTHON" -m pip install --disable-pip-version-check --no-input \
    --constraint "$kimi_vl_venv/constraints.txt" --editable "$kimi_vl_root[$extra]" >&2; then
    trap - INT TERM
    # pip gave up by itself (no network, no such version): what was there before is still good.
    if [ -n "$existed" ] && [ -z "$interrupted" ]; then rm -f "$kimi_vl_venv/.installing"; fi
    return 1
  fi
  trap - INT TERM
  # The development set holds the other one.
  _kimi_vl_wanted run > "$kimi_vl_venv/.installed-run" || return 1
  if [ "$1" = dev ]; then printf '%s\n' "$2" > "$kimi_vl_venv/.installed-dev" || return 1; fi
  rm -f "$kimi_vl_venv/.installing"
  echo "set-up: done" >&2
}

# Environments over .venv have only what differs from it, whose packages they find after their own: torch is never
# installed anew, and no other package moves further than what is wanted needs. Each prints its Python.

kimi_vl_transformers() {
  local allowed wanted
  allowed="$("$KIMI_VL_PYTHON" -c 'import sys, tomllib
dependencies = tomllib.load(open(sys.argv[1], "rb"))["project"]["dependencies"]
print(next(text for text in dependencies if text.startswith("transformers")))' "$kimi_vl_root/pyproject.toml")" || return 1
  case "$1" in
    oldest) wanted="$(sed -E 's/^([a-z]+)>=([0-9.]+).*$/\1==\2/' <<< "$allowed")" ;;
    newest) wanted="$allowed" ;;
    *) echo "error: unknown environment $1" >&2; return 1 ;;
  esac
  _kimi_vl_over "$1" "$wanted"
}

kimi_vl_clients() {
  _kimi_vl_over clients langchain-openai==1.7.4 litellm==1.110.2
}

# filelock 4 lacks what datasets asks of it. PyPI's torchvision does not load with torch for CPUs, and what asks a
# server does not need it.
kimi_vl_lmms_eval() {
  local python
  python="$(_kimi_vl_over lmms-eval lmms-eval==0.7.3 "filelock<4")" || return 1
  "$KIMI_VL_PYTHON" -m pip --python "$python" uninstall --yes --quiet torchvision >&2
  echo "$python"
}

kimi_vl_mindspore() {
  local wanted
  wanted="$("$KIMI_VL_PYTHON" -c 'import sys, tomllib
print(*tomllib.load(open(sys.argv[1], "rb"))["project"]["optional-dependencies"]["mindspore"], sep="\n")' \
    "$kimi_vl_root/pyproject.toml")" || return 1
  mapfile -t wanted <<< "$wanted"
  _kimi_vl_over mindspore "${wanted[@]}"
}

kimi_vl_router() {
  _kimi_vl_over router vllm-router==0.1.17
}

kimi_vl_cluster() {
  local wanted
  wanted="$("$KIMI_VL_PYTHON" -c 'import sys, tomllib
extras = tomllib.load(open(sys.argv[1], "rb"))["project"]["optional-dependencies"]
print(next(text for text in extras["cluster"] if text.startswith("ray")))' "$kimi_vl_root/pyproject.toml")" || return 1
  _kimi_vl_over cluster "$wanted"
}

# The environment .venv-$1 with the requirements that follow. One at a time: two tests may ask for it.
_kimi_vl_over() {
  local name="$1" over="$kimi_vl_root/.venv-$1"
  shift
  (
    exec 8< "$kimi_vl_root/scripts" || exit 1
    _kimi_vl_python -c 'import fcntl; fcntl.flock(8, fcntl.LOCK_EX)' || exit 1
    _kimi_vl_install_over "$name" "$over" "$@"
  ) || return 1
  echo "$over/bin/python"
}

_kimi_vl_install_over() {
  local name="$1" over="$2" base
  shift 2
  # Made from nothing where its making was cut off, and where .venv has changed below it.
  if [ -e "$over/.installing" ] || ! [ "$over/.made" -nt "$kimi_vl_venv/.installed-dev" ]; then
    base="$("$KIMI_VL_PYTHON" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" || return 1
    rm -rf "$over"
    "$KIMI_VL_PYTHON" -m venv --without-pip "$over" >&2 || return 1
    echo "$base" > "$("$over/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/below.pth" || return 1
    "$KIMI_VL_PYTHON" -m pip freeze | grep '^torch==' > "$over/constraints.txt" || return 1
    touch "$over/.made"
  fi
  # A range may have a newer version than it had; exact versions, and MindSpore with its 800 MB, are installed once.
  [ "$(cat "$over/.wanted" 2> /dev/null)" = "$*" ] && [[ "$1" == *==* || "$name" = mindspore ]] && return 0
  touch "$over/.installing" || return 1
  echo "set-up: $* in .venv-$name" >&2
  "$KIMI_VL_PYTHON" -m pip --python "$over/bin/python" install --disable-pip-version-check --no-input --quiet --upgrade \
    --constraint "$over/constraints.txt" "$@" >&2 || return 1
  printf '%s' "$*" > "$over/.wanted" || return 1
  rm -f "$over/.installing"
}
