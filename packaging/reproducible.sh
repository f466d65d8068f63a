#!/usr/bin/env bash
# Build the packages twice, in different folders, with another umask, time zone, locale and hash seed, and compare the
# bytes. Exit code 1 if they differ.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=$(realpath -s "$(command -v "${PYTHON:-python3}")")
export PYTHON
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# Copies: somebody may be at work in the checkout.
mkdir -p "$work/one" "$work/another/folder" "$work/another/tmp"
cp -r README.md LICENSE CHANGELOG.md docs systemd packaging harmonylite "$work/one"
[ ! -d build/vendor ] || { mkdir "$work/one/build" && cp -r build/vendor "$work/one/build"; }
cp -r "$work/one/." "$work/another/folder"

"$work/one/packaging/build-deb.sh" --no-lintian --out "$work/first" >/dev/null
(
  umask 077
  export TMPDIR=$work/another/tmp TZ=Pacific/Kiritimati LC_ALL=C.UTF-8 PYTHONHASHSEED=1
  "$work/another/folder/packaging/build-deb.sh" --no-lintian --out "$work/second" >/dev/null
)
cd "$work/first"
for package in *.deb; do
  cmp "$package" "$work/second/$package"
  sha256sum "$package"
done
