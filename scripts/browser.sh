# Sourced by scripts/test: a browser for the tests of the chat page, without installing anything on the system.
#
#   kimi_vl_browser    fetches Debian's headless Chromium, and the libraries of its that this machine lacks, into
#                      .chromium/ where no browser is installed; silent where nothing has to be done
#
# Without a browser the tests of the page are skipped with the reason. tests/page/browser.py looks in the same places.

kimi_vl_browser() {
  local folder="$kimi_vl_root/.chromium" name part
  for name in chromium-headless-shell chromium google-chrome google-chrome-stable; do
    command -v "$name" > /dev/null && return 0
  done
  [ -e "$folder/.done" ] && return 0
  for name in apt-get dpkg; do
    command -v "$name" > /dev/null || { echo "set-up: no browser here, and no $name to fetch one" >&2; return 1; }
  done
  echo "set-up: fetching headless Chromium into .chromium (once; about 100 MB)" >&2
  # Another run may fetch it at the same time: each has a folder of its own, and the last step is one renaming.
  part="$(mktemp -d "$kimi_vl_root/.chromium-part-XXXXXX")" || return 1
  if _kimi_vl_fetch_browser "$part" > "$part/log" 2>&1; then
    [ -e "$folder/.done" ] || rm -rf "$folder"
    mv -T "$part" "$folder" 2> /dev/null || { rm -rf "$part"; [ -e "$folder/.done" ]; }
  else
    echo "set-up: Chromium could not be fetched; the tests of the page are skipped" >&2
    tail -n 3 "$part/log" >&2
    rm -rf "$part"
    return 1
  fi
}

# The lists and archives stand in the folder, so that neither root's rights nor the system's own lists are needed.
_kimi_vl_fetch_browser() {
  local archive options
  mkdir -p "$1/lists/partial" "$1/archives/partial" || return 1
  options=(-q -o Debug::NoLocking=true -o APT::Sandbox::User= -o Dir::State::lists="$1/lists"
    -o Dir::Cache::archives="$1/archives" -o Dir::Cache::pkgcache= -o Dir::Cache::srcpkgcache=)
  apt-get "${options[@]}" update || return 1
  apt-get "${options[@]}" --yes --no-install-recommends --download-only install chromium-headless-shell || return 1
  for archive in "$1"/archives/*.deb; do
    dpkg -x "$archive" "$1/root" || return 1
  done
  rm -rf "$1/lists" "$1/archives"
  touch "$1/.done"
}
