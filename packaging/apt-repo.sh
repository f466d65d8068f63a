#!/usr/bin/env bash
# Make a signed apt repository in dist/apt from the packages in dist/: suites bookworm and trixie, architectures amd64,
# arm64 and armhf.
#
#   packaging/apt-repo.sh [--packages FOLDER] [--out FOLDER]
#
# APT_SIGN_WITH: the id of the key to sign with, in the caller's keyring. Without it, a key is made and kept in
# build/apt-key.pgp: good for trying, and for a private repository.
set -euo pipefail
cd "$(dirname "$0")/.."

packages=dist out=dist/apt
while [ $# -gt 0 ]; do
  case $1 in
    --packages) packages=$2; shift 2 ;;
    --out) out=$2; shift 2 ;;
    *) echo "$0: unknown option $1" >&2; exit 2 ;;
  esac
done
for tool in reprepro gpg; do
  command -v "$tool" >/dev/null || { echo "$0: $tool is missing: apt-get install reprepro gnupg" >&2; exit 1; }
done
compgen -G "$packages/*.deb" >/dev/null || { echo "$0: no packages in $packages: make deb" >&2; exit 1; }

state=$(mktemp -d)
key=${APT_SIGN_WITH:-}
finish() {
  [ "${APT_SIGN_WITH:-}" ] || gpgconf --kill gpg-agent || true
  rm -rf "$state"
}
trap finish EXIT
if [ -z "$key" ]; then
  # A keyring of its own, in a folder with a short name: the agent's socket lies in it.
  export GNUPGHOME=$state/gnupg
  mkdir -m 700 "$GNUPGHOME"
  kept=build/apt-key.pgp
  if [ ! -e "$kept" ]; then
    mkdir -p build
    gpg --batch --quiet --passphrase '' --quick-generate-key 'HarmonyLite packages' ed25519 sign never
    (umask 077 && gpg --batch --quiet --export-secret-keys >"$kept")
  fi
  gpg --batch --quiet --import "$kept"
  key=$(gpg --batch --no-auto-check-trustdb --list-secret-keys --with-colons | awk -F: '$1 == "fpr" { print $10; exit }')
fi

mkdir "$state/conf"
for suite in bookworm trixie; do
  cat <<CONF
Origin: HarmonyLite
Label: HarmonyLite
Codename: $suite
Architectures: amd64 arm64 armhf
Components: main
Description: HarmonyLite for Debian and Raspberry Pi OS
SignWith: $key

CONF
done >"$state/conf/distributions"

rm -rf "$out"
mkdir -p "$out"
out=$(realpath "$out")
for suite in bookworm trixie; do
  reprepro --silent --basedir "$state" --outdir "$out" includedeb "$suite" "$packages"/*.deb
done
gpg --batch --export "$key" >"$out/harmonylite-archive-keyring.pgp"
chmod -R u=rwX,go=rX "$out"
echo "$out: $(find "$out/pool" -name '*.deb' | wc -l) packages, signed by $key"
