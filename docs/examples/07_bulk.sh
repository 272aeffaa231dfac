#!/usr/bin/env bash
# Synthesize a folder of mels. After an interruption run it again: no utterance is lost or repeated.
set -euo pipefail
mkdir -p demo/mels
for name in one two three; do cp demo/mel.npy "demo/mels/$name.npy"; done
melrt bulk demo/lj.melrt --input demo/mels --output demo/bulk-speech
ls demo/bulk-speech
