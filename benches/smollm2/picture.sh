#!/usr/bin/env bash
# Takes a picture of a run's report.html, top to bottom, with headless chromium.
#
#     bash benches/smollm2/picture.sh REPORT.html PICTURE.png [HEIGHT]
set -euo pipefail
page=$(realpath "$1")
picture=$2
height=${3:-2300}
browser=$(command -v chromium || command -v chromium-browser || command -v google-chrome || true)
if [ -z "$browser" ]; then
  echo "picture.sh: chromium is not here (Debian: apt-get install chromium): $picture is not made" >&2
  exit 0
fi
profile=$(mktemp -d)
trap 'rm -rf "$profile"' EXIT
# Root, as in a container, has no sandbox.
"$browser" --headless --no-sandbox --disable-gpu --hide-scrollbars --user-data-dir="$profile" \
  --window-size="1100,$height" --screenshot="$(realpath -m "$picture")" "file://$page" 2>/dev/null
# A page has few colours, and a picture in the tree is to be small.
if command -v pngquant > /dev/null; then pngquant --force --ext .png 96 "$picture"; fi
