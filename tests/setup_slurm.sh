#!/usr/bin/env bash
# A cluster for tests/slurm: Debian's slurm-wlm, where there is none and this may install it.
# Without it those tests are skipped, and say so.
set -euo pipefail

if command -v slurmctld > /dev/null || [ -x /usr/sbin/slurmctld ]; then exit 0; fi
if [ "$(id -u)" != 0 ] || ! command -v apt-get > /dev/null; then
  echo "no Slurm, and none can be installed here (not root, or no apt-get): it is not tested"
  exit 0
fi
export DEBIAN_FRONTEND=noninteractive
if ! { apt-get update -qq && apt-get install -qq -y --no-install-recommends slurm-wlm munge libpmix-dev > /dev/null; }; then
  echo "Debian's slurm-wlm could not be installed, see above: Slurm is not tested"
fi
