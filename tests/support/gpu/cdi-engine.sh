#!/bin/sh
# Puts programs of a Docker Engine that knows CDI (25.0 or later) into a folder, without installing them.
#
# Debian 12's own engine is 20.10; Debian 13's runs on Debian 12 as it is, with Debian 12's runc, and comes from the
# mirror that this machine uses. Where the installed engine is new enough the folder stays empty, and that one is used.
set -eu
folder=$(realpath -m "$1")
mkdir -p "$folder"
if dockerd --version 2>/dev/null | grep -Eq 'version (2[5-9]|[3-9][0-9])\.'; then exit 0; fi
if [ -x "$folder/dockerd" ]; then exit 0; fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/state/lists/partial" "$work/cache/archives/partial"
touch "$work/status"
key=/usr/share/keyrings/debian-archive-keyring.gpg
mirror=$(cat /etc/apt/sources.list /etc/apt/sources.list.d/* 2>/dev/null |
    sed -nE 's#^(URIs:|deb( \[[^]]*\])?) +([a-z+]+://[^ ]+/debian/?)( .*)?$#\3#p' | head -1)
echo "deb [signed-by=$key] ${mirror:?no Debian mirror among the sources of apt} trixie main" > "$work/sources.list"
cd "$work"
set -- -qq -o Dir::Etc::sourcelist="$work/sources.list" -o Dir::Etc::sourceparts=- -o Dir::State="$work/state" \
    -o Dir::State::status="$work/status" -o Dir::Cache="$work/cache" -o APT::Sandbox::User=root
apt-get "$@" update
apt-get "$@" download docker.io containerd
for package in ./*.deb; do dpkg -x "$package" root; done
cp root/usr/sbin/dockerd root/usr/bin/containerd root/usr/bin/containerd-shim-runc-v2 "$folder"
