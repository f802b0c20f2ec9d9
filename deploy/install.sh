#!/bin/sh
# Installs the shim on the node whose root is mounted at $NODE ("" is this machine itself): the package into an environment of its
# version, the shim onto containerd's PATH, the runtime into containerd's configuration. A second run changes nothing.
#
#   NODE    where the node's root is                        (/node)
#   PREFIX  where the environments are, on the node         (/opt/shimcore)
#   BIN     a directory on containerd's PATH, on the node   (/usr/local/bin)
#   CONFIG  containerd's configuration, on the node         (/etc/containerd/config.toml)
#   RESTART the command that makes containerd read it, on the node; containers live on, since shims outlive containerd
set -eu

here=$(cd "$(dirname "$0")" && pwd)
node=${NODE-/node} prefix=${PREFIX-/opt/shimcore} bin=${BIN-/usr/local/bin}
config=${CONFIG-/etc/containerd/config.toml} restart=${RESTART-systemctl restart containerd}

on_node() { if [ -n "$node" ]; then chroot "$node" "$@"; else "$@"; fi; }
fail() { echo "shimcore: $*" >&2; exit 1; }

on_node python3 -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 11))' ||
    fail "the node needs Python 3.11 or later with venv (Debian: python3-venv)"

version=$(ls "$here"/wheels/shimcore-*.whl 2>/dev/null | sed -n '1s/.*shimcore-\([^-]*\)-.*/\1/p')
[ -n "$version" ] || fail "there is no wheel of shimcore in $here/wheels"
home=$prefix/$version

if ! on_node test -e "$home/.complete"; then
    echo "shimcore: installing $version into $home"
    mkdir -p "$node$prefix/wheels-$version"
    cp "$here"/wheels/*.whl "$node$prefix/wheels-$version/"
    on_node python3 -m venv --clear "$home"
    on_node "$home/bin/pip" install --quiet --disable-pip-version-check --no-index --find-links "$prefix/wheels-$version" shimcore
    rm -r "$node$prefix/wheels-$version"
    on_node touch "$home/.complete"
fi
# The shims that run keep the environment that they were started from: those of other versions are left where they are.
on_node "$home/bin/python" -m shimcore.install --dest "$bin"

[ -e "$node$config" ] || {
    mkdir -p "$(dirname "$node$config")"
    on_node containerd config default >"$node$config.new"
    mv "$node$config.new" "$node$config"
}
if ! grep -q 'containerd\.runtimes\.shimcore\]' "$node$config"; then
    # Not by `imports`: containerd 1.x takes an imported file's section in the place of the main file's.
    number=$(sed -n 's/^version *= *\([0-9]*\).*/\1/p' "$node$config" | head -n 1)
    part=$here/containerd-v${number:-1}.toml
    [ -e "$part" ] || fail "$config is of version ${number:-1}: \`containerd config migrate\` makes it 2 or 3"
    cp "$node$config" "$node$config.before-shimcore"
    { cat "$node$config.before-shimcore"; echo; grep -v '^version' "$part"; } >"$node$config.new"
    mv "$node$config.new" "$node$config"
    echo "shimcore: the runtime is in $config; restarting containerd"
    # shellcheck disable=SC2086 # words of a command
    [ -z "$restart" ] || on_node $restart
fi
echo "shimcore: $version is installed"
