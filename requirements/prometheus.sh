#!/usr/bin/env bash
# Unpacks Debian's or Ubuntu's package of Prometheus, with promtool, into build/prometheus for the tests of the board; needs
# no root, but package lists (apt-get update). Does nothing where it is there.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=build/prometheus
# Two runs of tests at once fetch it once.
mkdir -p build
exec 9>build/prometheus.lock
if command -v flock >/dev/null; then flock 9; fi
if [[ -x $folder/usr/bin/promtool ]]; then exit 0; fi
if ! command -v apt-get >/dev/null || ! command -v dpkg >/dev/null; then
  echo "prometheus.sh: only for Debian and Ubuntu; elsewhere put prometheus and promtool on PATH" >&2
  exit 1
fi
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
# Run by root, apt downloads as a user of its own, who has to be let in.
chmod 755 "$scratch"
if ! (cd "$scratch" && apt-get download -qq prometheus) 2>"$scratch/log"; then
  cat "$scratch/log" >&2
  echo "prometheus.sh: could not download the package; are there package lists (apt-get update) and a network?" >&2
  exit 1
fi
# Under another name until it is whole.
dpkg -x "$scratch"/prometheus_*.deb "$scratch/root"
rm -rf "$folder" && mv "$scratch/root" "$folder"
