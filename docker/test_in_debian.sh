#!/bin/sh
# Does what Dockerfile.cpu does, in an empty Debian 12 instead of Docker: installs with the same script, then runs as a
# user who may not write there. Needs root and debootstrap.
#
#     docker/test_in_debian.sh ROOT
#
# ROOT is made if missing, and kept: a second run repeats only what changed. Settings of the network and of uv
# (UV_TORCH_BACKEND=cpu for a small torch) are taken over from the environment.
set -eu

fail() {
    echo "test_in_debian: $*" >&2
    exit 1
}

[ $# -eq 1 ] || fail "name a folder for the Debian root: docker/test_in_debian.sh ROOT"
[ "$(id -u)" -eq 0 ] || fail "needs root, for debootstrap and chroot"
command -v debootstrap >/dev/null || fail "needs debootstrap: apt-get install debootstrap"
repository=$(cd "$(dirname "$0")/.." && pwd)
root=$1
home=/opt/spark_me

[ -e "$root/finished" ] || {
    debootstrap --variant=minbase bookworm "$root"
    touch "$root/finished"
}
cp /etc/resolv.conf "$root/etc/resolv.conf"
mount -t proc proc "$root/proc"
trap 'umount "$root/proc"' EXIT

settings=
for name in PIP_INDEX_URL PIP_CERT SSL_CERT_FILE UV_DEFAULT_INDEX UV_TORCH_BACKEND http_proxy https_proxy MAX_JOBS \
    OMP_NUM_THREADS; do
    value=$(printenv "$name") || continue
    settings="$settings $name=$value"
done
certificates=$(printenv SSL_CERT_FILE || true)

# as USER COMMAND…: in the root, with an environment as empty as an image's
as() {
    user=$1
    shift
    # shellcheck disable=SC2086  # several settings
    chroot --userspec="$user" "$root" env --ignore-environment --chdir="$home" HOME="/home/$user" USER="$user" \
        PATH="$home/.venv/bin:/usr/sbin:/usr/bin:/sbin:/bin" $settings "$@"
}

echo "== base: Python, which python:3.11-slim has, and a compiler"
mkdir -p "$root$home"
export DEBIAN_FRONTEND=noninteractive
chroot "$root" apt-get -qq update
chroot "$root" apt-get -qq install --no-install-recommends ca-certificates g++ python3 python3-venv >/dev/null
if [ -n "$certificates" ]; then
    install -D -m 644 "$certificates" "$root$certificates"
fi
for user in builder spark; do
    chroot "$root" id "$user" >/dev/null 2>&1 || chroot "$root" useradd --create-home "$user"
done

echo "== build: the installation, as a user without rights"
find "$root$home" -mindepth 1 -maxdepth 1 ! -name .venv ! -name '*.egg-info' -exec rm -rf {} +
git -C "$repository" ls-files -z --cached --others --exclude-standard ':!tests' ':!docs' |
    tar -C "$repository" --null --files-from=- --create | tar -C "$root$home" --no-same-owner --extract
chroot "$root" chown -R builder: "$home"
as builder ENGINE=cpu EXTRAS=all docker/install.sh

echo "== runtime: doctor and a step of training, as another user"
as spark spark-me doctor
as spark rm -rf /home/spark/run
as spark spark-me pretrain configs/demo/pretrain.yaml run.dir=/home/spark/run run.device=cpu \
    'model.image_size=[64,64]' data.repeats=1 train.epochs=1 train.batch_size=14 optim.warmup_epochs=0
as spark test -s /home/spark/run/checkpoints/step_00000001.pt
echo "== the installation works in an empty Debian 12"
