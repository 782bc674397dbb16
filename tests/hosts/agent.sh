#!/bin/sh
# In place of ssh: agent.sh [-option…] HOST COMMAND… runs COMMAND on an emulated host (see emulated.py),
# as a login there does: with an environment of its own, of which only these few names come from here.
while [ "${1#-}" != "$1" ]; do shift; done
host=$EMULATED_HOSTS/$1
shift
exec nsenter --target "$(cat "$host/pid")" --net --uts --ipc --mount \
    env -i HOME="$HOME" PATH="$PATH" TMPDIR="$host/tmp" EMULATED_HOSTS="$EMULATED_HOSTS" \
    sh -c "$*" </dev/null
