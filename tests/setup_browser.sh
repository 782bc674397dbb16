#!/usr/bin/env bash
# A browser for tests/unit/test_page_browser.py: Debian's chromium, where there is none and this may install it.
# Without one those tests are skipped, and say so.
set -euo pipefail

for name in chromium chromium-browser google-chrome google-chrome-stable; do
  if command -v "$name" > /dev/null; then exit 0; fi
done
if [ "$(id -u)" != 0 ] || ! command -v apt-get > /dev/null; then
  echo "no browser, and none can be installed here (not root, or no apt-get): the page is not tested in one"
  exit 0
fi
export DEBIAN_FRONTEND=noninteractive
if ! { apt-get update -qq && apt-get install -qq -y --no-install-recommends chromium > /dev/null; }; then
  echo "Debian's chromium could not be installed, see above: the page is not tested in a browser"
fi
