# SPDX-License-Identifier: GPL-2.0-only OR MIT
# shellcheck shell=bash
# For the programs of the test: each call is noted, may fail or hang as a file says, and may be the last thing that the
# script sees.
: "${BED_HOST:?}" "${BED_CLUSTER:?}"

# One of the moments at which the script can be killed.
moment() {
  local count=0
  [ ! -e "$BED_HOST/moments" ] || count=$(<"$BED_HOST/moments")
  echo $((count + 1)) >"$BED_HOST/moments"
  if [ "${BED_KILL:-0}" -eq $((count + 1)) ]; then
    echo yes >"$BED_HOST/killed"
    kill -9 "$BED_SCRIPT"
  fi
}

# Ends this program as the test wants it for the word.
trouble() {
  local file=$BED_HOST/fail/$1 status
  if [ -e "$BED_HOST/hang/$1" ]; then
    sleep 60 &
    wait
  fi
  # The script ends, and this program a while later.
  if [ -e "$BED_HOST/outlives/$1" ]; then
    /bin/rm "$BED_HOST/outlives/$1"
    kill -9 "$BED_SCRIPT"
    trap 'touch "$BED_HOST/outlived"' EXIT
    sleep 3
  fi
  if [ -e "$file" ]; then
    status=$(head -n1 "$file")
    # A part of rbd's reasons is output.
    tail -n+2 "$file" | grep "^RBD image"
    tail -n+2 "$file" | grep -v "^RBD image" >&2
    exit "$status"
  fi
}

complain() {
  echo "$2" >&2
  exit "$1"
}

printf '%s\n' "${0##*/} $*" >>"$BED_HOST/calls"
moment
trap 'moment' EXIT
