# SPDX-License-Identifier: GPL-2.0-only OR MIT
# shellcheck shell=bash
# What Xen's block-common.sh gives a script, as far as block-tap-rs uses it: errors end the script there, too.
set -e
trap 'fatal "$0 failed; error detected."' ERR
command=$1
LANG=POSIX

log() {
  logger -p "daemon.$1" -- "$0:" "${@:2}"
}

xenstore_read_default() {
  xenstore-read "$1" 2>/dev/null || echo "$2"
}

xenstore_write() {
  xenstore-write "$@" || fatal "Writing $* to xenstore failed."
}

fatal() {
  xenstore-write "$XENBUS_PATH/hotplug-error" "$*" "$XENBUS_PATH/hotplug-status" error
  log err "$@"
  exit 1
}

ebusy() {
  xenstore_write "$XENBUS_PATH/hotplug-error" "$*" "$XENBUS_PATH/hotplug-status" busy
  log err "$@"
  exit 1
}

success() {
  xenstore_write "$XENBUS_PATH/hotplug-status" connected
}

# DRBD's devices are always there; those of Ceph have their numbers in files.
device_major_minor() {
  case $1 in
  /dev/drbd*) printf '93:%x\n' "${1#/dev/drbd}" ;;
  *) cat "$BED_HOST/dev/${1#/dev/}" ;;
  esac
}

claim_lock() { :; }
release_lock() { :; }
