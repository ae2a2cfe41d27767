#!/usr/bin/env bash
# Builds the documentation as a book (target/book/index.html) and checks its links: `bash tools/book.sh`.
#
# mdBook is compiled from crates.io into .toolchain-book/, without optimisation, which its few pages do not need: once, in about
# 75 s of CPU time. A warning of mdBook's is an error here. The commands of the pages are run by `cargo test --test book`.
set -euo pipefail
cd "$(dirname "$0")/.."
version=0.5.4
tool=.toolchain-book/mdbook-$version

if [ ! -x "$tool/bin/mdbook" ]; then
  CARGO_PROFILE_RELEASE_OPT_LEVEL=0 CARGO_PROFILE_RELEASE_DEBUG=false cargo install mdbook --version "$version" --locked \
    --no-default-features --features search --root "$tool" --target-dir "$tool.build" --quiet
  rm -rf "$tool.build"
fi

rm -rf target/book
log=$(mktemp)
trap 'rm -f "$log"' EXIT
RUST_LOG=info "$tool/bin/mdbook" build docs 2>"$log" || { cat "$log" >&2; exit 1; }
if grep --quiet --extended-regexp 'WARN|ERROR' "$log"; then
  cat "$log" >&2
  echo "book.sh: mdBook warns" >&2
  exit 1
fi
python3 tools/book_links.py target/book
echo "the book: target/book/index.html"
